"""Where the samples are inside a tar, and chunks of neighbouring samples with their checksums."""

import io
import mmap
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from autopainter.data import crc
from autopainter.data.manifest import CHUNK_SAMPLES, Chunk
from autopainter.errors import one_line

_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
"""Key and suffix of a member, as WebDataset splits names: the suffix begins at the first dot of the file's name."""

_TEXT = re.compile("[^\\n\\ud800-\\udfff]*")
"""What a manifest can hold; tarfile gives surrogates for bytes that are no UTF-8."""

_GAP_SAMPLES = 2
"""Longest run of samples of the other split inside a chunk: reading over them is cheaper than another request."""

Range = tuple[int, int]


@dataclass(frozen=True)
class Place:
    """A sample in a tar.

    Attributes:
        key: its name.
        files: (offset, length) of each file by suffix, in lower case.
        start: first byte of its first header.
        stop: first byte of what follows it.
        crc32: of bytes [start, stop).
    """

    key: str
    files: dict[str, Range]
    start: int
    stop: int
    crc32: int


def find(data: bytes | mmap.mmap) -> tuple[list[Place], dict[str, str], str | None]:
    """Find the samples of an uncompressed tar.

    Args:
        data: the whole tar.

    Returns:
        The samples in order; the members that belong to none, by name, with the reason; and what is wrong with the
        tar as a whole, where its reading ended.
    """
    grouped: dict[str, dict[str, tarfile.TarInfo]] = {}
    broken: dict[str, str] = {}
    damage = None
    last = ""
    try:
        with tarfile.open(fileobj=io.BytesIO(data) if isinstance(data, bytes) else data, mode="r:") as tar:
            for member in tar:
                if member.size < 0 or tar.offset <= member.offset:  # tarfile would read it again, for ever
                    raise tarfile.ReadError(f"{member.name} has a size of {member.size}")
                match = _NAME.fullmatch(member.name)
                key, suffix = (match[1], match[2].lower()) if match else ("", "")
                if member.isdir() or member.name.rpartition("/")[2].startswith("."):
                    continue  # hidden files are what some systems leave behind
                if member.islnk() or member.issym():
                    broken[member.name] = "is a link; pack it with tar --dereference --hard-dereference"
                elif not member.isfile():
                    broken[member.name] = "is no plain file"
                elif not match:
                    broken[member.name] = "has no name of the form KEY.SUFFIX"
                elif not _TEXT.fullmatch(member.name):
                    broken[member.name] = "has a name with a line break or bytes that are no text"
                elif member.issparse():
                    broken[member.name] = "is a sparse file"
                elif (key in grouped and key != last) or suffix in grouped.get(key, ()):
                    broken[member.name] = f"is apart from the other files of {key}, or a second one of that name"
                elif _end(member) > len(data):
                    damage = f"ends inside of {member.name}"
                else:
                    grouped.setdefault(key, {})[suffix] = member
                    last = key
            header = data[tar.offset : tar.offset + tarfile.BLOCKSIZE]  # where reading ended
            if len(header) < tarfile.BLOCKSIZE:
                damage = damage or "is cut off: it has no end"
            elif any(header):  # tarfile takes a damaged header for the end
                damage = damage or f"has a damaged header at byte {tar.offset}"
    except MemoryError:
        raise
    except Exception as error:  # whatever tarfile makes of damaged headers
        damage = f"is no sound tar: {one_line(error)}"
    starts = [min(member.offset for member in members.values()) for members in grouped.values()]
    stops = [*starts[1:], max(map(_end, grouped[last].values()))] if last else []
    places = []
    for (key, members), start, stop in zip(grouped.items(), starts, stops, strict=True):
        files = {suffix: (member.offset_data, member.size) for suffix, member in members.items()}
        places.append(Place(key, files, start, stop, zlib.crc32(data[start:stop])))
    return places, broken, damage


def _end(member: tarfile.TarInfo) -> int:
    return member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def chunks(places: Sequence[Place], chosen: Sequence[int]) -> tuple[Chunk, ...]:
    """Put neighbouring samples into chunks.

    Args:
        places: all samples of a tar.
        chosen: indices of those that are in the split, in order; others inside a chunk's range are read over.
    """
    runs: list[list[int]] = []
    for index in chosen:
        if runs and len(runs[-1]) < CHUNK_SAMPLES and index - runs[-1][-1] - 1 <= _GAP_SAMPLES:
            runs[-1].append(index)
        else:
            runs.append([index])
    made = []
    first = 0
    for run in runs:
        tiles = places[run[0] : run[-1] + 1]
        checksum = crc.concatenated([(tile.crc32, tile.stop - tile.start) for tile in tiles])
        made.append(Chunk(first, len(run), tiles[0].start, tiles[-1].stop, checksum))
        first += len(run)
    return tuple(made)
