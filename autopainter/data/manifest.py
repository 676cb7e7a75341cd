"""The manifest: one immutable JSON object that says which bytes of which shards are which samples.

It is written last, so a data set without one does not exist yet. Its sha256 is the data set's identity: a run that is
continued must find the same one.
"""

import hashlib
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from autopainter import storage
from autopainter.errors import CorruptData, UserError
from autopainter.uri import split

FORMAT = "autopainter-manifest"
VERSION = 2
SPLITS = ("train", "validation")
CHUNK_SAMPLES = 16
"""Neighbouring samples that are fetched, checked and shuffled as one unit."""


@dataclass(frozen=True)
class Chunk:
    """Neighbouring samples of a shard, the unit of fetching. Bytes [start, stop) of the shard, with their CRC-32."""

    first: int
    samples: int
    start: int
    stop: int
    crc32: int


@dataclass(frozen=True)
class Sample:
    """One pair: (offset, length) of its image files inside the shard; without a drawing it is made on the fly."""

    key: str
    color: tuple[int, int]
    sketch: tuple[int, int] | None


class Samples(Sequence[Sample]):
    """The samples of a shard, in columns: a manifest of millions of samples fits into memory.

    Args:
        keys: names of the samples, without line breaks.
        files: int64 [samples, 2 or 4], offset and length of the picture and of the drawing, if there is one.
    """

    def __init__(self, keys: Sequence[str], files: NDArray[np.int64]) -> None:
        if files.shape not in ((len(keys), 2), (len(keys), 4)) or any("\n" in key for key in keys):
            raise ValueError(f"{len(keys)} sample keys do not fit to files of shape {files.shape}")
        self.files = files
        self._keys = "\n".join(keys)

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> Self:
        """Put samples into columns; all of them with or all without a drawing."""
        rows = list(samples)
        files = [sample.color + (sample.sketch or ()) for sample in rows]
        return cls([sample.key for sample in rows], np.array(files, np.int64).reshape(len(rows), -1 if rows else 2))

    @property
    def keys(self) -> list[str]:
        """Names of the samples."""
        return self._keys.split("\n") if len(self) else []

    @property
    def drawn(self) -> bool:
        """Whether the samples have drawings."""
        return self.files.shape[1] == 4

    def __len__(self) -> int:
        return len(self.files)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "list[Sample]": ...
    def __getitem__(self, index: int | slice) -> "Sample | list[Sample]":
        keys, files = self.keys[index], self.files[index].tolist()
        if isinstance(keys, str):
            return self._sample(keys, files)
        return [self._sample(key, file) for key, file in zip(keys, files, strict=True)]

    def __iter__(self) -> Iterator[Sample]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash((self._keys, self.files.tobytes()))

    @staticmethod
    def _sample(key: str, files: list[int]) -> Sample:
        return Sample(key, (files[0], files[1]), (files[2], files[3]) if len(files) > 2 else None)


@dataclass(frozen=True)
class Shard:
    """One tar file; ``key`` is its name in the place of the shards."""

    key: str
    bytes: int
    sha256: str
    samples: Samples
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Attributes:
        info: name, source, licence and the options of packing, for people.
        splits: shards of each of ``SPLITS``, in order.
        uri: folder or s3:// URI that the shards are in: that of the manifest, unless it was made by ``index``.
        id: sha256 of the manifest's bytes.
    """

    info: dict[str, Any]
    splits: dict[str, tuple[Shard, ...]]
    uri: str
    id: str

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of a split; ``UserError`` if there is none of that name or it is empty."""
        shards = self.splits.get(name, ())
        if not any(shard.samples for shard in shards):
            raise UserError(f"{self.uri}: the data set has no samples in the split {name!r}")
        return shards


def encode(info: dict[str, Any], splits: dict[str, tuple[Shard, ...]], shards_at: str | None = None) -> bytes:
    """The manifest's bytes: the same input gives the same bytes.

    Args:
        shards_at: folder or s3:// URI of the shards; none: where the manifest is.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "info": info,
        **({"shards_at": shards_at} if shards_at else {}),
        "splits": {name: [_encode_shard(shard) for shard in shards] for name, shards in splits.items()},
    }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")  # bytes of a file name that are no text, as JSON escapes them


def _encode_shard(shard: Shard) -> dict[str, Any]:
    return {
        "key": shard.key,
        "bytes": shard.bytes,
        "sha256": shard.sha256,
        "chunks": [[c.first, c.samples, c.start, c.stop, c.crc32] for c in shard.chunks],
        "sample_keys": shard.samples.keys,
        "sample_files": shard.samples.files.ravel().tolist(),
    }


UNFIT = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)
"""What damaged JSON may raise."""


def parse(data: bytes) -> Any:
    """JSON of ``encode``, with its shards as ``Shard``; one of ``UNFIT`` if it is none, or its numbers do not fit."""
    return json.loads(data, object_hook=_decode_shard)  # shard by shard, so that a large manifest needs little memory


def _decode_shard(entry: dict[str, Any]) -> Any:
    if "sample_files" not in entry:
        return entry
    keys = entry["sample_keys"]
    if not all(isinstance(name, str) for name in (entry["key"], entry["sha256"])) or not isinstance(keys, list):
        raise TypeError(f"{entry['key']!r}: names that are no texts")
    files = np.array(entry["sample_files"] or np.empty(0, np.int64)).reshape(len(keys), -1 if keys else 2)
    if files.dtype != np.int64:
        raise ValueError(f"{entry['key']}: offsets that are no numbers")
    shard = Shard(
        key=entry["key"],
        bytes=operator.index(entry["bytes"]),
        sha256=entry["sha256"],
        samples=Samples(keys, files),
        chunks=tuple(Chunk(*map(operator.index, chunk)) for chunk in entry["chunks"]),
    )
    if shard.key.startswith("/") or ".." in shard.key.split("/"):
        raise ValueError(f"{shard.key} is not in the place of the shards")
    first = 0
    for chunk in shard.chunks:
        members = files[chunk.first : chunk.first + chunk.samples]
        starts, lengths = members[:, ::2], members[:, 1::2]
        inside = (chunk.start <= starts).all() and (lengths >= 0).all() and (starts + lengths <= chunk.stop).all()
        if chunk.first != first or chunk.start < 0 or len(members) != chunk.samples or not len(members) or not inside:
            raise ValueError(f"{shard.key}: the chunk at sample {chunk.first} does not fit its samples")
        first += chunk.samples
    if first != len(shard.samples):
        raise ValueError(f"{shard.key}: {len(shard.samples)} samples, but chunks of {first}")
    return shard


def load(uri: str) -> Manifest:
    """Read a manifest from its path, s3:// or https:// URI.

    Raises:
        UserError: there is none, or it is of another kind or format version.
        CorruptData: it is damaged.
    """
    data = storage.read_input(uri, "data.manifest", "name the manifest.json that 'autopainter pack' writes last")
    try:
        document = parse(data)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise CorruptData(f"data.manifest: {uri}: not JSON") from None
    except UNFIT as error:
        raise CorruptData(f"data.manifest: {uri}: damaged: {error}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"data.manifest: {uri}: not a manifest of 'autopainter pack'")
    if document.get("version") != VERSION:
        raise UserError(
            f"data.manifest: {uri}: format version {document.get('version')}, but this program reads {VERSION};"
            " pack the data set again with this version"
        )
    try:
        splits = {name: tuple(shards) for name, shards in document["splits"].items()}
        if not all(isinstance(shard, Shard) for shards in splits.values() for shard in shards):
            raise ValueError("a shard without samples")
        info, place = dict(document["info"]), document.get("shards_at") or split(uri)[0]
        if not isinstance(place, str):
            raise TypeError(f"shards at {place}")
    except UNFIT as error:
        raise CorruptData(f"data.manifest: {uri}: damaged: {error}") from None
    return Manifest(info, splits, place, hashlib.sha256(data).hexdigest())


def check_shard(manifest: Manifest, split: str) -> None:
    """Check that the first shard of a split has its size.

    Raises:
        UserError: it has not, or is not there; or the split is empty.
        StorageError: storage kept failing.
    """
    store, shard = storage.open_store(manifest.uri), manifest.split(split)[0]
    if store.size(shard.key) != shard.bytes:
        raise UserError(f"data.manifest: {store.locate(shard.key)} is not the shard that the manifest describes")


def check_trained_on(manifest: Manifest, uri: str, run: str, manifest_id: str, advice: str) -> None:
    """Check that a run was trained on this data set.

    Args:
        uri: where the manifest was read.
        manifest_id: of the data set that ``run`` was trained on.
        advice: the end of the message.

    Raises:
        UserError: it was another one.
    """
    if manifest.id != manifest_id:
        raise UserError(
            f"data.manifest: {uri} is another data set (sha256 {manifest.id[:12]}) than the run {run} was trained on"
            f" ({manifest_id[:12]}){advice}"
        )
