"""Does a worker's memory grow? Runs the quickstart for ten epochs and watches the memory of its training processes.

It holds, or the exit code is 1: the median of each worker's resident memory over the tenth epoch is within 2 % of that
over the second.

    bash scripts/quickstart.sh --stop   # makes the environment
    .venv/bin/python scripts/soak.py
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
FIRST_EPOCH, TOLERANCE = 2, 0.02
SAMPLE_SECONDS = 0.5


class Watch:
    """Samples of the workers' memory by epoch.

    Args:
        samples_in_set: training samples of the data set.
        batch: global batch.
    """

    def __init__(self, samples_in_set: int, batch: int) -> None:
        self.samples_in_set = samples_in_set
        self.epoch_steps = samples_in_set / batch
        self.step = 0
        self.workers: dict[int, psutil.Process] = {}
        self.samples: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))  # by worker and epoch
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def feed(self, line: str) -> None:
        """Take over a line of the quickstart's output."""
        if (found := re.search(r" (\d+) train, \d+ validation samples", line)) and int(found[1]) != self.samples_in_set:
            raise SystemExit(f"the data set has {found[1]} training samples: call with --samples {found[1]}")
        if found := re.search(r"pid=(\d+)\) world_rank=(\d+)", line):
            self.workers[int(found[2])] = psutil.Process(int(found[1]))
        elif found := re.search(r"\bstep (\d+)/\d+ ", line):
            self.step = int(found[1])

    def end(self) -> None:
        """Stop sampling."""
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            epoch = int(self.step // self.epoch_steps) + 1
            for rank, process in list(self.workers.items()):
                try:
                    self.samples[rank][epoch].append(process.memory_info().rss)
                except psutil.NoSuchProcess:
                    del self.workers[rank]

    def medians(self, rank: int) -> dict[int, float]:
        """Median resident MiB of a worker by epoch."""
        return {epoch: statistics.median(values) / 2**20 for epoch, values in sorted(self.samples[rank].items())}


def main() -> int:
    """Run the quickstart, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="Epochs to train.")
    parser.add_argument("--samples", type=int, default=3999, help="Training pictures of the quickstart's data set.")
    parser.add_argument("--batch", type=int, default=8, help="Its global batch.")
    options = parser.parse_args()
    watch = Watch(options.samples, options.batch)
    steps = -(-options.epochs * options.samples // options.batch)
    with tempfile.TemporaryDirectory(prefix="autopainter-soak-") as folder:
        command = [sys.executable, "scripts/quickstart.py", "--folder", folder, "--steps", str(steps)]
        program = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        assert program.stdout is not None
        try:
            for line in program.stdout:
                print(line, end="", flush=True)
                watch.feed(line)
        finally:
            program.terminate()
            code = program.wait()
            watch.end()
    if code:
        return code
    ranks = sorted(watch.samples)
    tables = {rank: watch.medians(rank) for rank in ranks}
    print(f"\n| epoch | {' | '.join(f'worker {rank}, MiB' for rank in ranks)} |\n| ---: |{' ---: |' * len(ranks)}")
    for epoch in range(1, options.epochs + 1):
        print(f"| {epoch} | {' | '.join(f'{tables[rank].get(epoch, 0):.1f}' for rank in ranks)} |")
    growth = {rank: tables[rank][options.epochs] / tables[rank][FIRST_EPOCH] - 1 for rank in ranks}
    for rank, share in growth.items():
        print(f"worker {rank}: {share:+.2%} from epoch {FIRST_EPOCH} to epoch {options.epochs}")
    return int(any(abs(share) > TOLERANCE for share in growth.values()))


if __name__ == "__main__":
    sys.exit(main())
