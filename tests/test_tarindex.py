"""Where the samples are in a tar of any maker, the CRC-32 of joined bytes, and chunks of chosen samples.

References: webdataset's own reader, zlib. Run: pytest tests/test_tarindex.py
"""

import io
import itertools
import mmap
import tarfile
import zlib

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from autopainter.data import crc, tarindex
from autopainter.data.manifest import CHUNK_SAMPLES


def tar(members, kind=tarfile.PAX_FORMAT):
    """A tar of (name, bytes) members; without bytes a directory."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as writer:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            writer.addfile(info, io.BytesIO(data or b""))
    return buffer.getvalue()


def read_back(data, places):
    return [
        (place.key, {suffix: data[offset : offset + length] for suffix, (offset, length) in place.files.items()})
        for place in places
    ]


def by_webdataset(path):
    samples = webdataset.WebDataset([str(path)], shardshuffle=False)
    return [(sample["__key__"], {name: data for name, data in sample.items() if name[0] != "_"}) for sample in samples]


def lots(samples=6):
    """Members of well-formed samples of two files each."""
    return [(f"{n}.{suffix}", bytes([n]) * (700 + n)) for n in range(samples) for suffix in ("jpg", "png")]


@pytest.mark.parametrize(
    "members",
    [
        lots(),
        [("set", None), ("set/a", None), *((f"set/a/{name}", data) for name, data in lots())],
        [("./", None), *((f"./{name}", data) for name, data in lots())],
        [("v1.0/dir.d/a.Color.PNG", b"1"), ("v1.0/dir.d/a.seg.x.png", b"22"), ("v1.0/dir.d/b.Color.PNG", b"")],
        [("a.jpg", b"1"), ("a.txt", b"a cat"), ("a.json", b"{}"), ("b.jpg", b"2"), ("b.cls", b"7")],
        [(f"{'long/' * 60}{name}", data) for name, data in lots()],
        [("\u96ea b-_ .jpg", b"1"), ("\u96ea b-_ .png", b"2"), ("z.jpg", b"3")],
    ],
    ids=["plain", "in directories", "from a dot", "dots", "further members", "long names", "no ASCII"],
)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_the_samples_are_those_of_webdataset(members, kind, tmp_path):
    data = tar(members, kind)
    (tmp_path / "a.tar").write_bytes(data)
    places, broken, damage = tarindex.find(data)
    assert (broken, damage) == ({}, None)
    assert read_back(data, places) == by_webdataset(tmp_path / "a.tar")
    for place in places:
        assert zlib.crc32(data[place.start : place.stop]) == place.crc32
        with tarfile.open(fileobj=io.BytesIO(data[place.start : place.stop] + bytes(1024))) as alone:
            files = {member.name: alone.extractfile(member).read() for member in alone if member.isfile()}
        assert sorted(files.values()) == sorted(read_back(data, [place])[0][1].values())
    assert [place.start for place in places[1:]] == [place.stop for place in places[:-1]]
    assert not any(data[places[-1].stop :])


def test_webdatasets_own_writer(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for n in range(3):
            writer.write({"__key__": f"k{n}", "rgb.png": bytes([n]) * 10, "json": {"n": n}})
    with (tmp_path / "a.tar").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        places, broken, damage = tarindex.find(data)
        assert (broken, damage) == ({}, None)
        assert read_back(data, places) == by_webdataset(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("members", "samples", "named"),
    [
        ([("README", b"hi"), *lots(1)], 1, {"README": "KEY.SUFFIX"}),
        ([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.png", b"3")], 2, {"a.png": "apart"}),
        ([("a.jpg", b"1"), ("a.jpg", b"2"), ("a.png", b"3")], 1, {"a.jpg": "second one"}),
        ([("a.jpg", b"1"), ("a.JPG", b"2")], 1, {"a.JPG": "second one"}),
        ([("a.jpg", b"1"), ("a\nb.jpg", b"2")], 1, {"a\nb.jpg": "line break"}),
        ([("a.jpg", b"1"), ("\udcff.jpg", b"2")], 1, {"\udcff.jpg": "no text"}),
    ],
)
def test_members_of_no_sample_are_named(members, samples, named):
    data = tar(members, tarfile.GNU_FORMAT)
    places, broken, damage = tarindex.find(data)
    assert damage is None
    assert len(places) == samples
    assert broken.keys() == named.keys()
    assert all(named[name] in reason for name, reason in broken.items())
    assert read_back(data, places)[0][1]["jpg"] == next(file for name, file in members if name.endswith("jpg"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (tarfile.LNKTYPE, "is a link; pack it with tar --dereference --hard-dereference"),
        (tarfile.SYMTYPE, "is a link; pack it with tar --dereference --hard-dereference"),
        (tarfile.FIFOTYPE, "is no plain file"),
    ],
)
def test_a_member_that_is_no_file_of_its_own_is_named(kind, reason):
    buffer = io.BytesIO(tar([("a.jpg", b"1"), ("b.jpg", b"2")]))
    with tarfile.open(fileobj=buffer, mode="a") as writer:
        odd = tarfile.TarInfo("b.png")
        odd.type, odd.linkname = kind, "a.jpg"
        writer.addfile(odd)
    places, broken, damage = tarindex.find(buffer.getvalue())
    assert [place.files.keys() for place in places] == [{"jpg"}, {"jpg"}]
    assert broken == {"b.png": reason}
    assert damage is None


def mapped(data):
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


@pytest.mark.parametrize("way", [bytes, mapped])
def test_wherever_a_tar_is_cut_off_is_noticed(way):
    data = tar(lots())
    whole, _, _ = tarindex.find(data)
    ends = {place.stop for place in whole}
    for cut in {*range(256, whole[-1].stop + 1, 256), *ends, *(end + 100 for end in ends), 1}:
        places, _, damage = tarindex.find(way(data[:cut]))
        assert damage, cut
        for found, place in zip(places, whole, strict=False):  # what is there is right
            for suffix, file in found.files.items():
                assert file == place.files[suffix]
                assert sum(file) <= cut


def test_what_is_no_tar_is_named():
    for data in (b"", b"hello", bytes(100), zlib.compress(tar(lots()))):
        places, broken, damage = tarindex.find(data)
        assert (places, broken) == ([], {})
        assert damage
    assert tarindex.find(tar([])) == ([], {}, None)


@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_damaged_header_is_no_silent_end(place):
    """tarfile ends there as at the end of the archive."""
    data = bytearray(tar(lots()))
    whole, _, _ = tarindex.find(bytes(data))
    data[whole[place].start + 10] ^= 1
    places, _, damage = tarindex.find(bytes(data))
    assert len(places) == place
    assert damage


def resized(data, place, size):
    """A tar with another size in the header at a byte, and the header's checksum made right."""
    header = tarfile.TarInfo.frombuf(data[place : place + 512], "utf-8", "strict")
    header.size = size
    return data[:place] + header.tobuf(tarfile.GNU_FORMAT) + data[place + 512 :]


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**70), 2**62, 2**80])
@pytest.mark.parametrize("way", [bytes, mapped])
def test_a_member_of_an_impossible_size_ends_the_tar(size, way):
    data = tar(lots())
    whole, _, _ = tarindex.find(data)
    places, broken, damage = tarindex.find(way(resized(data, whole[3].start, size)))
    assert places == whole[:3]
    assert broken == {}
    assert damage


# CRC-32


@given(st.lists(st.binary(max_size=3000), max_size=6))
def test_the_crc_of_joined_bytes_is_that_of_zlib(parts):
    assert crc.concatenated((zlib.crc32(part), len(part)) for part in parts) == zlib.crc32(b"".join(parts))


def test_the_crc_of_long_parts():
    zeros = bytes(1 << 20)
    first = whole = zlib.crc32(b"first")
    second = 0
    for _ in range(150):
        whole, second = zlib.crc32(zeros, whole), zlib.crc32(zeros, second)
    assert crc.concatenated([(first, 5), (second, 150 << 20)]) == whole


# Chunks


@settings(max_examples=40)
@given(st.lists(st.booleans(), max_size=70))
def test_chunks_hold_the_chosen_samples_and_their_checksum(wanted):
    data = tar(lots(len(wanted)))
    places, _, _ = tarindex.find(data)
    chosen = [index for index, want in enumerate(wanted) if want]
    made = tarindex.chunks(places, chosen)
    held = []
    for chunk in made:
        assert chunk.first == len(held)
        assert 1 <= chunk.samples <= CHUNK_SAMPLES
        assert zlib.crc32(data[chunk.start : chunk.stop]) == chunk.crc32
        part = chosen[chunk.first : chunk.first + chunk.samples]
        assert (chunk.start, chunk.stop) == (places[part[0]].start, places[part[-1]].stop)
        assert all(later - earlier <= 3 for earlier, later in itertools.pairwise(part))
        held += part
    assert held == chosen
    if all(wanted):
        assert all(chunk.samples == CHUNK_SAMPLES for chunk in made[:-1])
