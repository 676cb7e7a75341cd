"""Painting with a saved run: sizes, hints, files and what is refused; contact sheets; scores.

The run is a small one with random weights: what is painted is checked against the network itself, not for beauty.
Run: pytest tests/test_paint.py
"""

import struct
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest
import torch

from autopainter import checkpoint, storage
from autopainter import config as configuration
from autopainter.data.pictures import write_png
from autopainter.data.stream import Batch
from autopainter.errors import CorruptData, UserError
from autopainter.evaluate import Score, paint_both
from autopainter.paint import Painter, paint_files, read_hints, read_sketch
from autopainter.pixels import network_input, to_pixels
from autopainter.sheet import contact_sheet
from autopainter.trainer import build_generator


@pytest.fixture(scope="module")
def config():
    texts = ["run.name=small", "run.storage=/tmp", "data.manifest=m", "train.steps=1", "loss.feature_weight=0",
             "data.image_size=32", "model.generator_width=4", "train.precision=float32"]  # fmt: skip
    return configuration.load(None, texts, {})


def save(folder, config, steps, document=None):
    """A run with checkpoints whose weights differ."""
    store = storage.open_store(str(folder))
    document = document or config.model_dump(mode="json")
    meta = {"manifest_id": "0" * 64, "identity": config.identity(), "config": document}
    writer = checkpoint.CheckpointWriter(store, checkpoint.begin_attempt(store, {}), checkpoint.Retention(10), meta)
    for step in steps:
        generator = build_generator(config)
        with torch.no_grad():  # far from the small weights of the start, so that pictures differ
            for number, parameter in enumerate(generator.parameters()):
                random = torch.Generator().manual_seed(1000 * step + number)
                parameter.copy_(torch.randn(parameter.shape, generator=random) * (0.2 if parameter.dim() > 1 else 1))
        writer.save(step, {f"average.{name}": tensor for name, tensor in generator.state_dict().items()})
    writer.wait()
    assert writer.error is None
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory, config):
    return save(tmp_path_factory.mktemp("run"), config, [5, 10])


@pytest.fixture(scope="module")
def painter(run):
    return Painter.load(run)


def drawing(height, width, seed=0):
    """Dark lines on white, uint8 [H, W]."""
    random = np.random.default_rng(seed)
    sketch = np.full((height, width), 255, np.uint8)
    for _ in range(5):
        ends = random.integers(0, [width, height], (2, 2)).tolist()
        cv2.line(sketch, ends[0], ends[1], 0, 1)
    return sketch


def hinted(height, width, alpha=255):
    """A red patch with an alpha on a transparent picture that is green underneath: uint8 [H, W, 4] RGBA."""
    hints = np.zeros((height, width, 4), np.uint8)
    hints[..., 1] = 200
    hints[: height // 2, : width // 2] = (250, 10, 20, alpha)
    return hints


def refusal(action, *words):
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def png_header(width, height):
    """An RGBA PNG that says it is of a size, without the pixels."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(bytes(99))) + part(b"IEND", b"")


# Loading


def test_the_newest_checkpoint_is_loaded_or_the_one_asked_for(run, config):
    newest, older = Painter.load(run), Painter.load(run, 5)
    assert (newest.step, older.step) == (10, 5)
    assert newest.config == config
    assert newest.manifest_id == "0" * 64
    sketch = drawing(32, 32)
    assert (newest.paint(sketch) == Painter.load(run, 10).paint(sketch)).all()
    assert (newest.paint(sketch) != older.paint(sketch)).any()


def test_a_run_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "begun").mkdir()
    for name in ("begun", "never"):
        refusal(lambda name=name: Painter.load(str(tmp_path / name)), str(tmp_path / name), "no checkpoint")


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(run):
    refusal(lambda: Painter.load(run, 7), run, "step 7", "[5, 10]")


def test_a_damaged_checkpoint_is_passed_over_unless_it_is_asked_for(tmp_path, config):
    run = save(tmp_path / "run", config, [5, 10])
    store = storage.open_store(run)
    key = next(entry.key for entry in store.list("checkpoints/00000010/") if "weights" in entry.key)
    data = bytearray(store.read(key))
    data[-1] ^= 1
    store.write(key, bytes(data))
    assert Painter.load(run).step == 5
    with pytest.raises(CorruptData, match="00000010"):
        Painter.load(run, 10)
    store.delete(entry.key for entry in store.list("checkpoints/00000005/"))
    with pytest.raises(CorruptData, match="00000005"):
        Painter.load(run)


def test_a_checkpoint_of_another_format_version_is_refused(tmp_path, config, monkeypatch):
    with monkeypatch.context() as later:
        later.setattr("autopainter.checkpoint.files.VERSION", 99)
        run = save(tmp_path / "run", config, [5])
    refusal(lambda: Painter.load(run), run, "99")


def test_a_configuration_of_a_later_program_is_refused(tmp_path, config):
    document = config.model_dump(mode="json")
    document["model"]["newer"] = 1
    run = save(tmp_path / "run", config, [5], document)
    refusal(lambda: Painter.load(run), run, "model.newer")


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
    network.load_state_dict(checkpoint.load_weights(store, checkpoint.read(store, 10)))
    sketch = drawing(64, 32)
    condition = network_input(torch.from_numpy(sketch)[None, None], torch.zeros(1, 4, 64, 32, dtype=torch.uint8))
    with torch.no_grad():
        expected = to_pixels(network(condition))[0].permute(1, 2, 0).numpy()
    assert (painter.paint(sketch) == expected).all()
    assert np.ptp(expected) > 50


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


def test_a_transparent_png_is_read_as_hints(tmp_path):
    path = tmp_path / "hints.png"
    PIL.Image.fromarray(hinted(20, 30), "RGBA").save(path)
    read = read_hints(path)
    assert (read == hinted(20, 30)).all()
    half = read_hints(path, 15)
    assert half.shape == (10, 15, 4)
    assert {tuple(pixel) for pixel in half.reshape(-1, 4)} == {(0, 200, 0, 0), (250, 10, 20, 255)}  # nothing is mixed


# Files


def test_a_sketch_is_read_with_transparency_on_white_and_scaled(tmp_path):
    path = tmp_path / "sketch.png"
    layer = np.zeros((30, 60, 4), np.uint8)
    layer[10, :, 3] = 255  # a black line on nothing
    PIL.Image.fromarray(layer, "RGBA").save(path)
    sketch = read_sketch(path)
    assert sketch.shape == (30, 60)
    assert (sketch[10] == 0).all()
    assert (np.delete(sketch, 10, axis=0) == 255).all()
    assert read_sketch(path, 20).shape == (10, 20)
    assert read_sketch(path, 120).shape == (60, 120)


@pytest.mark.parametrize("read", [read_sketch, read_hints])
def test_a_file_that_is_no_picture_is_refused(tmp_path, read):
    good = tmp_path / "good.png"
    PIL.Image.fromarray(hinted(40, 40), "RGBA").save(good)
    for name, data in (("empty.png", b""), ("text.png", b"hello"), ("cut.png", good.read_bytes()[:40]),
                       ("huge.png", png_header(40_000, 40_000))):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        refusal(lambda name=name: read(tmp_path / name), str(tmp_path / name))
    refusal(lambda: read(tmp_path / "missing.png"), "missing.png", "cannot be read")
    refusal(lambda: read(tmp_path), str(tmp_path), "cannot be read")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16"])
def test_hints_without_transparency_are_refused(tmp_path, mode):
    path = tmp_path / "hints.png"
    image = PIL.Image.new("L", (8, 8))
    (PIL.Image.fromarray(np.zeros((8, 8), np.uint16)) if mode == "I;16" else image.convert(mode)).save(path)
    refusal(lambda: read_hints(path), str(path), "transparency")


@pytest.fixture
def sketches(tmp_path):
    """Three sketch files of different sizes."""
    paths = [tmp_path / "in" / f"{name}.png" for name in ("one", "two", "three")]
    paths[0].parent.mkdir()
    for number, path in enumerate(paths):
        PIL.Image.fromarray(drawing(30 + number, 40, number)).save(path)
    return paths


def test_one_sketch_becomes_one_file(painter, sketches, tmp_path):
    target = tmp_path / "new" / "folder" / "out.png"
    assert list(paint_files(painter, sketches[:1], None, None, target)) == [target]
    assert (np.asarray(PIL.Image.open(target)) == painter.paint(drawing(30, 40, 0))).all()
    assert list(target.parent.iterdir()) == [target]


def test_several_sketches_become_a_folder(painter, sketches, tmp_path):
    hints = tmp_path / "hints.png"
    PIL.Image.fromarray(hinted(30, 40), "RGBA").save(hints)
    written = list(paint_files(painter, sketches, None, None, tmp_path / "out"))
    assert written == [tmp_path / "out" / path.name for path in sketches]
    assert [PIL.Image.open(path).size for path in written] == [(40, 30), (40, 31), (40, 32)]
    (only,) = paint_files(painter, sketches[:1], hints, 20, tmp_path / "hinted")
    expected = painter.paint(read_sketch(sketches[0], 20), read_hints(hints, 20))
    assert (np.asarray(PIL.Image.open(only)) == expected).all()


def test_outputs_that_do_not_fit_are_refused(painter, sketches, tmp_path):
    for paths, output in ((sketches, "out.png"), (sketches[:1], "out.jpg")):
        refusal(lambda p=paths, o=output: list(paint_files(painter, p, None, None, tmp_path / o)), "--output", output)
        assert not (tmp_path / output).exists()


def test_no_sketch_is_overwritten(painter, sketches):
    before = [path.read_bytes() for path in sketches]
    refusal(lambda: list(paint_files(painter, sketches, None, None, sketches[0].parent)), "--output")
    assert [path.read_bytes() for path in sketches] == before


def test_sketches_of_one_name_do_not_overwrite_each_other(painter, sketches, tmp_path):
    twin = tmp_path / "other" / sketches[0].name
    twin.parent.mkdir()
    PIL.Image.fromarray(drawing(50, 50)).save(twin)
    try:
        written = list(paint_files(painter, [sketches[0], twin], None, None, tmp_path / "out"))
    except UserError as error:
        assert sketches[0].name in str(error)  # noqa: PT017
    else:
        assert len(set(written)) == 2


def test_a_png_is_written_as_it_is(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_png(tmp_path / "a.png", image)
    assert (np.asarray(PIL.Image.open(tmp_path / "a.png")) == image).all()


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
