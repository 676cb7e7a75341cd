"""Which half of a side-by-side picture is the line drawing: told for each picture by itself, or refused.

Colour decides, and it must be where the drawing leaves bare paper. Two more measures can only refuse: the other half
must be dark lines on light paper, and its lines must lie on edges of the picture. Without colour nothing is decided: a
grey picture beside its line drawing may as well be a line drawing beside a shaded one.

Colour is the distance in RGB from the line through a half's paper and ink, after thin dark strokes are closed. It is 0
for a drawing in one ink, whatever the colours of ink and paper, which the usual measure of colourfulness (Hasler and
Suesstrunk 2003) takes for colour.

Thresholds were set on one half of OpenMoji (groups with an even CRC) with the families of scripts/measure_sides.py,
which reports on the other half; the numbers beside them are from the first.
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from autopainter.errors import UserError

EDGE = 256
"""Width and height in pixels that every half is scaled to, whatever its shape, before it is measured."""
STROKE = 15
"""Strokes up to this width, and the gaps between dense ones, count as drawn: OpenMoji's are 7 of 256 pixels wide."""
BLANK = 40
"""Grey levels between the lightest and the darkest pixel of a half that is not blank."""
COLOUR_DISTANCE = 30.0
"""Grey levels; scans of drawings in black on tinted paper have no area above 16."""
PICTURE_COLOURED = 0.04
"""Least share of coloured area in a picture; 3 to 4 % of the OpenMoji pictures that have any colour are below it. With
0.02 only 2 % are, but a stamp on a drawing beside a picture without colour is then taken for the picture."""
COLOURED_MARGIN = 10.0
"""Least ratio of the coloured areas. Blue ink under JPEG makes 0.02 of a drawing coloured, rarely 0.05."""
INK_CONTRAST = 60.0
"""RGB distance between paper and ink; the faintest pencil has 126, OpenMoji 442."""
TONE = 0.15
"""Between paper (0) and ink (1); uneven light on a scan stays below it."""
DRAWING_TONED = 0.1
"""Largest share of tones in a drawing: 98 % of the scans are below it, 90 % of grey copies of pictures above it."""
DRAWING_PAPER = 0.5
"""Least share of bare paper in a drawing; pencil has 0.65 and more, the other kinds 0.8."""
AGREEMENT = 0.4
"""Least agreement of the edges. Pairs have 0.67 and more, 99 % of the photographs, which are noisy, 0.46; strangers 0.4
at the 95th percentile, and 0.1 if they are photographs. Two faces, say, are alike enough to pass."""
WINDOW = 13
"""Pixels, of EDGE / 2, over which edges are compared: local, so that faint edges count as much as strong ones."""

Side = Literal["left", "right"]


class Undecided(UserError):
    """Which half is the drawing cannot be told; the message is the reason, without the name."""


@dataclass(frozen=True, eq=False)
class _Half:
    """Measures of one half; all arrays are [EDGE / 2, EDGE / 2].

    Attributes:
        coloured, toned, bare: where it has colour, colour or tones between paper and ink, and nothing but paper.
        contrast: RGB distance of paper and ink.
        edges: gradient magnitude, blurred.
    """

    coloured: NDArray[np.bool_]
    toned: NDArray[np.bool_]
    bare: NDArray[np.bool_]
    contrast: float
    edges: NDArray[np.float32]


def drawing_side(image: NDArray[np.uint8]) -> Side:
    """Find the drawing in a picture and its line drawing, side by side in either order.

    Args:
        image: uint8 [H, W, 3], RGB; W even.

    Returns:
        The half that is the drawing.

    Raises:
        Undecided: not sure, or no such pair.
    """
    middle = image.shape[1] // 2
    left, right = _measure(image[:, :middle], "left"), _measure(image[:, middle:], "right")
    side: Side = "left" if left.coloured.mean() < right.coloured.mean() else "right"
    drawing, picture = (left, right) if side == "left" else (right, left)
    if picture.coloured.mean() < PICTURE_COLOURED:
        raise Undecided("both halves are nearly grey, so that either may be the drawing")
    if picture.coloured.mean() < COLOURED_MARGIN * drawing.coloured.mean():
        raise Undecided("both halves are colourful")
    is_paper = drawing.bare.mean() >= DRAWING_PAPER and drawing.toned.mean() <= DRAWING_TONED
    if drawing.contrast < INK_CONTRAST or not is_paper:
        raise Undecided(f"the {side} half has no colour, but is not dark lines on light paper either")
    if (picture.coloured & drawing.bare).mean() < PICTURE_COLOURED:
        raise Undecided("the colour of one half is only where the other has ink: both may be drawings")
    if _agreement(drawing.edges, picture.edges) < AGREEMENT:
        raise Undecided("the halves do not show the same thing")
    return side


def _measure(pixels: NDArray[np.uint8], side: Side) -> _Half:
    """Measure one half, uint8 [H, W, 3] RGB; ``Undecided`` if it is blank."""
    small = cv2.resize(pixels, (EDGE, EDGE), interpolation=cv2.INTER_AREA)
    grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    darkest, lightest, _, _ = cv2.minMaxLoc(grey)
    if lightest - darkest < BLANK:
        raise Undecided(f"the {side} half is blank")
    colours = small[::2, ::2].reshape(-1, 3)
    colours = colours[np.argsort(grey[::2, ::2], axis=None, kind="stable")].astype(np.float32)
    paper = np.median(colours[-len(colours) // 4 :], axis=0)
    to_ink = np.median(colours[: len(colours) // 200], axis=0) - paper
    contrast = float(np.linalg.norm(to_ink))
    closed = cv2.morphologyEx(small, cv2.MORPH_CLOSE, np.ones((STROKE, STROKE), np.uint8))[::2, ::2]
    offset = closed.astype(np.float32) - paper
    # Without a direction to ink, as in white on black, greys are no colours.
    along = offset @ (to_ink / contrast if contrast >= INK_CONTRAST else np.full(3, -(3**-0.5), np.float32))
    coloured = np.square(offset) @ np.ones(3, np.float32) - np.square(along) > COLOUR_DISTANCE**2
    toned = coloured | (along > TONE * contrast) & (along < (1 - TONE) * contrast)
    bare = ~coloured & (along <= TONE * contrast)
    return _Half(coloured, toned, bare, contrast, _edges(grey))


def _edges(grey: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Gradient magnitude of uint8 [H, W], blurred so that lines may be some pixels out of place; at half the size."""
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), 1.0)
    gradient = cv2.magnitude(cv2.Sobel(smooth, cv2.CV_32F, 1, 0), cv2.Sobel(smooth, cv2.CV_32F, 0, 1))
    edges: NDArray[np.float32] = cv2.GaussianBlur(np.minimum(gradient, 160), (0, 0), 2.0)[::2, ::2]
    return edges


def _agreement(drawing: NDArray[np.float32], picture: NDArray[np.float32]) -> float:
    """Correlation of the edges in windows, from -1 to 1, averaged where the drawing has lines."""

    def mean(values: NDArray[np.float32]) -> NDArray[np.float32]:
        blurred: NDArray[np.float32] = cv2.blur(values, (WINDOW, WINDOW))
        return blurred

    drawn, seen = mean(drawing), mean(picture)
    drawn_variance = np.maximum(mean(drawing * drawing) - drawn * drawn, 0) + 1
    seen_variance = np.maximum(mean(picture * picture) - seen * seen, 0) + 1
    weight = np.sqrt(drawn_variance)
    correlation = (mean(drawing * picture) - drawn * seen) / (weight * np.sqrt(seen_variance))
    return float(np.average(correlation, weights=weight))
