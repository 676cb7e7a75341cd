"""Where pairs come from: one module a kind of source."""

from autopainter.data.pictures import BrokenInput
from autopainter.data.sides import Undecided
from autopainter.data.sources.base import Item, Listing, NoDrawing, Pair, Source
from autopainter.data.sources.images import ColorImages
from autopainter.data.sources.matched import MatchedFolders
from autopainter.data.sources.openmoji import OpenMoji
from autopainter.data.sources.sidebyside import SideBySide

__all__ = [
    "BrokenInput", "ColorImages", "Item", "Listing", "MatchedFolders", "NoDrawing", "OpenMoji", "Pair", "SideBySide",
    "Source", "Undecided",
]  # fmt: skip
