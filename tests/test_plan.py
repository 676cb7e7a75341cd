"""The order of samples: its properties for any data set, a plain reference of its definition, and a golden order.

Run: pytest tests/test_plan.py
"""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopainter import seeding
from autopainter.data import plan
from autopainter.data.plan import Order, step_positions
from autopainter.seeding import Use

orders = st.builds(
    Order,
    chunk_samples=st.lists(st.integers(1, 17), min_size=1, max_size=40).map(tuple),
    seed=st.integers(0, 2**63 - 1),
    lanes=st.integers(1, 50),
    block_chunks=st.integers(1, 6),
)


def reference(order, number):
    """One epoch from the module's words, one sample at a time: [(sample, chunk)]."""
    chunks = sorted(
        range(len(order.chunk_samples)), key=lambda chunk: seeding.key(order.seed, Use.CHUNK_ORDER, number, chunk)
    )
    lanes = []
    for lane in range(order.lanes):
        mine, sequence = chunks[lane :: order.lanes], []
        for first in range(0, len(mine), order.block_chunks):
            block = [
                (sum(order.chunk_samples[:chunk]) + within, chunk)
                for chunk in mine[first : first + order.block_chunks]
                for within in range(order.chunk_samples[chunk])
            ]
            sequence += sorted(block, key=lambda pair: seeding.key(order.seed, Use.SAMPLE_ORDER, number, pair[0]))
        lanes.append(sequence)
    merged = []
    for turn in range(max(map(len, lanes))):
        merged += [lane[turn] for lane in lanes if turn < len(lane)]
    return merged


def amplification(order, world, number):
    """Chunks fetched by all workers in an epoch over the chunks that there are."""
    chunks = order.epoch(number)[1]
    workers = (np.arange(order.samples) + number * order.samples) % world
    return len(set(zip(chunks.tolist(), workers.tolist(), strict=True))) / len(order.chunk_samples)


@settings(deadline=None, max_examples=60)
@given(order=orders, number=st.integers(0, 1000))
def test_each_epoch_is_the_permutation_that_the_reference_gives(order, number):
    samples, chunks = order.epoch(number)
    assert samples.dtype == chunks.dtype == np.int64
    assert sorted(samples.tolist()) == list(range(sum(order.chunk_samples))) == list(range(order.samples))
    owners = np.repeat(np.arange(len(order.chunk_samples)), order.chunk_samples)
    assert (owners[samples] == chunks).all()
    assert list(zip(samples.tolist(), chunks.tolist(), strict=True)) == reference(order, number)


@settings(deadline=None, max_examples=40)
@given(order=orders.filter(lambda order: order.samples > 30), number=st.integers(0, 100))
def test_epochs_and_seeds_differ(order, number):
    first = order.epoch(number)[0]
    other = Order(order.chunk_samples, order.seed ^ 1, order.lanes, order.block_chunks)
    assert (first != order.epoch(number + 1)[0]).any()
    assert (first != other.epoch(number)[0]).any()
    assert (first == order.epoch(number)[0]).all()


def test_the_order_of_a_known_data_set():
    """Pinned: a run that is continued after an upgrade of NumPy, or of this program, must see the same order."""
    order = Order(chunk_samples=(16, 16, 5, 16, 1, 16, 16, 9, 16, 3), seed=7, lanes=4, block_chunks=2)
    digest = hashlib.sha256()
    for number in range(3):
        for array in order.epoch(number):
            digest.update(array.astype("<i8").tobytes())
    assert order.epoch(0)[0][:8].tolist() == [80, 4, 56, 53, 71, 51, 106, 91]
    assert digest.hexdigest() == "c5261da5144977d8297b225a2073ec6d7d431060ca76112bcff00044e2d7ec68"


def test_the_mixer_is_splitmix64():
    """The first numbers of the authors' generator for the seed 0 (https://prng.di.unimi.it/splitmix64.c)."""
    golden = 0x9E3779B97F4A7C15
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [seeding.key(golden * turn % 2**64) for turn in range(3)] == expected
    counters = np.arange(-3, 50)
    vector = seeding.keys(seeding.key(5, 6), counters)
    assert vector.tolist() == [seeding.key(5, 6, int(counter)) for counter in counters]


@settings(deadline=None)
@given(share=st.integers(1, 12), world=st.integers(1, 12), step=st.integers(0, 10**6) | st.integers(10**12, 10**12 + 9))
def test_the_workers_share_the_positions_of_a_step(share, world, step):
    batch = share * world
    parts = [step_positions(step, batch, rank, world) for rank in range(world)]
    assert all(len(part) == share for part in parts)
    assert sorted(position for part in parts for position in part) == list(range(step * batch, (step + 1) * batch))
    assert all(position % world == rank for rank, part in enumerate(parts) for position in part)


def test_samples_that_are_neighbours_in_a_shard_are_far_apart_in_the_order():
    order = Order((16,) * 1000, seed=0, lanes=48, block_chunks=2)
    samples, chunks = order.epoch(0)
    steps = chunks[: order.samples // 48 * 48].reshape(-1, 48)
    distinct = np.array([len(set(step)) for step in steps.tolist()])
    assert (distinct == 48)[:-40].all()  # a batch never holds two samples of one chunk, but where lanes run out
    assert np.abs(np.corrcoef(samples[:-1], samples[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_a_chunk_is_needed_by_about_one_worker(world):
    even = Order((16,) * 48 * 20, seed=3, lanes=48, block_chunks=2)
    assert [amplification(even, world, number) for number in range(3)] == [1, 1, 1]
    large = Order((16,) * 3775 + (5,), seed=3, lanes=48, block_chunks=2)  # the paper's 60,000 images
    assert max(amplification(large, world, number) for number in range(3)) < 1.12


def test_a_worker_needs_few_chunks_at_a_time():
    """Memory is bounded: between its first and its last sample, a chunk is one of lanes / world * block_chunks."""
    order = Order((16,) * 48 * 10, seed=3, lanes=48, block_chunks=2)
    for world in (1, 4):
        chunks = order.epoch(0)[1][1::world]
        first, last = {}, {}
        for place, chunk in enumerate(chunks.tolist()):
            first.setdefault(chunk, place)
            last[chunk] = place
        alive = [sum(first[chunk] <= place <= last[chunk] for chunk in first) for place in range(0, len(chunks), 97)]
        assert max(alive) <= 48 // world * 2


@settings(deadline=None, max_examples=60)
@given(
    order=orders,
    share=st.integers(1, 6),
    world=st.integers(1, 5),
    start=st.integers(0, 40) | st.just(10**9),
)
def test_the_steps_of_all_workers_are_the_order(order, share, world, start):
    """From any step, over epochs, with data sets smaller than a batch: every position once, and as the order says."""
    batch, count = share * world, 2 + 2 * order.samples // (share * world)
    parts = [list(itertools.islice(plan.steps(order, batch, rank, world, start), count)) for rank in range(world)]
    for rank, part in enumerate(parts):
        assert [step for step, _ in part] == list(range(start, start + count))
        places = [place for _, step in part for place in step]
        for earlier, place in enumerate(places):
            # ``last`` is true exactly if this worker needs nothing more of the chunk in the epoch.
            rest = range(place.position + world, (place.epoch + 1) * order.samples, world)
            chunks = order.epoch(place.epoch)[1]
            if earlier < 40:
                assert place.last == all(chunks[position % order.samples] != place.chunk for position in rest), rank
    union = sorted(place for part in parts for _, step in part for place in step)
    assert [place.position for place in union] == list(range(start * batch, (start + count) * batch))
    for number in {place.epoch for place in union}:
        samples, chunks = order.epoch(number)
        mine = [place for place in union if place.epoch == number]
        for place in mine:
            at = place.position - number * order.samples
            assert (place.sample, place.chunk) == (samples[at], chunks[at])
        if len(mine) == order.samples:
            assert len({place.sample for place in mine}) == order.samples


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 17), min_size=1, max_size=20), size=st.integers(1, 50),
    limit=st.none() | st.integers(1, 400),
)  # fmt: skip
def test_samples_in_order(sizes, size, limit):
    steps = [places for _, places in plan.in_order(sizes, size, limit)]
    places = [place for step in steps for place in step]
    owners = np.repeat(np.arange(len(sizes)), sizes)[:limit].tolist()
    assert [place.sample for place in places] == list(range(len(owners)))
    assert [place.chunk for place in places] == owners
    assert [place.chunk for place in places if place.last] == sorted(set(owners))
    assert {len(step) for step in steps[:-1]} <= {size}
    assert 1 <= len(steps[-1]) <= size
