"""What does the exchange of gradients cost, and how much of it is hidden behind the backward pass?

Processes over gloo on this machine, one thread each, with the same images a worker. Two ways take turns: buckets that
are sent while the backward pass goes on, as in training, and one call after it.

    .venv/bin/python scripts/bench_exchange.py --ranks 2 4
"""

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from bench_step import random_batch, random_features
from measuring import bench_config, cpu
from torch.multiprocessing.spawn import spawn

from autopainter.config import Config
from autopainter.parallel import GradientBuffer
from autopainter.trainer import Trainer

WAYS = {"in buckets, during the backward pass": None, "at once, after it": 1 << 62}


class Watched(GradientBuffer):
    """Notes how long a step waits for the exchange, and what is exchanged."""

    waited_seconds = 0.0
    sent_bytes = 0

    def average(self) -> None:
        began = time.perf_counter()
        super().average()
        Watched.waited_seconds += time.perf_counter() - began
        Watched.sent_bytes += self._flat.nbytes


def work(rank: int, world: int, folder: str, config: Config, rounds: int) -> None:
    """One rank; the first one writes what it measured."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=600),
    )  # fmt: skip
    trainers = {way: watched(config, bucket_bytes) for way, bucket_bytes in WAYS.items()}
    batch = random_batch(config, 0)
    share = batch.part(slice(rank, None, world))
    found: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    for step in range(rounds + 1):
        for way, trainer in trainers.items():
            dist.barrier()
            Watched.waited_seconds, Watched.sent_bytes = 0.0, 0
            began = time.perf_counter()
            trainer.step(step, share)
            if step:  # the first one warms up
                found[way].append((time.perf_counter() - began, Watched.waited_seconds, Watched.sent_bytes))
    if rank == 0:
        Path(f"{folder}/{world}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def watched(config: Config, bucket_bytes: int | None) -> Trainer:
    """A trainer whose exchange is measured."""
    trainer = Trainer(config, torch.device("cpu"))
    size = {} if bucket_bytes is None else {"bucket_bytes": bucket_bytes}
    for name in ("generator_gradients", "discriminator_gradients"):
        buffer = getattr(trainer, name)
        setattr(trainer, name, Watched(buffer.parameters, len(buffer.scalars), **size))
    return trainer


def main() -> int:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--size", type=int, default=128, help="Edge of the images in pixels.")
    parser.add_argument("--images", type=int, default=2, help="Images of a rank.")
    parser.add_argument("--rounds", type=int, default=8, help="Steps of each way.")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="As in training.")
    options = parser.parse_args()
    print(f"{cpu()}; torch {torch.__version__}; {options.size} px, {options.images} images a rank, medians of a step\n")
    print("| ranks | gradients are sent | MB a rank | step, s | of it waiting for them, s |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for world in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            features = random_features(Path(folder), "relu2_2")
            fields = {
                "data.image_size": options.size, "train.global_batch": options.images * world, **features,
            }  # fmt: skip
            spawn(work, (world, folder, bench_config(fields, options.set), options.rounds), nprocs=world)
            found = json.loads(Path(folder, f"{world}.json").read_text())
        for way, measured in found.items():
            seconds, waited, sent = (statistics.median(column) for column in zip(*measured, strict=True))
            print(f"| {world} | {way} | {sent / 1e6:.1f} | {seconds:.3f} | {waited:.3f} |", flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
