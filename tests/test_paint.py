"""Painting with a saved run: which checkpoint, sizes, hints and what is refused; contact sheets; scores.

The run is a small one with random weights: what is painted is checked against the network itself, not for beauty.
Files are in test_sketches.py, tiles in test_tiling.py, photos in test_cleaning.py.
Run: pytest tests/test_paint.py
"""

import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from painting import damage, drawing, hinted, refusal, save_run, small_config
from waiting import PATIENCE_SECONDS

from autopainter import checkpoint, storage
from autopainter.data.pictures import resize, write_png
from autopainter.data.stream import Batch
from autopainter.errors import CorruptData
from autopainter.evaluate import Score, paint_both
from autopainter.paint import MAX_WHOLE, Painter
from autopainter.pixels import network_input, to_pixels
from autopainter.sheet import contact_sheet
from autopainter.tiling import paint_tiles
from autopainter.trainer import build_generator

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "painting.md"
AUTOPAINTER = str(Path(sys.executable).parent / "autopainter")


@pytest.fixture(scope="module")
def config():
    return small_config()


@pytest.fixture(scope="module")
def run(tmp_path_factory, config):
    return save_run(tmp_path_factory.mktemp("run"), config, {5: 21.0, 10: 20.0, 15: None})


@pytest.fixture(scope="module")
def painter(run):
    return Painter.load(run)


# Loading


def test_the_newest_checkpoint_is_loaded_or_the_best_or_the_one_asked_for(run, config):
    newest = Painter.load(run)
    assert newest.config == config
    assert newest.manifest_id == "0" * 64
    steps = {step: Painter.load(run, step).step for step in ("latest", "best", 10)}
    assert steps == {"latest": newest.step, "best": 5, 10: 10} == {"latest": 15, "best": 5, 10: 10}
    sketch = drawing(32, 32)
    assert (newest.paint(sketch) == Painter.load(run, 15).paint(sketch)).all()
    assert (newest.paint(sketch) != Painter.load(run, "best").paint(sketch)).any()


def test_a_run_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "begun").mkdir()
    for name in ("begun", "never"):
        for step in (None, "best", 3):
            refusal(lambda n=name, s=step: Painter.load(str(tmp_path / n), s), str(tmp_path / name), "no checkpoint;")


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(run):
    refusal(lambda: Painter.load(run, 7), run, "step 7", "[5, 10, 15]")


def test_what_is_no_step_is_refused_as_that(run):
    for step in ("10", "newest", 10.5):
        refusal(lambda step=step: Painter.load(run, step), "step: ", f"'best' or 'latest', got {step!r}")
    assert Painter.load(run, np.int64(10)).step == 10


def test_a_run_may_be_named_by_a_path(run, painter):
    loaded = Painter.load(Path(run))
    assert (loaded.paint(drawing(32, 32)) == painter.paint(drawing(32, 32))).all()
    refusal(lambda: Painter.load(Path(run), 7), run, "step 7")


def test_the_best_of_a_run_without_scores_is_refused(tmp_path, config):
    run = save_run(tmp_path / "run", config, {5: None, 10: float("nan")})
    refusal(lambda: Painter.load(run, "best"), run, "score", "latest", "[5, 10]")


def test_a_damaged_checkpoint_is_passed_over_aloud_unless_it_is_asked_for(tmp_path, config, caplog):
    run = save_run(tmp_path / "run", config, {5: 20.0, 10: 22.0, 15: 21.0})
    damage(run, 10)
    assert Painter.load(run, "latest").step == 15
    assert not caplog.records
    assert Painter.load(run, "best").step == 15
    (message,) = caplog.messages
    assert "step 10 is damaged" in message
    assert "step 15 is used instead" in message
    with pytest.raises(CorruptData, match="00000010"):
        Painter.load(run, 10)
    damage(run, 15)
    caplog.clear()
    assert Painter.load(run).step == 5
    assert [message.partition(" is damaged")[0] for message in caplog.messages] == [
        "checkpoint of step 15", "checkpoint of step 10",
    ]  # fmt: skip
    damage(run, 5)
    with pytest.raises(CorruptData, match="00000005"):
        Painter.load(run)


def test_a_damaged_checkpoint_is_named_on_the_command_line(tmp_path, config):
    run = save_run(tmp_path / "run", config, {5: None, 10: None})
    damage(run, 10)
    write_png(tmp_path / "sketch.png", drawing(20, 20)[..., None].repeat(3, axis=2))
    command = [AUTOPAINTER, "paint", "--run", run, str(tmp_path / "sketch.png"), "-o", str(tmp_path / "out.png")]
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}  # no credentials
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out.png'}\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("checkpoint of step 10 is damaged: ")
    assert line.endswith("; step 5 is used instead")


def test_a_checkpoint_of_another_format_version_is_refused(tmp_path, config, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr("autopainter.checkpoint.files.VERSION", 99)
        run = save_run(tmp_path / "run", config, {5: None})
    refusal(lambda: Painter.load(run), run, "99")


def test_a_configuration_of_a_later_program_is_refused(tmp_path, config):
    document = config.model_dump(mode="json")
    document["model"]["newer"] = 1
    run = save_run(tmp_path / "run", config, {5: None}, document)
    refusal(lambda: Painter.load(run), run, "model.newer")


@pytest.mark.parametrize("other", ["model.generator_width=8", "data.image_size=64", "model.norm=group"])
def test_weights_of_another_model_are_refused(tmp_path, config, other):
    run = save_run(tmp_path / "run", config, {5: None}, small_config(other).model_dump(mode="json"))
    message = refusal(lambda: Painter.load(run), run, "step 5", "another version of the model", "weight")
    assert len(message) - len(run) < 300


# Sizes


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 32), (33, 47), (1, 1), (3, 100), (96, 31)])
def test_a_picture_of_any_size_is_padded_and_cropped_back(painter, height, width):
    sketch, hints = drawing(height, width), hinted(height, width)
    painted = painter.paint(sketch, hints)
    assert painted.shape == (height, width, 3)
    assert painted.dtype == np.uint8
    margins = ((0, -height % 32), (0, -width % 32))
    whole = painter.paint(np.pad(sketch, margins, mode="edge"), np.pad(hints, (*margins, (0, 0)), mode="edge"))
    assert (painted == whole[:height, :width]).all()


def test_painting_is_what_the_network_gives(painter, run, config):
    store = storage.open_store(run)
    network = build_generator(config).eval()
    network.load_state_dict(checkpoint.load_weights(store, checkpoint.read(store, 15)))
    sketch = drawing(64, 32)
    condition = network_input(torch.from_numpy(sketch)[None, None], torch.zeros(1, 4, 64, 32, dtype=torch.uint8))
    with torch.no_grad():
        expected = to_pixels(network(condition))[0].permute(1, 2, 0).numpy()
    assert (painter.paint(sketch) == expected).all()
    assert np.ptp(expected) > 50


# Tiles


def test_large_pictures_are_painted_in_tiles_of_the_trained_size(painter):
    edge = 32 * MAX_WHOLE**0.5
    for height, width, tiled in ((edge, edge, False), (edge, edge + 1, True), (8 * edge, edge / 8, False)):
        sketch, hints = drawing(int(height), int(width)), hinted(int(height), int(width))
        painted = {asked: painter.paint(sketch, hints, asked) for asked in (None, True, False)}
        assert (painted[None] == painted[tiled]).all()
        assert (painted[True] != painted[False]).any()
        hint = torch.from_numpy(hints).permute(2, 0, 1)[None].clone()
        hint[:, 3] //= 255
        size = (32, max(round(32 * height / width), 1)) if width > height else (max(round(32 * width / height), 1), 32)
        small = painter.paint(resize(sketch, *size), cv2.resize(hints, size, interpolation=cv2.INTER_NEAREST))
        backdrop = torch.from_numpy(resize(small, int(width), int(height))).permute(2, 0, 1)[None]
        expected = paint_tiles(painter.batch, torch.from_numpy(sketch)[None, None], hint, 32, backdrop)
        assert (painted[True] == expected[0].permute(1, 2, 0).numpy()).all()


def test_wide_empty_parts_of_a_tiled_picture_have_the_colour_of_the_small_one(painter):
    sketch = np.full((64, 320), 255, np.uint8)
    sketch[:, 5:8] = 0
    painted = painter.paint(sketch, tiled=True)
    small = painter.paint(resize(sketch, 32, 6))
    assert (painted[:, 64:] == resize(small, 320, 64)[:, 64:]).all()
    assert (painted[:, :30] != resize(small, 320, 64)[:, :30]).any()


def test_too_little_memory_is_one_line(painter, monkeypatch):
    def full(condition):
        return torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(painter.generator, "forward", full)
    refusal(lambda: painter.paint(drawing(32, 40)), "memory", "40x32")


# Hints


def test_a_hint_counts_from_half_opacity_on(painter):
    sketch = drawing(40, 40)
    plain, full = painter.paint(sketch), painter.paint(sketch, hinted(40, 40, 255))
    assert (painter.paint(sketch, hinted(40, 40, 127)) == plain).all()  # the green underneath counts for nothing
    assert (painter.paint(sketch, hinted(40, 40, 128)) == full).all()
    assert (plain != full).any()


def test_painting_leaves_its_inputs_as_they_are(painter):
    sketch, hints = drawing(40, 40), hinted(40, 40)
    painter.paint(sketch, hints)
    assert (sketch == drawing(40, 40)).all()
    assert (hints == hinted(40, 40)).all()


def test_hints_of_another_size_are_refused(painter):
    refusal(lambda: painter.paint(drawing(40, 50), hinted(50, 40)), "40x50", "50x40")


# In other programs


def test_the_program_of_the_docs_paints_what_the_painter_paints(run, painter, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (uri,) = re.findall(r'"(s3://\S+)"', code)
    cv2.imwrite(str(tmp_path / "sketch.png"), drawing(40, 50))
    program = [sys.executable, "-W", "error", "-c", code.replace(uri, run)]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    painted = cv2.cvtColor(cv2.imread(str(tmp_path / "painted.png")), cv2.COLOR_BGR2RGB)
    assert (painted == painter.paint(drawing(40, 50))).all()


def test_importing_the_package_imports_no_torch():
    code = (
        "import autopainter, sys; assert 'torch' not in sys.modules; autopainter.Painter; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_SECONDS)


def test_an_array_may_be_a_view(painter):
    sketch = drawing(40, 50)[:, ::-1]
    assert (painter.paint(sketch) == painter.paint(sketch.copy())).all()


def test_an_array_that_is_no_sketch_and_no_hints_is_refused(painter):
    sketch = drawing(40, 50)
    refusal(lambda: painter.paint(np.stack([sketch] * 3, axis=-1)), "uint8 [40, 50, 3]", "uint8 [height, width]")
    refusal(lambda: painter.paint(sketch / 255), "float64 [40, 50]", "uint8 [height, width]")
    for empty in (sketch[:0], sketch[:, :0]):
        refusal(lambda empty=empty: painter.paint(empty), f"uint8 {list(empty.shape)}", "at least one pixel")
    for other, name in (
        (PIL.Image.fromarray(sketch), "of type Image"),
        (sketch.tolist(), "of type list"),
        (None, "of type NoneType"),
    ):
        refusal(lambda other=other: painter.paint(other), f"the sketch is {name}", "numpy.asarray(image.convert('L'))")
    for other, name in ((PIL.Image.new("RGBA", (50, 40)), "of type Image"), ([], "of type list")):
        refusal(lambda other=other: painter.paint(sketch, other), f"the hints are {name}", "image.convert('RGBA')")
    refusal(lambda: painter.paint(sketch, hinted(40, 50)[..., :3]), "[40, 50, 3]", "uint8 [height, width, 4]")


# Contact sheets


def batch_of(count, size):
    random = torch.Generator().manual_seed(0)

    def pixels(channels):
        return torch.randint(0, 256, (count, channels, size, size), generator=random, dtype=torch.uint8)

    hint = pixels(4)
    hint[:, 3] = hint[:, 3] > 128
    batch = Batch(0, [f"k{n}" for n in range(count)], pixels(1), pixels(3), hint, torch.zeros(count, dtype=torch.int64))
    return batch, pixels(3), pixels(3)


@pytest.mark.parametrize(("count", "columns", "tile"), [(1, 1, None), (5, 1, 24), (5, 2, 48), (4, 2, None), (7, 3, 16)])
def test_the_size_of_a_sheet(count, columns, tile):
    sheet = contact_sheet([batch_of(count, 32)], columns=columns, tile=tile)
    cell = (tile or 32) + 4
    assert sheet.shape == (22 + -(-count // columns) * cell, columns * 5 * cell + (columns - 1) * 20, 3)
    assert sheet.dtype == np.uint8


def test_a_row_is_sketch_painted_hints_painted_with_hints_and_target():
    batch, plain, with_hints = batch_of(3, 32)
    sheet = contact_sheet([(batch.part(slice(0, 2)), plain[:2], with_hints[:2]),
                           (batch.part(slice(2, 3)), plain[2:], with_hints[2:])])  # fmt: skip
    assert (sheet[:20] < 255).any()  # the titles
    for index in range(3):
        row = sheet[22 + 36 * index :][:32]
        cells = [row[:, 36 * place :][:, :32].transpose(2, 0, 1) for place in range(5)]
        hint = batch.hint[index].numpy()
        assert (cells[0] == batch.sketch[index].numpy()).all()
        assert (cells[1] == plain[index].numpy()).all()
        assert (cells[2][:, hint[3] == 1] == hint[:3, hint[3] == 1]).all()
        assert (cells[2][:, hint[3] == 0] >= 255 - 64).all()  # elsewhere the sketch, faintly
        assert (cells[3] == with_hints[index].numpy()).all()
        assert (cells[4] == batch.color[index].numpy()).all()


def test_painting_both_ways(painter):
    batch, _, _ = batch_of(2, 32)
    plain, with_hints = paint_both(painter.batch, batch)
    for index in range(2):
        hints = batch.hint[index].permute(1, 2, 0).numpy().copy()
        hints[..., 3] *= 255
        sketch = batch.sketch[index, 0].numpy()
        for painted, expected in ((plain, painter.paint(sketch)), (with_hints, painter.paint(sketch, hints))):
            # Other batch sizes may add in another order.
            assert np.abs(painted[index].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


# Scores


def test_the_score_is_the_mean_over_images_of_numpy():
    random = np.random.default_rng(0)
    target = random.integers(0, 256, (7, 3, 9, 11)).astype(np.uint8)
    noise = random.normal(0, [[[[scale]]] for scale in (1, 2, 5, 10, 20, 40, 80)], target.shape)
    painted = np.clip(target + noise, 0, 255).astype(np.uint8)
    difference = painted.astype(float) - target
    psnr = [10 * np.log10(255**2 / np.square(image).mean()) for image in difference]
    score = Score()
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
        assert score.add(torch.from_numpy(painted[part]), torch.from_numpy(target[part])) is score
    assert score.images == 7
    assert score.psnr == pytest.approx(np.mean(psnr), rel=1e-5)
    assert score.error == pytest.approx(np.abs(difference).mean(), rel=1e-5)


def test_a_perfect_image_has_a_finite_score():
    image = torch.full((2, 3, 4, 4), 200, dtype=torch.uint8)
    score = Score().add(image, image)
    assert score.error == 0
    assert 70 < score.psnr < 100
    assert Score().add(torch.zeros_like(image), torch.full_like(image, 255)).psnr == pytest.approx(0, abs=1e-6)
