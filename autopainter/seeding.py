"""Counter-based randomness: every random number of a run is a pure function of integers such as (seed, position).

No generator is carried from step to step, so any step can be computed at once, on any rank, in any thread, and twice
(activation checkpointing, a second pass over a microbatch) with the same result. The mixer is splitmix64's finaliser
(Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"); it is plain integer arithmetic, so the
sample order of a run does not depend on the version of NumPy or PyTorch.
"""

import math
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = (1 << 64) - 1


class Use(IntEnum):
    """What a random number is for; keeps the streams of different uses apart. Values are part of the run format."""

    CHUNK_ORDER = 1
    SAMPLE_ORDER = 2
    AUGMENT = 3
    HINTS = 4
    DROPOUT = 5
    WEIGHTS = 6
    SKETCH = 7
    COLOR_JITTER = 8
    PENALTY = 9
    RECOLOR = 10


def _finalise(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MULTIPLIERS[0]) & _MASK
    x = ((x ^ (x >> 27)) * _MULTIPLIERS[1]) & _MASK
    return x ^ (x >> 31)


def key(*numbers: int) -> int:
    """Mix integers into one 64 bit key, in [0, 2**64)."""
    state = 0
    for number in numbers:
        state = _finalise((state + _GOLDEN + (number & _MASK)) & _MASK)
    return state


def keys(prefix: int, counters: NDArray[np.int64]) -> NDArray[np.uint64]:
    """``key`` of every counter under one prefix key: the vectorised form of ``key(..., counter)``.

    Args:
        prefix: a key that ``key`` returned.
        counters: any shape.

    Returns:
        uint64 array of the shape of ``counters``, equal to ``_finalise(prefix + golden + counter)``.
    """
    x = counters.astype(np.uint64) + np.uint64((prefix + _GOLDEN) & _MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MULTIPLIERS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MULTIPLIERS[1])
    return x ^ (x >> np.uint64(31))


def generator(*numbers: int) -> np.random.Generator:
    """A NumPy generator for one short-lived use, such as one sample's augmentation."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key(*numbers))))


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


def uniform(sample_keys: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Uniform numbers that depend on each sample's key and on the place inside the sample only.

    The same numbers come out on every device, for every batch size and for every order of the samples.

    Args:
        sample_keys: int64 [B], one key a sample (the bits of a 64 bit key).
        shape: shape of one sample's numbers.

    Returns:
        float32 [B, *shape] in [0, 1), in steps of 2**-24.
    """
    return torch.ops.autopainter.uniform(sample_keys, shape)


def _uniform(sample_keys: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    count = math.prod(shape)
    place = torch.arange(1, count + 1, device=sample_keys.device, dtype=torch.int64) * _signed(_GOLDEN)
    x = sample_keys[:, None] + place[None, :]
    x = _shift_xor(x, 30) * _signed(_MULTIPLIERS[0])
    x = _shift_xor(x, 27) * _signed(_MULTIPLIERS[1])
    x = _shift_xor(x, 31)
    return (((x >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24).view(-1, *shape)


def _uniform_shape(sample_keys: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return sample_keys.new_empty((len(sample_keys), *shape), dtype=torch.float32)


def _shift_xor(x: torch.Tensor, bits: int) -> torch.Tensor:
    # PyTorch shifts int64 arithmetically: the mask makes it the logical shift of splitmix64.
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


# An operator of its own: torch.compile takes the places for indices, which it computes without wrapping around. Not by
# torch.library.custom_op, whose operators import all of torch.compile when they are first called.
torch.library.define("autopainter::uniform", "(Tensor sample_keys, int[] shape) -> Tensor")
torch.library.impl("autopainter::uniform", "default", _uniform)
torch.library.register_fake("autopainter::uniform", _uniform_shape)
