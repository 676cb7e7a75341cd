"""Folders."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from autopainter.errors import CorruptData, UserError
from autopainter.storage.store import Store, StoredObject

_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it


class LocalStore(Store):
    """A folder. Files are written beside their place, synced and renamed, so a crash leaves no half file."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.root = Path(uri)

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
        handle, name = self._temporary(key, target.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                os.fchmod(file.fileno(), 0o666 & ~_UMASK)  # mkstemp's 0600 would hide it from other users
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            place(temporary, target)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            temporary.unlink(missing_ok=True)

    def _temporary(self, key: str, folder: Path) -> tuple[int, str]:
        """An open temporary file in a folder, which is made if need be."""
        while True:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                return tempfile.mkstemp(dir=folder, prefix=".tmp-")
            except (PermissionError, NotADirectoryError, FileExistsError) as error:
                if not isinstance(error, FileExistsError) or (folder.exists() and not folder.is_dir()):
                    raise UserError(f"{self.locate(key)}: cannot be written: {error.strerror}") from None
            except FileNotFoundError:
                pass  # another process has just deleted the last file of this folder, and the folder with it

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
            for path in (Path(parent, name) for name in names if not name.startswith(".tmp-")):
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):
                        found.append(StoredObject(key, path.stat().st_size))
        return sorted(found, key=lambda entry: entry.key)

    def size(self, key: str) -> int | None:
        path = self.root / key
        return path.stat().st_size if path.is_file() else None

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self.root / key
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.root).parents[:-1]:
                try:
                    (self.root / folder).rmdir()
                except OSError:
                    break
