"""Where pairs come from: a source lists its items and reads each of them as a colour picture and its drawing.

Sources are small frozen dataclasses, so they travel to other processes and machines. ``read`` is a pure function of
the source and the item.
"""

import hashlib
import io
import re
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, cast, get_args

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
from numpy.typing import NDArray

from autopainter import storage
from autopainter.data.sketch import AUTHORS, XDoG, xdog
from autopainter.errors import StorageError, UserError

Fit = Literal["crop", "resize", "pad"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_PIXELS = 1 << 26
"""Largest picture that is decoded (8192 x 8192), so that a small file cannot fill the memory."""


class BrokenInput(UserError):
    """An input that cannot be read as a picture; the message is the reason, without the name."""


class NoDrawing(UserError):
    """A sound input that makes no useful pair and is left out by design; the message is the reason."""


@dataclass(frozen=True)
class Item:
    """One future sample.

    Attributes:
        key: name in the data set, unique in its source: letters, digits, ``_``, ``-`` and ``/``.
        group: items of one group are variants of one drawing and stay on one side of the split.
        location: where it is inside its source.
        bytes: size of the input, by which a replaced file is noticed.
    """

    key: str
    group: str
    location: str
    bytes: int


@dataclass(frozen=True, eq=False)
class Pair:
    """A picture, uint8 [S, S, 3] RGB, and its drawing, uint8 [S, S] with 0 for lines and 255 for paper."""

    color: NDArray[np.uint8]
    sketch: NDArray[np.uint8]


class Source(Protocol):
    """What can be packed."""

    def info(self) -> dict[str, Any]:
        """What the source is and how pairs are made from it, as JSON values: all that decides their pixels."""

    def items(self) -> list[Item]:
        """All items, sorted by key; ``UserError`` if there are none."""

    def read(self, item: Item) -> Pair:
        """One pair; ``BrokenInput`` or ``NoDrawing`` if there is none, ``StorageError`` if it could not be fetched."""


def check_size(size: int) -> None:
    """Check the edge of the pictures in pixels; ``UserError`` if it is out of range."""
    if not 16 <= size <= 4096:
        raise UserError(f"size: must be 16 to 4096 pixels, got {size}")


@dataclass(frozen=True)
class ColorImages:
    """Colour pictures in a folder or under an s3:// prefix, drawn by XDoG.

    Attributes:
        uri: folder or s3:// prefix; png, jpg, jpeg, webp and bmp files at any depth, hidden ones excepted.
        size: edge of the squares in pixels.
        fit: how a picture becomes square: ``crop`` its centre, ``resize`` it (distorts), or ``pad`` it with white.
        xdog: parameters of the drawing, which is made from the picture in its final size.
    """

    uri: str
    size: int
    fit: Fit = "crop"
    xdog: XDoG = AUTHORS

    def __post_init__(self) -> None:
        check_size(self.size)
        if self.fit not in get_args(Fit):
            raise UserError(f"fit: must be one of {', '.join(get_args(Fit))}, got {self.fit!r}")

    def info(self) -> dict[str, Any]:
        return {"kind": "color-images"} | asdict(self) | {"uri": self.uri.rstrip("/")}

    def items(self) -> list[Item]:
        store = storage.open_store(self.uri)
        if isinstance(store, storage.LocalStore) and not store.root.is_dir():
            raise UserError(f"{self.uri}: no such folder")
        found = [entry for entry in store.list() if _is_picture(entry.key)]
        if not found:
            raise UserError(f"{self.uri}: no pictures in it; looked for {', '.join(SUFFIXES)}")
        keys = _keys([entry.key for entry in found])
        items = [Item(key, key, entry.key, entry.bytes) for key, entry in zip(keys, found, strict=True)]
        return sorted(items, key=lambda item: item.key)

    def read(self, item: Item) -> Pair:
        try:
            data = storage.open_store(self.uri).read(item.location)
        except StorageError:
            raise
        except OSError as error:
            raise BrokenInput(f"cannot be read: {error.strerror or 'not found'}") from error
        color = fit_to(decode(data), self.size, self.fit)
        return Pair(_square(color), _square(xdog(color, self.xdog)))


def _is_picture(path: str) -> bool:
    return path.lower().endswith(SUFFIXES) and not any(part.startswith(".") for part in path.split("/"))


def _keys(paths: list[str]) -> list[str]:
    """Sample keys of files: the path without suffix; where that is unfit or not unique, a hash makes it so."""
    stems = [path.rpartition(".")[0] for path in paths]
    # Case-blind: a reader may unpack a shard on a file system that is.
    counts = Counter(stem.lower() for stem in stems)
    keys = []
    for path, stem in zip(paths, stems, strict=True):
        plain = re.sub(r"[^A-Za-z0-9_/-]", "_", stem)[-64:].strip("/")
        if plain != stem or counts[stem.lower()] > 1:
            plain += "-" + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:12]
        keys.append(plain)
    return keys


def decode(data: bytes) -> NDArray[np.uint8]:
    """Decode an image file: turned as its EXIF orientation says, transparency laid on white, 8 bits a channel.

    Colour profiles are not applied. Of 16 bit samples the high byte is kept.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        BrokenInput: not an image, damaged, animated, or larger than ``MAX_PIXELS`` (which is known before decoding).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, larger bound on pixels, and harmless metadata
            with PIL.Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BrokenInput(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded")
                # A JPEG may hold further frames (MPO: previews, depth); its first one is the picture.
                if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
                    raise BrokenInput("animated")
                return _to_rgb(PIL.ImageOps.exif_transpose(image))
    except PIL.UnidentifiedImageError:
        raise BrokenInput("not a PNG, JPEG, WebP or BMP image") from None
    except PIL.Image.DecompressionBombError:
        raise BrokenInput(f"more than {MAX_PIXELS} pixels") from None
    except (BrokenInput, MemoryError):
        raise
    except Exception as error:  # whatever a decoder makes of damaged bytes
        raise BrokenInput(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from error


def check_pixels(data: bytes) -> None:
    """Check, from an image file's header alone, that it is one and has at most ``MAX_PIXELS`` pixels.

    Raises:
        BrokenInput: it is not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BrokenInput(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded")
    except (PIL.UnidentifiedImageError, OSError, SyntaxError):
        raise BrokenInput("not an image") from None
    except PIL.Image.DecompressionBombError:
        raise BrokenInput(f"more than {MAX_PIXELS} pixels") from None


def _to_rgb(image: PIL.Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16 bit grey
        high = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return cast(NDArray[np.uint8], cv2.cvtColor(high, cv2.COLOR_GRAY2RGB))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB"))


def fit_to(image: NDArray[np.uint8], size: int, fit: Fit) -> NDArray[np.uint8]:
    """Scale a picture to [size, size], or with ``pad`` its longer edge to ``size``; shrinking averages areas."""
    height, width = image.shape[:2]
    if fit == "crop":
        edge = min(height, width)
        top, left = (height - edge) // 2, (width - edge) // 2
        image = image[top : top + edge, left : left + edge]
        target = (size, size)
    elif fit == "resize":
        target = (size, size)
    else:
        longer = max(height, width)
        target = (max(1, round(width * size / longer)), max(1, round(height * size / longer)))
    filter = cv2.INTER_AREA if max(height, width) > size else cv2.INTER_CUBIC
    return cast(NDArray[np.uint8], cv2.resize(image, target, interpolation=filter))


def _square(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pad the shorter edge with white, on both sides."""
    height, width = image.shape[:2]
    size = max(height, width)
    top, left = (size - height) // 2, (size - width) // 2
    return cast(
        NDArray[np.uint8],
        cv2.copyMakeBorder(
            image, top, size - height - top, left, size - width - left, cv2.BORDER_CONSTANT, value=(255, 255, 255)
        ),
    )
