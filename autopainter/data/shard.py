"""Shards: what each of them will hold, and making one, the unit of work of packing here or on a cluster.

A shard is a plain WebDataset tar with ``KEY.color.jpg``, ``KEY.json`` and, unless drawings are made on the fly,
``KEY.sketch.png`` of each sample. Its bytes are a pure function of the source, its list of items and the options.
"""

import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import webdataset

from autopainter import storage
from autopainter.data import groups, manifest, tarindex
from autopainter.data.manifest import CHUNK_SAMPLES, SPLITS, Sample, Samples, Shard
from autopainter.data.sources import BrokenInput, Item, NoDrawing, Pair, Source, Undecided
from autopainter.errors import CorruptData, UserError

SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}\.tar")
PLAN = "plan.json"
"""Name of what lies beside the records of a pack for as long as it is the one that may write."""

# The picture is what a model learns to paint: without chroma subsampling its colours end where its lines are (44 dB
# instead of 35 on OpenMoji at 96 pixels, for 20 % more bytes).
_JPEG = [
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    cv2.IMWRITE_JPEG_OPTIMIZE, 1,
    cv2.IMWRITE_JPEG_QUALITY,
]  # fmt: skip
# Lines on paper: without a row filter the files are smaller, and decoded in half the time.
_PNG = [cv2.IMWRITE_PNG_COMPRESSION, 6, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]


@dataclass(frozen=True)
class PackOptions:
    """What decides the content of the shards, beside the source."""

    validation: float = 0.05
    """Share of the groups that is held out for validation."""
    shard_samples: int = 512
    """Samples of a shard, a multiple of the samples of a chunk; a worker holds a shard in memory."""
    jpeg_quality: int = 95
    """Quality of the stored colour pictures."""
    limit: int | None = None
    """Pack only so many items, always the same ones, spread over the source; none: all."""
    group_by: str | None = None
    """Regular expression searched in the names of the inputs; those with the same match (its first group, if it has
    one) stay on one side of the split. None: the grouping of the source."""

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise UserError(f"validation: must be between 0 and 1, got {self.validation}")
        if self.shard_samples < CHUNK_SAMPLES or self.shard_samples % CHUNK_SAMPLES:
            raise UserError(f"shard_samples: must be a multiple of {CHUNK_SAMPLES}, got {self.shard_samples}")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"jpeg_quality: must be 1 to 100, got {self.jpeg_quality}")
        if self.limit is not None and self.limit < 2:
            raise UserError(f"limit: must be at least 2, got {self.limit}")
        if self.group_by is not None:
            groups.check(self.group_by)


DEFAULTS = PackOptions()


@dataclass(frozen=True)
class ShardPlan:
    """What a shard will hold: its name beside the manifest, its split, and its items in order."""

    name: str
    split: str
    items: tuple[Item, ...]


LeftOut = dict[str, dict[str, str]]
"""Inputs that are not in the shards: by kind, by name, the reason."""

LEFT_OUT = {BrokenInput: "broken", Undecided: "undecided", NoDrawing: "excluded"}
"""Kinds of inputs that are left out: cannot be read, no half is surely the drawing, left out by design."""


@dataclass(frozen=True)
class ShardRecord:
    """What became of a plan.

    Attributes:
        shard: the shard as the manifest lists it; None if none of its items could be packed.
        left_out: inputs that are not in it.
    """

    shard: Shard | None
    left_out: LeftOut = field(default_factory=dict)

    def encode(self) -> bytes:
        """As JSON bytes: a manifest of one shard."""
        return manifest.encode({"left_out": self.left_out}, {"": (self.shard,) if self.shard else ()})

    @staticmethod
    def decode(data: bytes) -> "ShardRecord":
        """The inverse of ``encode``; ``CorruptData`` for other bytes."""
        try:
            document = manifest.parse(data)
            (shard,) = document["splits"][""] or (None,)
            left_out = {kind: dict(document["info"]["left_out"][kind]) for kind in LEFT_OUT.values()}
            if not isinstance(shard, Shard | None):
                raise TypeError("its shard has no samples")
            return ShardRecord(shard, left_out)
        except manifest.UNFIT as error:
            raise CorruptData(f"not a shard record: {error}") from None


def plan_shards(items: list[Item], options: PackOptions) -> list[ShardPlan]:
    """Deal items to splits and shards: a pure function.

    The split depends on the group alone, so it stays when items are added. The order is that of hashed keys, so
    neighbours, which are later read together, are not alike.

    Raises:
        UserError: a split would be empty; the message says which share works.
    """
    assert len({item.key for item in items}) == len(items)
    chosen = sorted(items, key=lambda item: hashlib.sha256(b"order " + item.key.encode()).digest())[: options.limit]
    places = {item.group: place_of_group(item.group) for item in chosen}
    lowest, highest = min(places.values()), max(places.values())
    if lowest == highest:
        raise UserError(f"nothing can be held out for validation: all {len(chosen)} inputs are variants of one drawing")
    if not lowest < options.validation <= highest:
        raise UserError(
            f"validation: a share of {options.validation} leaves one split of {len(places)} groups empty;"
            f" use one from {_between(lowest, highest)}"
        )
    plans = []
    for split in SPLITS:
        held_out = split == "validation"
        members = [item for item in chosen if (places[item.group] < options.validation) == held_out]
        for number, first in enumerate(range(0, len(members), options.shard_samples)):
            part = tuple(members[first : first + options.shard_samples])
            plans.append(ShardPlan(f"{split}-{number:05d}.tar", split, part))
    return plans


def _between(lowest: float, highest: float) -> str:
    """The shares above ``lowest`` and up to ``highest``, as short as their bounds can be written."""
    for digits in itertools.count(4):
        first, last = math.floor(lowest * 10**digits) + 1, math.floor(highest * 10**digits)
        if first <= last:
            return f"{first / 10**digits:.{digits}f} to {last / 10**digits:.{digits}f}"
    raise AssertionError


def place_of_group(group: str) -> float:
    """A group's fixed place in [0, 1)."""
    return int.from_bytes(hashlib.sha256(printable(group).encode()).digest()[:6], "big") / 2**48


def pack_shard(
    source: Source,
    plan: ShardPlan,
    options: PackOptions,
    destination: str,
    record_key: str,
    tick: Callable[[], None],
) -> ShardRecord:
    """Make one shard, write it, and then write its record, which says that it is finished.

    The whole shard is held in memory until it is written.

    Args:
        source: where the items are read from.
        plan: what to pack.
        options: of the whole pack.
        destination: folder or s3:// URI.
        record_key: key in ``destination`` for the record.
        tick: called after each item.

    Raises:
        UserError: another pack writes there now.
        StorageError: reading or writing kept failing; inputs that are merely broken go into the record instead.
    """
    store = storage.open_store(destination)
    left_out: LeftOut = {kind: {} for kind in LEFT_OUT.values()}
    buffer = io.BytesIO()
    keys = []
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as writer:
        for item in plan.items:
            try:
                for pair in source.pairs(item, source.fetch(item)):
                    keys.append(f"{item.key}-{pair.part}" if pair.part else item.key)
                    writer.write(_encode(keys[-1], item, pair, options.jpeg_quality))
            except tuple(LEFT_OUT) as error:
                left_out[LEFT_OUT[type(error)]][printable(item.location)] = printable(str(error))
            tick()
    if store.size(f"{record_key.rpartition('/')[0]}/{PLAN}") is None:  # or it would write over shards of the other one
        raise taken_over(store.uri)
    shard = None
    if keys:
        data = buffer.getvalue()
        store.write(plan.name, data)
        shard = index(plan.name, data)
        assert shard.samples.keys == keys
    record = ShardRecord(shard, left_out)
    store.write(record_key, record.encode())
    return record


def taken_over(destination: str) -> UserError:
    """What to say when another pack has begun in the same place."""
    return UserError(f"another pack has taken over {destination}; pack to another place")


def printable(name: str) -> str:
    """A file name with bytes that are no text written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def _encode(key: str, item: Item, pair: Pair, jpeg_quality: int) -> dict[str, Any]:
    about = {"key": key, "group": item.group, "source": item.location}
    sketch = {} if pair.sketch is None else {"sketch.png": _image(".png", pair.sketch, _PNG)}
    return {
        "__key__": key,
        "color.jpg": _image(".jpg", cv2.cvtColor(pair.color, cv2.COLOR_RGB2BGR), [*_JPEG, jpeg_quality]),
        "json": json.dumps(about).encode(),
        **sketch,
    }


def _image(suffix: str, image: Any, options: list[int]) -> bytes:
    done, data = cv2.imencode(suffix, image, options)
    assert done
    return bytes(np.asarray(data).tobytes())


def index(name: str, data: bytes) -> Shard:
    """Find the samples of a shard that ``pack_shard`` wrote, and checksum its chunks.

    Args:
        name: name of the shard beside its manifest.
        data: the whole tar.
    """
    places, _, _ = tarindex.find(data)
    samples = Samples.of(Sample(place.key, place.files["color.jpg"], place.files.get("sketch.png")) for place in places)
    chunks = tarindex.chunks(places, range(len(places)))
    return Shard(name, len(data), hashlib.sha256(data).hexdigest(), samples, chunks)
