"""Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a piece of work on stderr; yields ``update(done, total)``."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TextColumn("{task.fields[rate]}"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None, rate="")
        rate = _Rate()
        yield lambda done, total: bar.update(task, completed=done, total=total, rate=rate.text(done))


class _Rate:
    """Mean rate since the first call; what had been done before then does not count."""

    def __init__(self) -> None:
        self._first: tuple[int, float] | None = None

    def text(self, done: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = done, now
        first, began = self._first
        return f"{(done - first) / (now - began):.0f}/s" if now > began else ""


def _lines(what: str) -> Callable[[int, int], None]:
    rate, last = _Rate(), time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        text = rate.text(done)
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            print(f"{what} {done}/{total} {text}", file=sys.stderr)

    return update
