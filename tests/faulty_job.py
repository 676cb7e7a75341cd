"""job/train.py with a fault in its workers: python tests/faulty_job.py FAULT FOLDER, then the options of job/train.py.

A fault strikes at the fourth step of a start, and once in all (a file in FOLDER remembers it) unless it says otherwise.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

import job.group  # noqa: E402
import job.train  # noqa: E402
from autopainter import losses  # noqa: E402
from autopainter.cli import exit_code_of  # noqa: E402
from job.backend import SafeTorchConfig, _SafeTorchBackend  # noqa: E402
from job.worker import train_worker  # noqa: E402

FAULT, FOLDER = sys.argv[1], sys.argv[2]
_STEP = 4


def once(folder: str, name: str) -> bool:
    """Whether this is the first call with this name by any process."""
    try:
        os.close(os.open(f"{folder}/{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def strike(fault: str, folder: str, painted: torch.Tensor) -> None:
    """What happens at the chosen step; ``painted`` is the generator's output with its graph."""
    rank = dist.get_rank()
    if fault == "hang" and rank == 1 and once(folder, fault):
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "host memory" and rank == 1 and once(folder, fault):
        signal.pause()  # the test shows the node a full memory: until Ray's monitor ends a worker
    if fault == "nan":
        painted.register_hook(lambda gradient: gradient * float("nan"))


def faulty(fault: str, folder: str) -> Callable[[dict[str, Any]], str]:
    """A ``train_worker`` with a fault."""

    def worker(parameters: dict[str, Any]) -> str:
        calls = 0
        original = losses.total_variation

        def total_variation(painted: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == _STEP:
                strike(fault, folder, painted)
            return original(painted)

        losses.total_variation = total_variation
        return train_worker(parameters)

    return worker


class Backend(_SafeTorchBackend):
    """The workers' first meeting fails, in a way that Ray takes for the end of the run."""

    folder = FOLDER

    def on_start(self, worker_group, backend_config):  # type: ignore[no-untyped-def]
        if once(self.folder, "rendezvous"):
            raise RuntimeError("no rendezvous: connection refused")
        super().on_start(worker_group, backend_config)


class NoMeeting(SafeTorchConfig):
    """A configuration with that backend."""

    @property
    def backend_cls(self):  # type: ignore[no-untyped-def]
        return Backend


if __name__ == "__main__":
    if FAULT == "rendezvous":
        job.group.SafeTorchConfig = NoMeeting  # type: ignore[misc]
    else:
        job.group.train_worker = faulty(FAULT, FOLDER)
    del sys.argv[1:3]
    sys.exit(exit_code_of(lambda: job.train.train.main(standalone_mode=False), "job/train.py"))
