"""Chunks on the local disk, so that later epochs cost no network; shared by all processes and threads of a node.

An epoch reads every chunk once, in a new order, so what was read last says nothing about what is read next: a cache of
half the data set is hit by 15 % of the reads if it keeps the latest chunks, and by 50 % if it always keeps the same.
Which chunks are kept is therefore a pure function of data set and budget: there is no count that a killed process
could leave wrong, any number of writers agree, and the bound holds at every moment.

    FOLDER/.lock                        held while a process opens the cache
    FOLDER/DATASET/.lock-BYTES          held, shared, by all that use this data set; what it may grow to
    FOLDER/DATASET/00000012-89abcdef    a chunk: its index and CRC-32; held by its writer, if it has one

All are flocks: they end with their process, in whatever way and container. A file counts only if its length and
checksum fit, so nothing is synced or renamed, and what a killed writer left is simply written again.
"""

import contextlib
import fcntl
import logging
import os
import re
import threading
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import tenacity

from autopainter import seeding

log = logging.getLogger(__name__)

_DATASET = 32 * "[0-9a-f]"
_LOCK = ".lock-" + 20 * "[0-9]"
_CHUNK = re.compile("[0-9]{8,}-[0-9a-f]{8}")
_warned: dict[Path, object] = {}  # the folders that this process has warned of


def admitted(dataset: str, sizes_bytes: Sequence[int], budget_bytes: int) -> list[int]:
    """The chunks that are kept: the first in an order of the data set's own, until the next would pass the budget."""
    order = np.argsort(seeding.keys(seeding.key(int(dataset[:16], 16)), np.arange(len(sizes_bytes))), kind="stable")
    total_bytes = np.cumsum(np.asarray(sizes_bytes, np.int64)[order])
    return order[: np.searchsorted(total_bytes, budget_bytes, side="right")].tolist()


class ChunkCache:
    """The chunks of one split, in a folder that may hold those of other data sets as well.

    All chunks in the folder have at most ``limit_bytes`` together, if all that use it say the same limit. Opening
    removes the data sets that were opened least recently until this one fits, but none that a live process has open:
    what those may grow to is taken off the limit. Files of other names are neither touched nor counted.

    A folder that fails is one warning of the process, not an error: what can be read is read, nothing more is written.
    Threads and a forked child may share an instance. ``dataset`` is the hex id of data set and split, of 32 digits or
    more; ``chunks`` are (bytes, CRC-32) of every chunk of the split in order.
    """

    def __init__(self, folder: Path | str, limit_bytes: int, dataset: str, chunks: Sequence[tuple[int, int]]) -> None:
        if not re.fullmatch(_DATASET, dataset[:32]):
            raise ValueError(f"the id of a data set is 32 hex digits or more, not {dataset!r}")
        self._root, self._folder, self._lock = Path(folder), Path(folder, dataset[:32]), Path()
        self._dataset, self._chunks = dataset, tuple(chunks)
        self._counts: dict[tuple[int, bool], int] = {}
        self._closed, self._writing = False, True
        self._held = contextlib.ExitStack()
        self._keep(limit_bytes)
        try:
            self._open(limit_bytes)
        except OSError as error:
            self._give_up(error)

    @property
    def hits(self) -> int:
        """Calls of ``get`` that returned a chunk."""
        return sum(count for (_, hit), count in self._counts.copy().items() if hit)

    @property
    def misses(self) -> int:
        """Calls of ``get`` that returned none."""
        return sum(count for (_, hit), count in self._counts.copy().items() if not hit)

    def get(self, index: int) -> bytes | None:
        """A chunk's bytes, checked, or none. A damaged file is deleted, so that the next ``put`` mends it."""
        data = self._read(index) if index in self._kept and not self._closed else None
        # Each thread counts for itself: a lock might be held at the moment of a fork, and for ever in the child.
        mine = threading.get_ident(), data is not None
        self._counts[mine] = self._counts.get(mine, 0) + 1
        return data

    def put(self, index: int, data: bytes) -> None:
        """Write a chunk's bytes if it is one of those that are kept and not there yet."""
        assert len(data) == self._chunks[index][0]
        if index not in self._kept or not self._writing:
            return
        try:
            # The folder is held once more, so that a close meanwhile does not let go of it under the write.
            with _locked(self._lock, fcntl.LOCK_SH), _locked(self._path(index), fcntl.LOCK_EX, os.O_CREAT) as file:
                if not self._closed and os.fstat(file).st_size != len(data):
                    os.ftruncate(file, 0)
                    left = memoryview(data)
                    while left:
                        left = left[os.write(file, left) :]
        except BlockingIOError:
            pass  # another writer is at this chunk, or the cache is closed and the folder somebody else's
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Let go of the folder; from now on ``get`` returns none and ``put`` does nothing."""
        self._closed, self._writing = True, False
        self._held.close()

    def _path(self, index: int) -> Path:
        return self._folder / f"{index:08d}-{self._chunks[index][1]:08x}"

    def _keep(self, budget_bytes: int) -> int:
        """Keep what a budget admits; returns its bytes."""
        self._kept = frozenset(admitted(self._dataset, [size for size, _ in self._chunks], budget_bytes))
        return sum(self._chunks[index][0] for index in self._kept)

    def _read(self, index: int) -> bytes | None:
        size, crc32 = self._chunks[index]
        with contextlib.suppress(OSError):
            with self._path(index).open("rb") as file:
                data = file.read(size + 1)
            if len(data) == size and zlib.crc32(data) == crc32:
                return data
            if len(data) >= size:  # a shorter one may have a writer
                self._path(index).unlink()
        return None

    # The opening of another process is waited for, but not for ever: it may be frozen.
    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(BlockingIOError), wait=tenacity.wait_fixed(0.02),
        stop=tenacity.stop_after_delay(60), reraise=True)  # fmt: skip
    def _open(self, limit_bytes: int) -> None:
        with contextlib.suppress(FileExistsError):  # if it is no folder, the next line says so
            self._root.mkdir(parents=True)
        with _locked(self._root / ".lock", fcntl.LOCK_EX, os.O_CREAT), contextlib.ExitStack() as held:
            own_bytes = self._make_room(limit_bytes)
            self._folder.mkdir(exist_ok=True)
            announced = self._folder / f".lock-{own_bytes:020d}"
            self._lock = next(self._folder.glob(_LOCK), announced)
            file = held.enter_context(_locked(self._lock, fcntl.LOCK_SH, os.O_CREAT))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _clean(self._folder, {self._path(index).name for index in self._kept})
                self._lock = self._lock.rename(announced)
            except BlockingIOError:  # others were first: what they have announced stands
                self._keep(min(own_bytes, int(self._lock.name[-20:])))
            os.utime(file)
            fcntl.flock(file, fcntl.LOCK_SH)
            self._held = held.pop_all()

    def _make_room(self, limit_bytes: int) -> int:
        """Keep what the data sets in use leave room for, and remove idle ones until it fits; returns its bytes."""
        idle, free_bytes = [], limit_bytes
        with contextlib.ExitStack() as held:
            for lock in self._root.glob(f"{_DATASET}/{_LOCK}"):
                if lock.parent != self._folder:
                    free_bytes -= (size := int(lock.name[-20:]))
                    with contextlib.suppress(BlockingIOError):
                        file = held.enter_context(_locked(lock, fcntl.LOCK_EX))
                        idle.append((os.fstat(file).st_mtime_ns, size, lock))
            budget_bytes = free_bytes + sum(size for _, size, _ in idle)
            if budget_bytes < min(limit_bytes, sum(size for size, _ in self._chunks)):
                log.warning("%s: data sets in use leave %d of %d bytes", self._root, max(budget_bytes, 0), limit_bytes)
            own_bytes = self._keep(budget_bytes)
            for _, size, lock in sorted(idle):
                if free_bytes < own_bytes:
                    free_bytes += size
                    _clean(lock.parent, ())
                    lock.unlink()  # last: a removal that is cut short is begun again
                    with contextlib.suppress(OSError):  # something that is not ours is in it
                        lock.parent.rmdir()
        return own_bytes

    def _give_up(self, error: OSError) -> None:
        self._writing, mine = False, object()
        if not self._closed and _warned.setdefault(self._root, mine) is mine:
            reason = "another process keeps it locked" if isinstance(error, BlockingIOError) else error.strerror
            log.warning("%s: %s; chunks are not cached there but streamed from storage each time", self._root, reason)


@contextlib.contextmanager
def _locked(path: Path, how: int, flags: int = 0) -> Iterator[int]:
    """An open file with a lock on it; ``BlockingIOError`` if another holds it."""
    file = os.open(path, os.O_RDWR | flags, 0o666)
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
        yield file
    finally:
        os.close(file)


def _clean(folder: Path, kept: Collection[str]) -> None:
    """Remove all chunks but some from a folder that nobody else uses."""
    for path in [path for path in folder.iterdir() if _CHUNK.fullmatch(path.name) and path.name not in kept]:
        path.unlink(missing_ok=True)
