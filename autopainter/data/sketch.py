"""Line drawings from colour pictures: the extended difference of Gaussians (XDoG).

Source: Winnemoeller, Kyprianidis, Olsen, "XDoG: An eXtended difference-of-Gaussians compendium including advanced image
stylization", Computers & Graphics 36(6), 2012, doi 10.1016/j.cag.2012.03.004.
"""

import math
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.typing import NDArray

from autopainter.errors import UserError

# The kernel of PIL.ImageFilter.SMOOTH, which PIL.ImageEnhance.Sharpness blends with the picture.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


@dataclass(frozen=True)
class XDoG:
    """Parameters of ``xdog``; the defaults are those of the authors of Auto-Painter (arXiv 1705.01908)."""

    sigma: float = 1.5
    """Standard deviation of the narrow Gaussian in pixels: the scale of the lines."""
    k: float = 2.0
    """Ratio of the wide Gaussian to the narrow one."""
    gamma: float = 0.97
    """Weight of the wide Gaussian; nearer to 1 draws fainter edges too."""
    phi: float = 200.0
    """Steepness of the threshold per grey level: a step at 200, soft lines near 0.1."""
    epsilon: float = 0.1
    """Threshold in grey levels."""
    sharpness: float = 3.0
    """Factor of the sharpening before the filter, as in PIL.ImageEnhance.Sharpness; 1 changes nothing."""

    def __post_init__(self) -> None:
        for name, least in (("sigma", 0.1), ("k", 1.0), ("gamma", 0.0), ("phi", 0.0), ("sharpness", 0.0)):
            value = getattr(self, name)
            if not least < value < math.inf:
                raise UserError(f"xdog.{name}: must be finite and above {least:g}, got {value}")
        if not math.isfinite(self.epsilon):
            raise UserError(f"xdog.epsilon: must be finite, got {self.epsilon}")


AUTHORS = XDoG()


def xdog(color: NDArray[np.uint8], params: XDoG = AUTHORS) -> NDArray[np.uint8]:
    """Draw the lines of a picture, black on white.

    With G_s(L) the Gaussian blur of the sharpened luminance L in [0, 255]::

        D = G_sigma(L) - gamma G_(k sigma)(L)
        T = 1 where D >= epsilon, else 1 + tanh(phi (D - epsilon))

    All in float32 and in grey levels, with mirrored borders. The authors' code (gen_sketch/sketch.py) has the same D
    and parameters, but blurs uint8 arrays, which cuts the fractions off both blurs before their small difference is
    taken, and writes 1 and 251 for line and paper; here they are 0 and 255.

    Args:
        color: uint8 [H, W, 3], RGB.
        params: of the filter.

    Returns:
        uint8 [H, W], from 0 (line) to 255 (paper).
    """
    luminance = cv2.cvtColor(color.astype(np.float32), cv2.COLOR_RGB2GRAY)
    smooth = cv2.filter2D(luminance, cv2.CV_32F, _SMOOTH, borderType=cv2.BORDER_REFLECT)
    sharp = np.clip(smooth + params.sharpness * (luminance - smooth), 0, 255)
    narrow = cv2.GaussianBlur(sharp, (0, 0), params.sigma, borderType=cv2.BORDER_REFLECT)
    wide = cv2.GaussianBlur(sharp, (0, 0), params.sigma * params.k, borderType=cv2.BORDER_REFLECT)
    below = np.minimum(narrow - params.gamma * wide - params.epsilon, 0)
    sketch: NDArray[np.uint8] = np.rint(255 * (1 + np.tanh(params.phi * below))).astype(np.uint8)
    return sketch


def jittered(params: XDoG, jitter: float, random: np.random.Generator) -> XDoG:
    """Vary the lines as different hands and pens would: their scale, how faint an edge is drawn, and how soft.

    Args:
        params: what to start from.
        jitter: how far, 0 (not at all) to 1. ``sigma`` is multiplied by up to 2 to the power of +-jitter, ``gamma``
            moved by up to +-0.02 jitter (nearer to 1 draws fainter edges), and the width of the threshold's ramp,
            1 / ``phi``, widened by up to 30 jitter grey levels (from steps to soft shades).
        random: three uniform numbers are drawn.
    """
    scale, faint, soft = random.uniform((-1, -1, 0), (1, 1, 1))
    return replace(
        params,
        sigma=params.sigma * 2.0 ** (jitter * scale),
        gamma=params.gamma + 0.02 * jitter * faint,
        phi=1 / (1 / params.phi + 30.0 * jitter * soft),
    )
