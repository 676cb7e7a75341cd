"""Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from autopainter import logs

log = logging.getLogger(__name__)

_LINE_SECONDS = 10.0


@contextlib.contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show the progress of a piece of work on stderr; yields ``update(what is done, done, total)``."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[rate]}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, tuple[TaskID, _Rate]] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=None, rate=""), _Rate()
            task, rate = tasks[what]
            bar.update(task, completed=done, total=total, rate=rate.text(done))

        yield update


class _Rate:
    """Mean rate since the first call; what had been done before then does not count."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def text(self, done: int) -> str:
        """The rate, if there is one yet."""
        rate = self._rate(done)
        return f"{rate:.0f}/s" if rate else ""

    def left(self, done: int, total: int) -> str:
        """The time left, if there is a rate yet."""
        rate = self._rate(done)
        return f"{(total - done) / rate // 60:.0f}:{(total - done) / rate % 60:02.0f} left" if rate else ""

    def _rate(self, done: int) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        first, began = self._first
        return (done - first) / (now - began) if now > began else 0.0


def _lines() -> Callable[[str, int, int], None]:
    rates: dict[str, _Rate] = {}
    last = time.monotonic()

    def update(what: str, done: int, total: int) -> None:
        nonlocal last
        rate = rates.setdefault(what, _Rate())
        text, left = rate.text(done), rate.left(done, total)
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            print(f"{what} {done}/{total} {text} {left}".rstrip(), file=sys.stderr)

    return update


@dataclass(frozen=True)
class TrainingProgress:
    """How far a run is.

    Attributes:
        attempt: number of this start of the run.
        step, steps: steps done, and steps in all.
        images_per_second: of all workers.
        data_wait: share of the time that the training step waited for data, 0 to 1.
        generator_loss, pixel_loss, discriminator_loss: of the last step.
        checkpoint_age: seconds since the last checkpoint, or since the start if there is none.
        seconds_left: until the end, at this speed.
    """

    attempt: int
    step: int
    steps: int
    images_per_second: float
    data_wait: float
    generator_loss: float
    pixel_loss: float
    discriminator_loss: float
    checkpoint_age: float
    seconds_left: float

    def __str__(self) -> str:
        return f"step {self.step}/{self.steps}  {self.values}"

    @property
    def values(self) -> str:
        """All but the step."""
        hours, seconds = divmod(round(self.seconds_left), 3600)
        left = f"{hours}:{seconds // 60:02}:{seconds % 60:02}" if hours else f"{seconds // 60}:{seconds % 60:02}"
        return (
            f"{self.images_per_second:.1f} images/s  waited {self.data_wait:.0%}  G {self.generator_loss:.3f}"
            f"  L1 {self.pixel_loss:.4f}  D {self.discriminator_loss:.3f}  checkpoint {self.checkpoint_age:.0f} s old"
            f"  {left} left"
        )


def log_progress(progress: TrainingProgress) -> None:
    """Show it as a line of the log, whose JSON has each value as a field."""
    log.info("%s", progress, extra=asdict(progress))


@contextlib.contextmanager
def training_progress() -> Iterator[Callable[[TrainingProgress], None]]:
    """Show the progress of training on stderr: a bar below the log on a terminal, elsewhere lines of the log."""
    console = Console(stderr=True)
    if not console.is_terminal or logs.structured():
        yield log_progress
        return
    columns = TextColumn("step"), BarColumn(bar_width=20), MofNCompleteColumn(), TextColumn("{task.fields[values]}")
    with Progress(*columns, console=console) as bar, _log_above():
        task = bar.add_task("training", total=None, values="")
        yield lambda now: bar.update(task, completed=now.step, total=now.steps, values=now.values)


@contextlib.contextmanager
def _log_above() -> Iterator[None]:
    """Let the log write to what sys.stderr is now, where a bar makes room for lines."""
    with contextlib.ExitStack() as restored:
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and (before := handler.setStream(sys.stderr)):
                restored.callback(handler.setStream, before)
        yield
