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
from autopainter.data.pictures import Image

_REFERENCE_SIZE = 512  # the authors' sizes in pixels are for images of this edge
_BLUR_SIGMA = 5.0
_WIDE_SIGMA = 2.0
_BLOCK_PIXELS = 24
_STROKE_PIXELS = 120
_STROKE_WIDTH = 16
_SAME_COLOR = 30  # largest change of R + G + B inside one hint
_WHITE = 245  # a target pixel with all channels above this needs no hint
PAPER = 230
"""Sketch pixels above this are no line."""


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
    blurred = _blur(color, max(_BLUR_SIGMA * scale, 0.3))
    white = cv2.inRange(color, (_WHITE,) * 3, (255,) * 3)
    colored = np.flatnonzero(cv2.inRange(sketch, PAPER + 1, 255) > white)
    if len(colored) == 0:
        return hints
    for _ in range(random.integers(config.max_blocks + 1)):
        y, x = divmod(int(colored[random.integers(len(colored))]), size)
        _block(hints, blurred, y, x, limit=max(round(_BLOCK_PIXELS * scale), 3))
    for _ in range(random.integers(config.max_strokes + 1)):
        y, x = divmod(int(colored[random.integers(len(colored))]), size)
        _stroke(hints, blurred, y, x, random.uniform(0, 2 * np.pi), random.uniform(0.3, 1), scale)
    return hints


def _blur(image: Image, sigma: float) -> Image:
    """Gaussian blur; a wide one as two means over squares of the same variance, which takes a fifth of the time."""
    if sigma < _WIDE_SIGMA:
        return cv2.GaussianBlur(image, (0, 0), sigma)
    edge = 2 * round((np.sqrt(6 * sigma**2 + 1) - 1) / 2) + 1  # the variance of one is (edge^2 - 1) / 12
    return cv2.blur(cv2.blur(image, (edge, edge)), (edge, edge))


def _same(blurred: Image, ys: NDArray[np.int64], xs: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where the sum R + G + B on a path is about that of its first pixel."""
    sums = blurred[ys, xs].astype(np.int32).sum(axis=1)
    return np.abs(sums - sums[0]) < _SAME_COLOR


def _block(hints: Image, blurred: Image, y: int, x: int, limit: int) -> None:
    edge = min(limit, len(blurred) - max(y, x))
    same = _same(blurred, np.arange(y, y + edge), np.arange(x, x + edge))
    edge = edge if same.all() else int(same.argmin())
    if 2 * edge >= limit:
        hints[y : y + edge, x : x + edge, :3] = blurred[y : y + edge, x : x + edge]
        hints[y : y + edge, x : x + edge, 3] = 1


def _stroke(hints: Image, blurred: Image, y: int, x: int, angle: float, share: float, scale: float) -> None:
    length = max(int(_STROKE_PIXELS * scale * share), 3)
    ys = (y + np.sin(angle) * np.arange(length)).astype(int)
    xs = (x + np.cos(angle) * np.arange(length)).astype(int)
    inside = (ys >= 0) & (xs >= 0) & (ys < len(blurred)) & (xs < len(blurred))
    length = length if inside.all() else int(inside.argmin())
    same = _same(blurred, ys[:length], xs[:length])
    end = (length if same.all() else int(same.argmin())) - 1
    color = tuple(int(value) for value in (*blurred[y, x], 1))
    cv2.line(hints, (x, y), (int(xs[end]), int(ys[end])), color, max(round(_STROKE_WIDTH * scale), 1))
