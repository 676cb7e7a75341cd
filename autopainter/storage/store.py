"""What every kind of storage offers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredObject:
    """A name and its size, as ``Store.list`` finds them."""

    key: str
    bytes: int


class Store(ABC):
    """Objects under one root. Keys are relative, with ``/`` between their parts.

    All methods raise ``FileNotFoundError`` for an object that is not there, ``UserError`` for what the user must mend
    (no such bucket, refused credentials) and ``StorageError`` for what kept failing after all retries.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def locate(self, key: str) -> str:
        """The full URI of a key, for messages."""
        return f"{self.uri}/{key}" if key else self.uri

    def close(self) -> None:  # noqa: B027 - most stores have nothing to end
        """End the retries of operations in other threads: they fail with their last error."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object."""

    @abstractmethod
    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, all of one version of it; ``CorruptData`` if it ends before ``stop``."""

    def read_large(self, key: str, size: int) -> bytes:
        """The whole object, of which it is known that it has ``size`` bytes; over several connections where it pays.

        An object of another size is ``CorruptData``, or is read as it is.
        """
        return self.read(key)

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Create an object if there is none; True if it now holds exactly ``data`` (so a retried create is true)."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[StoredObject]:
        """All objects whose key begins with ``prefix``, sorted by key."""

    @abstractmethod
    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects; those that are not there are passed over."""

    def abort_uploads(self, prefix: str, unwanted: Callable[[str], bool]) -> None:  # noqa: B027 - S3 only
        """Abort uploads that a killed writer began and nobody will finish: they are in no list, and take space.

        Args:
            prefix: beginning of their keys.
            unwanted: asked for the key of each; true: it is aborted. Whoever is writing it would meet an error.
        """

    def size(self, key: str) -> int | None:
        """Size of an object in bytes, None if there is none."""
        return next((found.bytes for found in self.list(key) if found.key == key), None)
