"""Colour hints: a few blocks and strokes of the target's colours, as a user would lay them down.

Blocks follow the paper authors' procedure (``gen_sketch/color.py``: the colour image is blurred; a block starts at a
random pixel that is not white and grows along the diagonal while the colour stays the same); strokes follow a straight
line through one colour. Both begin between the lines of the sketch, where a user would put them. A separate mask tells
a hint from its absence, so white can be a hint too.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from autopainter.config import Hints

Image = NDArray[np.uint8]

_REFERENCE_SIZE = 512  # the authors' sizes in pixels are for images of this edge
_BLUR_SIGMA = 5.0
_BLOCK_PIXELS = 24
_STROKE_PIXELS = 120
_STROKE_WIDTH = 16
_SAME_COLOR = 30  # largest change of R + G + B inside one hint
_WHITE = 245  # a target pixel with all channels above this needs no hint
_PAPER = 230  # a sketch pixel above this is no line


def draw(color: Image, sketch: Image, config: Hints, random: np.random.Generator) -> Image:
    """Draw random hints for one image.

    Args:
        color: uint8 [S, S, 3] RGB, the target.
        sketch: uint8 [S, S], its lines dark on white.
        config: shares and numbers of hints.
        random: generator of this sample.

    Returns:
        uint8 [S, S, 4]: RGB of the hints, and a mask that is 1 where there is a hint and 0 elsewhere.
    """
    size = color.shape[0]
    hints = np.zeros((size, size, 4), np.uint8)
    if random.random() < config.unhinted:
        return hints
    scale = size / _REFERENCE_SIZE
    blurred = cv2.GaussianBlur(color, (0, 0), max(_BLUR_SIGMA * scale, 0.3))
    colored = np.argwhere((color.min(axis=2) < _WHITE) & (sketch > _PAPER))
    if len(colored) == 0:
        return hints
    sums = blurred.astype(np.int32).sum(axis=2)
    for _ in range(random.integers(config.max_blocks + 1)):
        y, x = colored[random.integers(len(colored))]
        _block(hints, blurred, sums, int(y), int(x), limit=max(round(_BLOCK_PIXELS * scale), 3))
    for _ in range(random.integers(config.max_strokes + 1)):
        y, x = colored[random.integers(len(colored))]
        _stroke(hints, blurred, sums, int(y), int(x), random.uniform(0, 2 * np.pi), random.uniform(0.3, 1), scale)
    return hints


def _block(hints: Image, blurred: Image, sums: NDArray[np.int32], y: int, x: int, limit: int) -> None:
    edge = min(limit, sums.shape[0] - max(y, x))
    same = np.abs(sums[range(y, y + edge), range(x, x + edge)] - sums[y, x]) < _SAME_COLOR
    edge = edge if same.all() else int(same.argmin())
    if 2 * edge >= limit:
        hints[y : y + edge, x : x + edge, :3] = blurred[y : y + edge, x : x + edge]
        hints[y : y + edge, x : x + edge, 3] = 1


def _stroke(
    hints: Image, blurred: Image, sums: NDArray[np.int32], y: int, x: int, angle: float, share: float, scale: float
) -> None:
    length = max(int(_STROKE_PIXELS * scale * share), 3)
    ys = (y + np.sin(angle) * np.arange(length)).astype(int)
    xs = (x + np.cos(angle) * np.arange(length)).astype(int)
    inside = (ys >= 0) & (xs >= 0) & (ys < sums.shape[0]) & (xs < sums.shape[0])
    length = length if inside.all() else int(inside.argmin())
    same = np.abs(sums[ys[:length], xs[:length]] - sums[y, x]) < _SAME_COLOR
    end = (length if same.all() else int(same.argmin())) - 1
    mask = np.zeros(sums.shape, np.uint8)
    cv2.line(mask, (x, y), (int(xs[end]), int(ys[end])), 1, max(round(_STROKE_WIDTH * scale), 1))
    hints[mask == 1] = (*blurred[y, x], 1)
