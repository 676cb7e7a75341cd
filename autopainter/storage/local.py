"""Folders."""

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from autopainter.errors import CorruptData, UserError
from autopainter.storage.store import Store, StoredObject

_TEMPORARY = ".tmp-"
_FOLDER_ATTEMPTS = 1000

_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it


class LocalStore(Store):
    """A folder. Files are written beside their place, synced and renamed, so a crash leaves no half file.

    What a killed writer leaves is a temporary file; a store's first write into one of its folders removes those in it.
    """

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.root = Path(uri)
        self._swept: set[str] = set()

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        with (self.root / key).open("rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        if len(data) != stop - start:
            raise CorruptData(f"{self.locate(key)}: ends at byte {start + len(data)}, expected {stop}")
        return data

    def _write(self, key: str, data: bytes, place: Callable[[Path, Path], None]) -> None:
        target = self.root / key
        self._sweep(key)
        while not self._written(key, data, place):
            pass
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _written(self, key: str, data: bytes, place: Callable[[Path, Path], None]) -> bool:
        """Write a temporary file and put it in its place; False if another store has swept it away before."""
        target = self.root / key
        handle, name = self._temporary(key, target.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            try:
                with contextlib.suppress(OSError):  # some file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what _sweep takes for a sign of life
                os.fchmod(file.fileno(), 0o666 & ~_UMASK)  # mkstemp's 0600 would hide it from other users
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                place(temporary, target)
            except FileNotFoundError:
                return False
            finally:
                temporary.unlink(missing_ok=True)
        return True

    def _sweep(self, key: str) -> None:
        """Remove the temporary files of killed writers from the first folder of a key, once, with all below it.

        What a killed attempt left of a checkpoint is in a folder that no later attempt writes to. The root of the store
        may be anything, a home folder even, so it is not searched in depth.
        """
        first = key.partition("/")[0] if "/" in key else ""
        if first in self._swept:
            return
        self._swept.add(first)
        for parent, folders, names in os.walk(self.root / first):
            if not first:
                folders.clear()
            for path in (Path(parent, name) for name in names if name.startswith(_TEMPORARY)):
                with contextlib.suppress(OSError):
                    with path.open("r+b") as file:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()
                    self._remove_empty_folders(path)

    def _remove_empty_folders(self, path: Path) -> None:
        """Remove the folders that a deleted file was in, below the root, as far as they are empty."""
        for folder in path.relative_to(self.root).parents[:-1]:
            try:
                (self.root / folder).rmdir()
            except OSError:
                break

    def _temporary(self, key: str, folder: Path) -> tuple[int, str]:
        """An open temporary file in a folder, which is made if need be."""
        for attempt in range(_FOLDER_ATTEMPTS):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return tempfile.mkstemp(dir=folder, prefix=_TEMPORARY)
            except OSError as error:
                # Another process may have just deleted the last file of this folder, and the folder with it.
                vanished = isinstance(error, FileExistsError | FileNotFoundError) and not folder.is_file()
                if not vanished or attempt == _FOLDER_ATTEMPTS - 1:
                    raise UserError(f"{self.locate(key)}: cannot be written: {error.strerror}") from None
        raise AssertionError

    def write(self, key: str, data: bytes) -> None:
        self._write(key, data, os.replace)

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._write(key, data, os.link)  # link, unlike rename, refuses an existing target
        except FileExistsError:
            return self.read(key) == data
        return True

    def list(self, prefix: str = "") -> list[StoredObject]:
        folder = self.root / prefix if prefix.endswith("/") or not prefix else (self.root / prefix).parent
        found = []
        for parent, _, names in os.walk(folder):  # passes over folders that vanish meanwhile
            for path in (Path(parent, name) for name in names if not name.startswith(_TEMPORARY)):
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    try:
                        about = path.stat()
                        if stat.S_ISREG(about.st_mode):  # a pipe would be waited for
                            found.append(StoredObject(key, about.st_size))
                    except FileNotFoundError:
                        if path.is_symlink():  # to nothing, as whoever reads it will hear
                            found.append(StoredObject(key, 0))
        return sorted(found, key=lambda entry: entry.key)

    def size(self, key: str) -> int | None:
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self.root / key
            path.unlink(missing_ok=True)
            self._remove_empty_folders(path)
