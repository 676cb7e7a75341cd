"""Pictures that hold a colour picture in one half and its drawing in the other."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from autopainter.data import pictures
from autopainter.data.pictures import BrokenInput, Fit
from autopainter.data.sides import drawing_side
from autopainter.data.sources.base import Item, Listing, Pair, cut, list_items, read_picture
from autopainter.errors import UserError

Side = Literal["left", "right", "auto"]


@dataclass(frozen=True)
class SideBySide:
    """Pictures of two halves, in a folder or under an s3:// prefix.

    Attributes:
        uri: folder or s3:// prefix.
        size: edge of the squares in pixels.
        side: half that holds the drawing; ``auto`` decides for each picture and refuses those that cannot be decided.
        fit: how a half becomes square.
    """

    uri: str
    size: int
    side: Side
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        pictures.check_size(self.size)
        pictures.check_fit(self.fit)
        if self.side not in get_args(Side):
            raise UserError(f"sketch_side: must be one of {', '.join(get_args(Side))}, got {self.side!r}")

    def info(self) -> dict[str, Any]:
        return {"kind": "side-by-side"} | asdict(self) | {"uri": self.uri.rstrip("/")}

    def listing(self) -> Listing:
        return list_items(self.uri)

    def fetch(self, item: Item) -> list[bytes]:
        return [read_picture(self.uri, item.location)]

    def pairs(self, item: Item, files: Sequence[bytes]) -> list[Pair]:
        image = pictures.decode(files[0])
        width = image.shape[1]
        if width % 2:
            raise BrokenInput(f"its width of {width} pixels has no two equal halves")
        side = drawing_side(image) if self.side == "auto" else self.side
        left, right = image[:, : width // 2], image[:, width // 2 :]
        color, drawing = (right, left) if side == "left" else (left, right)
        return cut(color, drawing, self.size, self.fit)
