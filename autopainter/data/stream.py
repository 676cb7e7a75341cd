"""The stream: shards in object storage to batches, in the order of ``plan``, from any step.

Threads fetch chunks by ranged reads and check them, threads decode and augment (OpenCV releases the GIL), and a queue
of futures keeps the batches in order, so no number of threads changes what comes out. Nothing is a process and nothing
is remembered: the stream of step t is built from t alone. A chunk that keeps failing stops the run with its name;
skipping it would change the order of every later step.
"""

import functools
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autopainter import storage
from autopainter.config import Config
from autopainter.data import samples
from autopainter.data.manifest import Chunk, Manifest, Sample, Shard
from autopainter.data.plan import Order, step_positions
from autopainter.data.samples import Image
from autopainter.errors import CorruptData, StorageError

_CHECKSUM_ATTEMPTS = 3


@dataclass
class Batch:
    """Samples of one step, as one worker gets them.

    Attributes:
        step: the step they belong to.
        keys: their names in the data set.
        sketch: uint8 [B, 1, S, S], lines dark on white.
        color: uint8 [B, 3, S, S], RGB.
        hint: uint8 [B, 4, S, S], RGB and a 0/1 mask.
        dropout: int64 [B], each sample's key for ``seeding.uniform``.
    """

    step: int
    keys: list[str]
    sketch: torch.Tensor
    color: torch.Tensor
    hint: torch.Tensor
    dropout: torch.Tensor

    def part(self, rows: slice) -> "Batch":
        """A microbatch."""
        return Batch(
            self.step, self.keys[rows], self.sketch[rows], self.color[rows], self.hint[rows], self.dropout[rows]
        )

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        moved = (t.to(device, non_blocking=True) for t in (self.sketch, self.color, self.hint, self.dropout))
        return Batch(self.step, self.keys, *moved)


@dataclass
class Split:
    """The samples and chunks of one split in one line each, with the store that they are in."""

    store: storage.Store
    samples: list[Sample]
    chunks: list[tuple[Shard, Chunk]]
    bytes_read: int = 0

    @classmethod
    def open(cls, manifest: Manifest, name: str) -> "Split":
        """Lay out a split of a manifest; raises ``UserError`` if it is empty."""
        shards = manifest.split(name)
        return cls(
            store=storage.open_store(manifest.uri),
            samples=[sample for shard in shards for sample in shard.samples],
            chunks=[(shard, chunk) for shard in shards for chunk in shard.chunks],
        )

    def fetch(self, index: int) -> bytes:
        """Read one chunk and check it.

        Raises:
            CorruptData: its checksum is wrong each time it is read, or the shard ends before it.
            StorageError: it cannot be read, or the shard is gone.
        """
        shard, chunk = self.chunks[index]
        for _ in range(_CHECKSUM_ATTEMPTS):
            try:
                data = self.store.read_range(shard.key, chunk.start, chunk.stop)
            except FileNotFoundError:
                raise StorageError(
                    f"{self.store.locate(shard.key)}: not found; the data set was changed under the run"
                ) from None
            self.bytes_read += len(data)
            checksum = zlib.crc32(data)
            if checksum == chunk.crc32:
                return data
        raise CorruptData(
            f"{self.store.locate(shard.key)}: chunk of bytes {chunk.start} to {chunk.stop} has CRC-32 {checksum:08x},"
            f" the manifest says {chunk.crc32:08x}"
        )

    def decode(self, index: int, chunk_index: int, data: bytes) -> tuple[Image, Image]:
        """Decode one sample out of its chunk's bytes: uint8 [H, W, 3] RGB and uint8 [H, W]."""
        shard, chunk = self.chunks[chunk_index]
        sample = self.samples[index]
        color, sketch = (
            data[offset - chunk.start : offset - chunk.start + length]
            for offset, length in (sample.color, sample.sketch)
        )
        return samples.decode(color, sketch, f"{self.store.locate(shard.key)}: sample {sample.key}")


@dataclass
class _Pending:
    """A batch that is being made."""

    step: int
    keys: list[str]
    arrays: dict[str, NDArray[Any]]
    rows: list["Future[None]"] = field(default_factory=list)

    def row(self, index: int) -> dict[str, NDArray[Any]]:
        """Writable views of one sample's places."""
        return {name: array[index, ...] for name, array in self.arrays.items()}

    def batch(self) -> Batch:
        for row in self.rows:
            row.result()
        return Batch(self.step, self.keys, **{name: torch.from_numpy(array) for name, array in self.arrays.items()})


def _allocate(size: int, count: int) -> dict[str, NDArray[Any]]:
    return {
        "sketch": np.empty((count, 1, size, size), np.uint8),
        "color": np.empty((count, 3, size, size), np.uint8),
        "hint": np.empty((count, 4, size, size), np.uint8),
        "dropout": np.empty(count, np.int64),
    }


class TrainingStream:
    """An endless iterator over the training batches of one worker, beginning at any step.

    Memory is bounded by ``lanes / world * block_chunks`` chunks and ``prefetch_batches`` batches.

    Attributes:
        wait_seconds: time that ``next`` has waited for data so far.
    """

    def __init__(self, manifest: Manifest, config: Config, rank: int, world: int, start_step: int) -> None:
        self.config = config
        self.split = Split.open(manifest, "train")
        self.order = training_order(self.split, config)
        self.wait_seconds = 0.0
        self._rank, self._world = rank, world
        self._next_step = start_step
        self._epoch = functools.lru_cache(maxsize=2)(self.order.epoch)
        self._uses_left: dict[int, NDArray[np.int64]] = {}
        self._chunks: dict[tuple[int, int], Future[bytes]] = {}
        self._pending: deque[_Pending] = deque()
        self._fetchers = ThreadPoolExecutor(config.data.fetch_threads, "fetch")
        self._decoders = ThreadPoolExecutor(config.data.decode_threads, "decode")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._pending) < self.config.data.prefetch_batches:
            self._pending.append(self._schedule(self._next_step))
            self._next_step += 1
        began = time.perf_counter()
        batch = self._pending.popleft().batch()
        self.wait_seconds += time.perf_counter() - began
        return batch

    def close(self) -> None:
        """End the threads; what they had not begun is dropped."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _schedule(self, step: int) -> _Pending:
        positions = step_positions(step, self.config.train.global_batch, self._rank, self._world)
        pending = _Pending(step, [], _allocate(self.config.data.image_size, len(positions)))
        for row, position in enumerate(positions):
            epoch, place = divmod(position, self.order.samples)
            in_order, chunk_in_order = self._epoch(epoch)
            index, chunk = int(in_order[place]), int(chunk_in_order[place])
            data = self._chunk(epoch, place, chunk)
            pending.keys.append(self.split.samples[index].key)
            pending.rows.append(self._decoders.submit(self._make, index, chunk, data, position, pending.row(row)))
        return pending

    def _chunk(self, epoch: int, place: int, chunk: int) -> "Future[bytes]":
        """The chunk's bytes; held until the last sample that this worker takes from it in this epoch is scheduled."""
        if epoch not in self._uses_left:
            self._uses_left = {kept: left for kept, left in self._uses_left.items() if kept == epoch - 1}
            mine = self._epoch(epoch)[1][place :: self._world]
            self._uses_left[epoch] = np.bincount(mine, minlength=len(self.split.chunks))
        if (epoch, chunk) not in self._chunks:
            self._chunks[epoch, chunk] = self._fetchers.submit(self.split.fetch, chunk)
        data = self._chunks[epoch, chunk]
        self._uses_left[epoch][chunk] -= 1
        if self._uses_left[epoch][chunk] == 0:
            del self._chunks[epoch, chunk]
        return data

    def _make(self, index: int, chunk: int, data: "Future[bytes]", position: int, out: dict[str, Any]) -> None:
        color, sketch = self.split.decode(index, chunk, data.result())
        samples.training_sample(color, sketch, self.config, position, out)


def training_order(split: Split, config: Config) -> Order:
    """The order of the training split under a configuration."""
    return Order(
        chunk_samples=tuple(chunk.samples for _, chunk in split.chunks),
        seed=config.train.seed,
        lanes=config.data.lanes or config.train.global_batch,
        block_chunks=config.data.block_chunks,
    )


def validation_batches(manifest: Manifest, config: Config, size: int, limit: int | None = None) -> Iterator[Batch]:
    """The validation split in its own order, not augmented, with fixed hints, in batches of up to ``size``.

    Args:
        limit: stop after so many samples; none: the whole split.
    """
    split = Split.open(manifest, "validation")
    owners = [index for index, (_, chunk) in enumerate(split.chunks) for _ in range(chunk.samples)][:limit]
    with ThreadPoolExecutor(config.data.fetch_threads, "validation") as fetchers:
        for first in range(0, len(owners), size):
            rows = range(first, min(first + size, len(owners)))
            needed = sorted({owners[index] for index in rows})
            chunks = dict(zip(needed, fetchers.map(split.fetch, needed), strict=True))
            pending = _Pending(0, [], _allocate(config.data.image_size, len(rows)))
            for row, index in enumerate(rows):
                color, sketch = split.decode(index, owners[index], chunks[owners[index]])
                samples.validation_sample(color, sketch, config, index, pending.row(row))
                pending.keys.append(split.samples[index].key)
            yield pending.batch()
