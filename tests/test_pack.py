"""Packing: what is in the shards, what the manifest and the summary say, splits, and faults of inputs and processes.

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256

import cv2
import numpy as np
import PIL.Image
import pytest
import webdataset
from waiting import PATIENCE_SECONDS

from autopainter import storage
from autopainter.data import manifest, pool
from autopainter.data.pack import PackOptions, pack
from autopainter.data.shard import ShardRecord, plan_shards
from autopainter.data.sketch import xdog
from autopainter.data.sources import ColorImages, Item, MatchedFolders, OpenMoji, SideBySide, openmoji
from autopainter.errors import StorageError, UserError

SMALL = PackOptions(limit=90, shard_samples=32, validation=0.2)
SIDES = ("train", "validation")


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
    PIL.Image.fromarray(color).save(buffer, kind, **options)
    return buffer.getvalue()


def packed_samples(folder):
    """Split and files of each sample, by its key, as webdataset reads them."""
    found = {}
    for split in SIDES:
        urls = sorted(str(path) for path in folder.glob(f"{split}-*.tar"))
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            assert found.setdefault(sample["__key__"], (split, sample))[1] is sample
    return found


def sides(folder):
    """Split of each input, by its name."""
    found = {}
    for split, sample in packed_samples(folder).values():
        found.setdefault(json.loads(sample["json"])["source"], set()).add(split)
    return found


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
        save(folder / f"part-{number % 3}" / f"{number:03d}.png", draw(number, (60, 80) if number % 2 else (80, 60)))
    return folder


# What is in the shards


def test_webdataset_reads_every_pair(packed):
    folder, result = packed
    source = OpenMoji(64)
    items = {item.key: item for item in source.listing().items}
    read = packed_samples(folder)
    for key, (_, sample) in read.items():
        assert {name for name in sample if name[0] != "_"} == {"color.jpg", "sketch.png", "json"}
        about = json.loads(sample["json"])
        assert about == {"key": key, "group": openmoji.group(key), "source": f"{key}.svg"}
        (pair,) = source.pairs(items[key], source.fetch(items[key]))
        color = np.asarray(PIL.Image.open(io.BytesIO(sample["color.jpg"])))
        assert color.shape == (64, 64, 3)
        assert np.square(color.astype(float) - pair.color).mean() < 255**2 / 10**3.3  # 33 dB
        image = PIL.Image.open(io.BytesIO(sample["sketch.png"]))
        assert image.mode == "L"
        assert (np.asarray(image) == pair.sketch).all()
    assert len(read) == sum(result.samples.values()) == SMALL.limit - len(result.left_out["excluded"])
    found = [split for split, _ in read.values()]
    assert result.samples == {split: found.count(split) for split in SIDES}
    assert result.bad == {"broken": {}, "undecided": {}}


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


def test_what_is_left_out_by_design_is_named_with_the_reason(packed):
    _, result = packed
    assert result.left_out["excluded"]
    assert set(result.left_out["excluded"].values()) == {"its drawing is a bare frame"}


def test_the_summary_says_what_became_of_every_input(tmp_path):
    for number in range(16):
        save(tmp_path / "in" / f"{number:02d}.png", np.hstack([draw(number), draw(number)]))
    save(tmp_path / "in" / "odd.png", draw(1, (60, 61)))
    (tmp_path / "in" / "cut.jpg").write_bytes(image_bytes(draw(2), "JPEG")[:300])
    (tmp_path / "in" / "copy.png").write_bytes((tmp_path / "in" / "03.png").read_bytes())
    (tmp_path / "in" / "notes.txt").write_text("")
    source = SideBySide(str(tmp_path / "in"), 32, "left")
    result = pack(source, str(tmp_path / "out"), PackOptions(validation=0.3), workers=1)
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert summary == {
        "id": sha256((tmp_path / "out" / "manifest.json").read_bytes()).hexdigest(),
        "samples": result.samples,
        "shards": 2,
        "bytes": sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar")),
        "left_out": {"broken": result.left_out["broken"], "undecided": {}, "excluded": {}},
        "duplicates": [["03.png", "copy.png"]],
        "ignored": {".txt": 1},
    }
    assert list(result.left_out["broken"]) == ["cut.jpg", "odd.png"]
    assert "its width of 61 pixels" in result.left_out["broken"]["odd.png"]
    assert sum(result.samples.values()) == 17
    assert {name: getattr(result, name) for name in summary} == summary


def test_a_portrait_is_two_samples_of_one_group_on_one_side(tmp_path):
    for number in range(24):
        save(tmp_path / "in" / f"{number}.png", draw(number, (90, 60) if number % 2 else (60, 90)))
    source = ColorImages(str(tmp_path / "in"), 32, "upper-lower")
    result = pack(source, str(tmp_path / "out"), PackOptions(validation=0.3), workers=1)
    found = packed_samples(tmp_path / "out")
    parts = {0: [""], 1: ["-u", "-d"]}
    assert found.keys() == {f"{number}{part}" for number in range(24) for part in parts[number % 2]}
    for number in range(1, 24, 2):
        (upper, one), (lower, other) = found[f"{number}-u"], found[f"{number}-d"]
        assert upper == lower
        assert json.loads(one["json"])["group"] == json.loads(other["json"])["group"] == str(number)
        assert one["color.jpg"] != other["color.jpg"]
    assert sum(result.samples.values()) == 36


def test_a_data_set_for_drawings_on_the_fly_holds_no_drawings(pictures, tmp_path):
    options = PackOptions(validation=0.2)
    stored = pack(ColorImages(str(pictures), 32), str(tmp_path / "stored"), options, workers=1)
    result = pack(ColorImages(str(pictures), 32, sketch="on_the_fly"), str(tmp_path / "color"), options, workers=1)
    with_drawings, without = packed_samples(tmp_path / "stored"), packed_samples(tmp_path / "color")
    assert with_drawings.keys() == without.keys()
    for key, (_, sample) in without.items():
        assert {name for name in sample if name[0] != "_"} == {"color.jpg", "json"}
        assert sample["color.jpg"] == with_drawings[key][1]["color.jpg"]
    assert result.bytes < stored.bytes
    for shards in manifest.load(result.uri).splits.values():
        assert not any(shard.samples.drawn for shard in shards)


# Splits


def test_groups_of_openmoji_never_cross_the_split():
    items = OpenMoji(64).listing().items
    plans = plan_shards(items, PackOptions())
    of = {split: {item.group for plan in plans if plan.split == split for item in plan.items} for split in SIDES}
    assert not of["train"] & of["validation"]
    assert 0.03 < len(of["validation"]) / len({item.group for item in items}) < 0.07
    assert sorted(item.key for plan in plans for item in plan.items) == [item.key for item in items]


def test_the_split_stays_when_items_are_added():
    items = OpenMoji(64).listing().items
    before, after = plan_shards(items[::2], PackOptions()), plan_shards(items, PackOptions())
    held_out = {item.key for plan in after if plan.split == "validation" for item in plan.items}
    for plan in before:
        assert all((item.key in held_out) == (plan.split == "validation") for item in plan.items)


def test_an_empty_split_says_which_share_works(tmp_path):
    for number in range(6):
        save(tmp_path / f"{number}.png", draw(number))
    source = ColorImages(str(tmp_path), 32)
    with pytest.raises(UserError, match="leaves one split of 6 groups empty") as error:
        plan_shards(source.listing().items, PackOptions(validation=1e-6))
    for share in map(float, str(error.value).split(" from ")[1].split(" to ")):
        plans = plan_shards(source.listing().items, PackOptions(validation=share))
        assert [plan.split for plan in plans] == ["train", "validation"]
    with pytest.raises(UserError, match="variants of one drawing"):
        plan_shards(source.listing().items[:1], PackOptions())


def test_both_ends_of_the_shares_that_work_do():
    for first in range(2000):
        items = [Item(f"{number}", f"{number}", "", ()) for number in (first, first + 1)]
        with pytest.raises(UserError, match="leaves one split of 2 groups empty") as error:
            plan_shards(items, PackOptions(validation=1e-9))
        for share in map(float, str(error.value).split(" from ")[1].split(" to ")):
            plan_shards(items, PackOptions(validation=share))


def test_groups_by_a_pattern_stay_on_one_side(tmp_path):
    for number in range(40):
        save(tmp_path / "in" / f"show-{number % 8}" / f"{number}.png", draw(number))
    source, options = ColorImages(str(tmp_path / "in"), 32), PackOptions(validation=0.3)
    of_pictures = pack(source, str(tmp_path / "plain"), options, workers=1)
    of_shows = pack(source, str(tmp_path / "out"), replace(options, group_by=r"show-(\d)"), workers=1)
    assert of_pictures.id != of_shows.id
    crossing = {}
    for folder in ("plain", "out"):
        shows = {}
        for name, splits in sides(tmp_path / folder).items():
            shows.setdefault(name.partition("/")[0], set()).update(splits)
        assert len(shows) == 8
        crossing[folder] = sum(len(splits) > 1 for splits in shows.values())
    assert crossing["plain"] > 0 == crossing["out"]
    about = {json.loads(sample["json"])["group"] for _, sample in packed_samples(tmp_path / "out").values()}
    assert about == set("01234567")
    with pytest.raises(UserError, match=r"group_by: 'show-9' does not match 'show-0/0.png'"):
        pack(source, str(tmp_path / "none"), replace(options, group_by="show-9"), workers=1)
    assert not (tmp_path / "none").exists()


def test_copies_are_on_one_side_and_listed(tmp_path):
    """Eight pictures, each five times: without the comparison some would be on both sides."""
    for number in range(40):
        save(tmp_path / "in" / f"{number:02d}.png", draw(number % 8))
    source = ColorImages(str(tmp_path / "in"), 32)
    result = pack(source, str(tmp_path / "out"), PackOptions(validation=0.3), workers=1)
    of = sides(tmp_path / "out")
    copies = [[f"{number:02d}.png" for number in range(first, 40, 8)] for first in range(8)]
    assert sorted(result.duplicates) == copies
    assert all(len(set.union(*(of[name] for name in names))) == 1 for names in copies)
    assert sum(result.samples.values()) == 40
    plans = plan_shards(source.listing().items, PackOptions(validation=0.3))
    alone = {item.location: plan.split for plan in plans for item in plan.items}
    assert any(len({alone[name] for name in names}) == 2 for names in copies)


def test_a_drawing_with_several_colourings_is_on_one_side(tmp_path):
    for number in range(30):
        save(tmp_path / "color" / f"{number:02d}.png", draw(number))
        save(tmp_path / "line" / f"{number:02d}.png", draw(number // 3)[..., 0])
    source = MatchedFolders(str(tmp_path / "color"), str(tmp_path / "line"), 32)
    result = pack(source, str(tmp_path / "out"), PackOptions(validation=0.3), workers=1)
    of = sides(tmp_path / "out")
    drawings = [[f"{number:02d}.png" for number in range(first, first + 3)] for first in range(0, 30, 3)]
    assert sorted(result.duplicates) == drawings
    assert all(len(set.union(*(of[name] for name in names))) == 1 for names in drawings)


def test_copies_join_the_groups_of_a_pattern(tmp_path):
    """A picture of the one show is in the other as well: both shows are one group."""
    for number in range(24):
        save(tmp_path / "in" / f"{number % 6}-{number}.png", draw(number))
    for show in range(5):
        save(tmp_path / "in" / f"{show}-copy.png", draw(show + 1))
    save(tmp_path / "in" / "9-alone.png", draw(99))
    options = PackOptions(validation=0.5, group_by=r"^\d")
    with pytest.raises(UserError, match=r"validation: a share of 0.5 leaves one split of 2 groups empty"):
        pack(ColorImages(str(tmp_path / "in"), 32), str(tmp_path / "out"), replace(options, validation=0.5), workers=1)


# Same bytes, whatever happens


def test_any_number_of_workers_gives_the_same_bytes(pictures, tmp_path):
    source = ColorImages(str(pictures), 48, "upper-lower", jitter=0.7)
    options = PackOptions(shard_samples=16, validation=0.2)
    progress = []
    one = pack(source, str(tmp_path / "one"), options, workers=1)
    two = pack(source, str(tmp_path / "two"), options, workers=2, progress=lambda *done: progress.append(done))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert replace(one, uri=two.uri) == two
    assert sum(one.samples.values()) == 60
    packing = [done for done in progress if done[0] == "packing"]
    assert packing[0] == ("packing", 0, 40)
    assert packing[-1] == ("packing", 40, 40)
    shards = {*(f"train-{number:05d}.tar" for number in range(3)), "validation-00000.tar"}
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"manifest.json", "summary.json", *shards}


SCRIPT = """
import os, pathlib, signal, sys
from autopainter.data.pack import PackOptions, pack
from autopainter.data.sources import OpenMoji

if __name__ == "__main__":
    folder, stop = pathlib.Path(sys.argv[1]), int(sys.argv[2])

    def progress(what, done, total):
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
    errors = process.communicate(timeout=PATIENCE_SECONDS)[1].decode()
    assert process.returncode == -stop, errors
    assert no_process_is_left(process.pid)
    assert not (folder / "manifest.json").exists()
    assert list(folder.glob("*.tar"))
    return errors


@dataclass(frozen=True)
class Partly(OpenMoji):
    """Must not make the pairs of some items again."""

    done: frozenset = frozenset()

    def pairs(self, item, files):
        assert item.key not in self.done
        return super().pairs(item, files)


def test_a_killed_pack_is_continued_by_the_same_command(tmp_path):
    stopped(tmp_path / "data", signal.SIGKILL)
    options = PackOptions(limit=400, shard_samples=16)
    records = [ShardRecord.decode(path.read_bytes()) for path in (tmp_path / "data").glob("_pack/*/*.tar.json")]
    done = frozenset(key for record in records for key in record.shard.samples.keys)
    assert len(done) >= 10
    progress = []
    source = Partly(48, done)
    result = pack(source, str(tmp_path / "data"), options, workers=1, progress=lambda *done: progress.append(done))
    whole = pack(OpenMoji(48), str(tmp_path / "whole"), options, workers=1)
    assert 1 <= result.kept_shards == len(records) < result.shards
    assert next(done for done in progress if done[0] == "packing") == ("packing", 16 * len(records), 400)
    assert replace(whole, uri=result.uri, kept_shards=result.kept_shards) == result
    for leftover in (tmp_path / "data").glob(".tmp-*"):  # of a write that was killed; no reader looks at it
        leftover.unlink()
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")


def test_ctrl_c_ends_all_with_one_traceback(tmp_path):
    assert stopped(tmp_path / "data", signal.SIGINT).count("Traceback") == 1


@dataclass(frozen=True)
class Failing(ColorImages):
    """Storage gives up on one of the pictures."""

    def pairs(self, item, files):
        if item.key.endswith("005"):
            raise StorageError(f"{item.location}: gone for good")
        return super().pairs(item, files)


@dataclass(frozen=True)
class Dying(ColorImages):
    """A worker is killed from outside."""

    def pairs(self, item, files):
        if item.key.endswith("005"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().pairs(item, files)


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
    tasks = [("fails", tmp_path / "started"), (other, tmp_path / "started")]
    with pytest.raises(StorageError, match="gone for good"):
        pool.run(work, tasks, 2, lambda done: None)
    assert not multiprocessing.active_children()


@dataclass(frozen=True)
class Unreadable(ColorImages):
    """Must not be packed."""

    def pairs(self, item, files):
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


def test_a_second_run_needs_the_summary(pictures, tmp_path):
    options = PackOptions(validation=0.2)
    pack(ColorImages(str(pictures), 32), str(tmp_path), options, workers=1)
    summary = json.loads((tmp_path / "summary.json").read_bytes())
    for damaged in (b"{}", b"no", json.dumps(summary | {"id": "of another pack"}).encode(), None):
        (tmp_path / "summary.json").unlink()
        if damaged is not None:
            (tmp_path / "summary.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"summary.json: missing or damaged; pack again with --overwrite"):
            pack(ColorImages(str(pictures), 32), str(tmp_path), options, workers=1)
    pack(ColorImages(str(pictures), 32), str(tmp_path), options, workers=1, overwrite=True)
    assert pack(ColorImages(str(pictures), 32), str(tmp_path), options, workers=1).already_packed


def test_a_replaced_input_is_noticed(pictures, tmp_path):
    for number in range(8):
        save(tmp_path / "in" / f"{number}.png", draw(number))
    options = PackOptions(validation=0.5)
    pack(ColorImages(str(tmp_path / "in"), 32), str(tmp_path / "out"), options, workers=1)
    save(tmp_path / "in" / "3.png", draw(100, (50, 50)))
    with pytest.raises(UserError, match="inputs"):
        pack(ColorImages(str(tmp_path / "in"), 32), str(tmp_path / "out"), options, workers=1)


@dataclass(frozen=True)
class Meddling(ColorImages):
    """Something happens in the destination while a pack with SOME makes its last shard."""

    meddle: Callable = print

    def info(self):
        return ColorImages(self.uri, self.size).info()

    def pairs(self, item, files):
        if item == plan_shards(self.listing().items, SOME)[-1].items[0]:
            self.meddle()
        return super().pairs(item, files)


SOME = PackOptions(shard_samples=16, validation=0.2)
OTHER = PackOptions(shard_samples=32, validation=0.2)


def interrupted(pictures, folder):
    """A pack with SOME that was interrupted when its first shard was finished."""
    with pytest.raises(StorageError):
        pack(Failing(str(pictures), 48), str(folder), SOME, workers=1)
    assert (folder / "train-00000.tar").exists()


def test_an_interrupted_pack_gives_way_to_another_only_if_told(pictures, tmp_path):
    interrupted(pictures, tmp_path / "data")
    before = contents(tmp_path / "data")
    with pytest.raises(UserError, match=r"unfinished pack \(options.shard_samples 16 -> 32\); .*goes on.*--overwrite"):
        pack(ColorImages(str(pictures), 48), str(tmp_path / "data"), OTHER, workers=1)
    assert contents(tmp_path / "data") == before
    pack(ColorImages(str(pictures), 48), str(tmp_path / "data"), OTHER, workers=1, overwrite=True)
    pack(ColorImages(str(pictures), 48), str(tmp_path / "fresh"), OTHER, workers=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


def test_a_pack_that_another_one_has_replaced_writes_no_more(pictures, tmp_path):
    source, target = ColorImages(str(pictures), 48), str(tmp_path / "data")
    meddle = partial(pack, source, target, OTHER, workers=1, overwrite=True)
    with pytest.raises(UserError, match=f"another pack has taken over {target}; pack to another place"):
        pack(Meddling(str(pictures), 48, meddle=meddle), target, SOME, workers=1)
    pack(source, str(tmp_path / "fresh"), OTHER, workers=1)
    assert contents(tmp_path / "data") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["train-00000.tar", "_pack/*/train-00000.tar.json", "_pack/*/plan.json"])
def test_no_manifest_names_a_shard_that_is_gone(pictures, tmp_path, name):
    def meddle():
        (path,) = tmp_path.glob(name)
        path.unlink()

    with pytest.raises(UserError, match="another pack has taken over"):
        pack(Meddling(str(pictures), 48, meddle=meddle), str(tmp_path), SOME, workers=1)
    assert not (tmp_path / "manifest.json").exists()


def test_the_same_pack_at_the_same_time_gives_the_same(pictures, tmp_path):
    source, target = ColorImages(str(pictures), 48), str(tmp_path / "data")

    def overtaken(*arguments):
        made = pool.local(1)(*arguments)
        pack(source, target, SOME, workers=1)
        return made

    result = pack(source, target, SOME, run=overtaken)
    assert pack(source, target, SOME) == replace(result, already_packed=True)
    assert not (tmp_path / "data" / "_pack").exists()


RECORD, PLAN = "_pack/*/train-00000.tar.json", "_pack/*/plan.json"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((RECORD, damage) for damage in (b"", b'{"splits": 5}', b"[" * 100_000, "cut", "flipped")),
        (PLAN, b"{"),
        ("train-00000.tar", "cut"),
        ("train-00000.tar", "flipped"),
    ],
)
def test_what_is_damaged_of_an_interrupted_pack_is_made_again(pictures, tmp_path, name, damage):
    data = tmp_path / "data"
    interrupted(pictures, data)
    (path,) = data.glob(name)
    whole = path.read_bytes()
    middle = len(whole) // 2
    kinds = {"cut": whole[:middle], "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]}
    path.write_bytes(kinds.get(damage, damage))
    pack(ColorImages(str(pictures), 48), str(data), SOME, workers=1)
    pack(ColorImages(str(pictures), 48), str(tmp_path / "fresh"), SOME, workers=1)
    assert contents(data) == contents(tmp_path / "fresh")


def test_a_damaged_plan_of_another_pack_gives_way_if_told(pictures, tmp_path):
    interrupted(pictures, tmp_path)
    (plan,) = tmp_path.glob("_pack/*/plan.json")
    plan.write_bytes(b"{")
    with pytest.raises(UserError, match=r"holds an unfinished pack; the command that began it goes on.*--overwrite"):
        pack(ColorImages(str(pictures), 48), str(tmp_path), OTHER, workers=1)
    assert pack(ColorImages(str(pictures), 48), str(tmp_path), OTHER, workers=1, overwrite=True).samples


def test_shards_of_others_are_not_touched(pictures, tmp_path):
    (tmp_path / "train-00000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"train-00000.tar.*--overwrite"):
        pack(ColorImages(str(pictures), 32), str(tmp_path), workers=1)
    assert contents(tmp_path) == {"train-00000.tar": b"mine"}


# Inputs


def test_broken_inputs_are_named_and_the_others_packed(tmp_path):
    for number in range(20):
        save(tmp_path / "in" / f"{number}.jpg", draw(number), quality=90)
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "in" / "cut.jpeg").write_bytes(image_bytes(draw(5), "JPEG")[:-200])
    first, second = (PIL.Image.fromarray(draw(number)) for number in (1, 2))
    first.save(tmp_path / "in" / "moving.gif", save_all=True, append_images=[second])
    (tmp_path / "in" / "._0.jpg").write_bytes(b"what some systems leave behind")
    source = ColorImages(str(tmp_path / "in"), 32)
    result = pack(source, str(tmp_path / "out"), PackOptions(validation=0.3), workers=1)
    assert sum(result.samples.values()) == 20
    reasons = {"bad.png": "not an image", "cut.jpeg": "damaged", "moving.gif": "animated"}
    assert result.bad == {"broken": result.left_out["broken"], "undecided": {}}
    assert list(result.left_out["broken"]) == list(reasons)
    assert all(reason in result.left_out["broken"][name] for name, reason in reasons.items())
    assert pack(source, str(tmp_path / "out"), PackOptions(validation=0.3)).left_out == result.left_out


def test_undecided_and_unmatched_inputs_are_named(tmp_path):
    grey = cv2.cvtColor(draw(1), cv2.COLOR_RGB2GRAY)
    save(tmp_path / "sides" / "grey.png", np.hstack([grey, grey]))
    for number in range(8):
        color = draw(number)
        lines = np.dstack([xdog(color)] * 3)
        save(tmp_path / "sides" / f"{number}.png", np.hstack([color, lines] if number % 2 else [lines, color]))
        save(tmp_path / "color" / f"{number}.png", color)
        save(tmp_path / "line" / f"{number + 1}.png", lines)
    options = PackOptions(validation=0.4)
    result = pack(SideBySide(str(tmp_path / "sides"), 32, "auto"), str(tmp_path / "out"), options, workers=1)
    assert list(result.bad["undecided"]) == ["grey.png"]
    assert sum(result.samples.values()) == 8
    source = MatchedFolders(str(tmp_path / "color"), str(tmp_path / "line"), 32)
    result = pack(source, str(tmp_path / "matched"), options, workers=1)
    assert sum(result.samples.values()) == 7
    assert list(result.bad["broken"]) == [str(tmp_path / "line" / "8.png"), "0.png"]


def test_names_that_are_no_text(tmp_path):
    odd = os.fsdecode(b"Bl\xe4tter")
    for number in range(8):
        save(tmp_path / odd / f"{number}.png", draw(number))
        save(tmp_path / "line" / f"{number}.png", draw(number))
    for name in (f"{odd}.png", f"{odd}.bmp"):
        save(tmp_path / "line" / name, draw(1))
    save(tmp_path / odd / f"{odd}.png", draw(1))
    source = MatchedFolders(str(tmp_path / odd), str(tmp_path / "line"), 32)
    out = tmp_path / odd / "out"
    result = pack(source, str(out), PackOptions(validation=0.4), workers=1)
    assert result.left_out["broken"] == {
        r"Bl\udce4tter.png": r"has several drawings: Bl\udce4tter.bmp, Bl\udce4tter.png"
    }
    assert manifest.load(result.uri).info["source"]["colors"] == str(tmp_path / odd)
    assert pack(source, str(out), PackOptions(validation=0.4), workers=1).already_packed


@pytest.mark.parametrize("case", ["empty", "missing", "all broken", "destination is a file"])
def test_hopeless_commands_end_in_one_line_and_write_nothing(tmp_path, case):
    folder, out = tmp_path / "in", tmp_path / "out"
    message = {"empty": "no pictures", "missing": "no such folder", "all broken": "no pair is left"}.get(
        case, "cannot be written"
    )
    if case != "missing":
        folder.mkdir()
    for number in range(0 if case in ("empty", "missing") else 8):
        data = bytes(number) if case == "all broken" else image_bytes(draw(number), "PNG")
        (folder / f"{number}.png").write_bytes(data)
    if case == "destination is a file":
        out.write_text("")
    with pytest.raises(UserError, match=message) as error:
        pack(ColorImages(str(folder), 32), str(out), PackOptions(validation=0.5), workers=1)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("*.tar"))
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    "options",
    [
        {"validation": 0}, {"validation": 1.0}, {"shard_samples": 20}, {"jpeg_quality": 0}, {"limit": 0},
        {"group_by": "("},
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        PackOptions(**options)


# S3


def test_from_s3_to_s3(s3_uri, tmp_path):
    inputs = storage.open_store(f"{s3_uri}/in")
    for number in range(24):
        inputs.write(f"sub/{number}.png", image_bytes(draw(number), "PNG"))
    inputs.write("bad.jpg", b"")
    options = PackOptions(shard_samples=16, validation=0.3)
    result = pack(ColorImages(f"{s3_uri}/in", 32), f"{s3_uri}/out", options, workers=2)
    assert list(result.left_out["broken"]) == ["bad.jpg"]
    data = manifest.load(result.uri)
    store = storage.open_store(data.uri)
    names = [shard.key for shards in data.splits.values() for shard in shards]
    assert [entry.key for entry in store.list()] == sorted(["manifest.json", "summary.json", *names])
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
