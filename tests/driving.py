"""One call of job/train.py, read line by line, and what its run left; shared by the tests of the job."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import chaos_checks
import pytest
import torch
from waiting import PATIENCE_SECONDS

from autopainter import checkpoint, storage

ROOT = Path(__file__).resolve().parent.parent
STEPS = 24
JOB = (sys.executable, "job/train.py")
RARELY = "checkpoint.every_seconds=1000", "checkpoint.max_age_seconds=2000"  # so that only what is tested saves


class Driver:
    """One call of job/train.py whose output is read line by line."""

    started: ClassVar[list["Driver"]] = []

    def __init__(self, settings: list[str], program: tuple[str, ...] = JOB, **environment: str) -> None:
        options = [option for setting in settings for option in ("--set", setting)]
        self.lines: list[str] = []
        Driver.started.append(self)
        self.process = subprocess.Popen(
            [*program, "--config", "job/configs/quickstart.yaml", *options],
            cwd=ROOT, env=os.environ | {"RAY_DEDUP_LOGS": "0"} | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self._watchdog = threading.Timer(PATIENCE_SECONDS, self.process.kill)  # a test that waits for nothing fails
        self._watchdog.daemon = True
        self._watchdog.start()

    def kill(self) -> None:
        """SIGKILL it, if it still runs."""
        self._watchdog.cancel()
        self.process.kill()
        self.process.wait()

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read on until a line matches; an early end of the program fails the test with its output."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match
        pytest.fail(f"no line matches {pattern!r}:\n{''.join(self.lines)}")

    def finish(self, code: int = 0) -> str:
        """Wait for the end with this exit code; the whole output."""
        assert self.process.stdout is not None
        self.lines += self.process.stdout.readlines()
        output = "".join(self.lines)
        assert self.process.wait(timeout=PATIENCE_SECONDS) == code, output
        return output


def saved(run: str) -> list[int]:
    """Steps that a run has saved."""
    return checkpoint.steps(storage.open_store(run))


def final_state(run: str, steps: int = STEPS) -> checkpoint.Tensors:
    """The state of a finished run."""
    found = checkpoint.newest(storage.open_store(run))
    assert found is not None
    assert found[0].step == steps
    return found[1]


def assert_same_state(one: checkpoint.Tensors, other: checkpoint.Tensors) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def scalars(run: str, folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalar curves as TensorBoard shows them."""
    return chaos_checks.scalars(storage.open_store(run), folder)


def assert_same_run(run: str, reference: str, folder: Path) -> None:
    """Two finished runs are the same: state, and every curve with every step once."""
    assert_same_state(final_state(run), final_state(reference))
    mine, other = scalars(run, folder / "mine"), scalars(reference, folder / "other")
    assert mine == other
    assert [step for step, _ in mine["generator/loss"]] == list(range(1, STEPS + 1))
