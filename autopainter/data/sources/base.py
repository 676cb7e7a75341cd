"""What a source of pairs is: it lists its items and makes pictures with their drawings out of each item's files.

Sources are small frozen dataclasses, so they travel to other processes and machines. ``pairs`` is a pure function of
the source, the item and the bytes of its files.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from autopainter import storage
from autopainter.data import pictures
from autopainter.data.pictures import SUFFIXES, BrokenInput, Fit, Image
from autopainter.errors import StorageError, UserError
from autopainter.storage import StoredObject


class NoDrawing(UserError):
    """A sound input that makes no useful pair and is left out by design; the message is the reason."""


@dataclass(frozen=True)
class Item:
    """One input.

    Attributes:
        key: name in the data set, unique in its source: letters, digits, ``_``, ``-`` and ``/``.
        group: items of one group are variants of one drawing and stay on one side of the split.
        location: what people call it: the name of its first file inside the source.
        files: its files and their sizes in bytes, by which a replaced one is noticed.
    """

    key: str
    group: str
    location: str
    files: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Listing:
    """What a source found.

    Attributes:
        items: sorted by key.
        broken: inputs that cannot be items, by name, with the reason.
        ignored: number of files that are not taken for pictures, by suffix.
    """

    items: list[Item]
    broken: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pair:
    """A picture, uint8 [S, S, 3] RGB, and its drawing, uint8 [S, S] with 0 for lines and 255 for paper.

    Without a drawing the pair is completed by the stream, on the fly. ``part`` names the pair among those of its item.
    """

    color: NDArray[np.uint8]
    sketch: NDArray[np.uint8] | None
    part: str = ""


def cut(color: Image, drawing: Image, size: int, fit: Fit) -> list[Pair]:
    """Pairs of a picture and its drawing, both uint8 [H, W, 3] RGB and of one size, cut alike into squares."""
    colors = pictures.squares(color, size, fit)
    sketches = pictures.squares(cv2.cvtColor(drawing, cv2.COLOR_RGB2GRAY), size, fit)
    return [Pair(pictures.pad(colors[part]), pictures.pad(sketches[part]), part) for part in colors]


class Source(Protocol):
    """What can be packed."""

    def info(self) -> dict[str, Any]:
        """What the source is and how pairs are made from it, as JSON values: all that decides their pixels."""

    def listing(self) -> Listing:
        """All items; ``UserError`` if there are none."""

    def fetch(self, item: Item) -> list[bytes]:
        """The item's files; ``BrokenInput`` if one is not there, ``StorageError`` if storage kept failing."""

    def pairs(self, item: Item, files: Sequence[bytes]) -> list[Pair]:
        """Its pairs, in a fixed order; ``BrokenInput``, ``Undecided`` or ``NoDrawing`` if there are none."""


def list_pictures(uri: str) -> tuple[list[StoredObject], dict[str, int]]:
    """Pictures at any depth of a folder or s3:// prefix, hidden ones excepted, and a count of the other files.

    Raises:
        UserError: there is no such folder, or no picture in it.
    """
    store = storage.open_store(uri)
    if isinstance(store, storage.LocalStore) and not store.root.is_dir():
        raise UserError(f"{uri}: no such folder")
    found, ignored = [], Counter[str]()
    for entry in store.list():
        path = PurePosixPath(entry.key)
        if any(part.startswith(".") for part in path.parts):
            continue
        if path.suffix.lower() in SUFFIXES:
            found.append(entry)
        else:
            ignored[path.suffix.lower() or "no suffix"] += 1
    if not found:
        raise UserError(f"{uri}: no pictures in it; looked for {', '.join(SUFFIXES)}")
    return found, dict(sorted(ignored.items()))


def list_items(uri: str) -> Listing:
    """Every picture of a folder or s3:// prefix as an item and a group of its own; raises as ``list_pictures``."""
    found, ignored = list_pictures(uri)
    keys = sample_keys([entry.key for entry in found])
    items = [Item(key, key, entry.key, ((entry.key, entry.bytes),)) for key, entry in zip(keys, found, strict=True)]
    return Listing(sorted(items, key=lambda item: item.key), ignored=ignored)


def read_picture(uri: str, location: str) -> bytes:
    """A file under a folder or s3:// prefix.

    Raises:
        BrokenInput: it is not there or not readable.
        StorageError: storage failed in another way, which does not tell anything of the file.
    """
    store = storage.open_store(uri)
    try:
        return store.read(location)
    except StorageError:
        raise
    except OSError as error:
        if storage.lasting(error):
            raise BrokenInput(f"cannot be read: {error.strerror or 'not found'}") from error
        raise StorageError(
            f"{store.locate(location)}: cannot be read: {error.strerror}; the same command continues later"
        ) from error


def stem(path: str) -> str:
    """A file's path without its suffix."""
    return path.rpartition(".")[0]


def sample_keys(paths: list[str]) -> list[str]:
    """Sample keys of files: the path without suffix; where that is unfit or not unique, a hash makes it so."""
    # Case-blind: a reader may unpack a shard on a file system that is.
    counts = Counter(stem(path).lower() for path in paths)
    keys = []
    for path in paths:
        plain = re.sub(r"[^A-Za-z0-9_/-]", "_", stem(path))[-64:].strip("/")
        # "-u" and "-d" end the keys of upper and lower squares
        if plain != stem(path) or counts[plain.lower()] > 1 or plain.endswith(("-u", "-d")):
            plain += "-" + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        keys.append(plain)
    return keys
