"""Folders."""

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from autopainter.errors import CorruptData, StorageError, UserError
from autopainter.storage.store import Store, StoredObject

_TEMPORARY = ".tmp-"
_FOLDER_ATTEMPTS = 1000

_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it


def lasting(error: OSError) -> bool:
    """Whether what could not be read is not there or not readable as it is; anything else, another attempt may mend."""
    kinds = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
    return isinstance(error, kinds) or error.errno in (errno.ELOOP, errno.ENAMETOOLONG)


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
        """All files whose key begins with ``prefix``, those below linked folders as well, sorted by key.

        Raises:
            UserError: a folder may not be read.
            StorageError: a folder cannot be read.
        """
        found = []
        waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(prefix.rpartition("/")[0], frozenset())]
        while waiting:
            folder, above = waiting.pop()
            place, names = self._look_into(folder)
            if place in above:  # a link that leads back
                continue
            for key in (f"{folder}/{name}" if folder else name for name in names):
                mode, size = self._about(key) if key.startswith(prefix) else (0, 0)
                if stat.S_ISDIR(mode):
                    waiting.append((key, above | {place}))
                elif stat.S_ISREG(mode) and not key.rpartition("/")[2].startswith(_TEMPORARY):
                    found.append(StoredObject(key, size))  # a pipe would be waited for
        return sorted(found, key=lambda entry: entry.key)

    def _look_into(self, folder: str) -> tuple[tuple[int, int], Sequence[str]]:
        """Device and inode of a folder, and the names in it: none, if it is not there or is a system's own."""
        path = self.root / folder
        try:
            about = path.stat()
            return (about.st_dev, about.st_ino), os.listdir(path)
        except (FileNotFoundError, NotADirectoryError):  # perhaps it vanished just now
            return (0, 0), []
        except OSError as error:
            private = path.name.startswith(".") or path.name == "lost+found"  # of the root's disk, of other users
            if folder and private and isinstance(error, PermissionError):
                return (0, 0), []
            raise self._unlisted(path, error) from error

    def _about(self, key: str) -> tuple[int, int]:
        """Mode and size of what is at a key, (0, 0) if there is nothing.

        A link that leads nowhere passes for an empty file: whoever reads it will hear.
        """
        path = self.root / key
        try:
            about = path.stat()
            return about.st_mode, about.st_size
        except OSError as error:
            if lasting(error) and os.path.islink(path):
                return stat.S_IFREG, 0
            if isinstance(error, FileNotFoundError):
                return 0, 0
            raise self._unlisted(path.parent, error) from error

    @staticmethod
    def _unlisted(folder: Path, error: OSError) -> Exception:
        if isinstance(error, PermissionError):
            return UserError(f"{folder}: the folder cannot be read: {error.strerror}; grant that, or move it elsewhere")
        return StorageError(f"{folder}: the folder cannot be read: {error.strerror}")

    def size(self, key: str) -> int | None:
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self.root / key
            path.unlink(missing_ok=True)
            self._remove_empty_folders(path)
