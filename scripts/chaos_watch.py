"""The run that ``chaos.py`` disturbs, seen from outside: its driver, and what the driver's output says."""

import dataclasses
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from processes import Service

ROOT = Path(__file__).resolve().parent.parent


class Failed(AssertionError):
    """Something that must hold does not."""


class NoEffect(Failed):
    """A fault did not show the effect that it should have."""


@dataclasses.dataclass
class Attempt:
    """A start of the run, as the driver's output shows it; times are of ``time.monotonic()``."""

    number: int
    start: int
    pid: int
    last: int
    saved: int = 0
    times: dict[int, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Kill:
    """What became of a fault.

    Attributes:
        step: last step seen before it.
        resumed: steps done where the run went on; ``step`` if it was not interrupted.
        lost: steps that were done again.
        seconds: from the fault to the first step beyond ``step``; of an outage, to the first one after it.
        first_seconds: from the fault to the first step of any number.
        attempts: starts of the run that it took.
        details: of the kind.
    """

    kind: str
    step: int
    resumed: int
    lost: int
    seconds: float
    first_seconds: float
    attempts: int
    details: str = ""


class Watch:
    """What the driver's JSON log has said of the run."""

    def __init__(self) -> None:
        self._early: list[tuple[int, int]] = []  # attempt and step, before the first line of the attempt
        self.attempts: list[Attempt] = []
        self.ranks: dict[int, int] = {}
        self.passed_over: list[int] = []
        self.failures: list[str] = []

    @property
    def current(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts else None

    def feed(self, line: str) -> None:
        """Take over one line."""
        # What is written past the log, such as the interpreter's last words, is plain.
        record: dict[str, Any] = json.loads(line) if line.startswith("{") else {"message": line}
        text, pid = str(record["message"]), record.get("pid", 0)
        # By its process: the last lines of a killed worker may come when the next one has begun.
        attempt = next((attempt for attempt in reversed(self.attempts) if attempt.pid == pid), None)
        if "step" in record:
            self._early.append((record["attempt"], record["step"]))
        elif found := re.search(r"pid=(\d+)\) world_rank=(\d+)", text):
            self.ranks[int(found[2])] = int(found[1])
        elif found := re.search(r"run \S+, attempt (\d+): steps (\d+) to ", text):
            self.attempts.append(Attempt(int(found[1]), int(found[2]), pid, last=int(found[2])))
        elif attempt and (found := re.search(r"checkpoint of step (\d+) saved", text)):
            attempt.saved = int(found[1])
        elif found := re.search(r"checkpoint of step (\d+) is damaged and is passed over", text):
            self.passed_over.append(int(found[1]))
        elif "the worker group failed: " in text:
            self.failures.append(text.partition("the worker group failed: ")[2].strip())
        self._take_steps()

    def _take_steps(self) -> None:
        attempts = {attempt.number: attempt for attempt in self.attempts}
        for number, step in self._early:
            if attempt := attempts.get(number):
                attempt.last = step
                attempt.times[step] = time.monotonic()
        self._early = [early for early in self._early if early[0] not in attempts]


class Driver(Service):
    """``job/train.py``; each start has a log of its own."""

    kind = "driver"
    stop_seconds = 120.0

    def __init__(self, settings: Mapping[str, Any], env: Mapping[str, str], logs: Path) -> None:
        super().__init__(detach=False)
        self.settings, self.env, self.logs = dict(settings), dict(env), logs
        self.starts = 0
        self._half = b""

    def _launch(self) -> tuple[list[str], Mapping[str, str], Path]:
        self.starts += 1
        self.log = self.logs / f"{self.settings['run.name']}-{self.starts:03d}.log"
        self._read = 0
        settings = [option for item in self.settings.items() for option in ("--set", "=".join(map(str, item)))]
        config = str(ROOT / "job/configs/quickstart.yaml")
        command = [sys.executable, str(ROOT / "job/train.py"), "--config", config, "--log-format", "json", *settings]
        return command, self.env, self.log

    def _probe(self) -> None:
        pass

    def lines(self) -> list[str]:
        """What it has printed since the last call, in whole lines."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        return whole.decode(errors="replace").splitlines()
