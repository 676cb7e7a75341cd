"""Checks of local folders, which leave nothing behind."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from autopainter.doctor.findings import Finding, failed, gib, ok, one_line, warning

_PROBE_BYTES = 1 << 20


def check(name: str, find: Callable[[], str], wanted_bytes: int, change: str) -> Finding:
    """Whether a folder can be written to and has space.

    Args:
        find: its path; may fail as ``tempfile.gettempdir`` does.
        wanted_bytes: space that it should have.
        change: how to use another one, for the advice.
    """
    try:
        path = Path(find())
        with leaving_no_folder(path):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(bytes(_PROBE_BYTES))
                file.flush()
                os.fsync(file.fileno())
            free = shutil.disk_usage(path).free
    except OSError as error:
        advice = f"make it writable for uid {os.getuid()} and free space in it, or {change}"
        return failed(name, one_line(error), advice)
    detail = f"{path}: writable, {gib(free)} free"
    if free < wanted_bytes:
        return warning(name, f"{detail}, wanted: {gib(wanted_bytes)}", f"free space there, or {change}")
    return ok(name, detail)


@contextlib.contextmanager
def leaving_no_folder(path: Path) -> Iterator[None]:
    """Remove the folders, down to this one, that were made meanwhile and are empty."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
