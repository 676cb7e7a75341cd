"""Exported painters: ONNX files run by onnxruntime and archives of torch.export paint what the painter paints, at every
size and batch; names, axes, metadata; the programs of docs/export.md; what is refused, and that nothing is left then.

The runs are small ones with random weights, one for each normalisation. Run: pytest tests/test_export.py
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from painting import save_painters
from waiting import PATIENCE_SECONDS

from autopainter import config as configuration
from autopainter import export, storage
from autopainter.paint import Painter
from autopainter.sketches import read_hints, read_sketch
from autopainter.trainer import build_generator

FORMATS = ["onnx", "torch-export"]
PACKAGES = ["onnxscript", "onnxruntime"]
NORMS = ["instance", "batch", "group"]
SIZE = 32  # the innermost map of a picture of this size is 1x1
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "export.md"


def save(folder, norm, scale=0.2):
    """A run with one checkpoint, of step 7, whose random weights are far from those of the start."""
    config = configuration.load(None, [
        "run.name=small", "run.storage=/tmp", "data.manifest=m", "train.steps=9", "loss.feature_weight=0",
        f"data.image_size={SIZE}", "model.generator_width=4", f"model.norm={norm}",
        f"train.activation_checkpointing={'none' if norm == 'batch' else 'all'}",
    ], {})  # fmt: skip
    generator = build_generator(config)
    random = torch.Generator().manual_seed(7)
    for name, tensor in generator.state_dict().items():
        if name.endswith("running_var"):  # of batch norm, as all that is not a weight
            tensor.uniform_(0.5, 2, generator=random)
        elif tensor.is_floating_point():
            tensor.normal_(generator=random).mul_(scale if tensor.dim() > 1 else 1)
    return save_painters(folder, config.model_dump(mode="json"), [(7, generator, None)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """URI of a run by norm."""
    return {norm: save(tmp_path_factory.mktemp(norm) / "run", norm) for norm in NORMS}


@pytest.fixture(scope="module")
def files(runs, tmp_path_factory):
    """Exports a run once for each format: a function of format and norm that gives the file."""
    folder = tmp_path_factory.mktemp("files")

    def make(kind, norm="instance"):
        path = folder / f"{norm}.{kind}"
        if not path.exists():
            export.export(runs[norm], None, kind, str(path))
        return path

    return make


def open_file(kind, path):
    """A file as its own runtime reads it: a function of uint8 tensors."""
    if kind == "torch-export":
        return torch.export.load(str(path)).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))

    def run(sketch, hint):
        return torch.from_numpy(session.run(None, {"sketch": sketch.numpy(), "hint": hint.numpy()})[0])

    return run


def pixels(batch, height, width):
    random = torch.Generator().manual_seed(height)
    both = torch.randint(0, 256, (batch, 5, height, width), generator=random, dtype=torch.uint8)
    both[:, 4] = both[:, 4] > 127
    return both[:, :1], both[:, 1:]


# What the files paint


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_paints_what_the_painter_paints(runs, files, kind, norm):
    painter, program = Painter.load(runs[norm]), open_file(kind, files(kind, norm))
    for batch, height, width in [(1, SIZE, SIZE), (3, SIZE, SIZE), (1, 64, 96), (3, 96, 32), (2, 33, 47), (1, 1, 1)]:
        sketch, hint = pixels(batch, height, width)
        painted = program(sketch, hint)
        assert painted.dtype == torch.float32
        assert painted.shape == (batch, 3, height, width)
        expected = painter.batch(sketch, hint)
        # The file's values are not rounded, so they may be half a step away from the painter's.
        assert (painted * 255 - expected).abs().max() < 0.5 + 255 * export.TOLERANCE
        assert expected.max() - expected.min() > (50 if height > 1 else 0)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_mask_decides_what_is_a_hint(files, kind):
    program = open_file(kind, files(kind))
    sketch, hint = pixels(1, 40, 40)
    opaque, bare = hint.clone(), hint.clone()
    opaque[:, 3] *= 255
    bare[:, :3] *= bare[:, 3:]
    expected = program(sketch, hint)
    assert torch.equal(program(sketch, opaque), expected)
    assert torch.equal(program(sketch, bare), expected)
    assert not torch.equal(program(sketch, torch.zeros_like(hint)), expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_programs_of_the_docs_paint_what_the_painter_paints(runs, files, kind, tmp_path):
    (code,) = [
        code for code in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
        if (kind == "onnx") == ("onnxruntime" in code)
    ]  # fmt: skip
    sketch, hint = pixels(1, 45, 70)
    hint[:, 3] = torch.linspace(0, 255, 70).to(torch.uint8)
    PIL.Image.fromarray(sketch[0, 0].numpy()).save(tmp_path / "sketch.png")
    PIL.Image.fromarray(hint[0].permute(1, 2, 0).numpy()).save(tmp_path / "hints.png")
    (name,) = re.findall(r'"(painter\.\w+)"', code)
    (tmp_path / name).symlink_to(files(kind))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    expected = Painter.load(runs["instance"]).paint(
        read_sketch(tmp_path / "sketch.png"), read_hints(tmp_path / "hints.png")
    )
    painted = np.asarray(PIL.Image.open(tmp_path / "painted.png"))
    assert np.abs(painted.astype(int) - expected).max() <= 1
    assert (painted == expected).mean() > 0.99


# What is in the files


METADATA = {
    "run": "small", "step": "7", "data_set": "0" * 64, "image_size": "32", "stride": "32", "autopainter": "0.1.0",
}  # fmt: skip


def test_an_onnx_file_names_inputs_axes_and_where_it_comes_from(files):
    import onnx

    model = onnx.load(files("onnx"))
    onnx.checker.check_model(model, full_check=True)
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert axes == {
        "sketch": ["batch", 1, "height", "width"],
        "hint": ["batch", 4, "height", "width"],
        "painted": ["batch", 3, "height", "width"],
    }
    assert {entry.key: entry.value for entry in model.metadata_props} == METADATA
    assert [(domain.domain, domain.version) for domain in model.opset_import] == [("", 20)]
    assert "uint8 [B, 4, H, W]" in model.doc_string
    assert not [tensor.name for tensor in model.graph.initializer if tensor.external_data]


def test_an_archive_of_torch_export_says_where_it_comes_from(files):
    extra = {export.METADATA: ""}
    torch.export.load(str(files("torch-export")), extra_files=extra)
    assert json.loads(extra[export.METADATA]) == METADATA


# The command


@pytest.mark.parametrize("kind", FORMATS)
def test_the_command_writes_one_file_and_prints_the_difference_alone(runs, tmp_path, kind):
    target = tmp_path / "new" / "painter"
    program = [sys.executable, "-c", "from autopainter import cli; cli.main()"]  # what exporters log goes past capfd
    command = [*program, "export", "--run", runs["batch"], "--step", "7", "--format", kind, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    start = re.escape(f"{target}: step 7, {kind}, ")
    found = re.fullmatch(start + r"0\.\d MB; max abs difference (\S+), at most 0\.001 allowed\n", done.stdout)
    assert found
    assert 0 <= float(found[1]) < 1e-5
    assert list(target.parent.iterdir()) == [target]


def test_torch_export_needs_no_package_and_may_write_to_s3(runs, succeed, s3_uri, monkeypatch):
    for package in PACKAGES:
        monkeypatch.setitem(sys.modules, package, None)  # as Python does it for a package that is not there
    target = f"{s3_uri}/painter.pt2"
    succeed("export", "--run", runs["batch"], "--format", "torch-export", "-o", target)
    assert storage.read_uri(target).startswith(b"PK")


def refused(done, *words):
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_there_is_not_replaced(runs, call, tmp_path, kind):
    target = tmp_path / "painter"
    target.write_text("mine")
    refused(call("export", "--run", runs["batch"], "--format", kind, "-o", target), "--output", str(target))
    assert target.read_text() == "mine"
    refused(call("export", "--run", runs["batch"], "--format", kind, "-o", tmp_path), "--output", "folder")
    refused(call("export", "--run", runs["batch"], "--format", kind, "-o", f"{tmp_path}/"), "--output", "folder")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("place", ["file/painter", "/proc/none/painter", "x" * 300])
def test_a_place_where_nothing_can_be_written_is_refused_before_the_run_is_read(call, tmp_path, place):
    (tmp_path / "file").touch()
    command = ["export", "--run", tmp_path / "none", "--format", "torch-export", "-o", tmp_path / place]
    refused(call(*command), f"--output: {tmp_path / place}: ")


def test_a_step_that_was_not_saved_is_refused(runs, call, tmp_path):
    command = ["export", "--run", runs["batch"], "--step", 8, "--format", "torch-export", "-o", tmp_path / "painter"]
    refused(call(*command), runs["batch"], "step 8", "[7]")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_named_with_its_extra(runs, call, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    done = call("export", "--run", runs["batch"], "--format", "onnx", "-o", tmp_path / "painter")
    refused(done, package, "pip install -c constraints.txt -e '.[export]'")
    assert not list(tmp_path.iterdir())


# The comparison


def test_a_program_that_paints_something_else_is_not_written(call, tmp_path):
    run = save(tmp_path / "run", "instance", scale=float("nan"))
    done = call("export", "--run", run, "--format", "torch-export", "-o", tmp_path / "painter")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"autopainter: .*painter: not written: .* step 7 .* nan, .*\n", done.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_comparison_notices_what_goes_wrong_with_exports(runs):
    painter = Painter.load(runs["batch"])
    right = export.PixelPainter(painter.generator)

    def in_training(sketch, hint):
        network = Painter.load(runs["batch"]).generator
        painted = export.PixelPainter(network)
        network.train()
        return painted(sketch, hint)

    def without_padding(sketch, hint):
        height, width = (edge // SIZE * SIZE or 1 for edge in sketch.shape[2:])
        return torch.nn.functional.pad(right(sketch, hint)[..., :height, :width], (0, 1))[..., :-1]

    wrong = {
        "training mode": in_training,
        "padding": without_padding,
        "other pixels": lambda sketch, hint: right(255 - sketch, hint),
        "other range": lambda sketch, hint: right(sketch, hint) * 2 - 1,
        "other channels": lambda sketch, hint: right(sketch, hint).flip(1),
        "one batch": lambda sketch, hint: right(sketch[:1], hint[:1]).expand(len(sketch), -1, -1, -1),
        "no hints": lambda sketch, hint: right(sketch, torch.zeros_like(hint)),
        "nothing": lambda sketch, hint: right(sketch, hint) * float("nan"),
    }
    with torch.no_grad():
        assert export.compare(painter, right) == 0
        passed = [what for what, program in wrong.items() if export.compare(painter, program) <= export.TOLERANCE]
    assert passed == []
