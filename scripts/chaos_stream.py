"""Stream whole epochs through a proxy that breaks answers: nothing but the right data or a clear error may come of it.

Packs a small data set into a SeaweedFS of its own. Each trial draws workers, lanes, blocks, threads, first step and
faults, and streams through one epoch at least. Either every sample arrives in the planned order with the pixels of a
run without faults, or the stream stops with a StorageError that names shard and reason. Any third outcome is printed
with what repeats it, and makes the exit code 1:

    python scripts/chaos_stream.py --trials 200
    python scripts/chaos_stream.py --seed 7 --trial 31
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import logging
import os
import random
import re
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cartoons import pack_cartoons
from faulty_proxy import FAULTS, FaultyProxy
from services import SeaweedFS
from storage_times import storage_times

from autopainter import config as configuration
from autopainter import storage
from autopainter.data import manifest as manifests
from autopainter.data.stream import Batch, TrainingStream
from autopainter.errors import StorageError

PICTURES = 240
BUCKET, PREFIX = "datasets", "chaos"
RETRY_SECONDS, TIMEOUT_SECONDS = 2.0, 0.5
"""Of storage while there are faults: short enough for hundreds of hopeless trials."""
TRIAL_SECONDS = 300.0
"""A trial that takes longer hangs."""
LEVELS = (0.0, 0.02, 0.1, 0.2, 0.4, 0.7, 1.0)
"""Share of the answers that suffer a fault, from harmless to hopeless."""
REPLACEMENTS = ("same length", "shorter", "longer", "another shard", "deleted")


class ThirdOutcome(AssertionError):
    """Neither the right data nor a clear error."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """What is drawn for a trial; ``start`` and ``steps`` are of the global batch."""

    seed: str
    world: int
    global_batch: int
    lanes: int | None
    block_chunks: int
    fetch_threads: int
    decode_threads: int
    prefetch_batches: int
    fetch_ahead_batches: int
    cache_gib: float | None
    start: int
    steps: int
    epoch: int
    level: float
    rates: dict[str, float]
    damaged: int | None
    replaced: str | None
    replaced_after: int

    @property
    def group(self) -> str:
        """What trials are counted by."""
        changed = ", and a changed shard" if self.replaced or self.damaged is not None else ""
        return f"faults in {self.level:4.0%} of the answers{changed}"

    @classmethod
    def draw(cls, seed: int, number: int, samples: int) -> "Trial":
        """The trial of a number, for a data set of so many samples."""
        draw = random.Random(f"{seed}:{number}")
        world = draw.choice((1, 1, 2, 3, 4))
        batch = world * draw.choice((2, 4, 6, 8))
        epoch = draw.choice((0, 1, 2, 1000))
        first = epoch * samples // batch
        start = max(0, first - draw.choice((0, 0, 1, draw.randrange(samples // batch))))
        level = draw.choice(LEVELS)
        shares = {kind: draw.expovariate(1) for kind in draw.sample(FAULTS, draw.randint(1, len(FAULTS)))}
        return cls(
            seed=f"{seed}:{number}",
            world=world,
            global_batch=batch,
            lanes=draw.choice((None, 1, world, 2 * world, 3)),
            block_chunks=draw.choice((1, 2, 3)),
            fetch_threads=draw.choice((1, 2, 8)),
            decode_threads=draw.choice((1, 2, 4)),
            prefetch_batches=draw.choice((1, 2, 4, 8)),
            fetch_ahead_batches=draw.choice((0, 1, 4, 16)),
            cache_gib=draw.choice((None, None, 1.0, 0.0003)),  # the last one holds a few chunks
            start=start,
            steps=-(-(epoch + 1) * samples // batch) - start,
            epoch=epoch,
            level=level,
            rates={kind: level * share / sum(shares.values()) for kind, share in shares.items()},
            damaged=draw.randrange(1 << 20) if draw.random() < 0.08 else None,
            replaced=draw.choice(REPLACEMENTS) if draw.random() < 0.2 else None,
            replaced_after=draw.randrange(6),
        )


class Chaos:
    """A packed data set behind a proxy, and what became of the trials on it."""

    def __init__(self, server: SeaweedFS, proxy: FaultyProxy) -> None:
        self._client, self._proxy = server.client(), proxy
        self._manifest = manifests.load(pack_cartoons(f"s3://{BUCKET}/{PREFIX}", PICTURES))
        self._shards = [shard.key for shard in self._manifest.split("train")]
        self.keys = [sample.key for shard in self._manifest.split("train") for sample in shard.samples]
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.injected: Counter[str] = Counter()

    def run(self, trial: Trial) -> str:
        """One trial; its outcome in words. ``ThirdOutcome`` if it is none of those that may be."""
        others = set(threading.enumerate())
        expected = self._reference(trial)
        settle(others)
        target = random.Random(trial.seed).choice(self._shards)
        before = self._read(target)
        damaged = {} if trial.damaged is None else {f"/{BUCKET}/{PREFIX}/{target}": trial.damaged % len(before)}
        self._proxy.begin(trial.rates, seed=hash_of(trial.seed), damaged=damaged)
        with tempfile.TemporaryDirectory() as cache, contextlib.ExitStack() as cleanup:
            # Not before: without faults a server on a busy machine may be as slow.
            cleanup.enter_context(storage_times(RETRY_SECONDS, TIMEOUT_SECONDS))
            cleanup.callback(self._restore, target, before, others)
            config = self._config(trial, cache)
            streams = [TrainingStream(self._manifest, config, r, trial.world, trial.start) for r in range(trial.world)]
            for stream in streams:
                cleanup.callback(stream.close)
            try:
                for number, whole in enumerate(expected):
                    if trial.replaced and number == trial.replaced_after:
                        self._replace(target, before, trial.replaced)
                    for rank, stream in enumerate(streams):
                        compare(next(stream), whole, rank, trial.world)
            except StorageError as error:
                return f"stopped: {self._checked(error)}"
        if not self._proxy.asked:
            raise ThirdOutcome("nothing was read through the proxy")
        return "whole"

    def _reference(self, trial: Trial) -> list[Batch]:
        """The global batches of a run without faults, checked to hold the epoch's samples once each."""
        self._proxy.begin({})
        stream = TrainingStream(self._manifest, self._config(trial, None), 0, 1, trial.start)
        try:
            batches = [next(stream) for _ in range(trial.steps)]
        finally:
            stream.close()
        first = trial.epoch * len(self.keys) - trial.start * trial.global_batch
        epoch = [key for batch in batches for key in batch.keys][first : first + len(self.keys)]
        if Counter(epoch) != Counter(self.keys):
            raise ThirdOutcome("without faults: an epoch does not hold every sample once")
        return batches

    def _config(self, trial: Trial, cache: str | None) -> configuration.Config:
        kept = [f"data.cache={cache}", f"data.cache_gib={trial.cache_gib}"] if cache and trial.cache_gib else []
        return configuration.load(
            None,
            [
                "run.name=chaos", "run.storage=s3://runs", f"data.manifest={self._manifest.uri}/manifest.json",
                "data.image_size=32", "loss.feature_weight=0", "train.steps=1000000",
                f"train.global_batch={trial.global_batch}", f"data.lanes={trial.lanes or 'null'}",
                f"data.block_chunks={trial.block_chunks}", f"data.fetch_threads={trial.fetch_threads}",
                f"data.decode_threads={trial.decode_threads}", f"data.prefetch_batches={trial.prefetch_batches}",
                f"data.fetch_ahead_batches={trial.fetch_ahead_batches}", *kept,
            ],
            environment={},
        )  # fmt: skip

    def _read(self, shard: str) -> bytes:
        body: bytes = self._client.get_object(Bucket=BUCKET, Key=f"{PREFIX}/{shard}")["Body"].read()
        return body

    def _replace(self, shard: str, data: bytes, how: str) -> None:
        """Put something else in a shard's place, past the proxy."""
        if how == "deleted":
            self._client.delete_object(Bucket=BUCKET, Key=f"{PREFIX}/{shard}")
            return
        other = {
            "same length": lambda: bytes(byte ^ 0x55 for byte in data),
            "shorter": lambda: data[: len(data) // 2],
            "longer": lambda: data + data,
            "another shard": lambda: self._read(next(key for key in self._shards if key != shard)),
        }[how]()
        self._client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{shard}", Body=other)

    def _checked(self, error: StorageError) -> str:
        """The message of an error, if it says what and why."""
        message = str(error)
        if "\n" in message or not re.search(rf"{PREFIX}/({'|'.join(map(re.escape, self._shards))}): \S", message):
            raise ThirdOutcome(f"the error does not name shard and reason: {error!r}") from error
        return f"{type(error).__name__}: {message}"

    def _restore(self, shard: str, data: bytes, others: set[threading.Thread]) -> None:
        """Put a shard back, when all threads of the trial have ended."""
        settle(others)
        self._client.put_object(Bucket=BUCKET, Key=f"{PREFIX}/{shard}", Body=data)
        self.injected.update(self._proxy.injected)


def compare(part: Batch, whole: Batch, rank: int, world: int) -> None:
    """Check that a worker's batch is its share of the global one; ``ThirdOutcome`` if not."""
    for field in dataclasses.fields(Batch):
        got, expected = getattr(part, field.name), getattr(whole, field.name)
        share: Any = expected if isinstance(expected, int) else expected[rank::world]
        if not (torch.equal(got, share) if isinstance(share, torch.Tensor) else got == share):
            raise ThirdOutcome(f"wrong {field.name} at step {whole.step}, worker {rank} of {world}")


def settle(others: set[threading.Thread]) -> None:
    """Wait for the threads of streams that were closed: all but the given ones."""
    deadline = time.monotonic() + TRIAL_SECONDS / 2
    while left := set(threading.enumerate()) - others:
        if time.monotonic() > deadline:
            raise ThirdOutcome(f"threads outlive their stream: {sorted(thread.name for thread in left)}")
        time.sleep(0.005)


def hash_of(seed: str) -> int:
    return random.Random(seed).getrandbits(32)


@contextlib.contextmanager
def chaos() -> Iterator[Chaos]:
    """A server, a proxy and a data set; this process's storage settings lead to the proxy."""
    with (
        tempfile.TemporaryDirectory() as folder,
        SeaweedFS(Path(folder)) as server,
        FaultyProxy(server.endpoint) as proxy,
    ):
        os.environ.update({**server.env, "AWS_ENDPOINT_URL": proxy.url})
        yield Chaos(server, proxy)


def attempt(place: Chaos, trial: Trial) -> tuple[str, str]:
    """Run a trial under a watchdog: the kind of its outcome (whole, stopped, third, hang) and the details."""
    result = ["hang", f"not done in {TRIAL_SECONDS:.0f} s"]

    def body() -> None:
        try:
            details = place.run(trial)
            result[:] = [details.partition(":")[0], details]
        except Exception as error:  # whatever it is, it is the third outcome
            words = str(error) if isinstance(error, ThirdOutcome) else traceback.format_exc()
            result[:] = ["third", words]

    thread = threading.Thread(target=body, name="trial", daemon=True)
    thread.start()
    thread.join(TRIAL_SECONDS)
    if thread.is_alive():
        faulthandler.dump_traceback()
    return result[0], result[1]


def report(place: Chaos, seconds: float) -> None:
    """Print the counts."""
    totals: Counter[str] = Counter()
    for group, kind in sorted(place.outcomes):
        print(f"{group}: {place.outcomes[group, kind]} {kind}")
        totals[kind] += place.outcomes[group, kind]
    print("outcomes: " + ", ".join(f"{totals[kind]} {kind}" for kind in ("whole", "stopped", "third", "hang")))
    print("injected: " + ", ".join(f"{count} {kind}" for kind, count in sorted(place.injected.items())))
    print(f"{storage.retries()} attempts were tried again; {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, help="run only the trial of this number, and show it")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.ERROR if options.trial is None else logging.WARNING)
    began, bad = time.monotonic(), 0
    with chaos() as place:
        for number in range(options.trials) if options.trial is None else [options.trial]:
            trial = Trial.draw(options.seed, number, len(place.keys))
            kind, details = attempt(place, trial)
            place.outcomes[trial.group, kind] += 1
            if kind in ("third", "hang") or options.trial is not None:
                print(f"--seed {options.seed} --trial {number}: {kind}: {details}\n{trial}", flush=True)
            bad += kind in ("third", "hang")
            if kind == "hang":
                break
        report(place, time.monotonic() - began)
    sys.stdout.flush()
    os._exit(1 if bad else 0)  # a thread that hangs would be waited for


if __name__ == "__main__":
    main()
