"""How long does it take to paint a sketch: the whole command, one picture after another, and pictures in batches?

The default network with the weights that a run begins with, saved to a folder. Painting in batches is measured for
``--device cuda`` too; it is then read back for every batch, as a picture that is to be kept has to be.

    .venv/bin/python scripts/bench_paint.py [--device cuda]
"""

import argparse
import functools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from measuring import bench_config, cpu

from autopainter.checkpoint import CheckpointWriter, Retention, begin_attempt
from autopainter.paint import Painter
from autopainter.storage import open_store
from autopainter.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent


def save_run(uri: str, size: int) -> None:
    """A run with one checkpoint."""
    config = bench_config({"data.image_size": size, "loss.feature_weight": 0})
    store = open_store(uri)
    meta = {"manifest_id": "none", "config": config.model_dump(mode="json")}
    writer = CheckpointWriter(store, begin_attempt(store, {}), Retention(keep=1), meta)
    writer.save(1, Trainer(config, torch.device("cpu")).state())
    writer.wait()
    if writer.error:
        raise writer.error


def seconds(do: Callable[[], object], times: int) -> tuple[list[float], float]:
    """Seconds of each time, and processor seconds of one, its processes' included."""
    spent, before = [], processor_seconds()
    for _ in range(times):
        began = time.monotonic()
        do()
        spent.append(time.monotonic() - began)
    return spent, (processor_seconds() - before) / times


def processor_seconds() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def main() -> int:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--size", type=int, default=512, help="Edge in pixels.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="Pictures that are painted at once.")
    options = parser.parse_args()
    place = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else cpu()
    print(f"{place}; {options.size} px; medians of {options.rounds} (least - most)\n")
    print("| | seconds | processor seconds | pictures/s |\n| --- | ---: | ---: | ---: |")

    def show(what: str, found: tuple[list[float], float], pictures: int = 1) -> None:
        spent, used = found
        middle = statistics.median(spent)
        print(
            f"| {what} | {middle:.3f} ({min(spent):.3f} - {max(spent):.3f}) | {used:.3f} | {pictures / middle:.2f} |",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        run, sketch = f"{folder}/run", Path(folder, "sketch.png")
        save_run(run, options.size)
        lines = np.full((options.size, options.size), 255, np.uint8)
        cv2.circle(lines, (options.size // 2, options.size // 2), options.size // 3, 0, 3)
        cv2.imwrite(str(sketch), lines)
        program = "from autopainter.cli import main; main()"
        words = [sys.executable, "-c", program, "paint", "--run", run, str(sketch), "-o", f"{folder}/painted.png"]
        if options.device.type == "cpu":
            env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}  # the command takes a GPU where it finds one
            command = functools.partial(subprocess.run, words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=env)
            show("the whole command", seconds(command, options.rounds))
        painter = Painter.load(run, device=options.device)
        painter.paint(lines)
        show("one more picture", seconds(lambda: painter.paint(lines), options.rounds))
        for count in options.batches:
            pixels = torch.from_numpy(lines).expand(count, 1, -1, -1)
            hint = torch.zeros(count, 4, options.size, options.size, dtype=torch.uint8)
            painter.batch(pixels, hint)
            show(f"{count} at once", seconds(functools.partial(painter.batch, pixels, hint), options.rounds), count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
