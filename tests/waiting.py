"""Waiting for what other threads and processes do; shared by the tests."""

import re
import time
from collections.abc import Callable

PATIENCE_SECONDS = 900
"""After so long a test gives up on a process: a bound on hanging, far above what any takes on a busy machine."""


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait until a condition holds; the test fails if that takes longer."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def complaints(stderr: str) -> str:
    """What a command said beside its progress, of which it prints a line when it takes long."""
    return re.sub(r"^[a-z ]+ \d+/\d+( \d+/s)?( \d+:\d+ left)?\n", "", stderr, flags=re.MULTILINE)
