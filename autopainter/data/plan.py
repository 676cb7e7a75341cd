"""The order of samples: pure functions of (seed, data set, position), the same for every number of workers.

All chunks are permuted by (seed, epoch) and dealt to lanes; within a lane, samples are permuted over blocks of a few
chunks; the lanes are merged round-robin. A global *position* counts samples without end: position p belongs to epoch
p // N, so steps straddle epochs and nothing is padded or dropped. Step t is the positions [t * G, (t + 1) * G); worker
r of W takes those with p % W == r. A lane holds each of its chunks alone, and with a number of lanes that W divides
a lane goes to one worker, so every chunk is fetched by about one worker.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopainter import seeding
from autopainter.seeding import Use

Indices = NDArray[np.int64]


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
