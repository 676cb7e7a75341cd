"""The cache of chunks on the local disk: processes that share it, are killed in it or meet a disk that fails.

Processes are forked ones with real signals, full and read-only disks are real file systems where they may be mounted.
Run: pytest tests/test_cache.py
"""

import contextlib
import fcntl
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import zlib
from pathlib import Path

import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st

from autopainter import seeding
from autopainter.data.cache import ChunkCache, admitted

FORK = multiprocessing.get_context("fork")
ONE, TWO, THREE, FOUR = (hashlib.sha256(name).hexdigest() for name in (b"1", b"2", b"3", b"4"))
KILLED = -signal.SIGKILL


def made(count, size=1000, seed=0):
    """Chunks of a split: their bytes, and the table of (bytes, CRC-32)."""
    generator = random.Random(seed)
    data = [generator.randbytes(size + generator.randrange(size // 10)) for _ in range(count)]
    return data, [(len(chunk), zlib.crc32(chunk)) for chunk in data]


DATA, TABLE = made(20)
SIZES = [size for size, _ in TABLE]
ALL = sum(SIZES)


def opened(folder, limit=ALL, dataset=ONE, table=TABLE):
    return contextlib.closing(ChunkCache(folder, limit, dataset, table))


def fill(cache, data=DATA):
    for index, chunk in enumerate(data):
        cache.put(index, chunk)


def filled(folder, dataset, limit=ALL):
    """A data set that is cached as far as the limit allows, and not in use."""
    with opened(folder, limit, dataset) as cache:
        fill(cache)
    return folder / dataset[:32]


def there(cache, data=DATA):
    """The chunks that are in a cache; none of them has a wrong byte."""
    got = {index: cache.get(index) for index in range(len(data))}
    assert all(chunk in (None, data[index]) for index, chunk in got.items())
    return {index for index, chunk in got.items() if chunk is not None}


def size_of(folder):
    """Bytes of all files in a folder that others may be changing."""
    total = 0
    for path in Path(folder).rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def file_of(folder, index, dataset=ONE, table=TABLE):
    return folder / dataset[:32] / f"{index:08d}-{table[index][1]:08x}"


def flip(path, offset=500):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@contextlib.contextmanager
def process(work, *args):
    """A forked process that runs ``work(pipe, *args)``; gives it and our end of the pipe, and ends it."""
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=work, args=(theirs, *args))
    child.start()
    theirs.close()
    try:
        yield child, ours
    finally:
        child.kill()
        child.join()
        ours.close()


def told(pipe):
    assert pipe.poll(60), "the process says nothing"
    return pipe.recv()


def use(pipe, folder, limit, dataset):
    """Work of a process that opens the cache, and fills it when it is told."""
    with opened(folder, limit, dataset) as cache:
        pipe.send(len(cache._kept))
        while True:
            pipe.recv()
            fill(cache)
            pipe.send(size_of(folder))


def in_child(work):
    """What ``work`` returns in a forked process, and the warnings that it logs there."""

    def run(pipe):
        warnings = []
        handler = logging.Handler()
        handler.emit = lambda record: warnings.append(record.getMessage())
        logging.getLogger("autopainter").addHandler(handler)
        try:
            pipe.send((work(), warnings, None))
        except BaseException:
            pipe.send((None, warnings, traceback.format_exc()))

    with process(run) as (_, pipe):
        result, warnings, error = told(pipe)
    assert error is None, error
    return result, warnings


# Which chunks are kept

tables = st.lists(st.integers(1, 50), max_size=40)
datasets = st.sampled_from([ONE, TWO, THREE])


@given(datasets, tables, st.integers(-10, 2100), st.integers(0, 500))
def test_what_is_kept_fits_and_grows_with_the_budget(dataset, sizes, budget, more):
    kept = admitted(dataset, sizes, budget)
    everything = admitted(dataset, sizes, sum(sizes))
    assert sorted(everything) == list(range(len(sizes)))
    assert kept == everything[: len(kept)]
    assert sum(sizes[index] for index in kept) <= max(budget, 0)
    if len(kept) < len(sizes):  # the next one does not fit
        assert sum(sizes[index] for index in everything[: len(kept) + 1]) > budget
    assert admitted(dataset, sizes, budget + more)[: len(kept)] == kept


def test_the_order_is_that_of_the_data_set():
    for dataset in (ONE, TWO):
        by_key = sorted(range(100), key=lambda index: seeding.key(int(dataset[:16], 16), index))
        assert admitted(dataset, [1] * 100, 100) == by_key


@pytest.mark.parametrize("limit", [-5, 0, 999, ALL // 2, ALL - 1, ALL, ALL * 9])
def test_what_is_put_is_got_up_to_the_limit(tmp_path, limit):
    kept = set(admitted(ONE, SIZES, limit))
    with opened(tmp_path / "new" / "cache", limit) as cache:
        assert not there(cache)
        fill(cache)
        assert there(cache) == kept
        assert (cache.hits, cache.misses) == (len(kept), 40 - len(kept))
    assert size_of(tmp_path) == sum(SIZES[index] for index in kept) <= max(limit, 0)
    with opened(tmp_path / "new" / "cache", limit) as cache:
        assert there(cache) == kept


def test_another_limit_keeps_what_it_admits(tmp_path):
    filled(tmp_path, ONE)
    with opened(tmp_path, ALL // 2) as cache:
        assert there(cache) == set(admitted(ONE, SIZES, ALL // 2))
        assert size_of(tmp_path) <= ALL // 2
    with opened(tmp_path, ALL * 2) as cache:
        assert there(cache) == set(admitted(ONE, SIZES, ALL // 2))
        fill(cache)
        assert len(there(cache)) == 20


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2500),
    st.lists(st.tuples(datasets, st.sampled_from(["close", "keep", "close the first"])), min_size=1, max_size=8),
)
def test_no_sequence_of_data_sets_passes_the_limit(limit, steps):
    """Data sets of different sizes come and go, some while others are in use."""
    parts = {dataset: made(count, 100, count) for dataset, count in ((ONE, 4), (TWO, 9), (THREE, 16))}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        running = []
        for dataset, step in steps:
            data, table = parts[dataset]
            cache = stack.enter_context(opened(folder, limit, dataset, table))
            assert size_of(folder) <= limit
            fill(cache, data)
            running.append((cache, data))
            for other, content in running:
                fill(other, content)
                assert there(other, content) == other._kept
            assert size_of(folder) <= limit
            if step != "keep":
                running.pop(0 if step == "close the first" else -1)[0].close()


# Many processes


def test_many_processes_read_and_write_the_same_chunks(tmp_path):
    data, table = made(40, 60_000)
    limit = sum(size for size, _ in table) - 1000
    start, done = FORK.Barrier(5), FORK.Event()
    small_write = os.write

    def in_threads(work):
        failed = []

        def run(number):
            try:
                work(number)
            except BaseException:
                failed.append(traceback.format_exc())

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        if failed:
            sys.exit("\n".join(failed))

    def writer(_, process_number):
        os.write = lambda file, left: small_write(file, left[:4096])  # so that others meet unfinished files
        with opened(tmp_path, limit, ONE, table) as cache:
            start.wait(60)

            def work(thread_number):
                for index in random.Random(process_number + thread_number // 2).sample(range(40), 40):
                    assert cache.get(index) in (None, data[index])
                    cache.put(index, data[index])

            in_threads(work)

    def reader(_, process_number):
        with opened(tmp_path, limit, ONE, table) as cache:
            start.wait(60)

            def work(thread_number):
                generator = random.Random(process_number * 2 + thread_number)
                while not done.is_set():
                    index = generator.randrange(40)
                    assert cache.get(index) in (None, data[index])
                    assert size_of(tmp_path) <= limit

            in_threads(work)

    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(process(writer, number))[0] for number in range(3)]
        readers = [stack.enter_context(process(reader, number))[0] for number in range(2)]
        for child in writers:
            child.join(60)
        done.set()
        for child in readers:
            child.join(60)
        assert [child.exitcode for child in writers + readers] == [0] * 5
    with opened(tmp_path, limit, ONE, table) as cache:
        assert there(cache, data) == set(admitted(ONE, [size for size, _ in table], limit))
        assert 30 < cache.hits < 40


def test_files_that_are_damaged_all_the_time_never_give_a_wrong_byte(tmp_path):
    def damage(pipe):
        generator = random.Random(1)
        while not pipe.poll():
            path = file_of(tmp_path, generator.randrange(20))
            with contextlib.suppress(OSError), path.open("r+b") as file:
                file.seek(generator.randrange(1000))
                file.write(b"?")
                if generator.random() < 0.3:
                    file.truncate(generator.randrange(2000))

    def use(_):
        with opened(tmp_path) as cache:
            while cache.hits < 300 or cache.misses < 50:
                there(cache)
                fill(cache)

    with process(damage) as (vandal, pipe), process(use) as (one, _), process(use) as (two, _):
        one.join(60)
        two.join(60)
        pipe.send("stop")
        vandal.join(60)
        assert (one.exitcode, two.exitcode, vandal.exitcode) == (0, 0, 0)
    with opened(tmp_path) as cache:
        there(cache)
        fill(cache)
        assert len(there(cache)) == 20


@pytest.mark.parametrize("others", [False, True], ids=["alone", "beside another process"])
def test_what_a_writer_left_that_was_killed_in_a_write_is_written_again(tmp_path, others):
    real_write = os.write

    def die(file, left):
        real_write(file, left[: len(left) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def write(_):
        with opened(tmp_path) as cache:
            cache.put(3, DATA[3])
            os.write = die
            cache.put(5, DATA[5])

    with contextlib.ExitStack() as stack:
        if others:
            told(stack.enter_context(process(use, tmp_path, ALL, ONE))[1])
        with process(write) as (child, _):
            child.join(60)
            assert child.exitcode == KILLED
        assert file_of(tmp_path, 5).stat().st_size == SIZES[5] // 2
        with opened(tmp_path) as cache:
            assert there(cache) == {3}
            cache.put(5, DATA[5])
            assert there(cache) == {3, 5}


def test_writers_killed_at_any_moment_leave_nothing_wrong(tmp_path):
    real_write = os.write

    def write(pipe, first):
        with opened(tmp_path) as cache:
            for index in range(first, 20):
                cache.put(index, DATA[index])
                pipe.send(index)
                os.write = lambda file, left: real_write(file, left[:10])
            signal.pause()

    for first in range(0, 20, 3):
        with process(write, first) as (child, pipe):
            assert told(pipe) == first
            child.kill()
            child.join(60)
            assert child.exitcode == KILLED
        with opened(tmp_path) as cache:
            assert first in there(cache)
            assert size_of(tmp_path) <= ALL
    with opened(tmp_path) as cache:
        fill(cache)
        assert len(there(cache)) == 20


def test_a_chunk_that_is_being_written_is_a_miss_and_left_alone(tmp_path, monkeypatch):
    writing, go_on = threading.Event(), threading.Event()
    real_write = os.write

    def slowly(file, left):
        if len(left) == SIZES[7]:
            return real_write(file, left[:600])
        writing.set()
        assert go_on.wait(60)
        return real_write(file, left)

    monkeypatch.setattr(os, "write", slowly)
    with opened(tmp_path) as cache, opened(tmp_path) as other:
        thread = threading.Thread(target=cache.put, args=(7, DATA[7]))
        thread.start()
        assert writing.wait(60)
        assert other.get(7) is None
        other.put(7, DATA[7])
        assert not there(other)
        go_on.set()
        thread.join()
        assert there(other) == {7}


def test_threads_count_exactly(tmp_path):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with opened(tmp_path) as cache:
            cache.put(0, DATA[0])
            threads = [threading.Thread(target=lambda: [cache.get(i % 2) for i in range(1000)]) for _ in range(8)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert (cache.hits, cache.misses) == (4000, 4000)
    finally:
        sys.setswitchinterval(interval)


# Damage


@pytest.mark.parametrize(
    "damage",
    [flip, lambda path: os.truncate(path, 400), lambda path: os.truncate(path, 0),
     lambda path: os.truncate(path, 5000), Path.unlink],
    ids=["flipped bit", "cut off", "empty", "too long", "deleted"],
)  # fmt: skip
def test_a_damaged_file_is_a_miss_until_it_is_put_again(tmp_path, damage):
    with opened(tmp_path) as cache, opened(tmp_path) as other:
        fill(cache)
        damage(file_of(tmp_path, 4))
        assert there(cache) == set(range(20)) - {4}
        assert size_of(tmp_path) < ALL  # what is wrong is not kept
        assert other.get(4) is None
        other.put(4, DATA[4])
        assert len(there(cache)) == 20


def test_a_file_of_other_content_is_no_chunk(tmp_path):
    """The same data set in the same folder, but a chunk has changed: the name holds its checksum."""
    filled(tmp_path, ONE)
    with opened(tmp_path, table=[(SIZES[0], 1), *TABLE[1:]]) as cache:
        assert there(cache) == set(range(1, 20))
        assert not file_of(tmp_path, 0).exists()


# Data sets that share a folder


def test_old_data_sets_go_least_recently_used_first_until_it_fits(tmp_path):
    old = {dataset: filled(tmp_path, dataset, 3 * ALL) for dataset in (ONE, TWO, THREE)}
    for time, dataset in enumerate((TWO, THREE, ONE)):
        (lock,) = old[dataset].glob(".lock*")
        os.utime(lock, (time, time))
    with opened(tmp_path, 3 * ALL, FOUR) as cache:
        fill(cache)
        assert len(there(cache)) == 20
        assert [old[dataset].exists() for dataset in (ONE, TWO, THREE)] == [True, False, True]
        assert size_of(tmp_path) == 3 * ALL
    with opened(tmp_path, 3 * ALL, THREE) as cache:  # used again: now the first is the oldest
        assert len(there(cache)) == 20
    with opened(tmp_path, 2 * ALL, FOUR) as cache:
        assert len(there(cache)) == 20
        assert [old[dataset].exists() for dataset in (ONE, TWO, THREE)] == [False, False, True]


def test_a_data_set_in_use_stays_until_its_process_is_killed(tmp_path, caplog):
    limit = ALL + ALL // 2
    with process(use, tmp_path, limit, ONE) as (child, pipe):
        assert told(pipe) == 20
        with opened(tmp_path, limit, TWO) as cache:  # it counts with what it may grow to
            fill(cache)
            assert there(cache) == set(admitted(TWO, SIZES, ALL // 2))
            (warning,) = caplog.messages
            assert f"{ALL // 2} of {limit} bytes" in warning
            pipe.send("fill")
            assert ALL < told(pipe) <= limit
            assert there(cache) == set(admitted(TWO, SIZES, ALL // 2))
        child.kill()
        child.join(60)
        assert child.exitcode == KILLED
    caplog.clear()
    with opened(tmp_path, limit, TWO) as cache:
        assert not (tmp_path / ONE[:32]).exists()
        fill(cache)
        assert len(there(cache)) == 20
        assert not caplog.messages


@pytest.mark.parametrize("limit", [ALL // 2, ALL * 2])
def test_the_first_process_says_how_much_is_kept_until_all_have_left(tmp_path, limit):
    between = ALL * 3 // 4
    with process(use, tmp_path, between, ONE) as (_, pipe):
        count = told(pipe)
        pipe.send("fill")
        told(pipe)
        with opened(tmp_path, limit) as cache:
            expected = min(limit, between)
            fill(cache)
            assert there(cache) == set(admitted(ONE, SIZES, expected))
        assert len(list((tmp_path / ONE[:32]).glob("0*"))) == count
    with opened(tmp_path, limit) as cache:
        fill(cache)
        assert there(cache) == set(admitted(ONE, SIZES, limit))


def test_a_forked_child_shares_the_cache_and_does_not_take_it_along(tmp_path):
    def child():
        cache.put(2, DATA[2])
        found = there(cache)
        cache.close()
        return found, there(cache)

    with opened(tmp_path) as cache:
        cache.put(1, DATA[1])
        assert in_child(child) == (({1, 2}, set()), [])
        assert there(cache) == {1, 2}
        with opened(tmp_path, dataset=TWO) as other:
            fill(other)
            assert not there(other)  # the parent's is in use as before
        program = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        filled(tmp_path, TWO)  # a program that was started meanwhile holds nothing
        assert not (tmp_path / ONE[:32]).exists()
    finally:
        program.kill()
        program.wait()


def test_what_is_not_ours_is_neither_removed_nor_counted(tmp_path):
    old = filled(tmp_path, TWO)
    foreign = [
        tmp_path / "notes.txt", tmp_path / "models" / "00000000-00000000", tmp_path / THREE[:32] / "00000000-00000000",
        tmp_path / FOUR[:32], old / "mine", tmp_path / ONE[:32] / "mine",
    ]  # fmt: skip
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(2000))
    with opened(tmp_path) as cache:
        fill(cache)
        assert len(there(cache)) == 20
        assert all(path.stat().st_size == 2000 for path in foreign)
        assert os.listdir(old) == ["mine"]
    with opened(tmp_path, ALL // 2) as cache:
        assert all(path.exists() for path in foreign)


def test_an_opening_waits_for_another_one(tmp_path):
    def wait(pipe):
        ChunkCache._open.retry.before_sleep = lambda _: pipe.send("waiting")
        with opened(tmp_path) as cache:
            fill(cache)
            pipe.send(len(there(cache)))

    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with process(wait) as (_, pipe):
            assert told(pipe) == "waiting"
            fcntl.flock(file, fcntl.LOCK_UN)
            while (answer := told(pipe)) == "waiting":
                pass
            assert answer == 20


def test_an_opening_does_not_wait_for_ever(tmp_path, monkeypatch, caplog):
    filled(tmp_path, ONE)
    monkeypatch.setattr(ChunkCache._open.retry, "stop", tenacity.stop_after_attempt(2))
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with opened(tmp_path) as cache:
            assert len(there(cache)) == 20
            (warning,) = caplog.messages
            assert f"{tmp_path}: another process keeps it locked" in warning


# Closing


def test_a_closed_cache_holds_nothing_and_does_nothing(tmp_path):
    before = sorted(os.listdir("/proc/self/fd"))
    cache = ChunkCache(tmp_path, ALL, ONE, TABLE)
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    cache.put(0, DATA[0])
    cache.close()
    cache.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
    cache.put(1, DATA[1])
    assert cache.get(0) is None
    assert not file_of(tmp_path, 1).exists()
    filled(tmp_path, TWO)
    cache.put(1, DATA[1])
    assert not (tmp_path / ONE[:32]).exists()


def test_a_folder_that_is_closed_under_a_write_is_in_use_until_its_end(tmp_path, monkeypatch, caplog):
    writing, go_on = threading.Event(), threading.Event()
    real_write = os.write

    def slowly(file, left):
        writing.set()
        assert go_on.wait(60)
        return real_write(file, left)

    monkeypatch.setattr(os, "write", slowly)
    cache = ChunkCache(tmp_path, ALL, ONE, TABLE)
    thread = threading.Thread(target=cache.put, args=(0, DATA[0]))
    thread.start()
    assert writing.wait(60)
    cache.close()
    with opened(tmp_path, dataset=TWO) as other:
        assert not other._kept
    go_on.set()
    thread.join()
    assert file_of(tmp_path, 0).read_bytes() == DATA[0]
    with opened(tmp_path, dataset=TWO) as other:
        assert len(other._kept) == 20
    assert len(caplog.messages) == 1  # of the room that there was


def test_an_open_cache_is_not_pickled(tmp_path):
    with opened(tmp_path) as cache, pytest.raises(TypeError):
        pickle.dumps(cache)


@pytest.mark.parametrize("dataset", ["", "abc", "../" + 30 * "a", 32 * "A"])
def test_an_id_that_is_none_is_refused(tmp_path, dataset):
    with pytest.raises(ValueError, match="hex"):
        ChunkCache(tmp_path, ALL, dataset, TABLE)


# Disks that fail


def test_a_full_disk_is_one_warning_and_ends_the_writing(small_disk, caplog):
    data, table = made(20, 100_000)
    with opened(small_disk, 10**8, ONE, table) as cache:
        fill(cache, data)
        found = there(cache, data)
        assert 5 < len(found) < 11
        (warning,) = caplog.messages
        assert f"{small_disk}: No space left on device" in warning
        assert "streamed from storage" in warning
        file_of(small_disk, min(found), table=table).unlink()
        fill(cache, data)
        assert there(cache, data) == found - {min(found)}
    with opened(small_disk, 10**8, ONE, table) as cache:  # the next one writes what fits, and warns no more
        fill(cache, data)
        assert there(cache, data) >= found - {max(found)}
    with opened(small_disk, 10**8, TWO, table):
        pass
    with opened(small_disk, 250_000, THREE, table) as cache:  # old data sets make room on a disk that is full
        fill(cache, data)
        assert len(there(cache, data)) == 2
    assert len(caplog.messages) == 1


def test_a_read_only_disk_is_read(small_disk, caplog):
    filled(small_disk, ONE)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with opened(small_disk) as cache:
        assert len(there(cache)) == 20
        fill(cache)
    (warning,) = caplog.messages
    assert f"{small_disk}: Read-only file system" in warning


def test_a_limit_of_the_system_is_one_warning_whichever_thread_meets_it(tmp_path):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1020, resource.RLIM_INFINITY))
        with opened(tmp_path) as cache:
            threads = [threading.Thread(target=fill, args=(cache,)) for _ in range(8)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            return there(cache)

    found, warnings = in_child(limited)
    assert all(SIZES[index] <= 1020 for index in found)
    (warning,) = warnings
    assert f"{tmp_path}: File too large" in warning


def test_a_folder_that_may_not_be_written_is_one_warning():
    def unprivileged():
        if os.getuid() == 0:
            os.setuid(65534)
        with opened(folder) as cache:
            fill(cache)
            return there(cache)

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        found, warnings = in_child(unprivileged)
    assert not found
    (warning,) = warnings
    assert f"{folder}: Permission denied" in warning


@pytest.mark.parametrize(
    ("place", "reason"),
    [("file", "Not a directory"), ("file/cache", "Not a directory"), ("x" * 300, "File name too long"),
     ("loop", "Too many levels of symbolic links"), ("/proc/cache", "No such file or directory")],
    ids=["file", "below a file", "long name", "loop", "no place for folders"],
)  # fmt: skip
def test_a_folder_that_is_none_is_one_warning_for_all_that_open_it(tmp_path, caplog, place, reason):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")

    def run():
        for dataset in (ONE, TWO):
            with opened(tmp_path / place, ALL, dataset) as cache:
                fill(cache)
                assert not there(cache)
                assert cache.misses == 20

    _, (warning,) = in_child(run)
    assert f"{tmp_path / place}: {reason}" in warning


def test_a_folder_that_is_removed_under_the_run_is_a_warning(tmp_path, caplog):
    with opened(tmp_path / "cache") as cache:
        fill(cache)
        subprocess.run(["rm", "-r", str(tmp_path / "cache")], check=True)
        assert not there(cache)
        fill(cache)
        (warning,) = caplog.messages
        assert f"{tmp_path / 'cache'}: No such file or directory" in warning
