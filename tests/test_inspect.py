"""What inspect says of a data set, its contact sheet, and the damage that it finds, in a folder and on S3.

Run: pytest tests/test_inspect.py
"""

import re
from dataclasses import replace

import cv2
import numpy as np
import pytest
import webdataset

from autopainter import storage
from autopainter.data import inspect, manifest
from autopainter.data.index import Members, index
from autopainter.data.pack import PackOptions, pack
from autopainter.data.sources import ColorImages
from autopainter.errors import StorageError, UserError

GAP, BACKGROUND = 6, 225


@pytest.fixture(params=["folder", "s3"])
def packed(request, pictures, tmp_path):
    """The pictures, packed in a folder and on S3: (manifest, store)."""
    uri = str(tmp_path / "data") if request.param == "folder" else request.getfixturevalue("s3_uri")
    pack(ColorImages(str(pictures), size=48), uri, PackOptions(shard_samples=32, validation=0.1), workers=1)
    return manifest.load(f"{uri}/manifest.json"), storage.open_store(uri)


@pytest.fixture
def foreign(tmp_path):
    """Both splits in each shard, no drawings, colour pictures of several shapes."""
    random = np.random.default_rng(0)
    for number in range(2):
        samples = [(f"{number}-{key}", random.integers(0, 256, (40, 20 + key, 3), np.uint8)) for key in range(20)]
        with webdataset.TarWriter(str(tmp_path / f"{number}.tar"), encoder=False) as writer:
            for key, image in samples:
                writer.write({"__key__": key, "png": cv2.imencode(".png", image)[1].tobytes()})
    index(str(tmp_path), Members("png", None), validation=0.4, workers=1)
    return manifest.load(str(tmp_path / "manifest.json"))


def test_the_counts_are_those_of_the_shards(packed):
    data, store = packed
    about = inspect.describe(data)
    files = [entry for entry in store.list() if entry.key.endswith(".tar")]
    assert (about["shards"], about["bytes"]) == (len(files), sum(entry.bytes for entry in files))
    assert (about["id"], about["shards_at"]) == (data.id, store.uri)
    assert {name: (part["samples"], part["drawings"]) for name, part in about["splits"].items()} == {
        name: (sum(len(shard.samples) for shard in shards), "stored") for name, shards in data.splits.items()
    }
    assert sum(part["samples"] for part in about["splits"].values()) == 90
    assert about["source"]["kind"] == "color-images"


def test_a_shard_of_both_splits_is_counted_once(foreign):
    about = inspect.describe(foreign)
    assert about["shards"] == 2
    assert [part["shards"] for part in about["splits"].values()] == [2, 2]
    assert {part["drawings"] for part in about["splits"].values()} == {"on_the_fly"}
    assert sum(part["samples"] for part in about["splits"].values()) == 40
    assert inspect.verify(foreign) == {}


# Damage


def test_a_sound_data_set_is_verified(packed):
    data, _ = packed
    progress = []
    assert inspect.verify(data, lambda *done: progress.append(done)) == {}
    count = inspect.describe(data)["shards"]
    assert progress == [(done, count) for done in range(1, count + 1)]


def changed(store, key, place):
    """Flip one bit of a shard."""
    tar = bytearray(store.read(key))
    tar[place] ^= 1
    store.write(key, bytes(tar))


def test_a_flipped_byte_a_short_and_a_missing_shard_are_named(packed):
    data, store = packed
    first, second, third = data.split("train")
    held_out = data.split("validation")[0]
    chunk = first.chunks[1]
    changed(store, first.key, chunk.start + 700)
    changed(store, second.key, second.bytes - 1)  # after the last chunk
    store.write(third.key, store.read(third.key)[:-512])
    store.delete([held_out.key])
    found = inspect.verify(data)
    assert found.keys() == {store.locate(shard.key) for shard in (first, second, third, held_out)}
    assert re.fullmatch(
        rf"chunk of bytes {chunk.start} to {chunk.stop} has CRC-32 [0-9a-f]{{8}}, the manifest says {chunk.crc32:08x}",
        found[store.locate(first.key)],
    )
    assert f"the manifest says {second.sha256}" in found[store.locate(second.key)]
    assert found[store.locate(third.key)] == f"has {third.bytes - 512} bytes, the manifest says {third.bytes}"
    assert found[store.locate(held_out.key)] == "not found"


def test_an_empty_shard_is_named(packed):
    data, store = packed
    shard = data.split("train")[0]
    store.write(shard.key, b"")
    assert inspect.verify(data) == {store.locate(shard.key): f"has 0 bytes, the manifest says {shard.bytes}"}


def test_damage_of_either_split_of_a_shard_is_found(foreign, tmp_path):
    store = storage.open_store(foreign.uri)
    for split in ("train", "validation"):
        shard = foreign.split(split)[1]
        whole = store.read(shard.key)
        changed(store, shard.key, shard.samples[0].color[0])
        assert inspect.verify(foreign).keys() == {str(tmp_path / shard.key)}
        store.write(shard.key, whole)


# Contact sheet


def tiles(sheet, tile, columns):
    """The picture and the drawing of each place."""
    rows = (sheet.shape[0] - GAP) // (tile + GAP)
    assert sheet.shape == (rows * (tile + GAP) + GAP, columns * (2 * tile + GAP) + GAP, 3)
    for number in range(rows * columns):
        top, left = number // columns * (tile + GAP) + GAP, number % columns * (2 * tile + GAP) + GAP
        yield sheet[top : top + tile, left : left + tile], sheet[top : top + tile, left + tile : left + 2 * tile]


def stored(data, split):
    """(picture, drawing) of each sample, as OpenCV reads them."""
    store = storage.open_store(data.uri)
    for shard in data.split(split):
        tar = np.frombuffer(store.read(shard.key), np.uint8)
        for sample in shard.samples:
            color, sketch = (
                None if file is None else cv2.imdecode(tar[file[0] : sum(file)], cv2.IMREAD_COLOR_RGB)
                for file in (sample.color, sample.sketch)
            )
            yield color, sketch


def test_the_sheet_shows_samples_from_all_over_the_split(packed):
    data, _ = packed
    samples = list(stored(data, "train"))
    shown = list(tiles(inspect.sheet(data, "train", 7, columns=3, tile=48), 48, 3))
    assert len(shown) == 9
    chosen = [round(number * (len(samples) - 1) / 6) for number in range(7)]
    for (color, sketch), place in zip(shown, chosen, strict=False):
        assert (color == samples[place][0]).all()
        assert (sketch == samples[place][1]).all()
    assert all((part == BACKGROUND).all() for pair in shown[7:] for part in pair)


def test_the_sheet_of_a_small_split_shows_each_sample_once(packed):
    data, _ = packed
    samples = list(stored(data, "validation"))
    shown = list(tiles(inspect.sheet(data, "validation", 500, columns=6, tile=48), 48, 6))
    assert len(shown) - len(samples) < 6
    for (color, _), (expected, _) in zip(shown, samples, strict=False):
        assert (color == expected).all()


def test_pictures_of_any_shape_without_drawings_are_shown(foreign):
    samples = list(stored(foreign, "train"))
    shown = list(tiles(inspect.sheet(foreign, "train", 500, columns=6, tile=40), 40, 6))
    for (color, empty), (expected, _) in zip(shown, samples, strict=False):
        left = (40 - expected.shape[1]) // 2
        assert (color[:, left : left + expected.shape[1]] == expected).all()
        assert (color[:, :left] == 255).all()
        assert (empty == BACKGROUND).all()


def test_a_sheet_of_no_split_or_of_a_damaged_one_is_an_error(packed):
    data, store = packed
    with pytest.raises(UserError, match="no samples in the split 'test'"):
        inspect.sheet(data, "test", 5)
    shard = data.split("train")[0]
    tar = bytearray(store.read(shard.key))
    tar[shard.samples[0].color[0] : shard.samples[0].color[0] + 8] = bytes(8)
    store.write(shard.key, bytes(tar))
    with pytest.raises(StorageError, match=f"{shard.key}: sample {shard.samples[0].key}"):
        inspect.sheet(data, "train", 1)
    store.delete([shard.key])
    with pytest.raises(StorageError, match=f"{shard.key}: not found"):
        inspect.sheet(data, "train", 1)


def test_a_manifest_of_shards_elsewhere_is_verified_there(packed):
    data, store = packed
    moved = replace(data, uri=f"{store.uri}/none")
    assert set(inspect.verify(moved).values()) == {"not found"}
