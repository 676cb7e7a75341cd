"""What is in a data set: counts, a contact sheet, and a check of every checksum."""

import hashlib
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from autopainter import storage
from autopainter.data import pictures
from autopainter.data.chunks import decode_sample
from autopainter.data.manifest import Chunk, Manifest, Shard
from autopainter.data.pictures import Image
from autopainter.errors import StorageError

_READERS = 4
_GAP = 6


def describe(manifest: Manifest) -> dict[str, Any]:
    """What the data set is: JSON values for people and programs."""
    files = {shard.key: shard.bytes for shards in manifest.splits.values() for shard in shards}
    return {
        "id": manifest.id,
        "shards_at": manifest.uri,
        "shards": len(files),
        "bytes": sum(files.values()),
        "splits": {
            name: {
                "samples": sum(len(shard.samples) for shard in shards),
                "shards": len(shards),
                "chunks": sum(len(shard.chunks) for shard in shards),
                "drawings": "stored" if all(shard.samples.drawn for shard in shards) else "on_the_fly",
            }
            for name, shards in manifest.splits.items()
        },
    } | manifest.info


def verify(manifest: Manifest, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, str]:
    """Read every shard and compare its size, its sha256 and the CRC-32 of its chunks with the manifest.

    Args:
        progress: called with the number of shards done and of all.

    Returns:
        What is wrong, by the URI of the shard; empty if all is well.

    Raises:
        StorageError: storage kept failing.
    """
    files: dict[str, tuple[Shard, list[Chunk]]] = {}
    for shards in manifest.splits.values():
        for shard in shards:
            files.setdefault(shard.key, (shard, []))[1].extend(shard.chunks)
    store = storage.open_store(manifest.uri)
    found = {}
    with ThreadPoolExecutor(_READERS) as readers:
        faults = readers.map(lambda file: _verify(store, *file), files.values())
        for done, (key, fault) in enumerate(zip(files, faults, strict=True), 1):
            if fault:
                found[store.locate(key)] = fault
            progress(done, len(files))
    return found


def _verify(store: storage.Store, shard: Shard, chunks: list[Chunk]) -> str | None:
    try:
        with storage.mapped(store, shard.key) as data:
            if len(data) != shard.bytes:
                return f"has {len(data)} bytes, the manifest says {shard.bytes}"
            for chunk in chunks:
                checksum = zlib.crc32(data[chunk.start : chunk.stop])
                if checksum != chunk.crc32:
                    return (
                        f"chunk of bytes {chunk.start} to {chunk.stop} has CRC-32 {checksum:08x}, the manifest says"
                        f" {chunk.crc32:08x}"
                    )
            digest = hashlib.sha256(data).hexdigest()
    except StorageError:
        raise
    except FileNotFoundError:
        return "not found"
    return None if digest == shard.sha256 else f"has sha256 {digest}, the manifest says {shard.sha256}"


def sheet(manifest: Manifest, split: str, samples: int, *, columns: int = 6, tile: int = 128) -> Image:
    """Draw samples that are spread evenly over a split, each as its picture beside its drawing.

    Args:
        samples: number of samples, if there are so many.
        columns: samples of a row.
        tile: edge of a picture in pixels.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        StorageError: one of them cannot be read.
    """
    store = storage.open_store(manifest.uri)
    places = [(shard, chunk, chunk.first + row) for shard in manifest.split(split) for chunk in shard.chunks
              for row in range(chunk.samples)]  # fmt: skip
    chosen = [places[index] for index in np.linspace(0, len(places) - 1, min(samples, len(places))).round().astype(int)]
    rows = -(-len(chosen) // columns)
    image = np.full((rows * (tile + _GAP) + _GAP, columns * (2 * tile + _GAP) + _GAP, 3), 225, np.uint8)
    for number, (shard, chunk, index) in enumerate(chosen):
        try:
            data = store.read_range(shard.key, chunk.start, chunk.stop)
        except FileNotFoundError:
            raise StorageError(f"{store.locate(shard.key)}: not found") from None
        color, sketch = decode_sample(store, shard, chunk, shard.samples[index], data, sketch=True)
        top, left = number // columns * (tile + _GAP) + _GAP, number % columns * (2 * tile + _GAP) + _GAP
        for place, part in enumerate((color, sketch)):
            if part is not None:
                square = pictures.pad(pictures.squares(part, tile, "pad")[""])
                image[top : top + tile, left + place * tile : left + (place + 1) * tile] = (
                    square if square.ndim == 3 else square[:, :, None]
                )
    return image
