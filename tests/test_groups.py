"""What stays on one side of the split: groups by a pattern, and items that share a file.

Run: pytest tests/test_groups.py
"""

import itertools
import os
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopainter.data import groups
from autopainter.data.sources import ColorImages, MatchedFolders
from autopainter.errors import UserError

# Sets


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("abcdefgh")), max_size=12))
def test_joined_names_are_the_closure_of_the_joins(joins):
    joined = groups.Joined()
    sets = {name: {name} for name in "abcdefgh"}
    for one, other in joins:
        joined.join(one, other)
        both = sets[one] | sets[other]
        sets |= dict.fromkeys(both, both)
    for name, members in sets.items():
        assert joined.root(name) == min(members)


def test_a_long_chain_of_joins():
    joined = groups.Joined()
    names = [f"{number:06d}" for number in range(20_000)]
    for one, other in reversed(list(itertools.pairwise(names))):
        joined.join(one, other)
    assert {joined.root(name) for name in names} == {names[0]}


# Patterns


@pytest.mark.parametrize(
    ("name", "pattern", "group"),
    [
        ("show-07/frame-12.png", r"show-\d+", "show-07"),
        ("show-07/frame-12.png", r"^(.*)/", "show-07"),
        ("show-07/frame-12.png", r"(show)-(\d+)", "show"),
        ("show-07/frame-12.png", r"(?:show)-\d+", "show-07"),
        ("a.png", "", ""),
    ],
)
def test_the_first_group_or_the_whole_match(name, pattern, group):
    assert groups.of(name, pattern) == group


@pytest.mark.parametrize("pattern", [r"show-\d+", r"(show-\d+)|movie"])
def test_a_name_that_does_not_match_is_refused(pattern):
    with pytest.raises(UserError, match=r"does not match 'movie.png'; it must match every name"):
        groups.of("movie.png", pattern)


def test_what_is_no_pattern_is_refused():
    groups.check("a(b)?")
    with pytest.raises(UserError, match=r"group_by: 'a\(' is no regular expression"):
        groups.check("a(")


# Duplicates


def put(folder, files):
    """Files of a folder, by name; their bytes need not be pictures to be compared."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def join(source, items=None):
    """(groups by location, sets of duplicates, progress) of a source."""
    progress = []
    items, duplicates = groups.join_duplicates(
        source, items or source.listing().items, lambda *done: progress.append(done)
    )
    return {item.location: item.group for item in items}, duplicates, progress


@dataclass(frozen=True)
class Recording(ColorImages):
    """Remembers what was read."""

    read: list = field(default_factory=list)

    def fetch(self, item):
        self.read.append(item.location)
        return super().fetch(item)


def test_the_same_bytes_under_other_names_are_one_group(tmp_path):
    put(tmp_path, {"a.png": b"one", "b/c.jpg": b"one", "d.png": b"two", "e.png": b"longer", "f.png": b"one"})
    source = Recording(str(tmp_path), 32)
    of, duplicates, progress = join(source)
    assert of["a.png"] == of["b/c.jpg"] == of["f.png"]
    assert len({of["a.png"], of["d.png"], of["e.png"]}) == 3
    assert duplicates == [["a.png", "b/c.jpg", "f.png"]]
    assert sorted(source.read) == ["a.png", "b/c.jpg", "d.png", "f.png"]  # not the one of another size
    assert progress == [(4, 4)]


def test_files_of_their_own_sizes_are_not_read(tmp_path):
    put(tmp_path, {f"{number}.png": bytes(number) for number in range(20)})
    source = Recording(str(tmp_path), 32)
    of, duplicates, progress = join(source)
    assert all(group == name.removesuffix(".png") for name, group in of.items())
    assert (source.read, duplicates, progress) == ([], [], [])


def test_duplicates_join_the_whole_groups_that_they_are_in(tmp_path):
    put(tmp_path, {"x/1.png": b"1", "x/2.png": b"two", "y/1.png": b"two", "y/2.png": b"22", "z/1.png": b"four"})
    source = ColorImages(str(tmp_path), 32)
    items = [replace(item, group=groups.of(item.location, "^."), key=item.key) for item in source.listing().items]
    of, duplicates, _ = join(source, items)
    assert of == {"x/1.png": "x", "x/2.png": "x", "y/1.png": "x", "y/2.png": "x", "z/1.png": "z"}
    assert duplicates == [["x/2.png", "y/1.png"]]


@pytest.fixture
def folders(tmp_path):
    """Pairs: a and b share the drawing, b and c the picture; d has the bytes of a picture as its drawing; e is alone;
    f and g are alike in both."""
    colors = {"a": b"red", "b": b"blu", "c": b"blu", "d": b"elk", "e": b"ape", "f": b"twin!", "g": b"twin!"}
    sketches = {"a": b"[]", "b": b"[]", "c": b"()", "d": b"red", "e": b"{}", "f": b"line", "g": b"line"}
    put(tmp_path / "color", {f"{name}.png": data for name, data in colors.items()})
    put(tmp_path / "sketch", {f"{name}.jpg": data for name, data in sketches.items()})
    return MatchedFolders(str(tmp_path / "color"), str(tmp_path / "sketch"), 32)


def test_chains_of_duplicates_in_matched_folders(folders):
    of, duplicates, _ = join(folders)
    assert of["a.png"] == of["b.png"] == of["c.png"]
    assert of["f.png"] == of["g.png"]
    assert len(set(of.values())) == 4
    assert sorted(duplicates) == [["a.png", "b.png"], ["b.png", "c.png"], ["f.png", "g.png"]]


def test_the_order_of_the_items_does_not_matter(folders):
    items = folders.listing().items
    groupings = [join(folders, list(order))[0] for order in (items, items[::-1], np.random.default_rng(0).permutation(
        np.array(items, object)))]  # fmt: skip
    assert groupings[0] == groupings[1] == groupings[2]


def test_what_cannot_be_read_is_left_to_packing(tmp_path):
    put(tmp_path, {"a.png": b"one", "b.png": b"one", "c.png": b"one"})
    source = ColorImages(str(tmp_path), 32)
    items = source.listing().items
    (tmp_path / "b.png").unlink()
    of, duplicates, _ = join(source, items)
    assert of["a.png"] == of["c.png"] != of["b.png"]
    assert duplicates == [["a.png", "c.png"]]


def test_names_that_are_no_text_have_groups(tmp_path):
    put(tmp_path, {os.fsdecode(b"\xff-1.png"): b"1", os.fsdecode(b"\xff-2.png"): b"1"})
    of, duplicates, _ = join(ColorImages(str(tmp_path), 32))
    assert len(set(of.values())) == 1
    assert len(duplicates[0]) == 2
