"""How long from the command to the first step, and from a killed worker to the first new one, and what takes the time?

A run of generated cartoons on a Ray cluster that `job/train.py` starts on this machine; the log says where it is.

    .venv/bin/python scripts/bench_start.py
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from cartoons import pack_cartoons
from measuring import cpu, process_tree

ROOT = Path(__file__).resolve().parent.parent
_FROM_THE_WORKERS_ON = {
    "processes of the workers, their imports": r"Setting up process group",
    "process group, data set, networks": r"attempt \d+: steps",
    "first batch and step": r"^step \d+/",
}
START = {"imports, checks, Ray, its controller": r"Requesting resources", **_FROM_THE_WORKERS_ON}
RESTART = {
    "until it is noticed": r"the worker group failed",
    "the next group's controller": r"Requesting resources",
    **_FROM_THE_WORKERS_ON,
}
KILL_AT = 10


class Run:
    """The job, and the lines of its log with the time at which each came."""

    def __init__(self, folder: Path, manifest: str) -> None:
        settings = {
            "run.name": "start", "run.storage": folder, "data.manifest": manifest, "data.image_size": 32,
            "loss.feature_weight": 0, "train.steps": 100000, "train.precision": "float32",
            "telemetry.log_every_steps": 1, "checkpoint.every_seconds": 1,
        }  # fmt: skip
        command = [sys.executable, "job/train.py", "--config", "job/configs/quickstart.yaml", "--log-format", "json"]
        command += [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.began = time.monotonic()
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)

    def wait_for(self, pattern: str) -> float:
        """Read on to a line that matches; when it came."""
        assert self.process.stderr
        for line in self.process.stderr:
            try:
                message = json.loads(line)["message"]
            except (ValueError, KeyError):
                continue
            if re.search(pattern, message):
                return time.monotonic()
        raise RuntimeError(f"the job ended with {self.process.wait()} and never said {pattern}")

    def phases(self, named: dict[str, str], began: float) -> dict[str, float]:
        """Seconds of each phase, in their order, and of all."""
        found, last = {}, began
        for name, pattern in named.items():
            now = self.wait_for(pattern)
            found[name], last = now - last, now
        return {**found, "all": last - began}

    def kill_worker(self) -> float:
        """End one worker as the kernel would; when."""
        for pid in process_tree(self.process.pid):
            if Path(f"/proc/{pid}/comm").read_text().startswith("ray::RayTrain"):
                os.kill(pid, signal.SIGKILL)
                return time.monotonic()
        raise RuntimeError("no worker was found")

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=120)


def main() -> int:
    """Measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    spent: dict[str, dict[str, list[float]]] = {"start": defaultdict(list), "restart": defaultdict(list)}
    with tempfile.TemporaryDirectory() as folder:
        manifest = pack_cartoons(f"{folder}/data", pictures=200)
        for number in range(options.rounds):
            run = Run(Path(folder, f"runs-{number}"), manifest)
            try:
                found = {"start": run.phases(START, run.began)}
                run.wait_for(rf"^step {KILL_AT}/")
                run.wait_for("checkpoint of step")
                found["restart"] = run.phases(RESTART, run.kill_worker())
            finally:
                run.stop()
            for kind, phases in found.items():
                for name, seconds in phases.items():
                    spent[kind][name].append(seconds)
    print(f"{cpu()}; medians of {options.rounds} (least - most)\n")
    for kind, title in (("start", "from the command to the first step"), ("restart", "from a killed worker on")):
        print(f"| {title} | seconds |\n| --- | ---: |")
        for name, values in spent[kind].items():
            print(f"| {name} | {statistics.median(values):.1f} ({min(values):.1f} - {max(values):.1f}) |")
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
