"""Photos and scans of drawings on paper to dark lines on white: grey, level, threshold."""

import cv2
import numpy as np
from numpy.typing import NDArray

from autopainter.data.pictures import Image

LIGHT_EDGE = 512
"""Longer edge, in pixels, of the copy on which the light is measured: it changes slowly."""
STROKE = 1 / 32
"""Share of the longer edge. What is dark and narrower is ink, what is wider is shade, be it a filled shape."""
BLUR = 0.6
"""Standard deviation in pixels of the blur before the threshold: a camera's noise, not the lines."""
GRAIN = 3.5
"""Standard deviations of the paper's grain that stay white; 1 in 4,000 normally distributed values is darker."""
FAINTEST = 0.06
"""Least difference of ink from paper, both as shares of the light."""
CONTRAST = 0.1
"""Least difference of full ink from paper: what the darkest third of light pencil has, and the grain of a blank sheet
has not."""


def clean(photo: Image) -> Image:
    """Make a drawing of a photo or a scan of a drawing on paper.

    The numbers of the sections are those of Gonzalez and Woods, Digital Image Processing, 4th edition.

    1. *grey*: luminance. A photo is the product of the light and of what the paper reflects (2.3).
    2. *level*: the light is what is left of the luminance when a closing has taken the dark strokes away (9.8), and
       the quotient of the two is what the paper reflects (2.6, shading correction). Its median is paper.
    3. *threshold*, soft, so that lines keep smooth edges: white from ``GRAIN`` standard deviations below the paper on,
       black at the lower quartile of what is darker, linear between them.

    Args:
        photo: uint8 [H, W, 3] RGB, or [H, W]; strokes darker than the paper around them.

    Returns:
        uint8 [H, W], 0 for ink and 255 for paper; white all over if nothing is drawn.
    """
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY) if photo.ndim == 3 else photo
    light = _light(grey) + 1  # and one more to the grey: black is no 0 / 0
    reflected = cv2.GaussianBlur(grey.astype(np.float32) + 1, (0, 0), BLUR) / light
    reflected /= np.median(reflected)
    # The lighter half is paper alone, so its spread is the grain's: the camera's noise, and larger where light is less.
    grain = np.sqrt(np.square((reflected - 1) * light)[reflected >= 1].mean()) / light
    paper = 1 - np.maximum(GRAIN * grain, FAINTEST)
    darkness = paper - reflected
    inked = darkness[darkness > 0]
    contrast = max(float(np.percentile(inked, 75)), CONTRAST) if len(inked) else CONTRAST
    drawing: Image = np.rint(255 * np.clip(1 - darkness / contrast, 0, 1)).astype(np.uint8)
    return drawing


def _light(grey: Image) -> NDArray[np.float32]:
    """The light on the paper, float32 [H, W] in grey levels: what closing leaves of uint8 [H, W]."""
    height, width = grey.shape
    scale = min(1.0, LIGHT_EDGE / max(height, width))
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    small = cv2.GaussianBlur(cv2.resize(grey, size, interpolation=cv2.INTER_AREA).astype(np.float32), (0, 0), 1)
    stroke = round(STROKE * max(size)) | 1
    closed = cv2.morphologyEx(small, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (stroke, stroke)))
    smooth = cv2.GaussianBlur(closed, (0, 0), stroke / 12)  # the element's own corners
    light: NDArray[np.float32] = cv2.resize(smooth, (width, height), interpolation=cv2.INTER_LINEAR)
    return light
