"""A test of a whole system as a script: its folder of logs, which stays if the test fails, and its end."""

import contextlib
import logging
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Trial:
    """One call of the script.

    Attributes:
        folder: where its logs go.
        stays: whether the folder was asked for, so that it stays whatever happens.
        failed: what did not hold; empty if all did.
    """

    folder: Path
    stays: bool
    failed: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self.began

    def conclude(self, success: str) -> int:
        """Print how it ended, ``success`` if all holds, and remove what nobody needs; the exit code."""
        if self.failed:
            print(f"FAILED: {self.failed}\nthe logs are in {self.folder}", flush=True)
            return 1
        print(success)
        if not self.stays:
            shutil.rmtree(self.folder)
        return 0


@contextlib.contextmanager
def trial(
    folder: Path | None, prefix: str, failures: tuple[type[Exception], ...], place: str | None = None
) -> Iterator[Trial]:
    """Run a test; what it raises as one of ``failures`` is noted, what ends it otherwise leaves no folder.

    Args:
        folder: that of the logs; none: a temporary one.
        prefix: of the name of a temporary one.
        place: where a temporary one is made; none: where all are.
    """

    def leave(signum: int, _: object) -> None:
        raise SystemExit(128 + signum)  # through all the clean-up

    signal.signal(signal.SIGTERM, leave)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it names each purge of a resumed run
    held = Trial((folder or Path(tempfile.mkdtemp(prefix=prefix, dir=place))).absolute(), stays=folder is not None)
    held.folder.mkdir(parents=True, exist_ok=True)
    try:
        yield held
    except failures as error:
        held.failed = str(error)
    except BaseException:
        if not held.stays:
            shutil.rmtree(held.folder, ignore_errors=True)
        raise
