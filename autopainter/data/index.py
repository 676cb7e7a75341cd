"""A manifest for WebDataset shards that others made: they are read once and stay as they are."""

import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath

from autopainter import storage
from autopainter.cgroup import Groups
from autopainter.data import groups, manifest, pool, tarindex
from autopainter.data.manifest import SPLITS, Sample, Samples, Shard
from autopainter.data.pictures import BrokenInput, decode_stored
from autopainter.data.shard import place_of_group
from autopainter.data.tarindex import Place
from autopainter.errors import StorageError, UserError
from autopainter.uri import split as split_uri


@dataclass(frozen=True)
class Members:
    """Which members of a tar make a pair, by suffix after the key, in lower case; no sketch: drawn on the fly."""

    color: str
    sketch: str | None

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the members that a sample needs."""
        return (self.color, self.sketch) if self.sketch else (self.color,)


@dataclass(frozen=True)
class Scan:
    """A shard that was read.

    Attributes:
        key: its name in the place of the shards.
        bytes, sha256: of the whole file.
        places: all samples in it.
        sound: indices of those that can be trained on.
        digests: sha256 of the image files of the sound ones.
        broken: members and samples that are none, by name, with the reason.
    """

    key: str
    bytes: int
    sha256: str
    places: list[Place]
    sound: list[int]
    digests: list[tuple[str, ...]]
    broken: dict[str, str]


@dataclass(frozen=True)
class IndexResult:
    """What was indexed.

    Attributes:
        uri: of the manifest.
        id: of the data set.
        samples: number of samples by split.
        shards: number of shard files.
        bytes: size of all shards.
        broken: what could not be indexed, by name, with the reason.
    """

    uri: str
    id: str
    samples: dict[str, int]
    shards: int
    bytes: int
    broken: dict[str, str]


def index(
    shards: str,
    members: Members,
    output: str | None = None,
    *,
    validation: float = 0.05,
    validation_shards: str | None = None,
    group_by: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> IndexResult:
    """Read every shard once, check every sample by decoding it, and write the manifest.

    Args:
        shards: folder or s3:// prefix of tar files.
        members: which of their members make a pair.
        output: path or s3:// URI of the manifest; none: ``manifest.json`` beside the shards.
        validation: share of the groups that is held out.
        validation_shards: hold out the shards whose names this pattern (``val*/*``) matches instead.
        group_by: regular expression searched in the keys; those with the same match stay on one side of the split.
            Samples that share an image file, byte for byte, do so as well.
        workers: local processes; none: one for each core.
        overwrite: replace a manifest that is there.
        progress: called with the number of shards done and of all.

    Raises:
        UserError: there are no shards, a split gets no sample, or the output is there.
        StorageError: storage kept failing.
    """
    _check_options(validation, validation_shards, group_by)
    store = storage.open_store(shards)
    if isinstance(store, storage.LocalStore) and not store.root.is_dir():
        raise UserError(f"{shards}: no such folder")
    target, name = _target(output or f"{store.uri}/manifest.json", overwrite)
    keys = [entry.key for entry in store.list() if entry.key.lower().endswith(".tar")]
    if not keys:
        raise UserError(f"{shards}: no .tar files in it (compressed ones cannot be read in parts: unpack them)")
    if validation_shards is not None:
        matched = sum(PurePosixPath(key).match(validation_shards) for key in keys)
        if matched in (0, len(keys)):
            raise UserError(
                f"validation_shards: {validation_shards!r} matches {matched} of {len(keys)} shards, such as {keys[0]};"
                " it must match some and leave some for training"
            )
    scans = pool.local(workers or Groups().usable_cores())(
        scan, [(shards, key, members) for key in keys], [1] * len(keys), lambda done: progress(done, len(keys))
    )
    held_out = _held_out(scans, validation, validation_shards, group_by)
    splits: dict[str, tuple[Shard, ...]] = {}
    for split in SPLITS:
        side = [_shard(found, held_out[found.key], split == "validation", members) for found in scans]
        splits[split] = tuple(shard for shard in side if shard.samples)
    broken = {name: reason for found in scans for name, reason in found.broken.items()}
    for split, of_split in splits.items():
        if not of_split:
            example = next((f"; broken: {name}: {reason}" for name, reason in broken.items()), "")
            raise UserError(f"{shards}: no sample is left for {split}{example}")
    info = {
        "source": {"kind": "index", "shards": store.uri, "color": members.color, "sketch": members.sketch},
        "options": {"validation": validation, "validation_shards": validation_shards, "group_by": group_by},
    }
    elsewhere = None if _absolute(target) == _absolute(store) else _absolute(store)
    data = manifest.encode(info, splits, elsewhere)
    target.write(name, data)
    return IndexResult(
        uri=target.locate(name),
        id=hashlib.sha256(data).hexdigest(),
        samples={split: sum(len(shard.samples) for shard in of_split) for split, of_split in splits.items()},
        shards=len(scans),
        bytes=sum(found.bytes for found in scans),
        broken=broken,
    )


def _check_options(validation: float, validation_shards: str | None, group_by: str | None) -> None:
    if not 0 < validation < 1:
        raise UserError(f"validation: must be between 0 and 1, got {validation}")
    if validation_shards is not None:
        try:
            PurePosixPath("x").match(validation_shards)
        except ValueError:
            raise UserError(
                f"validation_shards: must be a pattern of names such as 'val-*.tar', got {validation_shards!r}"
            ) from None
    if group_by is not None:
        groups.check(group_by)


def _target(output: str, overwrite: bool) -> tuple[storage.Store, str]:
    """Where the manifest shall be written, and its name there."""
    folder, name = split_uri(output)
    store = storage.open_store(folder)
    if not name or (isinstance(store, storage.LocalStore) and (store.root / name).is_dir()):
        raise UserError(f"output: {output} is a folder; name a file in it, such as {output.rstrip('/')}/manifest.json")
    if not overwrite and store.size(name) is not None:
        raise UserError(f"{store.locate(name)}: is there; pass --overwrite or another --output")
    return store, name


def _absolute(store: storage.Store) -> str:
    return str(store.root.resolve()) if isinstance(store, storage.LocalStore) else store.uri


def scan(shards: str, key: str, members: Members, tick: Callable[[], None]) -> Scan:
    """Read one shard and decode its samples."""
    store = storage.open_store(shards)
    try:
        with storage.mapped(store, key) as data:
            found = _scan(store.locate(key), key, data, members)
    except StorageError:
        raise
    except OSError as error:
        if not storage.lasting(error):
            raise
        found = Scan(key, 0, "", [], [], [], {store.locate(key): f"cannot be read: {error.strerror or 'not found'}"})
    tick()
    return found


def _scan(uri: str, key: str, data: mmap.mmap | bytes, members: Members) -> Scan:
    places, strange, damage = tarindex.find(data)
    broken = {f"{uri}: {name}": reason for name, reason in strange.items()}
    if damage or not places:
        broken[uri] = damage or "has no samples"
    sound, digests = [], []
    for index, place in enumerate(places):
        try:
            digests.append(_check(place, data, members))
            sound.append(index)
        except BrokenInput as error:
            broken[f"{uri}: {place.key}"] = str(error)
    return Scan(key, len(data), hashlib.sha256(data).hexdigest(), places, sound, digests, broken)


def _check(place: Place, data: mmap.mmap | bytes, members: Members) -> tuple[str, ...]:
    """Digests of a sample's image files; ``BrokenInput`` if it cannot be trained on."""
    shapes, digests = [], []
    for suffix in members.suffixes:
        if suffix not in place.files:
            raise BrokenInput(f"has no member .{suffix}, only {', '.join(sorted(place.files))}")
        offset, length = place.files[suffix]
        file = bytes(data[offset : offset + length])
        shapes.append(decode_stored(file, grey=suffix == members.sketch).shape[:2])
        digests.append(hashlib.sha256(file).hexdigest())
    if len(set(shapes)) > 1:
        (height, width), (rows, columns) = shapes
        raise BrokenInput(f"its picture has {width} x {height} pixels and its drawing {columns} x {rows}")
    return tuple(digests)


def _held_out(scans: list[Scan], share: float, pattern: str | None, group_by: str | None) -> dict[str, set[int]]:
    """Indices of the samples of each shard that are held out."""
    if pattern is not None:
        return {found.key: set(found.sound) if PurePosixPath(found.key).match(pattern) else set() for found in scans}
    joined = groups.Joined()
    named: dict[tuple[str, int], str] = {}
    seen: dict[str, str] = {}
    for found in scans:
        for index, digests in zip(found.sound, found.digests, strict=True):
            key = found.places[index].key
            name = groups.of(key, group_by) if group_by else f"{found.key}:{key}"
            named[found.key, index] = name
            for digest in digests:
                joined.join(seen.setdefault(digest, name), name)
    return {
        found.key: {index for index in found.sound if place_of_group(joined.root(named[found.key, index])) < share}
        for found in scans
    }


def _shard(found: Scan, held_out: set[int], wanted: bool, members: Members) -> Shard:
    """The part of a shard that belongs to one split."""
    chosen = [index for index in found.sound if (index in held_out) == wanted]
    places = [found.places[index] for index in chosen]
    samples = Samples.of(
        Sample(place.key, place.files[members.color], place.files[members.sketch] if members.sketch else None)
        for place in places
    )
    return Shard(found.key, found.bytes, found.sha256, samples, tarindex.chunks(found.places, chosen))
