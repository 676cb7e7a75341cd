"""The stream: shards in object storage to batches, in the order of ``plan``, from any step.

Threads fetch chunks by ranged reads and check them, threads decode and augment (OpenCV releases the GIL), and a queue
of futures keeps the batches in order, so no number of threads changes what comes out. Nothing is a process and nothing
is remembered: the stream of step t is built from t alone. A chunk that keeps failing stops the run with its name;
skipping it would change the order of every later step.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from numpy.typing import NDArray

from autopainter.config import Config
from autopainter.data import plan, samples
from autopainter.data.chunks import Split
from autopainter.data.manifest import CHUNK_SAMPLES, Manifest
from autopainter.data.pictures import Image
from autopainter.data.plan import Order, Place


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
        return Batch(self.step, self.keys, *(tensor.to(device, non_blocking=True) for tensor in self.tensors()))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Its tensors, in the order of its attributes."""
        return self.sketch, self.color, self.hint, self.dropout


@dataclass
class _Pending:
    """A batch that is being made."""

    step: int
    keys: list[str]
    tensors: dict[str, torch.Tensor]
    rows: list["Future[None]"] = field(default_factory=list)

    def row(self, index: int) -> dict[str, NDArray[Any]]:
        """Writable views of one sample's places."""
        return {name: tensor.numpy()[index, ...] for name, tensor in self.tensors.items()}

    def batch(self) -> Batch:
        for row in self.rows:
            row.result()
        return Batch(self.step, self.keys, **self.tensors)


_PLANES = {"sketch": 1, "color": 3, "hint": 4}
_KEY_BYTES = 8


def _row_bytes(size: int) -> int:
    return sum(_PLANES.values()) * size**2 + _KEY_BYTES


def _allocate(size: int, count: int, pinned: bool) -> dict[str, torch.Tensor]:
    """Memory of a batch, whatever is in it; ``MemoryError`` if there is not so much to pin."""
    try:
        tensors = {
            name: torch.empty((count, planes, size, size), dtype=torch.uint8, pin_memory=pinned)
            for name, planes in _PLANES.items()
        }
        return tensors | {"dropout": torch.empty(count, dtype=torch.int64, pin_memory=pinned)}
    except RuntimeError as error:
        if pinned:  # it reads as if it were of the GPU's memory
            raise MemoryError(f"pinned memory of the host: {error}") from error
        raise


class _Pipeline(Iterator[Batch]):
    """Batches of planned steps, in order: chunks are requested ahead, samples are made ahead of their use.

    Args:
        split: where chunks come from.
        steps: number of each step, and the places of its samples.
        make: writes the pixels of a sample into the row that is its last argument.
        pinned: batches lie in memory that a GPU can copy from while it computes.
    """

    def __init__(
        self,
        split: Split,
        config: Config,
        steps: Iterator[tuple[int, list[Place]]],
        make: Callable[[Image, Image | None, Config, int, dict[str, Any]], None],
        pinned: bool = False,
    ) -> None:
        self.split = split
        self.wait_seconds = 0.0
        self._config, self._make, self._pinned = config, make, pinned
        self._steps = steps
        self._planned: deque[tuple[int, list[Place]]] = deque()  # their chunks are requested
        self._chunks: dict[tuple[int, int], Future[bytes]] = {}  # by epoch and number
        self._pending: deque[_Pending] = deque()
        self._failure: BaseException | None = None
        self._fetchers = ThreadPoolExecutor(config.data.fetch_threads, "fetch")
        self._decoders = ThreadPoolExecutor(config.data.decode_threads, "decode")

    def __next__(self) -> Batch:
        if self._failure:
            raise self._failure  # to go on with the step after it would be another order
        try:
            while len(self._pending) < self._config.data.prefetch_batches and (self._planned or self._plan()):
                self._pending.append(self._schedule(*self._planned.popleft()))
            while len(self._planned) < self._config.data.fetch_ahead_batches and self._plan():
                pass
            if not self._pending:
                raise StopIteration
            began = time.perf_counter()
            try:
                return self._pending.popleft().batch()
            finally:
                self.wait_seconds += time.perf_counter() - began
        except BaseException as error:
            self._failure = error
            raise

    @property
    def ready_batches(self) -> int:
        """Batches that are made and not yet taken."""
        return sum(all(row.done() for row in pending.rows) for pending in self._pending)

    @property
    def held_bytes(self) -> int:
        """Bytes of the chunks that are held, or are to be fetched next."""
        chunks = [self.split.chunks[number][1] for _, number in self._chunks]
        return sum(chunk.stop - chunk.start for chunk in chunks)

    def close(self) -> None:
        """End the threads; what they had not begun is dropped, and a later batch is refused with a RuntimeError."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self.split.close()

    def _plan(self) -> bool:
        """Take the next step and request its chunks; False if there is none."""
        step = next(self._steps, None)
        if step is None:
            return False
        for place in step[1]:
            if (place.epoch, place.chunk) not in self._chunks:
                self._chunks[place.epoch, place.chunk] = self._fetchers.submit(self.split.fetch, place.chunk)
        self._planned.append(step)
        return True

    def _schedule(self, step: int, places: list[Place]) -> _Pending:
        pending = _Pending(step, [], _allocate(self._config.data.image_size, len(places), self._pinned))
        for row, place in enumerate(places):
            of_epoch = place.epoch, place.chunk
            data = self._chunks.pop(of_epoch) if place.last else self._chunks[of_epoch]
            pending.keys.append(self.split.sample(place.sample).key)
            pending.rows.append(self._decoders.submit(self._sample, place, data, pending.row(row)))
        return pending

    def _sample(self, place: Place, data: "Future[bytes]", out: dict[str, Any]) -> None:
        color, sketch = self.split.decode(place.sample, data.result())
        self._make(color, sketch, self._config, place.position, out)


class TrainingStream(_Pipeline):
    """An endless iterator over the training batches of one worker, beginning at any step.

    Args:
        pinned: batches lie in memory that a GPU can copy from while it computes.
    """

    def __init__(
        self, manifest: Manifest, config: Config, rank: int, world: int, start_step: int, pinned: bool = False
    ) -> None:
        split = Split(manifest, "train", config, cached=True)
        self.order = training_order(split, config)
        steps = plan.steps(self.order, config.train.global_batch, rank, world, start_step)
        super().__init__(split, config, steps, samples.training_sample, pinned)
        self.most_bytes = self._bound(world)

    def _bound(self, world: int) -> int:
        """Bound on the memory for chunks and batches, from the configuration and the largest chunk.

        A lane holds the block of chunks that it is in, and those that the batches made and fetched ahead reach into. At
        the end of an epoch, where lanes run out, a worker also meets the last blocks of lanes that were others'.
        """
        data, batch = self._config.data, self._config.train.global_batch
        ahead = (data.prefetch_batches + data.fetch_ahead_batches) * batch
        blocks = 2 + ahead // (self.order.lanes * CHUNK_SAMPLES * data.block_chunks)
        epochs = 2 + ahead // self.order.samples
        lanes = self.order.lanes // math.gcd(self.order.lanes, world)
        held = min((lanes * blocks + self.order.lanes) * data.block_chunks, epochs * len(self.split.chunks))
        largest = max(chunk.stop - chunk.start for _, chunk in self.split.chunks)
        rows = batch // world * _row_bytes(data.image_size)
        if self._pinned:
            rows *= 2  # torch pins the next power of two
        return held * largest + (data.prefetch_batches + 1) * rows


def training_order(split: Split, config: Config) -> Order:
    """The order of the training split under a configuration."""
    return Order(
        chunk_samples=tuple(chunk.samples for _, chunk in split.chunks),
        seed=config.train.seed,
        lanes=config.data.lanes or config.train.global_batch,
        block_chunks=config.data.block_chunks,
    )


def keys_of_step(manifest: Manifest, config: Config, step: int) -> list[str]:
    """Names of the samples of a step (from 0), over all workers, in the order of their positions."""
    split = Split(manifest, "train", config)
    _, places = next(plan.steps(training_order(split, config), config.train.global_batch, 0, 1, step))
    return [split.sample(place.sample).key for place in places]


def validation_batches(manifest: Manifest, config: Config, size: int, limit: int | None = None) -> Iterator[Batch]:
    """The validation split in its own order, not augmented, with fixed hints, in batches of up to ``size``.

    Args:
        limit: stop after so many samples; none: the whole split.
    """
    split = Split(manifest, "validation", config)
    steps = plan.in_order([chunk.samples for _, chunk in split.chunks], size, limit)
    pipeline = _Pipeline(split, config, steps, samples.validation_sample)
    try:
        yield from pipeline
    finally:
        pipeline.close()
