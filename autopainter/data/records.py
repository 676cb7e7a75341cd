"""What an unfinished pack has in its destination: its plan, and a record of each shard that is finished.

They lie in a folder of their own for each pack, and are deleted when the manifest is there.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from autopainter import storage
from autopainter.config import flatten
from autopainter.data.manifest import SPLITS, UNFIT, Shard
from autopainter.data.shard import PLAN, SHARD_NAME, ShardPlan, ShardRecord, index, taken_over
from autopainter.errors import CorruptData, StorageError, UserError

log = logging.getLogger(__name__)

FOLDER = "_pack/"
ELSEWHERE = "pack to another place or pass --overwrite"
_READERS = 4  # each of them holds a shard in memory


def shards_in(store: storage.Store) -> dict[str, int]:
    """Sizes of everything that is named like a shard."""
    found = [entry for split in SPLITS for entry in store.list(f"{split}-")]
    return {entry.key: entry.bytes for entry in found if SHARD_NAME.fullmatch(entry.key)}


def delete(store: storage.Store) -> None:
    """Delete the records of all packs."""
    store.delete([entry.key for entry in store.list(FOLDER)])


def changes(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In what two packs differ, for people; empty if in nothing."""
    one, other = flatten({name: old.get(name) for name in new}), flatten(new)
    differing = [name for name in one | other if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)} -> {other.get(name)}" for name in differing)


@dataclass(frozen=True)
class Records:
    """The records of one pack.

    Attributes:
        store: the destination.
        identity: all that decides the bytes of the data set, as JSON values.
        plans: the shards that it will make.
    """

    store: storage.Store
    identity: dict[str, Any]
    plans: list[ShardPlan]

    @property
    def folder(self) -> str:
        """Where they lie."""
        return f"{FOLDER}{hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:16]}/"

    def key(self, plan: ShardPlan) -> str:
        """Of the record of a shard."""
        return f"{self.folder}{plan.name}.json"

    def claim(self, overwrite: bool, progress: Callable[[int, int], None]) -> dict[str, ShardRecord]:
        """Clear the destination of all but the finished shards of this pack, which are read; their records, by name.

        Args:
            overwrite: delete shards and records of others.
            progress: called with the number of shards read and of all that are to be read.

        Raises:
            UserError: there are such, or the destination cannot be written.
            StorageError: storage kept failing.
        """
        present = shards_in(self.store)
        keys = [entry.key for entry in self.store.list(FOLDER)]
        others = [key for key in keys if not key.startswith(self.folder)]
        if not overwrite:
            self._refuse_others(others, present, begun=self.folder + PLAN in keys)
        try:
            self.store.write(self.folder + PLAN, json.dumps(self.identity).encode())
        except StorageError:
            raise
        except OSError as error:
            raise UserError(f"{self.store.uri}: cannot be written: {error.strerror}") from error
        finished = [plan for plan in self.plans if self.key(plan) in keys]
        kept = {}
        with ThreadPoolExecutor(_READERS) as readers:
            for done, (plan, record) in enumerate(zip(finished, readers.map(self._finished, finished), strict=True), 1):
                if record is not None:
                    kept[plan.name] = record
                progress(done, len(finished))
        self.store.delete([name for name in present if name not in kept])
        self.store.delete(others)
        return kept

    def _refuse_others(self, others: list[str], present: dict[str, int], begun: bool) -> None:
        if others:
            try:
                other = json.loads(self.store.read(others[0].rpartition("/")[0] + "/" + PLAN))
                reason = f" ({changes(other, self.identity)})"
            except (FileNotFoundError, *UNFIT):
                reason = ""
            raise UserError(
                f"{self.store.uri}: holds an unfinished pack{reason}; the command that began it goes on with it;"
                f" else {ELSEWHERE}"
            )
        ours = {plan.name for plan in self.plans} if begun else set()
        if strangers := sorted(present.keys() - ours):
            name = self.store.locate(strangers[0])
            raise UserError(f"{name}: not from an interrupted run of this command; {ELSEWHERE}")

    def _finished(self, plan: ShardPlan) -> ShardRecord | None:
        """The record of a shard that is there as its record says."""
        try:
            record = ShardRecord.decode(self.store.read(self.key(plan)))
            if record.shard is None or _is_there(self.store, plan.name, record.shard):
                return record
        except (CorruptData, FileNotFoundError):
            pass
        log.warning("%s: the shard or its record is damaged; it is packed again", self.store.locate(plan.name))
        return None

    def check(self, shards: Iterable[Shard]) -> None:
        """Check that nobody else has written to the destination since ``claim``.

        Raises:
            UserError: somebody has.
        """
        keys = {entry.key for entry in self.store.list(FOLDER)}
        sizes = shards_in(self.store)
        ours = {self.folder + PLAN, *map(self.key, self.plans)}
        if keys != ours or any(sizes.get(shard.key) != shard.bytes for shard in shards):
            raise taken_over(self.store.uri)


def _is_there(store: storage.Store, name: str, shard: Shard) -> bool:
    data = store.read_large(name, shard.bytes)
    return hashlib.sha256(data).hexdigest() == shard.sha256 and index(name, data) == shard
