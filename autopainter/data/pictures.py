"""Image files to pixels, and pictures of any shape to squares."""

import io
import re
import warnings
from pathlib import Path
from typing import Literal, cast, get_args

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from autopainter.errors import StorageError, UserError, one_line
from autopainter.storage import LocalStore

Image = NDArray[np.uint8]

Fit = Literal["crop", "upper-lower", "resize", "pad"]
"""How a picture becomes square: ``crop`` its centre; ``upper-lower``: a portrait gives its upper and its lower square
(as the authors of Auto-Painter cut, notes in docs/data.md), anything else its centre; ``resize`` it (distorts); ``pad``
its shorter edge with white."""

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".avif", ".jp2", ".ppm", ".pgm",
    ".pbm", ".pnm", ".ras", ".sr", ".pam", ".pfm", ".hdr", ".pic",
)  # fmt: skip
"""Files that are taken for pictures: what OpenCV reads."""

MAX_PIXELS = 1 << 26
"""Largest picture that is decoded (8192 x 8192), so that a small file cannot fill the memory."""

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM", "SUN")
_PLAIN = {("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "1"), ("WEBP", "RGB")}
"""Formats and modes that OpenCV decodes to the same pixels as Pillow, and faster."""
_RADIANCE_SIZE = re.compile(rb"#\?.*?\n\n-Y (\d{1,9}) \+X (\d{1,9})\n", re.DOTALL)
"""The header of a Radiance picture, with its height and width."""

cv2.setNumThreads(1)  # pictures are decoded in parallel, none of them by itself
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)  # its warnings are lines beside ours


class BrokenInput(UserError):
    """An input that cannot be read as a picture; the message is the reason, without the name."""


def check_size(size: int) -> None:
    """Check the edge of the pictures in pixels; ``UserError`` if it is out of range."""
    if not 16 <= size <= 4096:
        raise UserError(f"size: must be 16 to 4096 pixels, got {size}")


def check_fit(fit: str) -> None:
    """Check the name of a fit; ``UserError`` if there is none of it."""
    if fit not in get_args(Fit):
        raise UserError(f"fit: must be one of {', '.join(get_args(Fit))}, got {fit!r}")


def decode(data: bytes) -> Image:
    """Decode an image file: turned as its EXIF orientation says, transparency laid on white, 8 bits a channel.

    Colour profiles are not applied. Of 16 bit samples the high byte is kept; floating-point ones (PFM, Radiance) are
    taken for 0 to 1 if none is above 1, else for 0 to 255.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        BrokenInput: not an image, damaged, animated, of several pages, or larger than ``MAX_PIXELS`` (which is known
            before decoding).
    """
    try:
        with _open(data) as image:
            # A JPEG may hold further frames (MPO: previews, depth); its first one is the picture.
            if image.format not in ("JPEG", "MPO") and getattr(image, "n_frames", 1) > 1:
                raise BrokenInput("has several pages" if image.format == "TIFF" else "animated")
            if image.format == "JPEG2000" and image.mode in ("RGB", "RGBA"):
                return _to_rgb(_jpeg2000(data) or image)
            if image.format == "TIFF" and image.mode == "I":  # of PGM it is the mode for 16 bits
                raise BrokenInput("has 32-bit or signed samples; store it with 8 or 16 bits a channel")
            return _to_rgb(PIL.ImageOps.exif_transpose(image))
    except PIL.UnidentifiedImageError:
        return _decode_rare(data)
    except (BrokenInput, MemoryError):
        raise
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise BrokenInput(f"damaged: {one_line(error)}") from error


def decode_stored(data: bytes, grey: bool) -> Image:
    """Decode an image file of a shard: as ``decode``, but by the fastest way that gives the same pixels.

    Args:
        data: an image file.
        grey: give luminance instead of colour.

    Returns:
        uint8 [H, W, 3] RGB, or [H, W] if ``grey``.

    Raises:
        BrokenInput: as ``decode``.
    """
    try:
        with _open(data) as image:
            plain = (image.format, image.mode) in _PLAIN and not image.has_transparency_data
            plain = plain and getattr(image, "n_frames", 1) == 1
            plain = plain and b"tiff:Orientation" not in image.info.get("xmp", b"")  # which OpenCV does not look at
    except PIL.UnidentifiedImageError:
        plain = False
    if plain:
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR_RGB)
        except cv2.error:
            pixels = None
        if pixels is None:
            raise BrokenInput("damaged")
        return cast(Image, pixels)
    pixels = decode(data)
    return cast(Image, cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)) if grey else pixels


def check_pixels(data: bytes) -> None:
    """Check, from an image file's header alone, that it is one and has at most ``MAX_PIXELS`` pixels.

    Raises:
        BrokenInput: it is not.
    """
    try:
        _open(data).close()
    except PIL.UnidentifiedImageError:
        raise BrokenInput("not an image") from None


def _open(data: bytes) -> PIL.Image.Image:
    """Read the header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, larger bound on pixels, and harmless metadata
            image = PIL.Image.open(io.BytesIO(data), formats=_FORMATS)
    except PIL.Image.DecompressionBombError:
        raise BrokenInput(f"more than {MAX_PIXELS} pixels") from None
    except (PIL.UnidentifiedImageError, MemoryError):
        raise
    except Exception as error:
        raise BrokenInput(f"damaged: {one_line(error)}") from error
    _check_count(image.width, image.height)
    return image


def _check_count(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenInput(f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded")


def _decode_rare(data: bytes) -> Image:
    """Formats that Pillow does not know; the bound on pixels is OPENCV_IO_MAX_IMAGE_PIXELS (see the package)."""
    if found := _RADIANCE_SIZE.match(data):  # OpenCV leaves a temporary file of one that is too large
        _check_count(width=int(found[2]), height=int(found[1]))
    try:
        image = (
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH) if data else None
        )
    except cv2.error as error:
        if "pixels" in str(error).lower():
            raise BrokenInput(f"more than {MAX_PIXELS} pixels") from None
        image = None
    if image is None:
        raise BrokenInput("not an image of a known format")
    if image.dtype == np.uint16:
        image = image >> 8
    elif image.dtype == np.float32:  # whose scale is not told
        image = np.clip(np.rint(image * (255 if image.max() <= 1 else 1)), 0, 255)
    return cast(Image, image.astype(np.uint8))


def _jpeg2000(data: bytes) -> PIL.Image.Image | None:
    """One of 16 bits a channel, by OpenCV: Pillow 13 rounds white up beyond 16 bits, to black. None for others."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.dtype != np.uint16 or image.ndim != 3:
        return None
    high = (image >> 8).astype(np.uint8)
    return PIL.Image.fromarray(cv2.cvtColor(high, cv2.COLOR_BGR2RGB if high.shape[2] == 3 else cv2.COLOR_BGRA2RGBA))


def _to_rgb(image: PIL.Image.Image) -> Image:
    if image.mode == "F":
        raise BrokenInput("has floating-point samples")
    if image.mode.startswith("I"):  # 16 bit grey
        high = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return cast(Image, cv2.cvtColor(high, cv2.COLOR_GRAY2RGB))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB"))


def resize(image: Image, width: int, height: int) -> Image:
    """The one resampling filter of packing, training, validation and painting: areas to shrink, cubic to enlarge."""
    if image.shape[:2] == (height, width):
        return image
    shrinks = image.shape[0] > height or image.shape[1] > width
    return cast(Image, cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC))


def scaled(image: Image, longer: int) -> tuple[int, int]:
    """Width and height of a picture whose longer edge becomes ``longer`` pixels."""
    height, width = image.shape[:2]
    scale = longer / max(height, width)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def squares(image: Image, size: int, fit: Fit) -> dict[str, Image]:
    """Cut a picture into squares.

    Args:
        image: uint8 [H, W] or [H, W, 3].
        size: edge in pixels.
        fit: how; with ``pad`` the longer edge becomes ``size`` and the padding is left to ``pad``.

    Returns:
        Squares by their name inside the picture: ``""`` for the only one, ``u`` and ``d`` for upper and lower ones.
    """
    height, width = image.shape[:2]
    if fit == "pad":
        longer = max(height, width)
        return {"": resize(image, max(1, round(width * size / longer)), max(1, round(height * size / longer)))}
    if fit == "resize":
        return {"": resize(image, size, size)}
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    tops = {"u": 0, "d": height - edge} if fit == "upper-lower" and height > width else {"": top}
    return {name: resize(image[top : top + edge, left : left + edge], size, size) for name, top in tops.items()}


def pad(image: Image) -> Image:
    """Pad the shorter edge with white, on both sides, to a square."""
    height, width = image.shape[:2]
    size = max(height, width)
    top, left = (size - height) // 2, (size - width) // 2
    return cast(
        Image,
        cv2.copyMakeBorder(
            image, top, size - height - top, left, size - width - left, cv2.BORDER_CONSTANT, value=(255, 255, 255)
        ),
    )


def write_png(path: Path, image: Image) -> None:
    """Write a uint8 [H, W, 3] RGB picture, whole or not at all.

    Raises:
        UserError: no file can be made there.
        StorageError: it could not be written, such as to a full disk.
    """
    _, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    try:
        LocalStore(str(path.parent)).write(path.name, data.tobytes())
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from None
