"""Packing: from a source of pairs to WebDataset shards and a manifest.

What comes out is a pure function of the source, its items and the options, to the byte and for any number of workers.
Each finished shard leaves a record under ``_pack/`` in the destination, so a pack that was killed is continued by the
same command; the manifest is written last, and the records are deleted after it.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from autopainter import storage
from autopainter.config import flatten
from autopainter.data import manifest, pool
from autopainter.data.manifest import Manifest
from autopainter.data.shard import DEFAULTS, SPLITS, PackOptions, ShardPlan, ShardRecord, pack_shard, plan_shards
from autopainter.data.sources import Item, Source
from autopainter.errors import StorageError, UserError

__all__ = ["PackOptions", "PackResult", "pack"]

PACKER = 1
"""Version of packing; another one gives other bytes for the same input."""

MANIFEST = "manifest.json"
_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.tar")
_RECORDS = "_pack/"
_ELSEWHERE = "pack to another place or pass --overwrite"


@dataclass(frozen=True)
class PackResult:
    """What was packed.

    Attributes:
        uri: of the manifest.
        id: of the data set.
        samples: number of samples by split.
        shards: number of shards.
        bytes: size of all shards.
        kept_shards: how many of them an earlier, unfinished run had made.
        already_packed: everything was there, nothing was done.
        broken: inputs that could not be read, by location, with the reason.
        excluded: inputs left out by design, by location, with the reason.
    """

    uri: str
    id: str
    samples: dict[str, int]
    shards: int
    bytes: int
    kept_shards: int
    already_packed: bool
    broken: dict[str, str]
    excluded: dict[str, str]


def pack(
    source: Source,
    destination: str,
    options: PackOptions = DEFAULTS,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackResult:
    """Pack a source, or go on with a pack that was interrupted.

    Args:
        source: what to pack.
        destination: folder or s3:// URI for shards and manifest.
        options: what decides the content.
        workers: local processes; none: one for each core.
        overwrite: replace the data set, or the shards of others, that are in the destination.
        progress: called with the number of items done and of all.

    Raises:
        UserError: the source is empty, the destination is not there or holds something else, or a split got no sample.
        StorageError: storage kept failing; the same command goes on later.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers: must be at least 1, got {workers}")
    store = storage.open_store(destination)
    exists = store.size(MANIFEST) is not None  # also finds a missing bucket before any work is done
    items = source.items()
    plans = plan_shards(items, options)
    identity = _identity(source, options, items)
    if exists and not overwrite:
        return _already_packed(store, identity)

    folder = f"{_RECORDS}{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}/"
    kept = _prepare(store, plans, folder, exists, overwrite)
    missing = [plan for plan in plans if plan.name not in kept]
    total = sum(len(plan.items) for plan in plans)
    before = total - sum(len(plan.items) for plan in missing)
    progress(before, total)
    tasks = [(source, plan, options, destination, f"{folder}{plan.name}.json") for plan in missing]
    made = pool.run(pack_shard, tasks, workers or os.cpu_count() or 1, lambda done: progress(before + done, total))
    records = kept | {plan.name: record for plan, record in zip(missing, made, strict=True)}
    return _finish(store, plans, records, identity, len(kept))


def _identity(source: Source, options: PackOptions, items: list[Item]) -> dict[str, Any]:
    """All that decides the bytes of a data set, as JSON values."""
    inputs = json.dumps([[item.key, item.group, item.location, item.bytes] for item in items])
    identity = {
        "packer": PACKER,
        "source": source.info(),
        "options": asdict(options),
        "items": len(items),
        "inputs": hashlib.sha256(inputs.encode()).hexdigest()[:16],
    }
    return dict(json.loads(json.dumps(identity)))


def _already_packed(store: storage.Store, identity: dict[str, Any]) -> PackResult:
    """The result of an earlier pack, if it is that of the same command."""
    found = manifest.load(store.locate(MANIFEST))
    old, new = flatten({name: found.info.get(name) for name in identity}), flatten(identity)
    differing = [name for name in old | new if old.get(name) != new.get(name)]
    if differing:
        changes = ", ".join(f"{name} {old.get(name)} -> {new.get(name)}" for name in differing)
        raise UserError(f"{store.uri}: holds another data set ({changes}); {_ELSEWHERE}")
    sizes = _shards_in(store)
    for shard in (shard for shards in found.splits.values() for shard in shards):
        if sizes.get(shard.key) != shard.bytes:
            raise UserError(f"{store.locate(shard.key)}: missing or damaged; pack again with --overwrite")
    _delete_records(store)
    return _result(found, kept=0, already=True)


def _shards_in(store: storage.Store) -> dict[str, int]:
    """Sizes of everything that is named like a shard."""
    found = [entry for split in SPLITS for entry in store.list(f"{split}-")]
    return {entry.key: entry.bytes for entry in found if _SHARD_NAME.fullmatch(entry.key)}


def _delete_records(store: storage.Store) -> None:
    store.delete([entry.key for entry in store.list(_RECORDS)])


def _prepare(
    store: storage.Store, plans: list[ShardPlan], folder: str, exists: bool, overwrite: bool
) -> dict[str, ShardRecord]:
    """Clear the destination of everything but the finished shards of the same pack; their records, by name."""
    present = _shards_in(store)
    if exists:
        store.delete([MANIFEST])
        _delete_records(store)
    records = [entry.key for entry in store.list(_RECORDS)]
    ours: set[str] = set()
    for key in records:
        if key.endswith("/plan.json"):
            ours.update(json.loads(store.read(key)))
    if not overwrite and (strangers := sorted(present.keys() - ours)):
        raise UserError(f"{store.locate(strangers[0])}: not from an interrupted run of this command; {_ELSEWHERE}")
    try:
        store.write(f"{folder}plan.json", json.dumps([plan.name for plan in plans]).encode())
    except StorageError:
        raise
    except OSError as error:
        raise UserError(f"{store.uri}: cannot be written: {error.strerror}") from error
    kept: dict[str, ShardRecord] = {}
    for plan in plans:
        if (key := f"{folder}{plan.name}.json") in records:
            record = ShardRecord.decode(store.read(key))
            if record.shard is None or present.get(plan.name) == record.shard.bytes:
                kept[plan.name] = record
    store.delete([name for name in present if name not in kept])
    store.delete([key for key in records if not key.startswith(folder)])
    return kept


def _finish(
    store: storage.Store, plans: list[ShardPlan], records: dict[str, ShardRecord], identity: dict[str, Any], kept: int
) -> PackResult:
    """Write the manifest, then delete the records."""
    broken: dict[str, str] = {}
    excluded: dict[str, str] = {}
    for record in records.values():
        broken |= record.broken
        excluded |= record.excluded
    splits = {}
    for split in SPLITS:
        shards = [records[plan.name].shard for plan in plans if plan.split == split]
        splits[split] = tuple(shard for shard in shards if shard is not None)
        if not splits[split]:
            name, reason = min((broken | excluded).items())
            raise UserError(
                f"no pair is left for {split}: {len(broken)} inputs are broken and {len(excluded)} left out,"
                f" such as {name}: {reason}"
            )
    info = identity | {"broken": dict(sorted(broken.items())), "excluded": dict(sorted(excluded.items()))}
    data = manifest.encode(info, splits)
    if not store.create(MANIFEST, data):
        raise UserError(f"{store.locate(MANIFEST)}: another pack has just finished there; {_ELSEWHERE}")
    _delete_records(store)
    return _result(Manifest(info, splits, store.uri, hashlib.sha256(data).hexdigest()), kept, already=False)


def _result(packed: Manifest, kept: int, already: bool) -> PackResult:
    shards = [shard for of_split in packed.splits.values() for shard in of_split]
    return PackResult(
        uri=f"{packed.uri}/{MANIFEST}",
        id=packed.id,
        samples={name: sum(len(shard.samples) for shard in of_split) for name, of_split in packed.splits.items()},
        shards=len(shards),
        bytes=sum(shard.bytes for shard in shards),
        kept_shards=kept,
        already_packed=already,
        broken=packed.info["broken"],
        excluded=packed.info["excluded"],
    )
