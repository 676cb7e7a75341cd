"""Two folders, of pictures and of their drawings, matched by name."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autopainter.data import pictures
from autopainter.data.pictures import BrokenInput, Fit
from autopainter.data.sources.base import Item, Listing, Pair, cut, list_pictures, read_picture, sample_keys, stem
from autopainter.errors import UserError
from autopainter.storage import StoredObject

_SAME_SHAPE = 0.01
"""Largest difference of the aspect ratios of a picture and its drawing: less than rounding of small sizes gives."""


@dataclass(frozen=True)
class MatchedFolders:
    """Pictures and drawings in two folders or under two s3:// prefixes; a pair has one path but for the suffix.

    Attributes:
        colors: folder or s3:// prefix of the colour pictures.
        sketches: folder or s3:// prefix of the drawings.
        size: edge of the squares in pixels.
        fit: how both become square.
    """

    colors: str
    sketches: str
    size: int
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        pictures.check_size(self.size)
        pictures.check_fit(self.fit)

    def info(self) -> dict[str, Any]:
        places = {"colors": self.colors.rstrip("/"), "sketches": self.sketches.rstrip("/")}
        return {"kind": "matched-folders"} | asdict(self) | places

    def listing(self) -> Listing:
        (colors, ignored), (sketches, others) = list_pictures(self.colors), list_pictures(self.sketches)
        drawings: dict[str, list[StoredObject]] = defaultdict(list)
        for entry in sketches:
            drawings[stem(entry.key)].append(entry)
        names = Counter(stem(entry.key) for entry in colors)
        items, broken = [], {}
        for key, color in zip(sample_keys([entry.key for entry in colors]), colors, strict=True):
            match drawings.get(stem(color.key), []):
                case _ if names[stem(color.key)] > 1:
                    broken[color.key] = "is one of several pictures of that name"
                case [sketch]:
                    files = ((color.key, color.bytes), (sketch.key, sketch.bytes))
                    items.append(Item(key, key, color.key, files))
                case []:
                    broken[color.key] = f"has no drawing of that name in {self.sketches}"
                case several:
                    broken[color.key] = f"has several drawings: {', '.join(entry.key for entry in several)}"
        for left in (drawing for name, found in drawings.items() if name not in names for drawing in found):
            broken[f"{self.sketches.rstrip('/')}/{left.key}"] = "is the drawing of no picture"
        if not items:
            raise UserError(f"{self.colors} and {self.sketches}: no two pictures have the same name")
        return Listing(
            sorted(items, key=lambda item: item.key), broken, dict(sorted((Counter(ignored) + Counter(others)).items()))
        )

    def fetch(self, item: Item) -> list[bytes]:
        (color, _), (sketch, _) = item.files
        return [read_picture(self.colors, color), read_picture(self.sketches, sketch)]

    def pairs(self, item: Item, files: Sequence[bytes]) -> list[Pair]:
        color, drawing = map(pictures.decode, files)
        (height, width), (rows, columns) = color.shape[:2], drawing.shape[:2]
        if abs(width * rows - columns * height) > _SAME_SHAPE * width * rows:
            raise BrokenInput(f"has {width} x {height} pixels and its drawing {columns} x {rows}: not of one shape")
        if (height, width) != (rows, columns):  # cut where the picture is cut
            drawing = pictures.resize(drawing, width, height)
        return cut(color, drawing, self.size, self.fit)
