"""Colour pictures, drawn by XDoG."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from autopainter import seeding
from autopainter.data import pictures
from autopainter.data.pictures import Fit
from autopainter.data.sketch import AUTHORS, XDoG, jittered, xdog
from autopainter.data.sources.base import Item, Listing, Pair, list_items, read_picture
from autopainter.errors import UserError

Sketch = Literal["stored", "on_the_fly"]


@dataclass(frozen=True)
class ColorImages:
    """Colour pictures in a folder or under an s3:// prefix.

    Attributes:
        uri: folder or s3:// prefix.
        size: edge of the squares in pixels.
        fit: how a picture becomes square.
        xdog: parameters of the drawing, which is made from the picture in its final size.
        jitter: how far the parameters vary from sample to sample, as ``sketch.jittered`` takes it.
        sketch: ``stored`` beside the picture, or left to be drawn ``on_the_fly`` by the stream.
    """

    uri: str
    size: int
    fit: Fit = "crop"
    xdog: XDoG = AUTHORS
    jitter: float = 0.0
    sketch: Sketch = "stored"

    def __post_init__(self) -> None:
        pictures.check_size(self.size)
        pictures.check_fit(self.fit)
        if not 0 <= self.jitter <= 1:
            raise UserError(f"jitter: must be 0 to 1, got {self.jitter}")
        if self.sketch not in get_args(Sketch):
            raise UserError(f"sketch: must be one of {', '.join(get_args(Sketch))}, got {self.sketch!r}")

    def info(self) -> dict[str, Any]:
        return {"kind": "color-images"} | asdict(self) | {"uri": self.uri.rstrip("/")}

    def listing(self) -> Listing:
        return list_items(self.uri)

    def fetch(self, item: Item) -> list[bytes]:
        return [read_picture(self.uri, item.location)]

    def pairs(self, item: Item, files: Sequence[bytes]) -> list[Pair]:
        squares = pictures.squares(pictures.decode(files[0]), self.size, self.fit)
        return [self._pair(item.key, part, color) for part, color in squares.items()]

    def _pair(self, key: str, part: str, color: pictures.Image) -> Pair:
        if self.sketch == "on_the_fly":
            return Pair(pictures.pad(color), None, part)
        seed = int.from_bytes(hashlib.sha256(f"{key} {part}".encode()).digest()[:8], "big")
        params = jittered(self.xdog, self.jitter, seeding.generator(seed))
        return Pair(pictures.pad(color), pictures.pad(xdog(color, params)), part)
