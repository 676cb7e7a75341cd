"""Where pairs come from: what each source lists, names and makes, in folders and on S3.

Run: pytest tests/test_sources.py
"""

import io
import os
import resource
from dataclasses import replace

import cv2
import numpy as np
import PIL.Image
import pytest
import webdataset

from autopainter import storage
from autopainter.data.pack import PackOptions, pack
from autopainter.data.sketch import XDoG, xdog
from autopainter.data.sources import (
    BrokenInput,
    ColorImages,
    Item,
    MatchedFolders,
    NoDrawing,
    OpenMoji,
    SideBySide,
    Undecided,
    base,
    openmoji,
)
from autopainter.errors import StorageError, UserError


def draw(number, height=60, width=60):
    """A cartoon-like picture: flat shapes with black outlines, uint8 [H, W, 3]."""
    random = np.random.default_rng(number)
    color = np.full((height, width, 3), random.integers(120, 256, 3), np.uint8)
    for _ in range(4):
        center = tuple(int(x) for x in random.integers(5, 55, 2))
        cv2.circle(color, center, int(random.integers(5, 20)), [int(x) for x in random.integers(0, 256, 3)], -1)
        cv2.circle(color, center, int(random.integers(5, 20)), (0, 0, 0), 2)
    return color


def png(image):
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder, files):
    """Write bytes, or pictures as PNG, by their names."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else png(data))


def pairs(source, name=None):
    """The pairs of the only item, or of that at a location."""
    items = source.listing().items
    (item,) = items if name is None else [item for item in items if item.location == name]
    return source.pairs(item, source.fetch(item))


# Listings


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """A folder and an s3:// prefix, each once."""
    return str(tmp_path / "in") if request.param == "folder" else request.getfixturevalue("s3_uri")


def test_pictures_at_any_depth_are_found_and_others_are_counted(place):
    store = storage.open_store(place)
    for name in ("b.png", "a/x/c.JPG", "a/d.tiff", "e.Webp", "f.gif", "g.avif", "h.jp2", "i.pgm", "j.hdr"):
        store.write(name, name.encode())
    for name in ("notes.txt", "a/more.TXT", "LICENSE", ".hidden.png", ".git/x.png", "a/._b.png"):
        store.write(name, b"")
    for uri in (place, place + "/"):
        listing = ColorImages(uri, 32).listing()
        assert [item.key for item in listing.items] == ["a/d", "a/x/c", "b", "e", "f", "g", "h", "i", "j"]
        assert listing.items[1] == Item("a/x/c", "a/x/c", "a/x/c.JPG", (("a/x/c.JPG", 9),))
        assert listing.ignored == {".txt": 2, "no suffix": 1}
        assert listing.broken == {}
        assert ColorImages(uri, 32).info()["uri"] == place
    source = ColorImages(place, 32)
    assert source.fetch(listing.items[1]) == [b"a/x/c.JPG"]
    gone = replace(listing.items[1], location="none.png")
    with pytest.raises(BrokenInput, match="cannot be read"):
        source.fetch(gone)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: ColorImages(folder, 32),
        lambda folder: SideBySide(folder, 32, "left"),
        lambda folder: MatchedFolders(folder, folder, 32),
    ],
    ids=["images", "side by side", "folders"],
)
def test_nothing_to_pack_is_said_in_one_line(make, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        make(str(tmp_path / "none")).listing()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"no pictures in it; looked for .png, .jpg") as error:
        make(str(tmp_path)).listing()
    assert "\n" not in str(error.value)


def test_a_missing_bucket_is_named(s3_uri):
    with pytest.raises(UserError, match="no bucket"):
        ColorImages("s3://autopainter-no-such-bucket/in", 32).listing()
    with pytest.raises(UserError, match="no pictures"):
        ColorImages(s3_uri, 32).listing()


def test_keys_are_valid_and_unique_for_any_file_name(tmp_path):
    names = ["a.b.png", "a b.png", "a_b.png", "same.png", "same.jpg", "Case.png", "case.png", "sub/x.png"]
    names += ["Bj\u00f8rk.png", "x" * 150 + ".png", "y" * 150 + "1.png", "y" * 150 + "2.png", os.fsdecode(b"\xff.png")]
    names += ["girl.png", "girl-u.png", "girl-d.png"]  # girl.png gives two samples
    put(tmp_path / "in", {name: draw(number, 90, 60) for number, name in enumerate(names)})
    put(tmp_path / "in", {os.fsdecode(b"\xfe.jpg"): b"", os.fsdecode(b"x.\xfe"): b"no picture"})
    source = ColorImages(str(tmp_path / "in"), 32, "upper-lower")
    items = source.listing().items
    assert [item.key for item in items] == sorted(item.key for item in items)
    assert {"sub/x", "a_b", "girl"} <= {item.key for item in items}
    assert len({item.key.lower() for item in items}) == len(names) + 1
    result = pack(source, str(tmp_path / "out"), PackOptions(validation=0.3), workers=1)
    assert list(result.left_out["broken"]) == ["\\udcfe.jpg"]
    assert result.ignored == {".\\udcfe": 1}
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    read = {sample["__key__"]: sample for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert len({key.lower() for key in read}) == 2 * len(names)
    assert all({"color.jpg", "sketch.png", "json"} <= sample.keys() for sample in read.values())


def test_keys_of_names_that_only_object_storage_has():
    paths = ["a//b.png", "/a.png", "//.b/c.png", "a/../b.png", "a/./b.png", "-u.png", "/.png"]
    keys = base.sample_keys(paths)
    assert len({key.lower() for key in keys}) == len(paths)
    assert all(key and not key.startswith("/") and "." not in key for key in keys)


# Colour pictures


def test_a_picture_is_cut_and_then_drawn(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = (250, 120, 10)
    wide[:, :10], wide[:, 70:] = 90, 200
    put(tmp_path, {"wide.png": wide})

    def made(fit, **options):
        (pair,) = pairs(ColorImages(str(tmp_path), 40, fit, **options))
        assert (pair.color.shape, pair.sketch.shape, pair.part) == ((40, 40, 3), (40, 40), "")
        return pair

    for fit in ("crop", "upper-lower"):
        assert (made(fit).color == (250, 120, 10)).all()
    resized = made("resize")
    assert (resized.color[:, 0] == 90).all()
    assert (resized.color[:, -1] == 200).all()
    assert (resized.sketch == xdog(resized.color)).all()
    padded = made("pad")
    assert (padded.color[:10] == 255).all()
    assert (padded.color[30:] == 255).all()
    assert (padded.color[10:30, 0] == 90).all()
    assert (padded.sketch[:10] == 255).all()
    assert (padded.sketch[10:30] == xdog(padded.color[10:30])).all()  # no line where the paper begins
    soft = XDoG(sigma=0.7, phi=0.5)
    assert (made("resize", xdog=soft).sketch == xdog(resized.color, soft)).all()


def test_a_portrait_gives_its_upper_and_its_lower_square(tmp_path):
    tall = draw(1, 100, 60)
    put(tmp_path, {"tall.png": tall, "wide.png": draw(2, 60, 100), "square.png": draw(3)})
    source = ColorImages(str(tmp_path), 60, "upper-lower")
    upper, lower = pairs(source, "tall.png")
    assert (upper.part, lower.part) == ("u", "d")
    assert (upper.color == tall[:60]).all()
    assert (lower.color == tall[40:]).all()
    assert (lower.sketch == xdog(lower.color)).all()
    assert (pairs(source, "wide.png")[0].color == draw(2, 60, 100)[:, 20:80]).all()
    assert [pair.part for name in ("wide.png", "square.png") for pair in pairs(source, name)] == ["", ""]


def test_jitter_is_seeded_by_the_sample(tmp_path):
    picture = draw(1, 100, 60)
    put(tmp_path, {f"{number}.png": picture for number in range(5)})
    source = ColorImages(str(tmp_path), 48, "upper-lower", jitter=1.0)
    items = source.listing().items
    drawings = {}
    for item in items:
        for pair in source.pairs(item, source.fetch(item)):
            drawings[item.key, pair.part] = pair.sketch.tobytes()
    assert len(set(drawings.values())) == 10  # of two pictures
    for item in reversed(items):  # nothing but the key counts
        for pair in replace(source).pairs(replace(item, group="other", location="elsewhere.png"), [png(picture)]):
            assert pair.sketch.tobytes() == drawings[item.key, pair.part]
    plain = replace(source, jitter=0.0)
    for pair in (pair for item in items for pair in plain.pairs(item, source.fetch(item))):
        assert (pair.sketch == xdog(pair.color)).all()


@pytest.mark.parametrize("fit", ["crop", "upper-lower", "resize", "pad"])
def test_a_drawing_to_be_made_on_the_fly_is_not_stored(fit, tmp_path):
    put(tmp_path, {"a.png": draw(1, 100, 60)})
    stored, undrawn = (pairs(ColorImages(str(tmp_path), 32, fit, sketch=mode)) for mode in ("stored", "on_the_fly"))
    assert [pair.sketch for pair in undrawn] == [None] * len(stored)
    for one, other in zip(stored, undrawn, strict=True):
        assert (one.color == other.color).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ColorImages("in", 8), "size: must be 16 to 4096 pixels, got 8"),
        (lambda: ColorImages("in", 32, "stretch"), "fit: must be one of crop, upper-lower, resize, pad"),
        (lambda: ColorImages("in", 32, jitter=1.5), "jitter: must be 0 to 1, got 1.5"),
        (lambda: ColorImages("in", 32, jitter=float("nan")), "jitter"),
        (lambda: ColorImages("in", 32, sketch="on-the-fly"), "sketch: must be one of stored, on_the_fly"),
        (lambda: SideBySide("in", 32, "top"), "sketch_side: must be one of left, right, auto"),
        (lambda: SideBySide("in", 5000, "left"), "size"),
        (lambda: SideBySide("in", 32, "left", "cut"), "fit"),
        (lambda: MatchedFolders("in", "in", 0), "size"),
        (lambda: MatchedFolders("in", "in", 32, "cut"), "fit"),
        (lambda: OpenMoji(0), "size"),
    ],
)
def test_a_source_that_cannot_be_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


# Two halves


def halves(number=1, height=60, width=60):
    color = draw(number, height, width)
    return color, xdog(color)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("fit", ["crop", "upper-lower", "resize", "pad"])
@pytest.mark.parametrize("shape", [(60, 60), (100, 60), (60, 90)])
def test_halves_are_cut_alike(side, fit, shape, tmp_path):
    color, sketch = halves(1, *shape)
    both = [np.dstack([sketch] * 3), color]
    put(tmp_path / "pair", {"a.png": np.hstack(both if side == "left" else both[::-1])})
    put(tmp_path / "color", {"a.png": color})
    expected = pairs(ColorImages(str(tmp_path / "color"), 60, fit))
    made = pairs(SideBySide(str(tmp_path / "pair"), 60, side, fit))
    assert [pair.part for pair in made] == [pair.part for pair in expected]
    for one, other in zip(made, expected, strict=True):
        assert (one.color == other.color).all()
        assert one.sketch.shape == (60, 60)
        top = {"u": 0, "d": 40}.get(one.part, (shape[0] - 60) // 2)
        left = (shape[1] - 60) // 2
        if shape == (60, 60) or fit in ("crop", "upper-lower"):  # nothing is resampled
            assert (one.sketch == sketch[top : top + 60, left : left + 60]).all()


def test_an_odd_width_is_refused(tmp_path):
    put(tmp_path, {"odd.png": np.zeros((20, 61, 3), np.uint8)})
    for side in ("left", "right", "auto"):
        with pytest.raises(BrokenInput, match="its width of 61 pixels has no two equal halves"):
            pairs(SideBySide(str(tmp_path), 32, side))


def test_the_drawing_is_found_in_either_half_or_named_as_undecided(tmp_path):
    rendered = {}
    emoji = OpenMoji(128)
    for item in emoji.listing().items:
        if item.key in ("1F34E", "1F98A", "1F422"):  # apple, fox, turtle
            (rendered[item.key],) = emoji.pairs(item, emoji.fetch(item))
    assert len(rendered) == 3
    for key, pair in rendered.items():
        lines = np.dstack([pair.sketch] * 3)
        put(tmp_path, {f"{key}-l.png": np.hstack([lines, pair.color]), f"{key}-r.png": np.hstack([pair.color, lines])})
    some = next(iter(rendered.values()))
    put(tmp_path, {"grey.png": np.hstack([np.dstack([some.sketch] * 3)] * 2),
                   "colours.png": np.hstack([some.color] * 2)})  # fmt: skip
    source = SideBySide(str(tmp_path), 128, "auto")
    for key, pair in rendered.items():
        for side in "lr":
            (found,) = pairs(source, f"{key}-{side}.png")
            assert (found.color == pair.color).all()
            assert (found.sketch == pair.sketch).all()
    for name in ("grey", "colours"):
        with pytest.raises(Undecided):
            pairs(source, f"{name}.png")


# Two folders


@pytest.fixture
def matched(tmp_path):
    """Folders of pictures and drawings: some match, some do not."""
    color, sketch = halves()
    put(tmp_path / "color", {"a.png": color, "sub/b.png": color, "lonely.png": color, "twice.png": color,
                             "one.png": color, "one.jpg": color, "notes.txt": b""})  # fmt: skip
    put(tmp_path / "line", {"a.jpg": sketch, "sub/b.png": sketch, "extra.png": sketch, "other/b.png": sketch,
                            "twice.png": sketch, "twice.gif": sketch, "one.png": sketch})  # fmt: skip
    return MatchedFolders(str(tmp_path / "color"), str(tmp_path / "line") + "/", 32)


def test_folders_are_matched_by_name_and_the_unmatched_are_named(matched, tmp_path):
    listing = matched.listing()
    assert [(item.key, item.location, [name for name, _ in item.files]) for item in listing.items] == [
        ("a", "a.png", ["a.png", "a.jpg"]), ("sub/b", "sub/b.png", ["sub/b.png", "sub/b.png"]),
    ]  # fmt: skip
    line = str(tmp_path / "line")
    assert listing.broken == {
        "lonely.png": f"has no drawing of that name in {line}/",
        "twice.png": "has several drawings: twice.gif, twice.png",
        "one.png": "is one of several pictures of that name",
        "one.jpg": "is one of several pictures of that name",
        f"{line}/extra.png": "is the drawing of no picture",
        f"{line}/other/b.png": "is the drawing of no picture",
    }
    assert listing.ignored == {".txt": 1}


def test_folders_on_s3_are_matched(s3_uri):
    color, sketch = halves()
    store = storage.open_store(s3_uri)
    for name, data in {"color/x/a.png": color, "line/x/a.webp": sketch, "line/b.png": sketch}.items():
        store.write(name, png(data))
    source = MatchedFolders(f"{s3_uri}/color", f"{s3_uri}/line", 60)
    (pair,) = pairs(source)
    assert (pair.color == color).all()
    assert (pair.sketch == sketch).all()
    assert source.listing().broken == {f"{s3_uri}/line/b.png": "is the drawing of no picture"}


def test_folders_that_share_no_name_are_refused(tmp_path):
    put(tmp_path, {"color/a.png": draw(1), "line/b.png": draw(1)})
    with pytest.raises(UserError, match="no two pictures have the same name"):
        MatchedFolders(str(tmp_path / "color"), str(tmp_path / "line"), 32).listing()


@pytest.mark.parametrize("fit", ["crop", "upper-lower", "resize", "pad"])
def test_a_drawing_of_another_size_is_cut_where_its_picture_is(fit, tmp_path):
    """A drawing of twice the edges is the picture itself, so that both must come out alike."""
    color = np.dstack([cv2.GaussianBlur(draw(1, 100, 60)[..., 0], (0, 0), 2)] * 3)
    put(tmp_path, {"color/a.png": color, "line/a.png": cv2.resize(color, (120, 200), interpolation=cv2.INTER_NEAREST)})
    source = MatchedFolders(str(tmp_path / "color"), str(tmp_path / "line"), 60, fit)
    made = pairs(source)
    assert [pair.part for pair in made] == (["u", "d"] if fit == "upper-lower" else [""])
    for pair in made:
        assert np.abs(pair.color[..., 0].astype(int) - pair.sketch).max() <= 1


@pytest.mark.parametrize(
    ("shape", "fits"), [((101, 60), True), ((99, 61), False), ((60, 100), False), ((50, 30), True)]
)
def test_a_drawing_of_another_shape_is_refused(shape, fits, tmp_path):
    put(tmp_path, {"color/a.png": np.zeros((100, 60, 3), np.uint8), "line/a.png": np.zeros(shape, np.uint8)})
    source = MatchedFolders(str(tmp_path / "color"), str(tmp_path / "line"), 32)
    if fits:
        assert pairs(source)[0].sketch.shape == (32, 32)
        return
    with pytest.raises(BrokenInput, match=f"has 60 x 100 pixels and its drawing {shape[1]} x {shape[0]}"):
        pairs(source)


def test_a_missing_file_of_a_pair_is_broken(matched, tmp_path):
    item = matched.listing().items[0]
    (tmp_path / "line" / "a.jpg").unlink()
    with pytest.raises(BrokenInput, match="cannot be read"):
        matched.fetch(item)


# OpenMoji


def test_openmoji_drawings_are_dark_lines_on_white():
    source = OpenMoji(48)
    listing = source.listing()
    assert len(listing.items) == 4495
    assert (listing.broken, listing.ignored) == ({}, {})
    drawn = 0
    for item in listing.items[::150]:
        try:
            (pair,) = source.pairs(item, source.fetch(item))
        except NoDrawing:
            continue
        drawn += 1
        assert pair.sketch.min() < 64
        assert np.median(pair.sketch) == 255
        assert pair.color.shape == (48, 48, 3)
    assert drawn > 20


def test_openmoji_without_lines_are_left_out_by_design():
    source = OpenMoji(48)
    for key, reason in (("1F195", "no line layer"), ("1F1E8-1F1ED", "bare frame")):
        item = next(item for item in source.listing().items if item.key == key)
        with pytest.raises(NoDrawing, match=reason):
            source.pairs(item, source.fetch(item))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1F468-1F3FB-200D-1F692", "1F469-200D-1F692"),  # skin and gender
        ("1F46E-1F3FB-200D-2642-FE0F", "1F46E"),
        ("1F9D1-1F3FD-200D-1F9BC-200D-27A1-FE0F", "1F469-200D-1F9BC"),  # direction
        ("0023-FE0F-20E3", "0023-20E3"),
        ("1F46B", "1F9D1-1F3FF-200D-1F91D-200D-1F9D1-1F3FB"),
        ("1F49A", "2764-FE0F"),
    ],
)
def test_variants_of_a_drawing_have_one_group(first, second):
    assert openmoji.group(first) == openmoji.group(second)


def test_other_drawings_have_other_groups():
    assert openmoji.group("1F600") != openmoji.group("1F601")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(openmoji, "PACKAGE", "no-such-package")
    openmoji._files.cache_clear()
    try:
        with pytest.raises(UserError, match=r"needs no-such-package.* pip install .* '\.\[openmoji\]'"):
            OpenMoji(64).listing()
    finally:
        openmoji._files.cache_clear()


def test_a_link_to_nothing_is_an_item_that_cannot_be_read(tmp_path):
    put(tmp_path, {"sound.png": draw(1)})
    (tmp_path / "gone.png").symlink_to(tmp_path / "moved-away.png")
    source = ColorImages(str(tmp_path), 32)
    assert [item.location for item in source.listing().items] == ["gone.png", "sound.png"]
    with pytest.raises(BrokenInput, match="cannot be read"):
        pairs(source, "gone.png")


def test_a_link_to_itself_is_an_item_that_cannot_be_read(tmp_path):
    put(tmp_path, {"sound.png": draw(1)})
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(BrokenInput, match="cannot be read: Too many levels of symbolic links"):
        pairs(ColorImages(str(tmp_path), 32), "loop.png")


def test_a_failure_that_is_not_the_pictures_own_does_not_break_it(tmp_path):
    """Here a process that may not open another file; on NFS an input/output error or a stale handle."""
    put(tmp_path, {"sound.png": draw(1)})
    source = ColorImages(str(tmp_path), 32)
    (item,) = source.listing().items
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(StorageError, match=r"sound.png: cannot be read: Too many open files; the same command"):
            source.fetch(item)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pairs(source, "sound.png")
