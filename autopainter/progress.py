"""Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

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
