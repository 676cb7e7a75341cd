"""What does a training pair cost the host, stage by stage, and how much host do GPUs need?

Pictures of 512 x 512 are generated and packed into a folder; processor time is counted, not the clock, so other work on
the machine hardly matters. The last table says what GPUs of a given speed need, computed from that.

    .venv/bin/python scripts/bench_loader.py
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from bench_pack import write_scenes
from measuring import bench_config, cpu
from numpy.typing import NDArray

from autopainter import seeding
from autopainter.config import Config
from autopainter.data import hints, manifest, pack, samples
from autopainter.data.chunks import Split
from autopainter.data.manifest import Manifest
from autopainter.data.sources import ColorImages
from autopainter.data.stream import TrainingStream
from autopainter.seeding import Use

BATCH = 16


class Stages:
    """Processor time of the calling thread, by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.thread_time()
        yield
        self.seconds[name] += time.thread_time() - began


def stages(data: Manifest, config: Config, rounds: int) -> tuple[dict[str, float], int]:
    """Seconds of each stage over all pairs of the training split, and their number."""
    spent, split, done = Stages(), Split(data, "train", config), 0
    size, seed = config.data.image_size, config.train.seed
    out: dict[str, NDArray[Any]] = {
        "sketch": np.empty((1, size, size), np.uint8), "color": np.empty((3, size, size), np.uint8),
        "hint": np.empty((4, size, size), np.uint8), "dropout": np.empty((), np.int64),
    }  # fmt: skip
    for _ in range(rounds):
        index = 0
        for number, (_, chunk) in enumerate(split.chunks):
            with spent("read and checksum"):
                held = split.fetch(number)
            for _ in range(chunk.samples):
                with spent("decode"):
                    color, sketch = split.decode(index, held)
                with spent("crop, mirror, resize"):
                    color, sketch = samples.augment(color, sketch, config, seeding.generator(seed, Use.AUGMENT, done))
                assert sketch is not None
                with spent("hints"):
                    hint = hints.draw(color, sketch, config.hints, seeding.generator(seed, Use.HINTS, done))
                with spent("turned hues"):
                    if done % 2 and cv2.hasNonZero(hint[..., 3]):  # as hints.recolored = 0.5
                        color, inside = samples.turn_hues(color, 90), hint[..., 3] > 0
                        hint[inside, :3] = samples.turn_hues(hint[inside, None, :3], 90)[:, 0]
                with spent("into the batch"):
                    samples._write(out, color, sketch, hint, done)
                index, done = index + 1, done + 1
    return dict(spent.seconds), done


def whole(data: Manifest, config: Config, steps: int) -> float:
    """Processor seconds of the process for a pair, all threads of the stream together."""
    stream = TrainingStream(data, config, 0, 1, 0)
    for _ in range(4):
        next(stream)
    began = time.process_time()
    for _ in range(steps):
        next(stream)
    spent = time.process_time() - began
    stream.close()
    return spent / (steps * config.train.global_batch)


def main() -> int:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--size", type=int, default=512, help="Edge in pixels.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu-images", type=int, default=600, help="Images a second of one GPU.")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), 0, options.images, options.size)
        pack.pack(ColorImages(folder, size=options.size), f"{folder}/data", pack.PackOptions(), workers=1)
        data = manifest.load(f"{folder}/data/manifest.json")
        config = bench_config({"loss.feature_weight": 0, "data.image_size": options.size, "train.global_batch": BATCH})
        shares, pairs = stages(data, config, options.rounds)
        total = whole(data, config, options.rounds * options.images // BATCH)
        stored = sum(chunk.stop - chunk.start for _, chunk in Split(data, "train", config).chunks)
        pair_bytes = stored * options.rounds / pairs
    print(f"{cpu()}; {options.size} px, {pair_bytes / 1024:.0f} KiB a pair, from a folder\n")
    print("| stage | core-ms a pair |\n| --- | ---: |")
    for name, seconds in shares.items():
        print(f"| {name} | {1e3 * seconds / pairs:.2f} |")
    print(f"| all of them | {1e3 * sum(shares.values()) / pairs:.2f} |")
    print(f"| the stream, its threads included | {1e3 * total:.2f} |\n")
    pixels = options.size**2 * 8
    print(f"| GPUs of {options.gpu_images} images/s | cores | from storage, MB/s | to the GPUs, MB/s |")
    print("| ---: | ---: | ---: | ---: |")
    for gpus in (1, 8):
        rate = gpus * options.gpu_images
        print(f"| {gpus} | {rate * total:.1f} | {rate * pair_bytes / 1e6:.0f} | {rate * pixels / 1e6:.0f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
