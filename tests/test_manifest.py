"""The manifest: what is written is what is loaded, and what is no manifest of this program is refused in one line.

Run: pytest tests/test_manifest.py
"""

import hashlib
import json

import pytest

from autopainter import storage
from autopainter.data import manifest
from autopainter.data.manifest import Chunk, Sample, Samples, Shard
from autopainter.errors import CorruptData, UserError

INFO = {"name": "cartoons", "licence": "CC BY-SA 4.0", "source": {"kind": "color-images", "size": 48}, "note": "Über"}


def shard(name, samples, chunk=16):
    """A shard with ``samples`` samples of 100 + 50 bytes and the fitting chunks."""
    return Shard(
        key=f"{name}.tar",
        bytes=200 * samples,
        sha256=hashlib.sha256(name.encode()).hexdigest(),
        samples=Samples.of(Sample(f"{name}/s-{n}", (200 * n, 100), (200 * n + 120, 50)) for n in range(samples)),
        chunks=tuple(
            Chunk(first, min(chunk, samples - first), 200 * first, 200 * min(first + chunk, samples), first * 2**25 + 1)
            for first in range(0, samples, chunk)
        ),
    )


SPLITS = {"train": (shard("train-0", 40), shard("train-1", 7)), "validation": (shard("validation-0", 3),)}


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    """URI of an empty place."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri")


def put(root, data, name="manifest.json"):
    storage.open_store(root).write(name, data)
    return f"{root}/{name}"


def refusal(uri, kind):
    """The message, one line, that loading is refused with; the class is exactly ``kind``."""
    with pytest.raises((UserError, CorruptData)) as caught:
        manifest.load(uri)
    assert caught.type is kind
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data.manifest: {uri}: ")
    return message


def test_what_is_encoded_is_loaded(root):
    data = manifest.encode(INFO, SPLITS)
    loaded = manifest.load(put(root, data))
    assert loaded.info == INFO
    assert loaded.splits == SPLITS
    assert loaded.uri == root
    assert loaded.id == hashlib.sha256(data).hexdigest()
    assert manifest.encode(loaded.info, loaded.splits) == data
    assert manifest.encode(INFO, {**SPLITS, "validation": ()}) != data


def test_the_manifest_is_plain_json_with_its_format_and_version():
    document = json.loads(manifest.encode(INFO, SPLITS))
    assert (document["format"], document["version"]) == ("autopainter-manifest", 2)
    second = document["splits"]["train"][1]
    assert second["sample_keys"][2] == "train-1/s-2"
    assert second["sample_files"][8:12] == [400, 100, 520, 50]
    assert document["splits"]["train"][0]["chunks"][1] == [16, 16, 3200, 6400, 2**29 + 1]


def test_a_split_that_is_missing_or_empty_is_named(root):
    splits = {"train": SPLITS["train"], "empty": (), "hollow": (shard("hollow", 0),)}
    loaded = manifest.load(put(root, manifest.encode(INFO, splits)))
    assert loaded.split("train") == SPLITS["train"]
    for name in ("validation", "empty", "hollow"):
        with pytest.raises(UserError, match=f"no samples in the split '{name}'") as caught:
            loaded.split(name)
        assert root in str(caught.value)


def test_a_missing_manifest_says_who_writes_it(root):
    assert "autopainter pack" in refusal(f"{root}/manifest.json", UserError)


@pytest.mark.parametrize("name", ["file/manifest.json", "folder"])
def test_a_path_that_is_no_file_is_refused(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    refusal(str(tmp_path / name), UserError)


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_format_version_is_named(root, version):
    document = json.loads(manifest.encode(INFO, SPLITS)) | {"version": version}
    message = refusal(put(root, json.dumps(document).encode()), UserError)
    assert f"format version {version}" in message
    assert "reads 2" in message


@pytest.mark.parametrize("data", [b"{}", b"[]", b"5", b"null", b'"text"', b'{"format": "webdataset", "version": 1}'])
def test_other_json_is_not_a_manifest(tmp_path, data):
    assert "not a manifest" in refusal(put(str(tmp_path), data), UserError)


def test_a_manifest_that_is_cut_off_is_damaged(root):
    data = manifest.encode(INFO, SPLITS)
    for length in (0, 1, 20, len(data) // 2, len(data) - 1):
        assert "not JSON" in refusal(put(root, data[:length]), CorruptData)
    assert "not JSON" in refusal(put(root, b"\xff" + data), CorruptData)


def damaged(damage):
    document = json.loads(manifest.encode(INFO, SPLITS))
    damage(document, document["splits"]["train"])
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda document, train: document.pop("splits"),
        lambda document, train: document.pop("info"),
        lambda document, train: document.update(splits=[1]),
        lambda document, train: document.update(info=5),
        lambda document, train: document["splits"].update(train=5),
        lambda document, train: train.append(None),
        lambda document, train: train[0].pop("sha256"),
        lambda document, train: train[0].pop("sample_files"),
        lambda document, train: train[0]["sample_files"].pop(),
        lambda document, train: train[0]["sample_files"].append(1),
        lambda document, train: train[0]["sample_keys"].append("one more"),
        lambda document, train: train[0]["chunks"][1].pop(),
        lambda document, train: train[0]["chunks"].append(7),
        lambda document, train: train[0].update(key=5),
        lambda document, train: train[0].update(bytes="9"),
        lambda document, train: train[0].update(sha256=5),
        lambda document, train: train[0].update(sample_keys="x" * len(train[0]["sample_keys"])),
        lambda document, train: train[0]["sample_keys"].__setitem__(0, 5),
        lambda document, train: document.update(shards_at=["there"]),
    ],
)
def test_a_document_of_another_form_is_damaged(tmp_path, damage):
    assert "damaged" in refusal(put(str(tmp_path), damaged(damage)), CorruptData)


def test_deeply_nested_json_is_damaged(tmp_path):
    assert "damaged" in refusal(put(str(tmp_path), b"[" * 100_000), CorruptData)


def shorten(shard):
    shard["sample_keys"].pop()
    del shard["sample_files"][-4:]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda train: train[0]["chunks"].clear(), id="samples without chunks"),
        pytest.param(lambda train: shorten(train[0]), id="chunks of more samples than there are"),
        pytest.param(lambda train: train[0]["chunks"][1].__setitem__(1, "16"), id="a text for a number"),
        pytest.param(lambda train: train[0]["sample_files"].__setitem__(9, "16"), id="a text for an offset"),
        pytest.param(lambda train: train[0]["sample_files"].__setitem__(9, 1.5), id="a fraction for an offset"),
        pytest.param(lambda train: train[0]["sample_files"].__setitem__(13, 10**6), id="a sample outside of its chunk"),
        pytest.param(lambda train: train[0]["sample_files"].__setitem__(13, -1), id="a negative length"),
        pytest.param(lambda train: train[0]["chunks"][0].__setitem__(2, -512), id="a chunk before the shard"),
        pytest.param(lambda train: train[0].update(key="../other.tar"), id="a shard elsewhere"),
    ],
)
def test_numbers_that_do_not_fit_together_are_damaged(tmp_path, damage):
    """They would fail, or give other samples, in the middle of a run."""
    assert "damaged" in refusal(put(str(tmp_path), damaged(lambda _, train: damage(train))), CorruptData)


def test_samples_without_drawings_and_shards_elsewhere(root):
    undrawn = Shard("a.tar", 400, "0" * 64, Samples.of([Sample("a", (0, 9), None)]), (Chunk(0, 1, 0, 200, 7),))
    loaded = manifest.load(put(root, manifest.encode({}, {"train": (undrawn,)}, shards_at="s3://bucket/shards")))
    assert loaded.uri == "s3://bucket/shards"
    assert loaded.split("train") == (undrawn,)
    assert loaded.split("train")[0].samples[0].sketch is None
    assert not loaded.split("train")[0].samples.drawn


def test_samples_are_a_sequence():
    rows = [Sample(f"k {n}", (n, 5), (n + 5, 2)) for n in range(5)]
    samples = Samples.of(rows)
    assert list(samples) == rows
    assert samples[3] == samples[-2] == rows[3]
    assert samples[1:3] == rows[1:3]
    assert samples.drawn
    assert len(Samples.of([])) == 0 == len(list(Samples.of([])))
    with pytest.raises(ValueError, match="do not fit"):
        Samples.of([Sample("two\nlines", (0, 1), None)])
    with pytest.raises(ValueError, match=r"inhomogeneous|fit"):
        Samples.of([Sample("a", (0, 1), None), Sample("b", (0, 1), (2, 3))])
