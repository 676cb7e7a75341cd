"""Counter-based randomness against splitmix64 in plain integers and its published numbers.

Run: pytest tests/test_seeding.py
"""

import numpy as np
import pytest
import torch

from autopainter import seeding
from autopainter.seeding import Use

MASK = 2**64 - 1
PUBLISHED = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821)
"""First numbers of splitmix64 with seed 1234567 (rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64)."""


def splitmix64(seed, count):
    """The first ``count`` numbers of the generator of Steele, Lea and Flood 2014."""
    numbers = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        numbers.append(z ^ (z >> 31))
    return numbers


def as_int64(*keys):
    return torch.tensor([key - 2**64 if key >= 2**63 else key for key in keys])


def sample_keys(count, seed=0):
    """The dropout keys of a run's first samples."""
    return as_int64(*(seeding.key(seed, Use.DROPOUT, position) for position in range(count)))


def correlation(a, b):
    return np.corrcoef(a.double().flatten(), b.double().flatten())[0, 1]


def test_published_numbers():
    assert splitmix64(1234567, 5) == list(PUBLISHED)
    assert seeding.key(1234567) == PUBLISHED[0]
    expected = torch.tensor([number >> 40 for number in PUBLISHED]) * 2.0**-24
    assert torch.equal(seeding.uniform(as_int64(1234567), (5,))[0], expected)


def test_golden_values():
    """These are part of the run format: if they change, a run that is continued gets other samples and masks."""
    assert {use.name: use.value for use in Use} == {
        "CHUNK_ORDER": 1, "SAMPLE_ORDER": 2, "AUGMENT": 3, "HINTS": 4, "DROPOUT": 5, "WEIGHTS": 6, "SKETCH": 7,
        "COLOR_JITTER": 8, "PENALTY": 9, "RECOLOR": 10,
    }  # fmt: skip
    assert seeding.key() == 0
    assert seeding.key(0, Use.DROPOUT, 0) == 1070957052962950154
    assert seeding.key(7, Use.AUGMENT, 123456789012) == 2633436689296661454
    assert seeding.uniform(as_int64(seeding.key(0, Use.DROPOUT, 0)), (2, 2)).tolist() == [
        [[0.9707238078117371, 0.3869720697402954], [0.7131505608558655, 0.5785987973213196]]
    ]
    assert seeding.generator(7, Use.HINTS, 3).integers(2**32, size=3).tolist() == [2027842601, 2934022699, 1081964146]


def test_key_chains_the_mixer():
    state = 0
    for number in (3, -1, 2**63):
        state = splitmix64((state + number) & MASK, 1)[0]
    assert seeding.key(3, -1, 2**63) == state


def test_key_depends_on_every_number_and_on_their_order():
    variants = [(1, 2, 3), (2, 1, 3), (1, 3, 2), (1, 2), (1, 2, 3, 0), (0, 1, 2, 3), (1, 2, 4), (1, 2, -3)]
    assert len({seeding.key(*numbers) for numbers in variants}) == len(variants)


@pytest.mark.parametrize("prefix", [(0,), (5, Use.SAMPLE_ORDER, 2), (2**63 - 1, 1)])
def test_keys_equal_key_element_by_element(prefix):
    counters = np.array([[0, 1, 2, 3], [-1, 10**12, 2**63 - 1, -(2**63)]])
    found = seeding.keys(seeding.key(*prefix), counters)
    assert found.dtype == np.uint64
    assert found.tolist() == [[seeding.key(*prefix, counter) for counter in row] for row in counters.tolist()]


def test_uniform_equals_splitmix64():
    keys = [0, 1, 2**63 - 1, 2**63, MASK, seeding.key(4, 5)]
    numbers = seeding.uniform(as_int64(*keys), (3, 4))
    assert numbers.shape == (6, 3, 4)
    assert numbers.dtype == torch.float32
    expected = [[number >> 40 for number in splitmix64(key, 12)] for key in keys]
    assert torch.equal(numbers.view(6, 12).double() * 2**24, torch.tensor(expected).double())


def test_uniform_is_independent_of_the_batch():
    keys = sample_keys(6)
    together = seeding.uniform(keys, (2, 5))
    for row, key in enumerate(keys):
        assert torch.equal(seeding.uniform(key[None], (2, 5))[0], together[row])
    order = torch.tensor([4, 0, 4, 2])
    assert torch.equal(seeding.uniform(keys[order], (2, 5)), together[order])
    assert torch.equal(seeding.uniform(keys, (10,)), together.view(6, 10))  # the place counts, not the shape


@pytest.mark.parametrize("keys", [sample_keys(64), torch.arange(64)], ids=["mixed", "consecutive"])
def test_uniform_is_uniform(keys):
    """Five standard errors of each statistic, for the keys that are used and for the hardest ones."""
    numbers = seeding.uniform(keys, (64, 64))
    count = numbers.numel()
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    assert abs(numbers.double().mean() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(numbers.double().square().mean() - 1 / 3) < 5 * (4 / 45 / count) ** 0.5
    counts = torch.histc(numbers, 256, 0, 1).double()
    expected = count / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * (2 * 255) ** 0.5
    for a, b in [
        (numbers[1:], numbers[:-1]),  # neighbouring samples
        (numbers[:, 1:], numbers[:, :-1]),  # neighbouring rows
        (numbers[..., 1:], numbers[..., :-1]),  # neighbouring places
    ]:
        assert abs(correlation(a, b)) < 5 / a.numel() ** 0.5


def test_the_streams_of_different_uses_seeds_and_positions_are_apart():
    base = seeding.generator(0, Use.AUGMENT, 0).random(4096)
    for numbers in [(0, Use.HINTS, 0), (1, Use.AUGMENT, 0), (0, Use.AUGMENT, 1)]:
        assert abs(np.corrcoef(base, seeding.generator(*numbers).random(4096))[0, 1]) < 5 / 64
    assert (base == seeding.generator(0, Use.AUGMENT, 0).random(4096)).all()
