"""The manifest: one immutable JSON object that says which bytes of which shards are which samples.

It is written last, so a data set without one does not exist yet. Its sha256 is the data set's identity: a run that is
continued must find the same one.
"""

import hashlib
import json
import operator
from dataclasses import asdict, dataclass
from typing import Any

from autopainter import storage
from autopainter.errors import CorruptData, UserError
from autopainter.uri import split

FORMAT = "autopainter-manifest"
VERSION = 1
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
    """One pair; offsets are those of the image files inside the shard. ``sketch`` is (offset, length)."""

    key: str
    color: tuple[int, int]
    sketch: tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """One tar file; ``key`` is its name beside the manifest."""

    key: str
    bytes: int
    sha256: str
    samples: tuple[Sample, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """A data set.

    Attributes:
        info: name, source, licence and the options of packing, for people.
        splits: shards of ``train`` and ``validation``, in order.
        uri: folder or s3:// URI that the shards are in.
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


def encode(info: dict[str, Any], splits: dict[str, tuple[Shard, ...]]) -> bytes:
    """The manifest's bytes: the same input gives the same bytes."""
    document = {
        "format": FORMAT,
        "version": VERSION,
        "info": info,
        "splits": {name: [_encode_shard(shard) for shard in shards] for name, shards in splits.items()},
    }
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


def _encode_shard(shard: Shard) -> dict[str, Any]:
    return asdict(shard) | {
        "samples": [[sample.key, *sample.color, *sample.sketch] for sample in shard.samples],
        "chunks": [[c.first, c.samples, c.start, c.stop, c.crc32] for c in shard.chunks],
    }


def decode_shard(entry: dict[str, Any]) -> Shard:
    """The inverse of what ``encode`` writes for one shard; ``ValueError`` if its numbers do not fit together."""
    shard = Shard(
        key=entry["key"],
        bytes=entry["bytes"],
        sha256=entry["sha256"],
        samples=tuple(Sample(key, (a, b), (c, d)) for key, a, b, c, d in entry["samples"]),
        chunks=tuple(Chunk(*map(operator.index, chunk)) for chunk in entry["chunks"]),
    )
    if shard.key.startswith("/") or ".." in shard.key.split("/"):
        raise ValueError(f"{shard.key} is not beside the manifest")
    first = 0
    for chunk in shard.chunks:
        members = shard.samples[chunk.first : chunk.first + chunk.samples]
        spans = [span for sample in members for span in (sample.color, sample.sketch)]
        inside = all(chunk.start <= start and start + length <= chunk.stop for start, length in spans)
        if chunk.first != first or len(members) != chunk.samples or not members or not inside:
            raise ValueError(f"{shard.key}: the chunk at sample {chunk.first} does not fit its samples")
        first += chunk.samples
    if first != len(shard.samples):
        raise ValueError(f"{shard.key}: {len(shard.samples)} samples, but chunks of {first}")
    return shard


def load(uri: str) -> Manifest:
    """Read a manifest from its path or s3:// URI.

    Raises:
        UserError: there is none, or it is of another kind or format version.
        CorruptData: it is damaged.
    """
    data = storage.read_input(uri, "data.manifest", "'autopainter pack' writes it last")
    try:
        document = json.loads(data)
    except ValueError:
        raise CorruptData(f"data.manifest: {uri}: not JSON") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"data.manifest: {uri}: not a manifest of 'autopainter pack'")
    if document.get("version") != VERSION:
        raise UserError(
            f"data.manifest: {uri}: format version {document.get('version')}, but this program reads {VERSION};"
            " pack the data set again with this version"
        )
    try:
        splits = {name: tuple(map(decode_shard, shards)) for name, shards in document["splits"].items()}
        info = dict(document["info"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptData(f"data.manifest: {uri}: damaged: {error}") from None
    return Manifest(info, splits, split(uri)[0], hashlib.sha256(data).hexdigest())
