"""Who runs a training process: it may ask it to stop, take its machine away, and wants to hear of checkpoints."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

from autopainter.progress import TrainingProgress, log_progress


class Host:
    """The plain host: nobody but whoever calls ``stop``. The job on Ray has one of its own.

    The two methods of all workers are called by every worker of the group after the same step, so they may exchange
    messages with each other.

    Args:
        show: shows people how far the training is.

    Attributes:
        meeting_seconds: time between calls of ``leaving``; infinite if there is nothing to learn.
    """

    meeting_seconds = float("inf")

    def __init__(self, show: Callable[[TrainingProgress], None] = log_progress) -> None:
        self._stop = threading.Event()
        self.show = show

    def stop(self) -> None:
        """Ask for a checkpoint after the next step, and the end."""
        self._stop.set()

    def stop_requested(self) -> bool:
        """Whether ``stop`` was called in this process."""
        return self._stop.is_set()

    def leaving(self) -> bool:
        """Of all workers: whether a machine of the group is about to be taken away."""
        return False

    def saved(self, step: int, uri: str, metrics: Mapping[str, float]) -> None:
        """Of all workers: a checkpoint was committed. Only worker 0 has its step, place and last metrics."""


class StopSignals:
    """What SIGTERM and SIGINT (Ctrl-C) asked for.

    Attributes:
        received: the first signal that came, 0 before any.
    """

    received = 0

    @property
    def exit_code(self) -> int:
        """Exit code of a program that ends because of it: 143 or 130."""
        return 128 + self.received


@contextlib.contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[StopSignals]:
    """Call ``stop`` once at the first SIGTERM or SIGINT; a second Ctrl-C interrupts as it always does."""
    signals = StopSignals()
    # torchrun passes on to its workers what the terminal has already sent them.
    supervised = "TORCHELASTIC_RUN_ID" in os.environ

    def receive(number: int, frame: FrameType | None) -> None:
        if not signals.received:
            signals.received = number
            stop()
        elif number == signal.SIGINT and not supervised:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
