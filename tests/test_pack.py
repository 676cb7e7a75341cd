"""Packing: what is in the shards, what the manifest says of them, faults of inputs and of processes.

Read back with webdataset's own reader. Run: pytest tests/test_pack.py
"""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from dataclasses import dataclass, replace
from hashlib import sha256

import cv2
import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
import webdataset

from autopainter import storage
from autopainter.data import manifest, openmoji, pool
from autopainter.data.sources.openmoji import OpenMoji
from autopainter.data.pack import PackOptions, pack
from autopainter.data.shard import plan_shards
from autopainter.data.sketch import xdog
from autopainter.data.sources import BrokenInput, ColorImages, NoDrawing, decode
from autopainter.errors import StorageError, UserError

SMALL = PackOptions(limit=90, shard_samples=32, validation=0.2)


def draw(number, size=(60, 80)):
    """A cartoon-like picture: flat shapes with black outlines, uint8 [H, W, 3]."""
    rng = np.random.default_rng(number)
    color = np.full((*size, 3), rng.integers(120, 256, 3), np.uint8)
    for _ in range(4):
        center = tuple(int(x) for x in rng.integers(5, 55, 2))
        cv2.circle(color, center, int(rng.integers(5, 20)), [int(x) for x in rng.integers(0, 256, 3)], -1)
        cv2.circle(color, center, int(rng.integers(5, 20)), (0, 0, 0), 2)
    return color


def save(path, color, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(color).save(path, **options)


def contents(folder):
    """Every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def image_bytes(color, kind, **options):
    buffer = io.BytesIO()
    image = color if isinstance(color, PIL.Image.Image) else PIL.Image.fromarray(color)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def no_process_is_left(group, seconds=15.0):
    """Whether all processes of a process group end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Part of OpenMoji, packed: (folder, result)."""
    folder = tmp_path_factory.mktemp("openmoji")
    return folder, pack(OpenMoji(64), str(folder), SMALL, workers=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 colour pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(40):
        save(folder / f"part-{number % 3}" / f"{number:03d}.png", draw(number))
    return folder


# What is in the shards


def test_webdataset_reads_every_pair(packed):
    folder, result = packed
    source = OpenMoji(64)
    items = {item.key: item for item in source.items()}
    seen = {}
    for split in ("train", "validation"):
        urls = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            key = sample["__key__"]
            about = json.loads(sample["json"])
            assert about == {"key": key, "group": openmoji.group(key), "source": f"{key}.svg"}
            pair = source.read(items[key])
            color = np.asarray(PIL.Image.open(io.BytesIO(sample["color.jpg"])))
            assert color.shape == (64, 64, 3)
            assert np.square(color.astype(float) - pair.color).mean() < 255**2 / 10**3.3  # 33 dB
            image = PIL.Image.open(io.BytesIO(sample["sketch.png"]))
            assert image.mode == "L"
            assert (np.asarray(image) == pair.sketch).all()
            assert key not in seen
            seen[key] = split
    assert len(seen) == sum(result.samples.values()) == SMALL.limit - len(result.excluded)
    assert result.samples == {split: list(seen.values()).count(split) for split in ("train", "validation")}
    assert not result.broken


def test_the_manifest_names_the_bytes_of_every_image(packed):
    folder, result = packed
    data = manifest.load(result.uri)
    assert data.id == result.id
    for split, shards in data.splits.items():
        urls = [str(folder / shard.key) for shard in shards]
        read = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
        for shard in shards:
            tar = (folder / shard.key).read_bytes()
            assert shard.key.startswith(split)
            assert (len(tar), sha256(tar).hexdigest()) == (shard.bytes, shard.sha256)
            for sample in shard.samples:
                for suffix, (offset, length) in (("color.jpg", sample.color), ("sketch.png", sample.sketch)):
                    assert tar[offset : offset + length] == read[sample.key][suffix]


def test_chunks_are_whole_neighbouring_samples_with_their_checksum(packed):
    folder, result = packed
    for shards in manifest.load(result.uri).splits.values():
        for shard in shards:
            tar = (folder / shard.key).read_bytes()
            position = first = 0
            for chunk in shard.chunks:
                assert (chunk.start, chunk.first) == (position, first)
                part = tar[chunk.start : chunk.stop]
                assert zlib.crc32(part) == chunk.crc32
                with tarfile.open(fileobj=io.BytesIO(part + bytes(1024))) as alone:
                    keys = [member.name.partition(".")[0] for member in alone]
                expected = [sample.key for sample in shard.samples[first : first + chunk.samples] for _ in range(3)]
                assert keys == expected
                position, first = chunk.stop, first + chunk.samples
            assert first == len(shard.samples)
            assert not any(tar[position:])  # only the end-of-archive blocks follow
            assert all(chunk.samples == manifest.CHUNK_SAMPLES for chunk in shard.chunks[:-1])


def test_left_out_pictures_are_named_with_the_reason(packed):
    _, result = packed
    assert result.excluded
    assert set(result.excluded.values()) == {"its drawing is a bare frame"}
    source = OpenMoji(64)
    new = next(item for item in source.items() if item.key == "1F195")
    with pytest.raises(NoDrawing, match="no line layer"):
        source.read(new)


def test_openmoji_drawings_are_dark_lines_on_white():
    source = OpenMoji(48)
    items = source.items()
    assert len(items) == 4495
    for item in items[::150]:
        try:
            pair = source.read(item)
        except NoDrawing:
            continue
        assert pair.sketch.min() < 64
        assert np.median(pair.sketch) == 255
        assert pair.color.shape == (48, 48, 3)


# Splits


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1F468-1F3FB-200D-1F692", "1F469-200D-1F692"),  # skin and gender
        ("1F46E-1F3FB-200D-2642-FE0F", "1F46E"),
        ("1F9D1-1F3FD-200D-1F9BC-200D-27A1-FE0F", "1F469-200D-1F9BC"),  # direction
        ("0023-FE0F-20E3", "0023-20E3"),
        ("1F46B", "1F9D1-1F3FF-200D-1F91D-200D-1F9D1-1F3FB"),
        ("1F49A", "2764-FE0F"),
    ],
)
def test_variants_of_a_drawing_have_one_group(first, second):
    assert openmoji.group(first) == openmoji.group(second)


def test_groups_never_cross_the_split():
    items = OpenMoji(64).items()
    plans = plan_shards(items, PackOptions())
    sides = {split: {item.group for plan in plans if plan.split == split for item in plan.items} for split in
             ("train", "validation")}  # fmt: skip
    assert not sides["train"] & sides["validation"]
    assert 0.03 < len(sides["validation"]) / len({item.group for item in items}) < 0.07
    assert sorted(item.key for plan in plans for item in plan.items) == [item.key for item in items]
    assert openmoji.group("1F600") != openmoji.group("1F601")


def test_the_split_stays_when_items_are_added():
    items = OpenMoji(64).items()
    before, after = plan_shards(items[::2], PackOptions()), plan_shards(items, PackOptions())
    held_out = {item.key for plan in after if plan.split == "validation" for item in plan.items}
    for plan in before:
        assert all((item.key in held_out) == (plan.split == "validation") for item in plan.items)


def test_an_empty_split_says_which_share_works(tmp_path):
    for number in range(6):
        save(tmp_path / f"{number}.png", draw(number))
    source = ColorImages(str(tmp_path), 32)
    with pytest.raises(UserError, match="leaves one split of 6 groups empty") as error:
        plan_shards(source.items(), PackOptions(validation=1e-6))
    share = float(str(error.value).split(" from ")[1].split()[0])
    plans = plan_shards(source.items(), PackOptions(validation=share))
    assert [plan.split for plan in plans] == ["train", "validation"]
    with pytest.raises(UserError, match="variants of one drawing"):
        plan_shards(source.items()[:1], PackOptions())


# Same bytes, whatever happens


def test_any_number_of_workers_gives_the_same_bytes(pictures, tmp_path):
    source = ColorImages(str(pictures), 48)
    options = PackOptions(shard_samples=16, validation=0.2)
    progress = []
    one = pack(source, str(tmp_path / "one"), options, workers=1)
    two = pack(source, str(tmp_path / "two"), options, workers=2, progress=lambda *done: progress.append(done))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert replace(one, uri=two.uri) == two
    assert sum(one.samples.values()) == 40
    assert progress[0] == (0, 40)
    assert progress[-1] == (40, 40)
    assert "_pack" not in {path.name for path in (tmp_path / "two").iterdir()}


SCRIPT = """
import os, pathlib, signal, sys
from autopainter.data.sources.openmoji import OpenMoji
from autopainter.data.pack import PackOptions, pack

if __name__ == "__main__":
    folder, stop = pathlib.Path(sys.argv[1]), int(sys.argv[2])

    def progress(done, total):
        if list(folder.glob("_pack/*/*.tar.json")):  # a shard is finished, others are not
            os.kill(os.getpid(), stop) if stop == signal.SIGKILL else os.killpg(0, stop)

    pack(OpenMoji(48), str(folder), PackOptions(limit=400, shard_samples=16), workers=2, progress=progress)
"""


def stopped(folder, stop):
    """Start a pack with two workers, stop it by a signal when its first shard is finished; its error output."""
    script = folder.with_name("script.py")
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(int(stop))], start_new_session=True, stderr=subprocess.PIPE
    )
    errors = process.communicate(timeout=120)[1].decode()
    assert process.returncode == -stop, errors
    assert no_process_is_left(process.pid)
    assert not (folder / "manifest.json").exists()
    assert list(folder.glob("*.tar"))
    return errors


def test_a_killed_pack_is_continued_by_the_same_command(tmp_path):
    stopped(tmp_path / "data", signal.SIGKILL)
    options = PackOptions(limit=400, shard_samples=16)
    result = pack(OpenMoji(48), str(tmp_path / "data"), options, workers=1)
    whole = pack(OpenMoji(48), str(tmp_path / "whole"), options, workers=1)
    assert 1 <= result.kept_shards < result.shards
    assert replace(whole, uri=result.uri, kept_shards=result.kept_shards) == result
    for leftover in (tmp_path / "data").glob(".tmp-*"):  # of a write that was killed; no reader looks at it
        leftover.unlink()
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_ctrl_c_ends_all_with_one_traceback(tmp_path):
    assert stopped(tmp_path / "data", signal.SIGINT).count("Traceback") == 1


@dataclass(frozen=True)
class Failing(ColorImages):
    """Storage gives up on one of the pictures."""

    def read(self, item):
        if item.key.endswith("005"):
            raise StorageError(f"{item.location}: gone for good")
        return super().read(item)


@dataclass(frozen=True)
class Dying(ColorImages):
    """A worker is killed from outside."""

    def read(self, item):
        if item.key.endswith("005"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(item)


def test_a_killed_worker_ends_the_pack(pictures, tmp_path):
    options = PackOptions(shard_samples=16, validation=0.2)
    with pytest.raises(UserError, match="fewer workers"):
        pack(Dying(str(pictures), 48), str(tmp_path), options, workers=2)
    assert not multiprocessing.active_children()
    assert not (tmp_path / "manifest.json").exists()


def work(kind, started, tick):
    """A task that fails when the other one runs, or that goes on for long, with or without ticks."""
    if kind == "fails":
        while not started.exists():
            time.sleep(0.01)
        raise StorageError("gone for good")
    started.touch()
    for _ in range(10000):
        time.sleep(0.01 if kind == "ticks" else 100)
        tick()


@pytest.mark.parametrize("other", ["ticks", "is stuck"])
def test_a_failing_worker_ends_the_others(tmp_path, other):
    start = time.monotonic()
    tasks = [("fails", tmp_path / "started"), (other, tmp_path / "started")]
    with pytest.raises(StorageError, match="gone for good"):
        pool.run(work, tasks, 2, lambda done: None)
    assert time.monotonic() - start < 60
    assert not multiprocessing.active_children()


@dataclass(frozen=True)
class Unreadable(ColorImages):
    """Must not be read."""

    def read(self, item):
        raise AssertionError(item)


def test_a_second_run_does_nothing_and_another_pack_is_refused(pictures, tmp_path):
    target = str(tmp_path / "data")
    options = PackOptions(shard_samples=16, validation=0.2)
    first = pack(ColorImages(str(pictures), 32), target, options, workers=1)
    before = contents(tmp_path)
    again = pack(Unreadable(str(pictures), 32), target, options, workers=1)
    assert again == replace(first, already_packed=True)

    with pytest.raises(UserError, match=r"source.size 32 -> 48.*--overwrite"):
        pack(ColorImages(str(pictures), 48), target, options, workers=1)
    assert contents(tmp_path) == before

    (tmp_path / "data" / "train-00001.tar").unlink()
    with pytest.raises(UserError, match=r"train-00001.tar: missing"):
        pack(ColorImages(str(pictures), 32), target, options, workers=1)

    bigger = PackOptions(shard_samples=64, validation=0.2)
    pack(ColorImages(str(pictures), 48), target, bigger, workers=1, overwrite=True)
    pack(ColorImages(str(pictures), 48), str(tmp_path / "fresh"), bigger, workers=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")  # no shard of the old one is left


def test_a_replaced_input_is_noticed(pictures, tmp_path):
    for number in range(8):
        save(tmp_path / "in" / f"{number}.png", draw(number))
    options = PackOptions(validation=0.5)
    pack(ColorImages(str(tmp_path / "in"), 32), str(tmp_path / "out"), options, workers=1)
    save(tmp_path / "in" / "3.png", draw(100, (50, 50)))
    with pytest.raises(UserError, match="inputs"):
        pack(ColorImages(str(tmp_path / "in"), 32), str(tmp_path / "out"), options, workers=1)


def test_an_interrupted_pack_gives_way_to_other_options(pictures, tmp_path):
    options = PackOptions(shard_samples=16, validation=0.2)
    with pytest.raises(StorageError):
        pack(Failing(str(pictures), 48), str(tmp_path / "data"), options, workers=1)
    other = PackOptions(shard_samples=32, validation=0.2)
    pack(ColorImages(str(pictures), 48), str(tmp_path / "data"), other, workers=1)
    pack(ColorImages(str(pictures), 48), str(tmp_path / "fresh"), other, workers=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_shards_of_others_are_not_touched(pictures, tmp_path):
    (tmp_path / "train-00000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"train-00000.tar.*--overwrite"):
        pack(ColorImages(str(pictures), 32), str(tmp_path), workers=1)
    assert contents(tmp_path) == {"train-00000.tar": b"mine"}


# Inputs


def test_orientation_transparency_and_depth_are_normalised():
    color = draw(3)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter to the right when shown
    turned = image_bytes(np.ascontiguousarray(np.rot90(color)), "PNG", exif=exif)
    assert (decode(turned) == color).all()
    turned = decode(image_bytes(np.ascontiguousarray(np.rot90(color)), "JPEG", exif=exif, quality=95))
    assert turned.shape == color.shape

    half = np.dstack([np.full((8, 8, 3), 100, np.uint8), np.full((8, 8), 51, np.uint8)])
    assert (decode(image_bytes(half, "PNG")) == 224).all()  # 100 * 0.2 + 255 * 0.8
    assert (decode(image_bytes(half[..., [0, 3]], "PNG")) == 224).all()
    palette = PIL.Image.fromarray(np.zeros((8, 8), np.uint8), "P")
    palette.putpalette([9, 9, 9])
    assert (decode(image_bytes(palette, "PNG")) == 9).all()
    assert (decode(image_bytes(palette, "PNG", transparency=0)) == 255).all()

    deep = np.full((8, 8), 0xABCD, np.uint16)
    assert (decode(cv2.imencode(".png", deep)[1].tobytes()) == 0xAB).all()
    assert (decode(cv2.imencode(".png", np.dstack([deep] * 3))[1].tobytes()) == 0xAB).all()
    grey = decode(image_bytes(np.full((8, 8), 77, np.uint8), "PNG"))
    assert grey.shape == (8, 8, 3)
    assert (grey == 77).all()
    for kind in ("BMP", "WEBP"):
        decoded = decode(image_bytes(color, kind, lossless=True))
        assert (decoded == color).all()
    with PIL.Image.fromarray(color) as image:
        assert np.abs(decode(image_bytes(image.convert("CMYK"), "JPEG", quality=95)).astype(int) - color).mean() < 8


def frames(kind):
    first, second = (PIL.Image.fromarray(draw(number)) for number in (1, 2))
    return image_bytes(first, kind, save_all=True, append_images=[second])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "not a PNG"),
        (lambda: b"hello", "not a PNG"),
        (lambda: image_bytes(draw(1), "GIF"), "not a PNG"),
        (lambda: image_bytes(draw(1), "JPEG")[:-300], "damaged"),
        (lambda: image_bytes(draw(1), "PNG")[:-300], "damaged"),
        (lambda: image_bytes(draw(1), "WEBP")[:-300], "damaged"),
        (lambda: image_bytes(draw(1), "BMP")[:-300], "damaged"),
        (lambda: frames("WEBP"), "animated"),
        (lambda: frames("PNG"), "animated"),
    ],
)
def test_inputs_that_are_no_pictures_are_refused(make, reason):
    with pytest.raises(BrokenInput, match=reason):
        decode(make())


@pytest.mark.parametrize("edge", [9000, 60000])
def test_a_bomb_is_refused_before_it_is_decoded(edge, monkeypatch):
    bomb = image_bytes(PIL.Image.new("1", (edge, edge)), "PNG") if edge < 10000 else None
    if bomb is None:  # a header is enough
        small = image_bytes(PIL.Image.new("1", (8, 8)), "PNG")
        header = b"IHDR" + edge.to_bytes(4, "big") * 2 + small[24:29]
        bomb = small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
    assert len(bomb) < 20_000
    monkeypatch.setattr(PIL.PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("decoded"))
    with pytest.raises(BrokenInput, match="pixels"):
        decode(bomb)


def test_pictures_become_squares(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (250, 120, 10)
    wide[:, :10], wide[:, 70:] = 90, 200
    save(tmp_path / "wide.png", wide)

    def read(fit):
        source = ColorImages(str(tmp_path), 40, fit)
        pair = source.read(source.items()[0])
        assert pair.color.shape == (40, 40, 3)
        assert pair.sketch.shape == (40, 40)
        return pair

    crop = read("crop")
    assert (crop.color == (250, 120, 10)).all()
    assert (crop.sketch == xdog(crop.color)).all()
    resized = read("resize")
    assert (resized.color[:, 0] == 90).all()
    assert (resized.color[:, -1] == 200).all()
    padded = read("pad")
    assert (padded.color[:10] == 255).all()
    assert (padded.color[30:] == 255).all()
    assert (padded.color[10:30, 0] == 90).all()
    assert (padded.sketch[:10] == 255).all()
    with pytest.raises(UserError, match="crop, resize, pad"):
        ColorImages(str(tmp_path), 40, "stretch")


def test_broken_inputs_are_named_and_the_others_packed(tmp_path):
    for number in range(20):
        save(tmp_path / "in" / f"{number}.jpg", draw(number), quality=90)
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "in" / "cut.jpeg").write_bytes(image_bytes(draw(5), "JPEG")[:-200])
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    (tmp_path / "in" / "._0.jpg").write_bytes(b"what some systems leave behind")
    source = ColorImages(str(tmp_path / "in"), 32)
    result = pack(source, str(tmp_path / "out"), PackOptions(validation=0.3), workers=1)
    assert sum(result.samples.values()) == 20
    assert list(result.broken) == ["bad.png", "cut.jpeg"]
    assert "not a PNG" in result.broken["bad.png"]
    assert "damaged" in result.broken["cut.jpeg"]
    assert pack(source, str(tmp_path / "out"), PackOptions(validation=0.3)).broken == result.broken


def test_keys_are_valid_and_unique_for_any_file_name(tmp_path):
    names = ["a.b.png", "a b.png", "a_b.png", "same.png", "same.jpg", "Case.png", "case.png", "sub/x.png"]
    names += ["Bj\u00f8rk.png", "x" * 150 + ".png", "y" * 150 + "1.png", "y" * 150 + "2.png", os.fsdecode(b"\xff.png")]
    for number, name in enumerate(names):
        save(tmp_path / "in" / name, draw(number))
    (tmp_path / "in" / os.fsdecode(b"\xfe.jpg")).write_bytes(b"")
    source = ColorImages(str(tmp_path / "in"), 32)
    items = source.items()
    assert [item.key for item in items] == sorted(item.key for item in items)
    assert "sub/x" in {item.key for item in items}
    assert "a_b" in {item.key for item in items}
    assert len({item.key.lower() for item in items}) == len(names) + 1
    result = pack(source, str(tmp_path / "out"), PackOptions(validation=0.3), workers=1)
    assert list(result.broken) == ["\\udcfe.jpg"]
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert len(read) == len(names)
    assert all({"color.jpg", "sketch.png", "json"} <= sample.keys() for sample in read.values())


@pytest.mark.parametrize("case", ["empty", "missing", "all broken", "destination is a file"])
def test_hopeless_commands_end_in_one_line_and_write_nothing(tmp_path, case):
    folder, out = tmp_path / "in", tmp_path / "out"
    message = {"empty": "no pictures", "missing": "no such folder", "all broken": "no pair is left"}.get(
        case, "cannot be written"
    )
    if case != "missing":
        folder.mkdir()
    for number in range(0 if case in ("empty", "missing") else 8):
        (folder / f"{number}.png").write_bytes(b"" if case == "all broken" else image_bytes(draw(number), "PNG"))
    if case == "destination is a file":
        out.write_text("")
    with pytest.raises(UserError, match=message) as error:
        pack(ColorImages(str(folder), 32), str(out), PackOptions(validation=0.5), workers=1)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.tar"))
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    "options", [{"validation": 0}, {"validation": 1.0}, {"shard_samples": 20}, {"jpeg_quality": 0}, {"limit": 0}]
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        PackOptions(**options)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(openmoji, "PACKAGE", "no-such-package")
    openmoji._files.cache_clear()
    try:
        with pytest.raises(UserError, match=r"pip install 'autopainter\[openmoji\]'"):
            OpenMoji(64).items()
    finally:
        openmoji._files.cache_clear()


# S3


def test_from_s3_to_s3(s3_uri, tmp_path):
    inputs = storage.open_store(f"{s3_uri}/in")
    for number in range(24):
        inputs.write(f"sub/{number}.png", image_bytes(draw(number), "PNG"))
    inputs.write("bad.jpg", b"")
    options = PackOptions(shard_samples=16, validation=0.3)
    result = pack(ColorImages(f"{s3_uri}/in", 32), f"{s3_uri}/out", options, workers=2)
    assert list(result.broken) == ["bad.jpg"]
    data = manifest.load(result.uri)
    store = storage.open_store(data.uri)
    names = [shard.key for shards in data.splits.values() for shard in shards]
    assert [entry.key for entry in store.list()] == sorted(["manifest.json", *names])
    for shards in data.splits.values():
        for shard in shards:
            for chunk in shard.chunks:
                assert zlib.crc32(store.read_range(shard.key, chunk.start, chunk.stop)) == chunk.crc32
    assert pack(ColorImages(f"{s3_uri}/in/", 32), f"{s3_uri}/out/", options).already_packed

    local = pack(ColorImages(f"{s3_uri}/in", 32), str(tmp_path), options, workers=1)
    assert local.id == result.id
    assert all(store.read(name) == (tmp_path / name).read_bytes() for name in names)


def test_a_missing_bucket_is_found_before_any_work(s3_uri, pictures):
    with pytest.raises(UserError, match="no bucket"):
        pack(Unreadable(str(pictures), 32), "s3://autopainter-no-such-bucket/data")
