"""Image files to pixels: every format, what is refused, the bound on pixels, and how pictures become squares.

Files are made by Pillow and OpenCV or, where neither writes the kind, byte by byte. Run: pytest tests/test_pictures.py
"""

import io
import json
import os
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import PIL.Image
import pytest

from autopainter.data import pictures
from autopainter.data.pictures import BrokenInput, check_pixels, decode, decode_stored, pad, resize, squares


def draw(height=40, width=60):
    """A cartoon-like picture without any symmetry, uint8 [H, W, 3]."""
    color = np.full((height, width, 3), 255, np.uint8)
    color[:, : width // 5] = (10, 200, 60)
    color[: height // 4] = (240, 220, 30)
    cv2.circle(color, (width // 2, height // 2), height // 3, (200, 30, 90), -1)
    cv2.circle(color, (width // 2, height // 2), height // 3, (0, 0, 0), 2)
    return color


COLOR = draw()
GREY = cv2.cvtColor(COLOR, cv2.COLOR_RGB2GRAY)
DEEP, DEEP_GREY = COLOR.astype(np.uint16) * 256 + 77, GREY.astype(np.uint16) * 256 + 77
FEW = np.where(GREY > 128, 255, 0).astype(np.uint8)  # black and white
CLEAR = np.dstack([COLOR, np.where(GREY > 100, 255, 51)]).astype(np.uint8)  # 51: a fifth
ON_WHITE = np.rint(COLOR * (CLEAR[..., 3:] / 255) + 255 * (1 - CLEAR[..., 3:] / 255)).astype(np.uint8)
WASHED = np.rint(GREY * (CLEAR[..., 3] / 255) + 255 - CLEAR[..., 3]).astype(np.uint8)  # GREY with that alpha
BEST = {"quality": 100, "subsampling": 0}


def pil(kind, image=COLOR, mode=None, **options):
    """An image file by Pillow."""
    picture = PIL.Image.fromarray(image)
    buffer = io.BytesIO()
    (picture.convert(mode) if mode else picture).save(buffer, kind, **options)
    return buffer.getvalue()


def by_cv(suffix, image):
    """An image file by OpenCV."""
    order = {2: [], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[image.shape[2] if image.ndim == 3 else 2]
    return cv2.imencode(suffix, image[..., order] if order else image)[1].tobytes()


def pam(kind, image):
    depth = image.shape[2] if image.ndim == 3 else 1
    most = np.iinfo(image.dtype).max
    height, width = image.shape[:2]
    header = f"P7\nWIDTH {width}\nHEIGHT {height}\nDEPTH {depth}\nMAXVAL {most}\nTUPLTYPE {kind}\nENDHDR\n"
    return header.encode() + image.astype(image.dtype.newbyteorder(">")).tobytes()


def transparent_palette(kind):
    """Colour 0 is transparent and is laid on white; the rest is grey."""
    image = PIL.Image.fromarray(np.where(FEW > 0, 0, 1).astype(np.uint8), "P")
    image.putpalette([9, 9, 9, 77, 77, 77])
    buffer = io.BytesIO()
    image.save(buffer, kind, transparency=0)
    return buffer.getvalue()


ON_PAPER = np.where(FEW > 0, 255, 77).astype(np.uint8)

# name: (file, pixels as RGB or grey, largest error of a channel)
FORMATS = {
    "png": (pil("PNG"), COLOR, 0),
    "png of 16 bits": (by_cv(".png", DEEP), COLOR, 0),
    "png, grey": (pil("PNG", GREY), GREY, 0),
    "png, grey of 16 bits": (by_cv(".png", DEEP_GREY), GREY, 0),
    "png of 1 bit": (pil("PNG", FEW, "1"), FEW, 0),
    "png, palette": (pil("PNG", GREY, "P"), GREY, 0),
    "png, palette with transparency": (transparent_palette("PNG"), ON_PAPER, 0),
    "png with alpha": (pil("PNG", CLEAR), ON_WHITE, 1),
    "png, grey with alpha": (pil("PNG", np.dstack([GREY, CLEAR[..., 3]])), WASHED, 1),
    "jpeg": (pil("JPEG", **BEST), COLOR, 6),
    "jpeg, grey": (pil("JPEG", GREY, quality=100), GREY, 3),
    "jpeg, progressive": (pil("JPEG", progressive=True, **BEST), COLOR, 6),
    "jpeg, cmyk": (pil("JPEG", mode="CMYK", quality=100), COLOR, 6),
    "jpeg with further frames": (
        pil("MPO", save_all=True, append_images=[PIL.Image.fromarray(255 - COLOR)], **BEST), COLOR, 6),
    "webp": (pil("WEBP", lossless=True), COLOR, 0),
    "webp with alpha": (pil("WEBP", CLEAR, lossless=True, exact=True), ON_WHITE, 1),
    "bmp": (pil("BMP"), COLOR, 0),
    "bmp of 1 bit": (pil("BMP", FEW, "1"), FEW, 0),
    "dib": (pil("DIB"), COLOR, 0),
    "tiff": (pil("TIFF"), COLOR, 0),
    "tiff, lzw": (pil("TIFF", compression="tiff_lzw"), COLOR, 0),
    "tiff of 16 bits": (by_cv(".tiff", DEEP), COLOR, 0),
    "tiff, grey of 16 bits": (by_cv(".tiff", DEEP_GREY), GREY, 0),
    "tiff, big endian": (pil("TIFF", DEEP_GREY.astype(">u2"), big_tiff=False), GREY, 0),
    "tiff with alpha": (pil("TIFF", CLEAR), ON_WHITE, 1),
    "tiff, palette": (pil("TIFF", GREY, "P"), GREY, 0),
    "gif": (pil("GIF", GREY), GREY, 0),
    "gif with transparency": (transparent_palette("GIF"), ON_PAPER, 0),
    "avif": (pil("AVIF", quality=100, subsampling="4:4:4"), COLOR, 8),
    "avif with alpha": (pil("AVIF", CLEAR, quality=100, subsampling="4:4:4"), ON_WHITE, 10),
    "jpeg 2000": (pil("JPEG2000"), COLOR, 0),
    "jpeg 2000 of 16 bits": (by_cv(".jp2", DEEP), COLOR, 2),
    "jpeg 2000, white of 16 bits": (by_cv(".jp2", np.full((64, 64, 3), 65535, np.uint16)), np.full((64, 64), 255), 0),
    "jpeg 2000, clear of 16 bits": (by_cv(".jp2", np.dstack([DEEP, CLEAR[..., 3] * np.uint16(257)])), ON_WHITE, 3),
    "jpeg 2000, grey": (pil("JPEG2000", GREY), GREY, 0),
    "ppm": (pil("PPM"), COLOR, 0),
    "ppm of 16 bits": (by_cv(".ppm", DEEP), COLOR, 1),
    "ppm as text": (b"P3 2 1 255\n1 2 3 4 5 6\n", np.array([[[1, 2, 3], [4, 5, 6]]]), 0),
    "pgm": (by_cv(".pgm", GREY), GREY, 0),
    "pgm of 16 bits": (by_cv(".pgm", DEEP_GREY), GREY, 0),
    "pbm": (pil("PPM", FEW, "1"), FEW, 0),
    "sun": (by_cv(".sr", COLOR), COLOR, 0),
    "pam": (pam("RGB", COLOR), COLOR, 0),
    "pam, grey": (pam("GRAYSCALE", GREY), GREY, 0),
    "pam of 16 bits": (pam("RGB", DEEP), COLOR, 1),
    "pfm": (by_cv(".pfm", COLOR.astype(np.float32)), COLOR, 0),
    "pfm, 0 to 1": (by_cv(".pfm", COLOR.astype(np.float32) / 255), COLOR, 0),
    "hdr": (by_cv(".hdr", (COLOR / 255).astype(np.float32)), COLOR, 2),
}  # fmt: skip
RARE = ("pam", "pfm", "pfm, 0 to 1", "hdr")
"""Formats that Pillow does not know."""


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_pixels(name):
    data, expected, most = FORMATS[name]
    expected = expected if expected.ndim == 3 else np.dstack([expected] * 3)
    image = decode(data)
    assert (image.dtype, image.shape) == (np.uint8, expected.shape)
    assert np.abs(image.astype(int) - expected).max() <= most


@pytest.mark.parametrize("name", FORMATS)
def test_the_fast_way_gives_the_same_pixels(name):
    data, expected, _ = FORMATS[name]
    image = decode(data)
    assert (decode_stored(data, grey=False) == image).all()
    if expected.ndim == 2:  # what a drawing is
        assert np.abs(decode_stored(data, grey=True).astype(int) - image[..., 0]).max() <= 1


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_grey_drawing_that_is_stored_in_colours_is_its_luminance(depth):
    drawing = np.dstack([FEW] * 3)
    for data in (by_cv(".png", drawing.astype(depth) * (257 if depth == np.uint16 else 1)), pil("JPEG", drawing)):
        assert np.abs(decode_stored(data, grey=True).astype(int) - decode(data)[..., 0]).max() <= 2


TURNED = {
    1: COLOR,
    2: COLOR[:, ::-1],
    3: COLOR[::-1, ::-1],
    4: COLOR[::-1],
    5: COLOR.transpose(1, 0, 2),
    6: np.rot90(COLOR),
    7: COLOR[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(COLOR, -1),
}
"""What is in the file for each EXIF orientation of the same picture."""


@pytest.mark.parametrize(
    ("kind", "options", "most"),
    [
        ("PNG", {}, 0),
        ("JPEG", BEST, 6),
        ("WEBP", {"lossless": True}, 0),
        ("TIFF", {}, 0),
        ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 8),
        ("MPO", BEST, 6),
    ],
)
def test_pictures_are_turned_as_their_orientation_says(kind, options, most):
    for orientation, stored in TURNED.items():
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        data = pil(kind, np.ascontiguousarray(stored), exif=exif, **options)
        image = decode(data)
        assert image.shape == COLOR.shape, orientation
        assert np.abs(image.astype(int) - COLOR).max() <= most, orientation
        assert (decode_stored(data, grey=False) == image).all(), orientation
        assert decode_stored(data, grey=True).shape == COLOR.shape[:2], orientation


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG"])
def test_an_orientation_that_only_xmp_tells_turns_stored_pictures_too(kind):
    xmp = b'<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>'
    info = PIL.PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode())
    data = pil(kind, np.ascontiguousarray(TURNED[6]), **({"pnginfo": info} if kind == "PNG" else {"xmp": xmp}))
    image = decode(data)
    assert image.shape == COLOR.shape
    assert (decode_stored(data, grey=False) == image).all()
    assert decode_stored(data, grey=True).shape == COLOR.shape[:2]


def frames(kind):
    other = PIL.Image.fromarray(np.ascontiguousarray(COLOR[::-1]))
    return pil(kind, save_all=True, append_images=[other])


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def swollen_png():
    """Text that would fill the memory."""
    png = pil("PNG")
    return png[:33] + png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(8 << 20))) + png[33:]


BROKEN = {
    "empty": (b"", "not an image"),
    "text": (b"hello", "not an image"),
    "only a magic number": (b"GIF89a", "not an image|damaged"),
    "swollen": (swollen_png(), "damaged"),
    "32 bits": (pil("TIFF", GREY.astype(np.int32) * 257), "has 32-bit or signed samples"),
    "floating point": (pil("TIFF", GREY.astype(np.float32)), "floating-point"),
    **{f"animated {kind}": (frames(kind), "animated") for kind in ("GIF", "PNG", "WEBP", "AVIF")},
    "several pages": (frames("TIFF"), "several pages"),
    **{
        f"half of {kind}": (data[: len(data) // 2], "not an image|damaged" if kind == "AVIF" else "damaged")
        for kind, data in {
            kind: pil(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
        }.items()
    },
    **{
        f"half of {name}": (FORMATS[name][0][: len(FORMATS[name][0]) // 2], "not an image|damaged")
        for name in ("sun", "pam", "pfm", "hdr")
    },
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("way", ["packing", "colour", "grey"])
def test_what_is_no_picture_is_refused(name, way):
    data, reason = BROKEN[name]
    read = {"packing": decode, "colour": lambda data: decode_stored(data, grey=False),
            "grey": lambda data: decode_stored(data, grey=True)}[way]  # fmt: skip
    with pytest.raises(BrokenInput, match=reason) as error:
        read(data)
    assert "\n" not in str(error.value)


def read_in_every_way(data):
    """The reasons of refusals; any other error is the test's failure."""
    for read in (decode, lambda data: decode_stored(data, False), lambda data: decode_stored(data, True), check_pixels):
        try:
            read(data)
        except BrokenInput as error:
            yield str(error)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", FORMATS)
def test_wrong_bytes_make_another_picture_or_are_refused(name):
    random = np.random.default_rng(0)
    data = FORMATS[name][0]
    for _ in range(10):
        places = random.integers(0, min(len(data), 400), 3)
        damaged = patched(data, *((place, random.bytes(1)) for place in places))
        assert not any("\n" in reason for reason in read_in_every_way(damaged))


def test_an_edge_that_only_one_decoder_can_read_is_no_crash():
    assert set(read_in_every_way(pil("PNG", np.zeros((1, 2**20 + 1), np.uint8)))) <= {"damaged"}


def patched(data, *changes):
    """A file with bytes replaced at offsets."""
    made = bytearray(data)
    for offset, new in changes:
        made[offset : offset + len(new)] = new
    return bytes(made)


# The bound


def large(edge):
    """Headers of pictures of edge x edge pixels, which no pixels follow; of the kinds that can be so large."""
    little = pil("PNG", COLOR[:8, :8])
    both = struct.pack(">II", edge, edge)
    png = patched(little, (16, both), (29, struct.pack(">I", zlib.crc32(b"IHDR" + both + little[24:29]))))
    jpeg = pil("JPEG", COLOR[:8, :8])
    gif = pil("GIF", GREY[:8, :8])
    tiff = pil("TIFF", COLOR[:8, :8])
    entries = [struct.pack("<HHLL", tag, 4, 1, edge) for tag in (256, 257)]
    at = [tiff.index(struct.pack("<HH", tag, 4)) for tag in (256, 257)]
    jp2 = pil("JPEG2000", COLOR[:8, :8])
    size = jp2.index(b"\xff\x51")
    found = {
        "png": png,
        "jpeg": patched(jpeg, (jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", edge, edge))),
        "gif": patched(gif, (6, struct.pack("<HH", edge, edge))),
        "bmp": patched(pil("BMP", COLOR[:8, :8]), (18, struct.pack("<ii", edge, edge))),
        "tiff": patched(tiff, *zip(at, entries, strict=True)),
        "jp2": patched(jp2, (jp2.index(b"ihdr") + 4, both), (size + 6, both), (size + 22, both)),
        "ppm": f"P6 {edge} {edge} 255\n".encode(),
        "sun": patched(by_cv(".sr", COLOR[:8, :8]), (4, both)),
        "pam": f"P7\nWIDTH {edge}\nHEIGHT {edge}\nDEPTH 3\nMAXVAL 255\nTUPLTYPE RGB\nENDHDR\n".encode(),
        "pfm": f"PF\n{edge} {edge}\n-1.0\n".encode(),
        "hdr": f"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y {edge} +X {edge}\n".encode(),
    }
    if edge < 2**14:
        webp = pil("WEBP", COLOR[:8, :8], lossless=True)
        at_size = webp.index(b"VP8L") + 9
        bits = struct.unpack_from("<I", webp, at_size)[0] >> 28 << 28 | (edge - 1) << 14 | edge - 1
        found["webp"] = patched(webp, (at_size, struct.pack("<I", bits)))
        avif = pil("AVIF", COLOR[:8, :8])
        found["avif"] = patched(avif, (avif.index(b"ispe") + 8, both))
    return found


PROGRAM = """
import json, pathlib, sys
from autopainter.data.pictures import BrokenInput, decode, decode_stored

reasons = {}
for path in pathlib.Path(sys.argv[1]).iterdir():
    for way in (decode, lambda data: decode_stored(data, False), lambda data: decode_stored(data, True)):
        try:
            way(path.read_bytes())
        except BrokenInput as error:
            reasons.setdefault(path.name, []).append(str(error))
print(json.dumps(reasons))
"""


@pytest.mark.parametrize("edge", [8193, 60000])
def test_a_picture_of_too_many_pixels_is_known_by_its_header(edge, tmp_path):
    """In a process of its own, as OpenCV takes its bound from the environment when it is loaded."""
    files = large(edge)
    assert len(files) >= 11
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    left = tmp_path.with_suffix(".left")
    left.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True,
        env=os.environ | {"OPENCV_TEMP_PATH": str(left)},
    )  # fmt: skip
    assert list(left.iterdir()) == []
    reasons = json.loads(done.stdout)
    assert {name: [f"{reason} pixels" for reason in found] for name, found in reasons.items() if
            len(found) != 3 or not all("pixels" in reason for reason in found)} == {}  # fmt: skip
    assert reasons.keys() == files.keys()


def test_the_bound_is_on_pixels_and_not_on_edges():
    check_pixels(large(8192)["png"])
    with pytest.raises(BrokenInput, match="8193 x 8193 pixels; at most 67108864"):
        check_pixels(large(8193)["png"])
    wide = np.zeros((2, 9000), np.uint8)
    assert decode(pil("PNG", wide)).shape == (2, 9000, 3)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.split(",")[0].split()[0] not in RARE])
def test_the_header_alone_is_read(name):
    check_pixels(FORMATS[name][0])


@pytest.mark.parametrize("data", [b"", b"hello", swollen_png()], ids=["empty", "text", "swollen"])
def test_a_header_that_is_none_is_refused(data):
    with pytest.raises(BrokenInput, match=r"not an image|damaged"):
        check_pixels(data)


# Squares


def stripes(height, width):
    """Every row and column is told from its colour."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.dstack([rows, columns, np.full_like(rows, 7)])


@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((80, 40), {"u": (0, 0), "d": (40, 0)}),
        ((50, 40), {"u": (0, 0), "d": (10, 0)}),  # they overlap
        ((41, 40), {"u": (0, 0), "d": (1, 0)}),
        ((40, 80), {"": (0, 20)}),
        ((40, 45), {"": (0, 2)}),
        ((40, 40), {"": (0, 0)}),
    ],
)
def test_upper_and_lower_squares_of_a_portrait(shape, cuts):
    image = stripes(*shape)
    made = squares(image, 40, "upper-lower")
    assert list(made) == list(cuts)
    for name, (top, left) in cuts.items():
        assert (made[name] == image[top : top + 40, left : left + 40]).all()


@pytest.mark.parametrize(("shape", "top", "left"), [((80, 40), 20, 0), ((40, 81), 0, 20), ((40, 40), 0, 0)])
def test_the_centre_is_cut(shape, top, left):
    image = stripes(*shape)
    assert (squares(image, 40, "crop")[""] == image[top : top + 40, left : left + 40]).all()


def test_resized_and_padded():
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, :40] = (90, 20, 10)
    resized = squares(wide, 20, "resize")[""]
    assert resized.shape == (20, 20, 3)
    assert (resized[:, :10] == (90, 20, 10)).all()
    assert not resized[:, 10:].any()
    for image in (wide, wide[..., 0], wide.transpose(1, 0, 2)):
        fitted = squares(image, 20, "pad")[""]
        assert sorted(fitted.shape[:2]) == [10, 20]
        padded = pad(fitted)
        assert padded.shape == (20, 20, *image.shape[2:])
        middle = padded[5:15] if fitted.shape[0] == 10 else padded[:, 5:15]
        assert (middle == fitted).all()
        assert (padded == 255).sum() == padded.size - fitted.size
    assert squares(np.zeros((1, 900), np.uint8), 20, "pad")[""].shape == (1, 20)


@pytest.mark.parametrize("fit", ["crop", "upper-lower", "resize", "pad"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (33, 32), (90, 31)])
def test_any_shape_becomes_a_square(fit, shape):
    for image in squares(stripes(*shape), 16, fit).values():
        assert pad(image).shape == (16, 16, 3)


def test_pictures_shrink_by_areas():
    checks = np.indices((8, 8)).sum(0).astype(np.uint8) % 2 * 200
    assert (resize(checks, 4, 4) == 100).all()
    assert resize(checks, 8, 8) is checks


def test_sizes_and_fits_out_of_range_are_named():
    for size in (15, 4097):
        with pytest.raises(ValueError, match=rf"size: must be 16 to 4096 pixels, got {size}"):
            pictures.check_size(size)
    with pytest.raises(ValueError, match="fit: must be one of crop, upper-lower, resize, pad, got 'stretch'"):
        pictures.check_fit("stretch")
