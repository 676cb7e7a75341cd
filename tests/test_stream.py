"""The stream from a real S3 server: the same samples for any workers, threads and start, and what faults it names.

The data set is the ``dataset`` of conftest.py: several small shards with uneven chunks.
Run: pytest tests/test_stream.py
"""

import itertools
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import CancelledError
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from autopainter import cli, seeding, storage
from autopainter.data import hints, manifest, pack, samples, sources, stream
from autopainter.data.stream import TrainingStream, validation_batches
from autopainter.errors import CorruptData, StorageError, UserError
from autopainter.seeding import Use
from autopainter.storage import retries
from autopainter.uri import split

FIELDS = ("sketch", "color", "hint", "dropout")


def changed(config, **sections):
    """A configuration with fields replaced: data={"flip": False}."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=fields) for name, fields in sections.items()}
    )


def batches(data, config, steps, start=0, rank=0, world=1):
    """Some steps of one worker."""
    running = TrainingStream(data, config, rank, world, start)
    try:
        return list(itertools.islice(running, steps))
    finally:
        running.close()


def union(parts):
    """The global batch out of the workers' batches of one step: worker r has positions r, r + W, ..."""
    world, share = len(parts), len(parts[0].keys)
    keys = [parts[rank].keys[row] for row in range(share) for rank in range(world)]
    whole = {name: torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1) for name in FIELDS}
    return stream.Batch(parts[0].step, keys, **whole)


def assert_same(one, other):
    assert (one.step, one.keys) == (other.step, other.keys)
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.fixture
def data(dataset):
    return manifest.load(dataset)


@pytest.fixture
def copied(dataset, s3_uri):
    """The data set again, to be damaged: (manifest, store)."""
    source, store = storage.open_store(split(dataset)[0]), storage.open_store(s3_uri)
    for entry in source.list():
        store.write(entry.key, source.read(entry.key))
    return manifest.load(f"{s3_uri}/manifest.json"), store


@pytest.fixture
def tiny(pictures, tmp_path):
    """Manifest of a data set that is smaller than a batch."""
    options = pack.PackOptions(limit=6, shard_samples=16, validation=0.5)
    pack.pack(sources.ColorImages(str(pictures), size=48), str(tmp_path / "tiny"), options, workers=1)
    return manifest.load(str(tmp_path / "tiny" / "manifest.json"))


def train_samples(data):
    return [sample.key for shard in data.split("train") for sample in shard.samples]


def test_the_fixture_is_uneven(data):
    """What the tests below stand on: several shards, a short chunk, and steps that cross the epoch's end."""
    shards = data.split("train")
    sizes = {chunk.samples for shard in shards for chunk in shard.chunks}
    assert len(shards) > 2
    assert len(sizes) > 1
    assert len(train_samples(data)) % 8


def test_the_shapes_of_a_batch(data, small):
    (batch,) = batches(data, small, 1, start=3)
    assert batch.step == 3
    assert batch.sketch.shape == (8, 1, 32, 32)
    assert batch.color.shape == (8, 3, 32, 32)
    assert batch.hint.shape == (8, 4, 32, 32)
    assert {getattr(batch, name).dtype for name in FIELDS[:3]} == {torch.uint8}
    assert batch.dropout.dtype == torch.int64
    assert len(set(batch.dropout.tolist())) == 8
    part = batch.part(slice(2, 5))
    assert part.keys == batch.keys[2:5]
    assert all(torch.equal(getattr(part, name), getattr(batch, name)[2:5]) for name in FIELDS)


@pytest.mark.parametrize(("world", "lanes"), [(2, None), (2, 2), (4, 3), (8, 1)])
def test_any_number_of_workers_gets_the_same_global_batches(data, small, world, lanes):
    small = changed(small, data={"lanes": lanes})
    steps = 2 * len(train_samples(data)) // 8 + 2  # over two epoch seams
    alone = batches(data, small, steps)
    together = [batches(data, small, steps, rank=rank, world=world) for rank in range(world)]
    for one, *parts in zip(alone, *together, strict=True):
        assert_same(one, union(parts))


def test_each_epoch_holds_every_sample_once(data, small):
    count = len(train_samples(data))
    keys = [key for batch in batches(data, small, 3 * count // 8 + 1) for key in batch.keys]
    epochs = [keys[count * number : count * (number + 1)] for number in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(train_samples(data))
    assert epochs[0] != epochs[1] != epochs[2]


def test_any_step_is_reached_at_once(data, small):
    small = changed(small, data={"lanes": 2})
    seam = len(train_samples(data)) // 8
    whole = batches(data, small, seam + 4)
    for start in (1, seam - 1, seam, seam + 1):
        for resumed, expected in zip(batches(data, small, 3, start=start), whole[start : start + 3], strict=True):
            assert_same(resumed, expected)
    far = 10**9
    (alone,) = batches(data, small, 1, start=far)
    assert_same(alone, union([batches(data, small, 1, far, rank, 2)[0] for rank in range(2)]))


@pytest.mark.parametrize("threads", [(1, 1, 1), (1, 4, 3), (8, 1, 16), (16, 8, 5)])
def test_no_number_of_threads_changes_a_batch(data, small, threads):
    fetch, decode, prefetch = threads
    other = changed(small, data={"fetch_threads": fetch, "decode_threads": decode, "prefetch_batches": prefetch})
    for one, two in zip(batches(data, small, 14), batches(data, other, 14), strict=True):
        assert_same(one, two)


@pytest.mark.parametrize("change", [{"train": {"seed": 1}}, {"data": {"lanes": 3}}, {"data": {"block_chunks": 3}}])
def test_what_is_part_of_the_order_changes_it(data, small, change):
    small = changed(small, data={"lanes": 2})
    before, after = batches(data, small, 5), batches(data, changed(small, **change), 5)
    assert [batch.keys for batch in before] != [batch.keys for batch in after]


def test_a_batch_is_made_as_the_configuration_says(data, small):
    """Each sample from the shard's bytes by the functions of ``samples``, seeded by its global position."""
    plain = {}
    store = storage.open_store(data.uri)
    for shard in data.split("train"):
        tar = store.read(shard.key)
        for sample in shard.samples:
            files = [tar[offset : offset + length] for offset, length in (sample.color, sample.sketch)]
            plain[sample.key] = samples.decode(*files, sample.key)
    small = small.model_copy(update={"hints": small.hints.model_copy(update={"recolored": 0.0})})
    for batch in batches(data, small, 2, start=11):
        for row, key in enumerate(batch.keys):
            position = batch.step * 8 + row
            color, sketch = samples.augment(*plain[key], small, seeding.generator(0, Use.AUGMENT, position))
            hint = hints.draw(color, sketch, small.hints, seeding.generator(0, Use.HINTS, position))
            for name, expected in (("color", color), ("sketch", sketch[..., None]), ("hint", hint)):
                assert (getattr(batch, name)[row].numpy() == expected.transpose(2, 0, 1)).all()
            assert batch.dropout[row].item() % 2**64 == seeding.key(0, Use.DROPOUT, position)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_data_set_smaller_than_a_batch(tiny, small, world):
    names = train_samples(tiny)
    assert 1 <= len(names) < 8
    parts = [batches(tiny, small, 4, rank=rank, world=world) for rank in range(world)]
    keys = [key for step in zip(*parts, strict=True) for key in union(step).keys]
    for first in range(0, len(keys) - len(names), len(names)):
        assert sorted(keys[first : first + len(names)]) == sorted(names)
    for one, *others in zip(batches(tiny, small, 4), *parts, strict=True):
        assert_same(one, union(others))


# So that what is read so far is known exactly.
ONE_FETCHER = {"fetch_threads": 1, "prefetch_batches": 1, "fetch_ahead_batches": 0}


def test_each_chunk_is_fetched_once_an_epoch_and_then_let_go(data, small):
    config = changed(small, train={"global_batch": 1}, data=ONE_FETCHER | {"lanes": 2, "block_chunks": 1})
    running = TrainingStream(data, config, 0, 1, 0)
    needed = sum(chunk.stop - chunk.start for _, chunk in running.split.chunks)
    held = 0
    for epoch in range(1, 4):
        for _ in train_samples(data):
            next(running)
            held = max(held, len(running._chunks))
        assert running.split.bytes_read == epoch * needed
        assert not running._chunks
    assert 0 < held <= 2  # lanes * block_chunks
    running.close()
    assert needed < sum(shard.bytes for shard in data.split("train"))  # without the ends of the archives


def test_a_late_start_fetches_only_what_is_left_of_the_epoch(data, small):
    config = changed(small, data=ONE_FETCHER)
    seam = len(train_samples(data)) // 8
    running = TrainingStream(data, config, 0, 1, seam - 1)
    next(running)
    order = stream.training_order(running.split, config)
    wanted = set(order.epoch(0)[1][(seam - 1) * 8 : seam * 8].tolist())
    chunks = [running.split.chunks[index][1] for index in wanted]
    assert running.split.bytes_read == sum(chunk.stop - chunk.start for chunk in chunks)
    running.close()


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 2)])
def test_a_late_start_lets_go_of_its_chunks_as_well(data, small, rank, world):
    config = changed(small, train={"global_batch": world}, data=ONE_FETCHER | {"lanes": 2})
    count = len(train_samples(data))
    running = TrainingStream(data, config, rank, world, count // 2 // world)
    for batch in running:
        if (batch.step + 1) * world + rank >= count:  # the next position of this worker is of the second epoch
            break
    assert not running._chunks
    running.close()


def test_chunks_are_fetched_ahead_of_their_batches(data, small):
    config = changed(small, data={"prefetch_batches": 1, "fetch_ahead_batches": 3})
    running = TrainingStream(data, config, 0, 1, 0)
    next(running)
    wanted = set(running.order.epoch(0)[1][: 4 * 8].tolist())  # the batch that is out and three more
    assert {chunk for _, chunk in running._chunks} <= wanted
    deadline = time.monotonic() + 30
    sizes = {chunk: running.split.chunks[chunk][1] for chunk in wanted}
    while running.split.bytes_read < sum(chunk.stop - chunk.start for chunk in sizes.values()):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)
    running.close()


@pytest.mark.parametrize(("world", "ahead", "lanes"), [(1, 0, None), (1, 30, None), (2, 5, 4), (4, 16, 3)])
def test_the_memory_stays_below_what_is_said(data, small, world, ahead, lanes):
    config = changed(small, data={"fetch_ahead_batches": ahead, "lanes": lanes, "block_chunks": 1})
    running = TrainingStream(data, config, world - 1, world, 0)
    batch = sum(getattr(next(running), name).nbytes for name in FIELDS)
    assert running.most_bytes > 3 * batch  # two made ahead, one taken
    most = 0
    for _ in range(3 * len(train_samples(data)) // 8):
        next(running)
        most = max(most, running.held_bytes)
    assert 0 < most <= running.most_bytes - 3 * batch
    assert 0 <= running.ready_batches <= 2
    running.close()


def test_after_a_failure_the_stream_does_not_go_on(copied, small):
    data, store = copied
    store.delete([shard.key for shard in data.split("train")])
    running = TrainingStream(data, small, 0, 1, 0)
    for _ in range(3):
        with pytest.raises(StorageError, match="not found"):
            next(running)
    running.close()


# The cache


def cached(config, folder, gib=1.0):
    return changed(config, data=ONE_FETCHER | {"cache": str(folder), "cache_gib": gib})


def test_later_epochs_come_from_the_cache(data, small, tmp_path):
    steps = 2 * len(train_samples(data)) // 8
    plain = batches(data, small, steps)
    config = cached(small, tmp_path / "cache")
    first = TrainingStream(data, config, 0, 1, 0)
    for expected in plain:
        assert_same(next(first), expected)
    needed = sum(chunk.stop - chunk.start for _, chunk in first.split.chunks)
    assert first.split.bytes_read == needed
    assert first.split.cache.hits > 0
    first.close()
    again = TrainingStream(data, config, 0, 1, 0)  # another process of the node, or the resumed run
    for expected in plain:
        assert_same(next(again), expected)
    assert again.split.bytes_read == 0
    again.close()


def test_a_damaged_cache_is_healed_and_a_small_one_helps_a_little(data, small, tmp_path):
    steps = 2 * len(train_samples(data)) // 8
    plain = batches(data, small, steps)
    config = cached(small, tmp_path / "cache")
    batches(data, config, steps)
    files = [path for path in (tmp_path / "cache").rglob("*-*") if path.is_file() and path.stat().st_size > 100]
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    for one, expected in zip(batches(data, config, steps), plain, strict=True):
        assert_same(one, expected)
    needed = sum(chunk.stop - chunk.start for shard in data.split("train") for chunk in shard.chunks)
    half = TrainingStream(data, cached(small, tmp_path / "half", needed / 2 / 2**30), 0, 1, 0)
    for expected in plain:
        assert_same(next(half), expected)
    assert needed < half.split.bytes_read < 2 * needed
    half.close()
    kept = sum(path.stat().st_size for path in (tmp_path / "half").rglob("*") if path.is_file())
    assert 0 < kept <= needed / 2


def test_an_unusable_cache_is_no_error(data, small, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    for one, expected in zip(batches(data, cached(small, tmp_path / "file"), 3), batches(data, small, 3), strict=True):
        assert_same(one, expected)
    assert len([record for record in caplog.records if str(tmp_path / "file") in record.getMessage()]) == 1


# Drawings on the fly


def test_a_data_set_without_drawings(pictures, small, tmp_path):
    source = sources.ColorImages(str(pictures), size=48, sketch="on_the_fly")
    pack.pack(source, str(tmp_path), pack.PackOptions(shard_samples=32, validation=0.2), workers=1)
    data = manifest.load(str(tmp_path / "manifest.json"))
    with pytest.raises(UserError, match=r"sketch\.mode"):
        TrainingStream(data, small, 0, 1, 0)
    config = changed(small, sketch={"mode": "on_the_fly"})
    count = len(train_samples(data))
    made = batches(data, config, 2 * count // 8)
    lines: dict[str, set[bytes]] = {}
    for batch in made:
        for row, key in enumerate(batch.keys):
            lines.setdefault(key, set()).add(batch.sketch[row].numpy().tobytes())
    assert sum(len(drawings) for drawings in lines.values()) == 8 * len(made)  # no epoch shows the same lines
    assert_same(made[-1], union([batches(data, config, 1, len(made) - 1, rank, 2)[0] for rank in range(2)]))
    held_out = joined(list(validation_batches(data, config, 4)))
    assert held_out.sketch.min() == 0
    assert_same(held_out, joined(list(validation_batches(data, config, 7))))


# Faults


def test_a_flipped_byte_is_named_with_its_place_and_checksums(copied, small):
    data, store = copied
    shard = data.split("train")[1]
    chunk = shard.chunks[1]
    tar = bytearray(store.read(shard.key))
    tar[shard.samples[chunk.first].color[0] + 100] ^= 4
    store.write(shard.key, bytes(tar))
    with pytest.raises(CorruptData) as caught:
        batches(data, small, 20)
    message = str(caught.value)
    assert "\n" not in message
    assert store.locate(shard.key) in message
    assert f"bytes {chunk.start} to {chunk.stop}" in message
    actual = zlib.crc32(bytes(tar[chunk.start : chunk.stop]))
    assert f"{actual:08x}" in message
    assert f"{chunk.crc32:08x}" in message
    assert "damaged or was replaced" in message


def test_a_replaced_shard_is_noticed_while_the_run_goes_on(copied, small):
    """Bytes of another size under the same name, between two steps."""
    data, store = copied
    config = changed(small, data={"prefetch_batches": 1, "fetch_ahead_batches": 0})
    running = TrainingStream(data, config, 0, 1, 0)
    next(running)
    for shard in data.split("train"):
        store.write(shard.key, store.read(shard.key)[512:])
    with pytest.raises(CorruptData, match="replaced under the run") as caught:
        list(itertools.islice(running, 20))
    assert any(store.locate(shard.key) in str(caught.value) for shard in data.split("train"))
    running.close()


def test_a_shard_that_was_cut_off_is_corrupt_data(copied, small):
    data, store = copied
    shard = data.split("train")[0]
    store.write(shard.key, store.read(shard.key)[: shard.chunks[0].stop])  # all of the second chunk is missing
    with pytest.raises(CorruptData) as caught:
        batches(data, small, 20)
    assert store.locate(shard.key) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_deleted_shard_is_named_and_is_no_crash(copied, tmp_path, small, place, capsys):
    data, store = copied
    if place == "local":
        folder = storage.open_store(str(tmp_path / "data"))
        for entry in store.list():
            folder.write(entry.key, store.read(entry.key))
        data, store = manifest.load(f"{folder.uri}/manifest.json"), folder
    shard = data.split("train")[1]
    store.delete([shard.key])
    # As a command: one line and an exit code, not a traceback.
    assert cli.exit_code_of(lambda: batches(data, small, 20), "autopainter") in (1, 2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert store.locate(shard.key) in error


def test_a_chunk_that_is_no_pair_of_images_names_its_sample(copied, small):
    """The checksums fit, so the shard was packed so."""
    data, store = copied
    shard = data.split("train")[0]
    sample = shard.samples[3]
    tar = bytearray(store.read(shard.key))
    tar[sample.sketch[0] : sample.sketch[0] + 8] = b"no image"
    store.write(shard.key, bytes(tar))
    first, *others = shard.chunks
    sealed = replace(first, crc32=zlib.crc32(bytes(tar[first.start : first.stop])))
    shards = (replace(shard, chunks=(sealed, *others)), *data.split("train")[1:])
    splits = {**data.splits, "train": shards}
    store.write("manifest.json", manifest.encode(data.info, splits))
    with pytest.raises(CorruptData) as caught:
        batches(manifest.load(f"{store.uri}/manifest.json"), small, 20)
    assert f"{store.locate(shard.key)}: sample {sample.key}" in str(caught.value)


def test_close_ends_the_threads(data, small):
    before = set(threading.enumerate())
    running = TrainingStream(data, changed(small, data={"prefetch_batches": 8}), 0, 1, 0)
    next(running)
    started = set(threading.enumerate()) - before
    assert {thread.name.split("_")[0] for thread in started} == {"fetch", "decode"}
    running.close()
    deadline = time.monotonic() + 30
    for thread in started:
        thread.join(max(deadline - time.monotonic(), 0))
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(RuntimeError):
        list(itertools.islice(running, 9))


def test_close_ends_fetches_that_are_tried_again(data, small, s3):
    """A server that is gone would otherwise hold up the end of the process for the whole budget of a retry."""
    running = TrainingStream(data, changed(small, data=ONE_FETCHER), 0, 1, 0)
    next(running)
    before = retries()
    s3.kill()
    try:
        failed = []

        def take():
            try:
                for _ in range(20):
                    next(running)
            except (StorageError, CancelledError, RuntimeError) as error:  # waited for it, was behind it, or after it
                failed.append(error)

        step = threading.Thread(target=take)
        step.start()
        while retries() == before:
            assert step.is_alive()
            time.sleep(0.01)
        fetchers = [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]
        assert fetchers
        running.close()
        for thread in (*fetchers, step):
            thread.join(30)
            assert not thread.is_alive()
        assert failed
    finally:
        s3.start()


def test_a_data_set_without_a_split_is_refused(data, small):
    empty = manifest.Manifest(data.info, {"train": data.split("train"), "validation": ()}, data.uri, data.id)
    with pytest.raises(UserError, match="validation"):
        next(validation_batches(empty, small, 4))
    with pytest.raises(UserError, match="train"):
        TrainingStream(manifest.Manifest(data.info, {}, data.uri, data.id), small, 0, 1, 0)


# Validation


def joined(parts):
    """Batches of validation as one."""
    return stream.Batch(
        0,
        [key for part in parts for key in part.keys],
        *(torch.cat([getattr(part, name) for part in parts]) for name in FIELDS),
    )


def test_validation_is_the_split_in_its_order_as_it_is(data, small):
    store = storage.open_store(data.uri)
    batch = joined(list(validation_batches(data, small, 4)))
    row = 0
    for shard in data.split("validation"):
        tar = store.read(shard.key)
        for sample in shard.samples:
            offset, length = sample.color
            color = cv2.imdecode(np.frombuffer(tar[offset : offset + length], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            color = cv2.resize(np.ascontiguousarray(color), (32, 32), interpolation=cv2.INTER_AREA)
            assert batch.keys[row] == sample.key
            assert (batch.color[row].numpy() == color.transpose(2, 0, 1)).all()
            row += 1
    assert row == len(batch.keys) > 3
    assert batch.hint[:, 3].flatten(1).any(dim=1).float().mean() > 0.5  # nearly always hinted
    assert not set(batch.keys) & set(train_samples(data))


def test_validation_is_the_same_at_every_call_and_in_any_batches(data, small):
    whole = joined(list(validation_batches(data, small, 4)))
    other = changed(small, train={"seed": 5}, hints={"unhinted": 1.0}, data={"fetch_threads": 1, "flip": False})
    for config, size in ((small, 4), (small, 1), (small, 100), (other, 3)):
        parts = list(validation_batches(data, config, size))
        assert all(len(part.keys) == size for part in parts[:-1])
        assert_same(joined(parts), whole)


@pytest.mark.parametrize("limit", [1, 3, 4, 5, 10**6])
def test_validation_stops_at_its_limit(data, small, limit):
    whole = joined(list(validation_batches(data, small, 4)))
    some = joined(list(validation_batches(data, small, 4, limit)))
    assert_same(some, whole.part(slice(0, limit)))
