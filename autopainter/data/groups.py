"""Groups of items that must stay on one side of the split."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from autopainter.data.pictures import BrokenInput
from autopainter.data.sources import Item, Source
from autopainter.errors import UserError

_READERS = 16
_BATCH = 1024
"""Items that are read ahead, which bounds the memory."""


class Joined:
    """Names that were joined into sets, each known by its smallest name."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def root(self, name: str) -> str:
        """Name of the set that a name is in."""
        while (parent := self._parents.get(name, name)) != name:
            self._parents[name] = self._parents.get(parent, parent)
            name = parent
        return name

    def join(self, one: str, other: str) -> None:
        """Make one set of the sets of two names."""
        first, second = sorted((self.root(one), self.root(other)))
        if first != second:
            self._parents[second] = first


def check(pattern: str) -> None:
    """Check a regular expression; ``UserError`` if it is none."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"group_by: {pattern!r} is no regular expression: {error}") from None


def of(name: str, pattern: str) -> str:
    """What a regular expression finds in a name: its first group, or the whole match.

    Raises:
        UserError: it does not match, or without its group.
    """
    match = re.search(pattern, name)
    found = match and match[min(match.re.groups, 1)]
    if found is None:
        raise UserError(f"group_by: {pattern!r} does not match {name!r}; it must match every name")
    return str(found)


def by_pattern(items: list[Item], pattern: str | None) -> list[Item]:
    """Items with the groups that a regular expression finds in their locations; as they are, if there is none."""
    return [replace(item, group=of(item.location, pattern)) for item in items] if pattern else items


def join_duplicates(
    source: Source, items: list[Item], progress: Callable[[int, int], None]
) -> tuple[list[Item], list[list[str]]]:
    """Put items that share a file, byte for byte, into one group, and with them all of their groups.

    Only files of a size that occurs twice are read.

    Args:
        progress: called with the number of items read and of all that are to be read.

    Returns:
        The items, and the locations of each set of items that share a file.

    Raises:
        StorageError: storage kept failing.
    """
    sizes: dict[tuple[int, int], int] = defaultdict(int)
    for item in items:
        for place, (_, size) in enumerate(item.files):
            sizes[place, size] += 1
    suspects = [item for item in items if any(sizes[place, size] > 1 for place, (_, size) in enumerate(item.files))]
    same: dict[tuple[int, str], list[Item]] = defaultdict(list)
    with ThreadPoolExecutor(_READERS) as readers:
        for first in range(0, len(suspects), _BATCH):
            batch = suspects[first : first + _BATCH]
            for item, digests in zip(batch, readers.map(lambda item: _digests(source, item), batch), strict=True):
                for place, digest in enumerate(digests):
                    same[place, digest].append(item)
            progress(first + len(batch), len(suspects))
    # once, also if they share several files
    found = list({tuple(item.key for item in twins): twins for twins in same.values() if len(twins) > 1}.values())
    joined = Joined()
    for first_item, *twins in found:
        for item in twins:
            joined.join(first_item.group, item.group)
    return [replace(item, group=joined.root(item.group)) for item in items], [
        [item.location for item in twins] for twins in found
    ]


def _digests(source: Source, item: Item) -> list[str]:
    try:
        return [hashlib.sha256(file).hexdigest() for file in source.fetch(item)]
    except BrokenInput:
        return []  # packing names it
