"""Sketch and hint files: how they are read, which belong together, where paintings go, and what is refused.

``autopainter paint`` is called in this process, on a small run with random weights. Run: pytest tests/test_sketches.py
"""

import contextlib
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
from painting import command, drawing, hinted, refusal, save_run, small_config
from waiting import PATIENCE_SECONDS

from autopainter.cleaning import clean
from autopainter.data.pictures import write_png
from autopainter.paint import Painter
from autopainter.sketches import Job, plan, read_hints, read_sketch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"), small_config(), {5: None})


@pytest.fixture(scope="module")
def painter(run):
    return Painter.load(run)


def save(path, picture, **options):
    """A uint8 array as a picture file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(picture).save(path, **options)
    return path


def pixels(path):
    return np.asarray(PIL.Image.open(path))


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def sketches(tmp_path):
    """Three sketch files of different sizes, in a folder of their own."""
    names = "one", "two", "three"
    return [save(tmp_path / "in" / f"{name}.png", drawing(30 + n, 40, n)) for n, name in enumerate(names)]


@pytest.fixture
def paint(run, tmp_path, capfd):
    """Calls ``autopainter paint`` with an output inside the test's folder: exit code, stdout's and stderr's lines."""

    def call(*arguments, output):
        code = command(["paint", "--run", run, *arguments, "-o", tmp_path / output])
        said = capfd.readouterr()
        return code, said.out.splitlines(), said.err.splitlines()

    return call


def png_header(width, height):
    """An RGBA PNG that says it is of a size, without the pixels."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(bytes(99))) + part(b"IEND", b"")


# Reading


def test_a_sketch_is_read_with_transparency_on_white_and_scaled(tmp_path):
    layer = np.zeros((30, 60, 4), np.uint8)
    layer[10, :, 3] = 255  # a black line on nothing
    path = save(tmp_path / "sketch.png", layer)
    sketch = read_sketch(path)
    assert sketch.shape == (30, 60)
    assert (sketch[10] == 0).all()
    assert (np.delete(sketch, 10, axis=0) == 255).all()
    assert read_sketch(path, 20).shape == (10, 20)
    assert read_sketch(path, 120).shape == (60, 120)


def test_a_photo_is_turned_as_it_was_taken_and_cleaned_before_it_is_scaled(tmp_path):
    upright = cv2.resize(drawing(60, 80), (320, 240)) // 2 + 40  # grey paper
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side: turn by 90 degrees clockwise
    path = save(tmp_path / "photo.jpg", np.rot90(upright), exif=exif, quality=95)
    assert read_sketch(path).shape == (240, 320)
    photo = read_sketch(path)
    assert np.abs(photo.astype(int) - upright).mean() < 3
    cleaned = read_sketch(path, cleaned=True)
    assert np.median(photo) < 200
    assert np.median(cleaned) == 255
    assert np.abs(cleaned.astype(int) - clean(photo)).max() <= 2
    expected = cv2.resize(cleaned, (160, 120), interpolation=cv2.INTER_AREA)
    assert (read_sketch(path, 160, cleaned=True) == expected).all()


def test_a_transparent_png_is_read_as_hints(tmp_path):
    path = save(tmp_path / "hints.png", hinted(20, 30))
    assert (read_hints(path) == hinted(20, 30)).all()
    half = read_hints(path, 15)
    assert half.shape == (10, 15, 4)
    assert {tuple(pixel) for pixel in half.reshape(-1, 4)} == {(0, 200, 0, 0), (250, 10, 20, 255)}  # nothing is mixed


def test_hints_of_few_colours_and_on_their_side_are_read(tmp_path):
    palette = PIL.Image.fromarray(hinted(20, 30)).convert("P")
    palette.putpixel((29, 19), 7)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    palette.save(tmp_path / "hints.png", transparency=palette.getpixel((29, 0)), exif=exif)
    read = read_hints(tmp_path / "hints.png")
    assert read.shape == (30, 20, 4)
    upper, rest = read[:15, 10:], read[15:]
    assert (upper[..., 3] == 255).all()  # the upper left patch comes to the upper right
    assert (np.abs(upper[..., :3].astype(int) - (250, 10, 20)) < 40).all()
    assert (rest[..., 3] == 0).sum() == rest[..., 3].size - 1


@pytest.mark.parametrize("read", [read_sketch, read_hints])
def test_a_file_that_is_no_picture_is_refused(tmp_path, read):
    good = save(tmp_path / "good.png", hinted(40, 40))
    for name, data in (("empty.png", b""), ("text.png", b"hello"), ("cut.png", good.read_bytes()[:40]),
                       ("huge.png", png_header(40_000, 40_000)),
                       ("short.png", png_header(40, 40))):  # fmt: skip
        (tmp_path / name).write_bytes(data)
        refusal(lambda name=name: read(tmp_path / name), str(tmp_path / name))
    refusal(lambda: read(tmp_path / "missing.png"), "missing.png", "cannot be read")
    refusal(lambda: read(tmp_path), str(tmp_path), "cannot be read")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16", "RGBA", "JPEG"])
def test_hints_without_transparency_are_refused(tmp_path, mode):
    path = tmp_path / "hints.png"
    if mode == "I;16":
        image = PIL.Image.fromarray(np.zeros((8, 8), np.uint16))
    else:
        image = PIL.Image.new("RGB", (8, 8)).convert("RGB" if mode == "JPEG" else mode)
    image.save(path, format="JPEG" if mode == "JPEG" else "PNG")
    refusal(lambda: read_hints(path), str(path), "transparent")


# Which files


def test_one_sketch_becomes_one_file(painter, sketches, paint, tmp_path):
    target = tmp_path / "new" / "folder" / "out.png"
    assert paint(sketches[0], output=target) == (0, [str(target)], [])
    assert (pixels(target) == painter.paint(drawing(30, 40, 0))).all()
    assert tree(tmp_path / "new") == ["folder/out.png"]
    assert paint(sketches[0], output="v1.2")[:2] == (0, [str(tmp_path / "v1.2" / "one.png")])


def test_a_sketch_may_come_through_a_pipe(run, painter, sketches, tmp_path):
    arguments = ["paint", "--run", run, "/dev/stdin", "-o", tmp_path / "out.png"]
    program = [sys.executable, "-m", "autopainter", *map(str, arguments)]
    done = subprocess.run(program, input=sketches[0].read_bytes(), capture_output=True, timeout=PATIENCE_SECONDS)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (pixels(tmp_path / "out.png") == painter.paint(drawing(30, 40, 0))).all()


def test_several_sketches_become_a_folder(painter, sketches, paint, tmp_path):
    code, written, _ = paint(*sketches, output="out")
    assert (code, written) == (0, [str(tmp_path / "out" / path.name) for path in sketches])
    assert [pixels(path).shape for path in written] == [(30, 40, 3), (31, 40, 3), (32, 40, 3)]


def test_a_folder_is_painted_in_the_order_of_its_names_without_what_is_below(sketches, paint, tmp_path):
    folder = sketches[0].parent
    save(folder / "B.JPG", drawing(8, 9))
    save(folder / "below" / "deep.png", drawing(8, 8))
    save(folder / ".hidden.png", drawing(8, 8))
    extra = save(tmp_path / "extra.png", drawing(8, 8))
    code, written, _ = paint(extra, folder, output=folder / "out")
    assert (code, [Path(path).name for path in written]) == (
        0,
        ["extra.png", "B.png", "one.png", "three.png", "two.png"],
    )
    assert tree(folder / "out") == ["B.png", "extra.png", "one.png", "three.png", "two.png"]


def test_what_is_passed_over_is_told(sketches, tmp_path, caplog):
    folder = sketches[0].parent
    plan([folder], None, tmp_path / "out")
    assert not caplog.messages
    (folder / "notes.txt").write_text("no picture")
    assert len(plan([folder], None, tmp_path / "out")) == 3
    assert [message.startswith(f"{folder}: 1 file") for message in caplog.messages] == [True]


def test_hints_of_a_folder_go_by_name(painter, sketches, paint, tmp_path, caplog):
    save(tmp_path / "hints" / "two.webp", hinted(31, 40), lossless=True, exact=True)
    save(tmp_path / "hints" / "other.png", hinted(5, 5))
    code, _, _ = paint(*sketches, "--hints", tmp_path / "hints", output="out")
    assert code == 0
    expected = painter.paint(drawing(31, 40, 1), hinted(31, 40))
    assert (pixels(tmp_path / "out" / "two.png") == expected).all()
    assert (pixels(tmp_path / "out" / "one.png") == painter.paint(drawing(30, 40, 0))).all()
    without = [message for message in caplog.messages if "without hints" in message]
    assert [message.partition(":")[0] for message in without] == [str(sketches[0]), str(sketches[2])]


def test_hints_of_no_sketch_are_named(sketches, tmp_path, caplog):
    for name in ("one", "two", "three"):
        save(tmp_path / "hints" / f"{name}.png", hinted(30, 40))
    plan(sketches, tmp_path / "hints", tmp_path / "out")
    assert not caplog.messages
    save(tmp_path / "hints" / "tow.png", hinted(30, 40))
    plan(sketches, tmp_path / "hints", tmp_path / "out")
    assert caplog.messages == [f"{tmp_path / 'hints'}: 1 file(s) in it have the name of no sketch: tow.png"]


@pytest.mark.parametrize("alpha", [0, 127, 128])
def test_hints_without_effect_are_named(painter, sketches, paint, tmp_path, caplog, alpha):
    hints = save(tmp_path / "faint.png", hinted(30, 40, alpha))
    assert paint(sketches[0], "--hints", hints, output="out.png")[0] == 0
    plain = painter.paint(drawing(30, 40, 0))
    assert (pixels(tmp_path / "out.png") == plain).all() == (alpha < 128)
    said = f"{hints}: holds no hints: no pixel is at least half opaque; {sketches[0]} is painted without"
    assert caplog.messages == ([said] if alpha < 128 else [])


def test_size_scales_sketch_and_hints(painter, sketches, paint, tmp_path):
    hints = save(tmp_path / "hints.png", hinted(30, 40))
    assert paint(sketches[0], "--hints", hints, "--size", 20, output="hinted.png")[0] == 0
    expected = painter.paint(read_sketch(sketches[0], 20), read_hints(hints, 20))
    assert expected.shape == (15, 20, 3)
    assert (pixels(tmp_path / "hinted.png") == expected).all()


def test_clean_and_tile_reach_the_painting(painter, tmp_path, paint, caplog):
    photo = save(tmp_path / "photo.png", drawing(90, 100) // 2 + 40)
    cleaned = clean(np.asarray(PIL.Image.open(photo)))
    assert paint(photo, "--clean", output="auto.png")[0] == 0
    assert "100x90" in caplog.text
    assert "--size 32" in caplog.text
    caplog.clear()
    for option, tiled in (("--tile", True), ("--no-tile", False)):
        assert paint(photo, "--clean", option, output=f"{option}.png")[0] == 0
        assert (pixels(tmp_path / f"{option}.png") == painter.paint(cleaned, None, tiled)).all()
    assert not caplog.messages
    assert (pixels(tmp_path / "auto.png") == pixels(tmp_path / "--tile.png")).all()


def test_a_dry_run_paints_nothing(sketches, paint, tmp_path):
    code, said, _ = paint(*sketches, "--dry-run", output="out")
    assert code == 0
    assert said[-1] == f"# paints 3 sketch(es) into {tmp_path / 'out'} with step 5"
    assert not (tmp_path / "out").exists()


# What is refused


def test_a_broken_sketch_is_named_and_the_others_are_painted(sketches, paint, tmp_path):
    sketches[1].write_bytes(b"no picture")
    code, written, said = paint(sketches[0].parent, output="out")
    assert code == 1
    assert [Path(path).name for path in written] == ["one.png", "three.png"]
    assert said == [f"not painted: {sketches[1]}: not an image of a known format"]
    assert tree(tmp_path / "out") == ["one.png", "three.png"]


def test_hints_that_fit_one_sketch_paint_that_one(sketches, paint, tmp_path):
    hints = save(tmp_path / "hints.png", hinted(31, 40))
    code, written, said = paint(*sketches, "--hints", hints, output="out")
    assert code == 1
    assert written == [str(tmp_path / "out" / "two.png")]
    assert [line.split(": ")[1] for line in said] == [str(sketches[0]), str(sketches[2])]
    assert "40x31" in said[0]
    assert "40x30" in said[0]


SHORT_OF_MEMORY = """
import resource, sys
from painting import command

paint = ["paint", "--run", *sys.argv[4:], "--size", "32", "-o", sys.argv[3]]
command([*paint, sys.argv[1]])  # has loaded all there is to load
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (150 << 20),) * 2)
sys.exit(command([*paint, sys.argv[2]]))
"""


@pytest.mark.parametrize(("edge", "options"), [(8000, []), (4000, ["--clean"])])
def test_a_sketch_too_large_for_the_memory_is_named_and_the_others_are_painted(run, sketches, tmp_path, edge, options):
    large = save(tmp_path / "in" / "large.png", np.full((edge, edge), 255, np.uint8))
    arguments = [sketches[0], sketches[0].parent, tmp_path / "out", run, *options]
    done = subprocess.run(
        [sys.executable, "-c", SHORT_OF_MEMORY, *map(str, arguments)], cwd=Path(__file__).parent,
        capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    said = [f"not painted: {large}: too little memory to read and paint it; make it smaller"]
    assert (done.returncode, done.stderr.splitlines()) == (1, said)
    assert tree(tmp_path / "out") == ["one.png", "three.png", "two.png"]


def bad_inputs(folder):
    """Name, arguments, output, and what the line must say."""
    one = save(folder / "in" / "one.png", drawing(30, 40))
    two = save(folder / "in" / "two.png", drawing(30, 40))
    twin = save(folder / "other" / "one.jpg", drawing(30, 40))
    text = folder / "text.png"
    text.write_bytes(b"no picture")
    cut = folder / "cut.png"
    cut.write_bytes(one.read_bytes()[:40])
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    (folder / "taken" / "two.png").mkdir(parents=True)
    turned = save(folder / "turned.png", hinted(40, 30))
    strange = save(folder / "strange" / "else.png", hinted(30, 40))
    hints = save(folder / "good" / "one.png", hinted(30, 40))
    links = folder / "links"
    links.mkdir()
    (links / "one.png").symlink_to(hints)
    double = save(folder / "double" / "one.png", hinted(30, 40)).parent
    save(double / "one.webp", hinted(30, 40))
    return [
        ("no picture", [text], "out.png", [str(text), "not an image"]),
        ("half a picture", [cut], "out.png", [str(cut), "not an image"]),
        ("no file", [one, folder / "none.png"], "out", ["none.png", "no such file"]),
        ("an empty folder", [folder / "empty"], "out", [str(folder / "empty"), "no pictures"]),
        ("two of one name", [one, twin], "out", [str(twin), str(one), "rename"]),
        ("one file twice", [one, folder / "in"], "out", [str(one), "rename"]),
        ("hints of another size", [one, "--hints", turned], "out.png", [str(one), "30x40", "40x30"]),
        ("hints that are none", [one, two, "--hints", text], "out", [str(text), "not an image"]),
        ("no hints at all", [one, "--hints", folder / "none"], "out", ["none", "cannot be read"]),
        ("hints of others", [one, "--hints", strange.parent], "out", [str(strange.parent), "one.png"]),
        ("two hints for one", [one, "--hints", double], "out", ["one.png", "one.webp"]),
        ("several into a file", [one, two], "out.png", ["--output", "folder"]),
        ("a folder into a file", [folder / "in"], "out.png", ["--output", "folder"]),
        ("another format", [one], "out.jpg", ["--output", ".png"]),
        ("into a file that is no folder", [one, two], "file", ["--output", "is a file"]),
        ("another kind of file", [one], "painted.heic", ["--output", ".png"]),
        ("under a file", [one], "file/x.png", ["--output", "file/x.png", "Not a directory"]),
        ("a folder under a file", [one, two], "file/sub", ["--output", "file/sub", "Not a directory"]),
        ("where nothing can be made", [one], "/proc/none/x.png", ["--output", "/proc"]),
        ("over a folder", [one, two], "taken", ["--output", "taken/two.png", "not a folder"]),
        ("over the sketch", [one], one, ["--output", "another place"]),
        ("among the sketches", [folder / "other"], folder / "other", ["--output", "another place"]),
        ("over the hints", [one, "--hints", hints], hints, ["--output", "hints", "another place"]),
        ("among the hints", [one, "--hints", hints.parent], "good", ["--output", "hints", "another place"]),
        ("over a link's hints", [one, two, "--hints", links], "good", ["--output", "hints", "another place"]),
        ("no step", [one, "--step", "last"], "out.png", ["--step", "'last'", "best or latest"]),
        ("a step of many digits", [one, "--step", "9" * 5000], "out.png", ["--step", "'999999999999999999' is no"]),
        ("a step that was not saved", [one, "--step", "7"], "out.png", ["step 7", "[5]"]),
        ("the best of no scores", [one, "--step", "best"], "out.png", ["score", "latest"]),
        ("too small a size", [one, "--size", "3"], "out.png", ["--size", "16"]),
    ]  # fmt: skip


def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(paint, tmp_path):
    cases = bad_inputs(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)}
    for name, arguments, output, words in cases:
        code, written, said = paint(*arguments, output=output)
        assert (name, code, written, len(said)) == (name, 2, [], 1)
        assert [word for word in words if word not in said[0]] == [], (name, said)
    assert {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)} == before


@pytest.mark.parametrize("output", ["s3://bucket/painted.png", "s3://bucket/painted", "file:///x.png", "-"])
def test_an_output_that_is_no_path_is_refused(run, sketches, tmp_path, monkeypatch, capfd, output):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert command(["paint", "--run", run, sketches[0], "-o", output]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "--output" in line
    assert f"{output}: must be a path" in line
    assert tree(tmp_path) == before


def test_a_place_that_looks_like_a_uri_with_a_secret_is_a_path(sketches, paint, tmp_path):
    target = tmp_path / "out?token=1" / "x.png"
    assert paint(sketches[0], output=target) == (0, [str(target)], [])
    assert tree(target.parent) == ["x.png"]


def test_a_full_disk_is_one_line(run, small_disk, tmp_path, capfd):
    sketch = save(tmp_path / "one.png", drawing(32, 32))
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", 0) as file:
        while file.write(bytes(4096)):
            pass
    assert command(["paint", "--run", run, sketch, "-o", small_disk / "x.png"]) == 1
    line = f"autopainter: {small_disk}/x.png: cannot be written: No space left on device\n"
    assert capfd.readouterr().err == line
    assert tree(small_disk) == ["filler"]


def test_sketches_are_looked_at_before_the_run_is(tmp_path):
    jobs = plan([save(tmp_path / "a.jpg", drawing(9, 9))], None, tmp_path / "b.png")
    assert jobs == [Job(tmp_path / "a.jpg", None, tmp_path / "b.png")]
    code = command(["paint", "--run", "s3://nowhere/run", tmp_path / "none.png", "-o", tmp_path / "b.png"])
    assert code == 2


def test_a_png_is_written_as_it_is(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_png(tmp_path / "a.png", image)
    assert (pixels(tmp_path / "a.png") == image).all()
    assert PIL.Image.open(io.BytesIO((tmp_path / "a.png").read_bytes())).format == "PNG"
