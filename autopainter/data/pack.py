"""Packing: from a source of pairs to WebDataset shards and a manifest.

What comes out is a pure function of the source, its items and the options, to the byte and for any number of workers.
Each finished shard leaves a record under ``_pack/`` in the destination, so a pack that was killed is continued by the
same command; the manifest is written last, and the records are deleted after it.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from autopainter import storage
from autopainter.cgroup import Groups
from autopainter.data import groups, manifest, pool, records
from autopainter.data.manifest import SPLITS, Manifest
from autopainter.data.pool import Run
from autopainter.data.records import ELSEWHERE, Records
from autopainter.data.shard import (
    DEFAULTS,
    LEFT_OUT,
    LeftOut,
    PackOptions,
    ShardRecord,
    pack_shard,
    plan_shards,
    printable,
)
from autopainter.data.sources import Item, Listing, Source
from autopainter.errors import UserError

__all__ = ["PackOptions", "PackResult", "pack"]

PACKER = 2
"""Version of packing; another one gives other bytes for the same input."""

MANIFEST = "manifest.json"
SUMMARY = "summary.json"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the number of items done and of all."""


@dataclass(frozen=True)
class PackResult:
    """What was packed; all but the first three is also in summary.json beside the manifest.

    Attributes:
        uri: of the manifest.
        kept_shards: how many shards an earlier, unfinished run had made.
        already_packed: everything was there, nothing was done.
        id: of the data set.
        samples: number of samples by split.
        shards: number of shards.
        bytes: size of all shards.
        left_out: inputs that are not in the data set, by kind: ``broken``, ``undecided`` (which half is the drawing)
            and ``excluded`` (by design); by name, the reason.
        duplicates: names of inputs that share a file; they are in one split.
        ignored: number of files that are not taken for pictures, by suffix.
    """

    uri: str
    kept_shards: int
    already_packed: bool
    id: str
    samples: dict[str, int]
    shards: int
    bytes: int
    left_out: LeftOut
    duplicates: list[list[str]]
    ignored: dict[str, int]

    @property
    def bad(self) -> dict[str, dict[str, str]]:
        """The inputs that should have been packed and were not: broken and undecided ones."""
        return {kind: self.left_out[kind] for kind in ("broken", "undecided")}


def pack(
    source: Source,
    destination: str,
    options: PackOptions = DEFAULTS,
    *,
    workers: int | None = None,
    run: Run | None = None,
    overwrite: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> PackResult:
    """Pack a source, or go on with a pack that was interrupted.

    Args:
        source: what to pack.
        destination: folder or s3:// URI for shards and manifest.
        options: what decides the content.
        workers: local processes; none: one for each core.
        run: how tasks are run instead of on local processes, such as on a cluster.
        overwrite: replace the data set, or the shards of others, that are in the destination.
        progress: what to tell of the progress.

    Raises:
        UserError: the source is empty, the destination is not there or holds something else, or a split got no sample.
        StorageError: storage kept failing; the same command goes on later.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers: must be at least 1, got {workers}")
    store = storage.open_store(destination)
    exists = store.size(MANIFEST) is not None  # also finds a missing bucket before any work is done
    listing = source.listing()
    items = groups.by_pattern(listing.items, options.group_by)
    items, duplicates = groups.join_duplicates(source, items, lambda done, total: progress("comparing", done, total))
    plans = plan_shards(items, options)
    identity = _identity(source, options, items)
    if exists and not overwrite:
        return _already_packed(store, identity)

    ours = Records(store, identity, plans)
    if exists:
        store.delete([MANIFEST, SUMMARY])
        records.delete(store)
    kept = ours.claim(overwrite, lambda done, total: progress("checking", done, total))
    missing = [plan for plan in plans if plan.name not in kept]
    total = sum(len(plan.items) for plan in plans)
    before = total - sum(len(plan.items) for plan in missing)
    progress("packing", before, total)
    tasks = [(source, plan, options, destination, ours.key(plan)) for plan in missing]
    made = (run or pool.local(workers or Groups().usable_cores()))(
        pack_shard, tasks, [len(plan.items) for plan in missing], lambda done: progress("packing", before + done, total)
    )
    done = kept | {plan.name: record for plan, record in zip(missing, made, strict=True)}
    return _finish(ours, done, listing, duplicates, len(kept))


def _identity(source: Source, options: PackOptions, items: list[Item]) -> dict[str, Any]:
    """All that decides the bytes of a data set, as JSON values."""
    inputs = json.dumps([[item.key, item.group, item.location, item.files] for item in items])
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
    if changes := records.changes(found.info, identity):
        raise UserError(f"{store.uri}: holds another data set ({changes}); {ELSEWHERE}")
    sizes = records.shards_in(store)
    for shard in (shard for shards in found.splits.values() for shard in shards):
        if sizes.get(shard.key) != shard.bytes:
            raise UserError(f"{store.locate(shard.key)}: missing or damaged; pack again with --overwrite")
    records.delete(store)
    try:
        result = _result(found, json.loads(store.read(SUMMARY)), kept=0, already=True)
    except (FileNotFoundError, ValueError, TypeError):
        result = None
    if result is None or result.id != found.id:
        raise UserError(f"{store.locate(SUMMARY)}: missing or damaged; pack again with --overwrite")
    return result


def _finish(
    ours: Records,
    done: dict[str, ShardRecord],
    listing: Listing,
    duplicates: list[list[str]],
    kept: int,
) -> PackResult:
    """Write the summary, then the manifest, then delete the records."""
    store, identity = ours.store, ours.identity
    left_out: LeftOut = {kind: {} for kind in LEFT_OUT.values()}
    left_out["broken"] |= {printable(name): printable(reason) for name, reason in listing.broken.items()}
    for record in done.values():
        for kind, found in record.left_out.items():
            left_out[kind] |= found
    left_out = {kind: dict(sorted(found.items())) for kind, found in left_out.items()}
    splits = {}
    for split in SPLITS:
        shards = [done[plan.name].shard for plan in ours.plans if plan.split == split]
        splits[split] = tuple(shard for shard in shards if shard is not None)
        if not splits[split]:
            name, reason = min(entry for found in left_out.values() for entry in found.items())
            counts = ", ".join(f"{len(found)} {kind}" for kind, found in left_out.items())
            raise UserError(f"no pair is left for {split}: {counts} inputs, such as {name}: {reason}")
    data = manifest.encode(identity, splits)
    packed = Manifest(identity, splits, store.uri, hashlib.sha256(data).hexdigest())
    summary = {
        "id": packed.id,
        "samples": {name: sum(len(shard.samples) for shard in of_split) for name, of_split in splits.items()},
        "shards": sum(map(len, splits.values())),
        "bytes": sum(shard.bytes for of_split in splits.values() for shard in of_split),
        "left_out": left_out,
        "duplicates": [[printable(name) for name in twins] for twins in duplicates],
        "ignored": {printable(suffix): count for suffix, count in listing.ignored.items()},
    }
    if store.size(MANIFEST) is None:  # else the same command has run twice at once, or create() says what has
        ours.check(shard for of_split in splits.values() for shard in of_split)
    store.write(SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False).encode())
    if not store.create(MANIFEST, data):
        raise UserError(f"{store.locate(MANIFEST)}: another pack has just finished there; {ELSEWHERE}")
    records.delete(store)
    return _result(packed, summary, kept, already=False)


def _result(packed: Manifest, summary: dict[str, Any], kept: int, already: bool) -> PackResult:
    return PackResult(uri=f"{packed.uri}/{MANIFEST}", kept_shards=kept, already_packed=already, **summary)
