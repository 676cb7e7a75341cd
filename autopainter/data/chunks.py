"""The chunks of a split: from storage or from the node's cache, verified, and one sample's pixels out of them."""

import bisect
import hashlib
import itertools
import threading
import zlib
from pathlib import Path

from autopainter import storage
from autopainter.config import Config
from autopainter.data import samples
from autopainter.data.cache import ChunkCache
from autopainter.data.manifest import Chunk, Manifest, Sample, Shard
from autopainter.data.pictures import Image
from autopainter.errors import CorruptData, StorageError, UserError

_CHECKSUM_ATTEMPTS = 3


class Split:
    """The samples and chunks of one split in one line each.

    Attributes:
        chunks: every chunk with its shard.
        cache: chunks kept on this node's disk, if any are.
        bytes_read: what was fetched from storage so far.
    """

    def __init__(self, manifest: Manifest, name: str, config: Config, *, cached: bool = False) -> None:
        """Lay out a split of a manifest.

        Args:
            cached: keep chunks in ``data.cache``, if that is set.

        Raises:
            UserError: it is empty, or has no drawings and the configuration wants stored ones.
        """
        shards = manifest.split(name)
        self._wants_sketch = config.sketch.mode == "stored"
        if self._wants_sketch and not all(shard.samples.drawn for shard in shards):
            raise UserError(f"sketch.mode: {manifest.uri} holds no drawings; set sketch.mode to on_the_fly")
        self.store = storage.open_store(manifest.uri)
        self.chunks: list[tuple[Shard, Chunk]] = [(shard, chunk) for shard in shards for chunk in shard.chunks]
        self._firsts = [0, *itertools.accumulate(chunk.samples for _, chunk in self.chunks)]
        self.cache: ChunkCache | None = None
        if cached and config.data.cache:
            sizes = [(chunk.stop - chunk.start, chunk.crc32) for _, chunk in self.chunks]
            limit = int(config.data.cache_gib * 2**30)
            dataset = hashlib.sha256(f"{manifest.id} {name}".encode()).hexdigest()
            self.cache = ChunkCache(Path(config.data.cache), limit, dataset, sizes)
        self.bytes_read = 0
        self._lock = threading.Lock()

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self._firsts[-1]

    def chunk_of(self, index: int) -> int:
        """The chunk that a sample is in."""
        return bisect.bisect_right(self._firsts, index) - 1

    def sample(self, index: int) -> Sample:
        """A sample of the split."""
        number = self.chunk_of(index)
        shard, chunk = self.chunks[number]
        return shard.samples[chunk.first + index - self._firsts[number]]

    def fetch(self, number: int) -> bytes:
        """Get one chunk and check it.

        Raises:
            CorruptData: its checksum is wrong each time it is read, or the shard is not the one of the manifest.
            StorageError: it cannot be read, or the shard is gone.
        """
        data = self.cache.get(number) if self.cache else None
        if data is None:
            data = self._read(*self.chunks[number])
            if self.cache:
                self.cache.put(number, data)
        return data

    def _read(self, shard: Shard, chunk: Chunk) -> bytes:
        uri = self.store.locate(shard.key)
        checksums = []
        try:
            for _ in range(_CHECKSUM_ATTEMPTS):
                data = self.store.read_range(shard.key, chunk.start, chunk.stop)
                with self._lock:
                    self.bytes_read += len(data)
                checksums.append(zlib.crc32(data))
                if checksums[-1] == chunk.crc32:
                    return data
        except CorruptData:  # ends too early
            if self.store.size(shard.key) == shard.bytes:
                raise
        except FileNotFoundError:
            raise StorageError(f"{uri}: not found; the data set was changed under the run") from None
        size = self.store.size(shard.key)
        if size != shard.bytes:
            raise CorruptData(f"{uri}: has {size} bytes, the manifest says {shard.bytes}: replaced under the run")
        at_rest = len(set(checksums)) == 1
        raise CorruptData(
            f"{uri}: chunk of bytes {chunk.start} to {chunk.stop} has CRC-32 {checksums[-1]:08x}, the manifest says"
            f" {chunk.crc32:08x}; read {_CHECKSUM_ATTEMPTS} times with"
            f" {'one result: the shard is damaged or was replaced' if at_rest else 'other results: damaged on the way'}"
        )

    def decode(self, index: int, data: bytes) -> tuple[Image, Image | None]:
        """Decode one sample out of its chunk's bytes: uint8 [H, W, 3] RGB and, if stored ones are wanted, [H, W]."""
        shard, chunk = self.chunks[self.chunk_of(index)]
        return decode_sample(self.store, shard, chunk, self.sample(index), data, sketch=self._wants_sketch)

    def close(self) -> None:
        """End what is being fetched again and again, and let go of the cache."""
        self.store.close()
        if self.cache:
            self.cache.close()


def decode_sample(
    store: storage.Store, shard: Shard, chunk: Chunk, sample: Sample, data: bytes, *, sketch: bool
) -> tuple[Image, Image | None]:
    """Decode a sample out of the bytes of its chunk; the drawing too, if ``sketch`` is set and there is one.

    Raises:
        CorruptData: it is no pair of images; the message names shard and sample.
    """
    color, drawing = (
        data[file[0] - chunk.start : file[0] - chunk.start + file[1]] if file else None
        for file in (sample.color, sample.sketch if sketch else None)
    )
    assert color is not None
    return samples.decode(color, drawing, f"{store.locate(shard.key)}: sample {sample.key}")
