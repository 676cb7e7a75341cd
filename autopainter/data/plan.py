"""The order of samples: pure functions of (seed, data set, position), the same for every number of workers.

All chunks are permuted by (seed, epoch) and dealt to lanes; within a lane, samples are permuted over blocks of a few
chunks; the lanes are merged round-robin. A global *position* counts samples without end: position p belongs to epoch
p // N, so steps straddle epochs and nothing is padded or dropped. Step t is the positions [t * G, (t + 1) * G); worker
r of W takes those with p % W == r. A lane holds each of its chunks alone, and with a number of lanes that W divides
a lane goes to one worker, so every chunk is fetched by about one worker.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from autopainter import seeding
from autopainter.seeding import Use

Indices = NDArray[np.int64]


class Place(NamedTuple):
    """Where a sample stands in the order of one worker."""

    position: int
    """Global position, which decides augmentation, hints and dropout."""
    epoch: int
    sample: int
    chunk: int
    last: bool
    """The worker needs nothing more of the chunk in this epoch."""


@dataclass(frozen=True)
class Order:
    """The order of one data set's samples.

    Attributes:
        chunk_samples: samples of each chunk, in the order of the manifest.
        seed: seed of the run.
        lanes: number of parallel chunk sequences.
        block_chunks: chunks of a lane whose samples are permuted together.
    """

    chunk_samples: tuple[int, ...]
    seed: int
    lanes: int
    block_chunks: int

    @functools.cached_property
    def samples(self) -> int:
        """Samples of one epoch."""
        return sum(self.chunk_samples)

    def epoch(self, number: int) -> tuple[Indices, Indices]:
        """Samples and chunks of an epoch by place: two int64 [samples] arrays (sample index, its chunk index)."""
        chunks = np.argsort(
            seeding.keys(seeding.key(self.seed, Use.CHUNK_ORDER, number), np.arange(len(self.chunk_samples))),
            kind="stable",
        )
        sizes = np.asarray(self.chunk_samples, dtype=np.int64)
        first = np.concatenate(([0], np.cumsum(sizes)[:-1]))
        rank = np.arange(len(chunks))  # place of a chunk in the permuted order
        lane, block = rank % self.lanes, rank // self.lanes // self.block_chunks

        dealt = sizes[chunks]
        chunk = np.repeat(chunks, dealt)
        within = np.arange(self.samples) - np.repeat(np.cumsum(dealt) - dealt, dealt)
        sample = first[chunk] + within
        lane, block = np.repeat(lane, dealt), np.repeat(block, dealt)

        shuffle = seeding.keys(seeding.key(self.seed, Use.SAMPLE_ORDER, number), sample)
        by_lane = np.lexsort((shuffle, block, lane))
        turn = np.arange(self.samples) - np.searchsorted(lane[by_lane], lane[by_lane])  # place within its lane
        merged = by_lane[np.lexsort((lane[by_lane], turn))]
        return sample[merged], chunk[merged]


def step_positions(step: int, global_batch: int, rank: int, world: int) -> range:
    """Global positions of a step (from 0) that a worker computes; ``world`` must divide ``global_batch``."""
    assert global_batch % world == 0
    return range(step * global_batch + rank, (step + 1) * global_batch, world)


def steps(order: Order, global_batch: int, rank: int, world: int, start_step: int) -> Iterator[tuple[int, list[Place]]]:
    """The steps of one worker without end, each with the places of its samples."""
    epoch = functools.lru_cache(maxsize=2)(functools.partial(_worker_epoch, order, rank, world))
    for step in itertools.count(start_step):
        places = []
        for position in step_positions(step, global_batch, rank, world):
            number, place = divmod(position, order.samples)
            sample, chunk, last = epoch(number)
            places.append(Place(position, number, int(sample[place]), int(chunk[place]), bool(last[place])))
        yield step, places


def _worker_epoch(order: Order, rank: int, world: int, number: int) -> tuple[Indices, Indices, NDArray[np.bool_]]:
    """Samples and chunks of an epoch, and whether a place is the worker's last one of its chunk."""
    sample, chunk = order.epoch(number)
    mine = np.arange((rank - number * order.samples) % world, order.samples, world)
    _, from_end = np.unique(chunk[mine][::-1], return_index=True)
    last = np.zeros(order.samples, np.bool_)
    last[mine[len(mine) - 1 - from_end]] = True
    return sample, chunk, last


def in_order(chunk_samples: Sequence[int], size: int, limit: int | None) -> Iterator[tuple[int, list[Place]]]:
    """All samples in the order of the manifest, in steps of up to ``size``; of no more than ``limit`` samples."""
    owners = [chunk for chunk, samples in enumerate(chunk_samples) for _ in range(samples)][:limit]
    for step, first in enumerate(range(0, len(owners), size)):
        rows = range(first, min(first + size, len(owners)))
        yield (
            step,
            [
                Place(row, 0, row, owners[row], last=row + 1 == len(owners) or owners[row + 1] != owners[row])
                for row in rows
            ],
        )
