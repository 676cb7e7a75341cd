"""WebDataset shards that others made: what is indexed, how it is split, what is named as broken, and that it streams.

Shards are written by plain tarfile in any layout. Run: pytest tests/test_index.py
"""

import hashlib
import io
import itertools
import json
import os
import tarfile
import zlib
from collections import Counter

import cv2
import numpy as np
import PIL.Image
import pytest
import webdataset

from autopainter import storage
from autopainter.data import manifest
from autopainter.data.index import Members, index
from autopainter.data.pictures import decode_stored
from autopainter.data.sketch import xdog
from autopainter.data.stream import TrainingStream, validation_batches
from autopainter.errors import UserError

PAIR = Members("jpg", "png")


def draw(number, height=48, width=48):
    """A cartoon-like picture: flat shapes with black outlines, uint8 [H, W, 3]."""
    random = np.random.default_rng(number)
    color = np.full((height, width, 3), random.integers(120, 256, 3), np.uint8)
    for _ in range(3):
        center = tuple(int(x) for x in random.integers(5, 45, 2))
        cv2.circle(color, center, int(random.integers(5, 20)), [int(x) for x in random.integers(0, 256, 3)], -1)
    return color


def image(pixels, kind):
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def pair(number, shape=(48, 48)):
    """Files of a sample by suffix: a JPEG picture and its PNG drawing."""
    color = draw(number, *shape)
    return {"jpg": image(color, "JPEG"), "png": image(xdog(color), "PNG")}


def tar(samples, kind=tarfile.PAX_FORMAT):
    """A tar of samples: (key, files by suffix)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as writer:
        for key, files in samples:
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                writer.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def put(uri, shards):
    store = storage.open_store(uri)
    for name, samples in shards.items():
        store.write(name, samples if isinstance(samples, bytes) else tar(samples))
    return uri


def some(first, count, prefix="p"):
    return [(f"{prefix}{number:04d}", pair(number)) for number in range(first, first + count)]


def check(uri, members=PAIR):
    """Split of every sample by shard and key, after all that a manifest says was compared with the shards."""
    data = manifest.load(uri)
    store = storage.open_store(data.uri)
    found = {}
    for split, shards in data.splits.items():
        for shard in shards:
            raw = store.read(shard.key)
            assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard.bytes, shard.sha256)
            for chunk in shard.chunks:
                assert zlib.crc32(raw[chunk.start : chunk.stop]) == chunk.crc32
            for sample in shard.samples:
                assert (shard.key, sample.key) not in found
                found[shard.key, sample.key] = split
                shape = decode_stored(raw[sample.color[0] : sum(sample.color)], grey=False).shape
                assert (sample.sketch is None) == (members.sketch is None)
                if sample.sketch:
                    drawing = decode_stored(raw[sample.sketch[0] : sum(sample.sketch)], grey=True)
                    assert drawing.shape == shape[:2]
    return found


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """A folder and an s3:// prefix, each once."""
    return str(tmp_path / "in") if request.param == "folder" else request.getfixturevalue("s3_uri")


def test_every_sample_is_in_one_split_and_no_shard_is_touched(place):
    put(place, {"a.tar": some(0, 40), "sub/b.tar": some(40, 25), "notes.txt": b"", "C.TAR": some(65, 10)})
    store = storage.open_store(place)
    before = {entry.key: store.read(entry.key) for entry in store.list()}
    progress = []
    result = index(place, PAIR, validation=0.3, workers=1, progress=lambda *done: progress.append(done))
    assert result.uri == f"{place}/manifest.json"
    assert progress == [(1, 3), (2, 3), (3, 3)]
    after = {entry.key: store.read(entry.key) for entry in store.list()}
    assert result.id == hashlib.sha256(after.pop("manifest.json")).hexdigest()
    assert before == after
    found = check(result.uri)
    keys = {"a.tar": range(40), "sub/b.tar": range(40, 65), "C.TAR": range(65, 75)}
    assert found.keys() == {(shard, f"p{number:04d}") for shard, numbers in keys.items() for number in numbers}
    assert result.samples == Counter(found.values())
    assert 10 <= result.samples["validation"] <= 35
    assert (result.shards, result.broken) == (3, {})
    assert result.bytes == sum(len(data) for name, data in before.items() if name.lower().endswith(".tar"))
    assert manifest.load(result.uri).uri == place


def test_two_workers_give_the_same_manifest(tmp_path):
    put(str(tmp_path), {f"{number}.tar": some(10 * number, 10) for number in range(4)})
    for workers in (1, 2):
        index(str(tmp_path), PAIR, str(tmp_path / f"{workers}.json"), validation=0.4, workers=workers)
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


@pytest.mark.parametrize(
    ("members", "name"),
    [
        (PAIR, lambda number: f"{number}"),
        (PAIR, lambda number: f"./set.v2/{number}"),
        (PAIR, lambda number: f"{'deep/' * 50}{number}"),
        (Members("rgb.color.jpg", "seg.png"), lambda number: f"a/{number}"),
    ],
    ids=["plain", "from a dot", "long names", "dots in the suffix"],
)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_any_layout_of_names(members, name, kind, tmp_path):
    if kind == tarfile.USTAR_FORMAT and "deep/" in name(0):
        name = lambda number: f"{'deep/' * 25}{number}"  # noqa: E731  # the longest that it can
    samples = []
    for number in range(12):
        files = pair(number)
        more = {members.color.upper(): files["jpg"], members.sketch: files["png"], "json": b"{}", "txt": b"a cat"}
        samples.append((name(number), more))
    put(str(tmp_path), {"a.tar": tar(samples, kind)})
    result = index(str(tmp_path), members, validation=0.4, workers=1)
    assert result.broken == {}
    assert check(result.uri, members).keys() == {("a.tar", name(number)) for number in range(12)}


def test_the_writer_of_webdataset_and_pictures_of_other_formats(tmp_path):
    """Colours as PNG with transparency, drawings as JPEG, one of them in colours."""
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(12):
            color = draw(number)
            clear = np.dstack([color, np.full((48, 48), 200, np.uint8)])
            lines = xdog(color)
            writer.write({
                "__key__": f"{number:03d}",
                "image.png": image(clear if number % 2 else color, "PNG"),
                "line.jpg": image(np.dstack([lines] * 3) if number == 3 else lines, "JPEG"),
                "page.gif": image(lines, "GIF"),
            })  # fmt: skip
    for members in (Members("image.png", "line.jpg"), Members("image.png", "page.gif"), Members("image.png", None)):
        result = index(str(tmp_path), members, validation=0.4, workers=1, overwrite=True)
        assert result.broken == {}
        assert len(check(result.uri, members)) == 12


def test_what_is_broken_is_named_and_left_out(tmp_path):
    def changed(number, **files):
        return f"p{number:04d}", {suffix: data for suffix, data in (pair(number) | files).items() if data is not None}

    good = some(100, 10)
    cut = tar(some(200, 6))
    damaged = bytearray(tar(some(300, 6)))
    fourth = damaged.index(b"p0303.jpg")
    damaged[fourth + 100] ^= 1
    moving = io.BytesIO()
    PIL.Image.fromarray(draw(1)).save(moving, "GIF", save_all=True, append_images=[PIL.Image.fromarray(draw(2))])
    apart = pair(50)
    put(str(tmp_path), {
        "bad.tar": [
            *good,
            changed(0, png=None),
            changed(1, jpg=b"no picture"),
            changed(2, png=pair(2)["png"][:200]),
            changed(3, png=pair(3, (48, 50))["png"]),
            changed(4, jpg=moving.getvalue()),
            ("apart", {"jpg": apart["jpg"]}),
            ("between", pair(51)),
            ("apart", {"png": apart["png"]}),
            ("between", {"jpg": apart["jpg"]}),
        ],
        "cut.tar": cut[: cut.index(b"p0204.jpg") + 700],
        "damaged.tar": bytes(damaged),
        "empty.tar": b"",
        "nothing.tar": tar([]),
        "text.tar": b"hello" * 1000,
    })  # fmt: skip
    result = index(str(tmp_path), PAIR, validation=0.4, workers=1)
    reasons = {
        "bad.tar: p0000": "has no member .png, only jpg",
        "bad.tar: p0001": "not an image",
        "bad.tar: p0002": "damaged",
        "bad.tar: p0003": "its picture has 48 x 48 pixels and its drawing 50 x 48",
        "bad.tar: p0004": "animated",
        "bad.tar: apart": "has no member .png, only jpg",
        "bad.tar: apart.png": "is apart from the other files of apart",
        "bad.tar: between.jpg": "a second one of that name",
        "cut.tar": "is no sound tar",
        "damaged.tar": "has a damaged header",
        "empty.tar": "is no sound tar",
        "nothing.tar": "has no samples",
        "text.tar": "is no sound tar",
    }
    named = {name.removeprefix(f"{tmp_path}/"): reason for name, reason in result.broken.items()}
    assert named.keys() == reasons.keys()
    assert {name: named[name] for name, reason in reasons.items() if reason not in named[name]} == {}
    assert result.shards == 6
    found = check(result.uri)
    assert {key for shard, key in found if shard == "bad.tar"} == {*(key for key, _ in good), "between"}
    assert {key for shard, key in found if shard == "damaged.tar"} == {"p0300", "p0301", "p0302"}
    assert {key for shard, key in found if shard == "cut.tar"} == {f"p020{number}" for number in range(4)}


def test_a_shard_that_cannot_be_read_is_broken(tmp_path):
    put(str(tmp_path), {"a.tar": some(0, 20)})
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nothing.tar")
    (tmp_path / "loop.tar").symlink_to(tmp_path / "loop.tar")
    result = index(str(tmp_path), PAIR, validation=0.4, workers=1)
    assert {name: reason.partition(":")[0] for name, reason in result.broken.items()} == {
        str(tmp_path / name): "cannot be read" for name in ("gone.tar", "loop.tar")
    }
    assert len(check(result.uri)) == 20


@pytest.mark.parametrize("name", ["line\nbreak", os.fsdecode(b"\xff")])
def test_keys_that_a_manifest_cannot_hold_are_broken(name, tmp_path):
    put(str(tmp_path), {"a.tar": tar([*some(0, 10), (name, pair(10))], tarfile.GNU_FORMAT)})
    result = index(str(tmp_path), PAIR, validation=0.4, workers=1)
    assert len(result.broken) == 2  # both members
    assert len(check(result.uri)) == 10


# Splits


def test_the_share_and_the_seams_of_the_split(tmp_path):
    put(str(tmp_path), {"a.tar": some(0, 80)})
    share = {}
    for validation in (0.1, 0.5):
        result = index(str(tmp_path), PAIR, validation=validation, workers=1, overwrite=True)
        share[validation] = {key for key, split in check(result.uri).items() if split == "validation"}
    assert 1 <= len(share[0.1]) < len(share[0.5]) <= 60
    assert share[0.1] < share[0.5]
    (shard,) = manifest.load(result.uri).split("validation")
    assert any(chunk.samples > 1 for chunk in shard.chunks)


def test_samples_of_one_match_stay_together(tmp_path):
    shards = {f"{number}.tar": [(f"show{number % 2}{key % 5}/{number}-{key}", pair(10 * number + key))
                                for key in range(10)] for number in range(4)}  # fmt: skip
    put(str(tmp_path), shards)
    result = index(str(tmp_path), PAIR, validation=0.4, group_by=r"^show\d+", workers=1)
    groups = {}
    for (_, key), split in check(result.uri).items():
        groups.setdefault(key.partition("/")[0], set()).add(split)
    assert len(groups) == 10
    assert all(len(splits) == 1 for splits in groups.values())
    assert set().union(*groups.values()) == {"train", "validation"}


def test_shards_of_a_pattern_are_held_out(tmp_path):
    put(str(tmp_path), {"train/0.tar": some(0, 5), "val/0.tar": some(5, 4), "val/1.tar": some(9, 3)})
    for pattern in ("val/*", "val/*.tar"):
        result = index(str(tmp_path), PAIR, validation_shards=pattern, workers=1, overwrite=True)
        for (shard, _), split in check(result.uri).items():
            assert split == ("validation" if shard.startswith("val/") else "train")
        assert result.samples == {"train": 5, "validation": 7}


def test_copies_are_on_one_side_also_across_shards(tmp_path):
    """Ten pictures in four shards under other names; in two of them only the drawing is the same."""
    shards = {}
    for number in range(4):
        samples = []
        for key in range(10):
            files = pair(key)
            if number > 1:
                files["jpg"] = image(draw(100 * number + key), "JPEG")
            samples.append((f"s{number}-{key}", files))
        shards[f"{number}.tar"] = samples
    put(str(tmp_path), shards)
    result = index(str(tmp_path), PAIR, validation=0.4, workers=1)
    of = {}
    for (_, key), split in check(result.uri).items():
        of.setdefault(key[-1], set()).add(split)
    assert len(of) == 10
    assert all(len(splits) == 1 for splits in of.values())


# Places


def test_a_manifest_elsewhere_names_the_place_of_the_shards(tmp_path, monkeypatch):
    put(str(tmp_path / "shards"), {"a.tar": some(0, 20)})
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    result = index("../shards", PAIR, "sets/one.json", validation=0.4, workers=1)
    assert result.uri == "sets/one.json"
    uri = str(tmp_path / "work" / "sets" / "one.json")
    monkeypatch.chdir("/")
    assert manifest.load(uri).uri == str(tmp_path / "shards")
    assert len(check(uri)) == 20
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["a.tar"]


@pytest.mark.parametrize(
    ("shards", "output"), [("in", "./in/manifest.json"), ("./in/", "../work/in/m.json"), ("link", "in/m.json")]
)
def test_a_manifest_beside_the_shards_names_no_place_however_it_is_written(shards, output, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    put("in", {"a.tar": some(0, 20)})
    (tmp_path / "work" / "link").symlink_to("in")
    result = index(shards, PAIR, output, validation=0.4, workers=1)
    (tmp_path / "work" / "in").rename(tmp_path / "moved")
    assert len(check(str(tmp_path / "moved" / result.uri.rpartition("/")[2]))) == 20


def test_shards_whose_names_are_no_text(tmp_path):
    folder = tmp_path / os.fsdecode(b"B\xe4r")
    put(str(folder), {os.fsdecode(b"\xff.tar"): some(0, 20)})
    result = index(str(folder), PAIR, str(tmp_path / "one.json"), validation=0.4, workers=1)
    assert manifest.load(result.uri).uri == str(folder)
    assert len(check(result.uri)) == 20


def test_a_local_manifest_of_shards_on_s3(s3_uri, tmp_path):
    put(s3_uri, {"a.tar": some(0, 20)})
    result = index(s3_uri + "/", PAIR, str(tmp_path / "one.json"), validation=0.4, workers=1)
    assert manifest.load(result.uri).uri == s3_uri
    assert len(check(result.uri)) == 20
    assert [entry.key for entry in storage.open_store(s3_uri).list()] == ["a.tar"]


def test_a_manifest_that_is_there_is_kept(tmp_path):
    put(str(tmp_path), {"a.tar": some(0, 20)})
    index(str(tmp_path), PAIR, validation=0.4, workers=1)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"manifest.json: is there; pass --overwrite or another --output"):
        index(str(tmp_path), Members("jpg", None), validation=0.4, workers=1)
    assert (tmp_path / "manifest.json").read_bytes() == before
    index(str(tmp_path), Members("jpg", None), validation=0.4, workers=1, overwrite=True)
    assert (tmp_path / "manifest.json").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shards": "none"}, "no such folder"),
        ({"shards": "empty"}, "no .tar files in it"),
        ({"members": Members("webp", None)}, r"no sample is left for train; broken: .*no member .webp, only jpg, png"),
        ({"validation": 1e-9}, "no sample is left for validation"),
        *(({"validation": share}, "validation: must be between 0 and 1, got") for share in (5, 0, 1, float("nan"))),
        ({"validation_shards": ""}, "validation_shards: must be a pattern of names such as 'val-\\*.tar', got ''"),
        (
            {"validation_shards": "val*"},
            r"validation_shards: 'val\*' matches 0 of 1 shards, such as a.tar; it must match",
        ),
        ({"validation_shards": "*"}, r"validation_shards: '\*' matches 1 of 1 shards, such as a.tar; it must match"),
        ({"group_by": "show"}, "group_by: 'show' does not match 'p0000'"),
        ({"group_by": "("}, r"group_by: '\(' is no regular expression"),
    ],
)
def test_what_cannot_be_indexed_is_one_line_and_no_manifest(options, said, tmp_path):
    put(str(tmp_path / "in"), {"a.tar": some(0, 5)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.tar.gz").write_bytes(b"")
    options = {"shards": "in", "members": PAIR, "workers": 1} | options
    with pytest.raises(UserError, match=said) as error:
        index(str(tmp_path / options.pop("shards")), options.pop("members"), **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("output", ["new/", "folder", "folder/", "s3://bucket"])
def test_an_output_that_is_no_file_is_said_before_any_shard_is_read(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put("in", {"a.tar": some(0, 20)})
    (tmp_path / "folder").mkdir()
    scanned = []
    with pytest.raises(
        UserError, match=f"(output: {output} is a folder; name a file in it, such as )|use a folder or s3"
    ):
        index("in", PAIR, output, workers=1, progress=lambda *done: scanned.append(done))
    assert not scanned
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.tar", "folder", "in"]


# Streaming


@pytest.mark.parametrize("members", [PAIR, Members("jpg", None)], ids=["stored", "on the fly"])
def test_an_indexed_data_set_streams(members, s3_uri, small, tmp_path):
    put(s3_uri, {"a.tar": some(0, 30), "b.tar": [("x", {"jpg": b"broken"}), *some(30, 11)]})
    result = index(s3_uri, members, str(tmp_path / "set.json"), validation=0.3, workers=1)
    data = manifest.load(result.uri)
    mode = "stored" if members.sketch else "on_the_fly"
    config = small.model_copy(update={"sketch": small.sketch.model_copy(update={"mode": mode})})
    expected = {split: sorted(key for (_, key), at in check(result.uri, members).items() if at == split)
                for split in ("train", "validation")}  # fmt: skip
    stream = TrainingStream(data, config, 0, 1, 0)
    try:
        batches = list(itertools.islice(stream, -(-len(expected["train"]) // 8)))
    finally:
        stream.close()
    keys = [key for batch in batches for key in batch.keys]
    assert sorted(keys[: len(expected["train"])]) == expected["train"]
    assert all(batch.sketch.min() < 128 < batch.sketch.max() for batch in batches)
    held_out = [key for batch in validation_batches(data, config, 4) for key in batch.keys]
    assert sorted(held_out) == expected["validation"]
    if not members.sketch:
        with pytest.raises(UserError, match=r"holds no drawings; set sketch.mode to on_the_fly"):
            TrainingStream(data, small, 0, 1, 0)


def test_the_manifest_tells_where_it_came_from(tmp_path):
    put(str(tmp_path), {"a.tar": some(0, 20)})
    index(str(tmp_path), PAIR, validation=0.4, group_by=r"\d+", workers=1)
    document = json.loads((tmp_path / "manifest.json").read_bytes())
    assert document["info"] == {
        "source": {"kind": "index", "shards": str(tmp_path), "color": "jpg", "sketch": "png"},
        "options": {"validation": 0.4, "validation_shards": None, "group_by": r"\d+"},
    }
    assert "shards_at" not in document
