"""Temporary folders that a killed process does not leave for ever: the next process that makes one removes them."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_LOCK = ".lock"


class ScratchFolder:
    """A folder below the system's temporary one, locked as long as its process lives.

    Args:
        purpose: part of its name. Folders of the same purpose whose process is gone are removed first.

    Attributes:
        path: the folder, empty but for the lock.
    """

    def __init__(self, purpose: str) -> None:
        prefix = f"autopainter-{purpose}-"
        for old in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_LOCK}"):
            with contextlib.suppress(OSError), old.open("r+b") as lock:  # another process's, or just removed
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old.parent, ignore_errors=True)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        # Held under another name first: a lock file that is not locked yet would be taken for a dead process's.
        taken = self.path / f"{_LOCK}.new"
        self._lock = os.open(taken, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        taken.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
