"""From the bytes of one pair to the pixels of one training sample."""

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from autopainter import seeding
from autopainter.config import Config, Sketch
from autopainter.data import hints, pictures
from autopainter.data.pictures import BrokenInput, Image
from autopainter.data.sketch import XDoG, jittered, xdog
from autopainter.errors import CorruptData
from autopainter.seeding import Use

_HUE_DEGREES = 30.0  # of a color_jitter of 1; saturation and contrast vary by up to half and a quarter
_SATURATION = 0.5
_CONTRAST = 0.25

_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float64)
_TO_RGB = np.linalg.inv(_TO_YIQ)


def decode(color: bytes, sketch: bytes | None, name: str) -> tuple[Image, Image | None]:
    """Decode a pair's image files: uint8 [H, W, 3] RGB and uint8 [H, W], or None if there is no drawing.

    Raises:
        CorruptData: one of them is no image or too large a one, or their sizes differ.
    """
    try:
        pixels = pictures.decode_stored(color, grey=False)
        lines = None if sketch is None else pictures.decode_stored(sketch, grey=True)
    except BrokenInput as error:
        raise CorruptData(f"{name}: {error}") from None
    if lines is not None and pixels.shape[:2] != lines.shape:
        raise CorruptData(f"{name}: not a pair of images of one size")
    return pixels, lines


def draw(color: Image, config: Sketch, random: np.random.Generator | None) -> Image:
    """Draw a picture in its final size: uint8 [S, S]; without a generator, with the parameters as they are."""
    params = XDoG(config.sigma, config.k, config.gamma, config.phi, config.epsilon, config.sharpness)
    return xdog(color, jittered(params, config.jitter, random) if random else params)


def augment(
    color: Image, sketch: Image | None, config: Config, random: np.random.Generator
) -> tuple[Image, Image | None]:
    """Random square crop and mirror, both images alike; [S, S, 3] and [S, S] with S = data.image_size."""
    height, width = color.shape[:2]
    share = random.uniform(config.data.crop_min, config.data.crop_max)
    edge = max(round(min(height, width) * share), 1)
    top, left = int(random.integers(height - edge + 1)), int(random.integers(width - edge + 1))
    mirrored = config.data.flip and random.random() < 0.5

    def view(image: Image) -> Image:
        size = config.data.image_size
        cut = pictures.resize(image[top : top + edge, left : left + edge], size, size)
        return cv2.flip(cut, 1) if mirrored else np.ascontiguousarray(cut)

    return view(color), None if sketch is None else view(sketch)


def jitter_colors(color: Image, sketch: Image, strength: float, random: np.random.Generator) -> tuple[Image, Image]:
    """Turn the hue and change saturation and contrast of a picture, and the contrast of its drawing alike.

    Hue and saturation are a rotation and a scale in the plane of colour differences (YIQ); contrast scales the distance
    to white, so paper stays white.
    """
    hue, saturation, contrast = random.uniform(-strength, strength, 3) * (_HUE_DEGREES, _SATURATION, _CONTRAST)
    scale, angle = 1 + saturation, np.deg2rad(hue)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    matrix = (1 + contrast) * (_TO_RGB @ (turn * np.array([[1], [scale], [scale]])) @ _TO_YIQ)
    # White maps to itself: x -> 255 + M (x - 255), and M (255, 255, 255) is the contrast times 255.
    offset = np.full((3, 1), -255 * contrast)
    jittered_color = cv2.transform(color, np.hstack((matrix, offset)))
    jittered_sketch = cv2.transform(sketch, np.array([[1 + contrast, -255 * contrast]]))
    return jittered_color, jittered_sketch


def turn_hues(image: Image, degrees: float) -> Image:
    """Turn the hues of uint8 [H, W, 3] RGB on the colour circle; saturation and value (HSV) stay, greys too."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(degrees * 256 / 360) % 256)  # hues are 256ths of the circle: it wraps
    turned: Image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return turned


def training_sample(
    color: Image, sketch: Image | None, config: Config, position: int, out: dict[str, NDArray[Any]]
) -> None:
    """Make the sample of a global position and write it into one row of a batch's arrays."""
    seed = config.train.seed
    color, sketch = augment(color, sketch, config, seeding.generator(seed, Use.AUGMENT, position))
    if sketch is None or config.sketch.mode == "on_the_fly":
        sketch = draw(color, config.sketch, seeding.generator(seed, Use.SKETCH, position))
    if config.data.color_jitter:
        random = seeding.generator(seed, Use.COLOR_JITTER, position)
        color, sketch = jitter_colors(color, sketch, config.data.color_jitter, random)
    hint = hints.draw(color, sketch, config.hints, seeding.generator(seed, Use.HINTS, position))
    if config.hints.recolored and cv2.hasNonZero(hint[..., 3]):
        recolor = seeding.generator(seed, Use.RECOLOR, position)
        if recolor.random() < config.hints.recolored:
            degrees = recolor.uniform(0, 360)
            color = turn_hues(color, degrees)
            inside = hint[..., 3] > 0  # a small part of the image
            hint[inside, :3] = turn_hues(hint[inside, None, :3], degrees)[:, 0]
    _write(out, color, sketch, hint, seeding.key(seed, Use.DROPOUT, position))


def validation_sample(
    color: Image, sketch: Image | None, config: Config, index: int, out: dict[str, NDArray[Any]]
) -> None:
    """Make the sample of a validation index: its centre, always hinted, the same in every run."""
    size = config.data.image_size
    color = pictures.squares(color, size, "crop")[""]
    if sketch is None or config.sketch.mode == "on_the_fly":
        sketch = draw(color, config.sketch, None)
    else:
        sketch = pictures.squares(sketch, size, "crop")[""]
    always = config.hints.model_copy(update={"unhinted": 0.0})
    hint = hints.draw(color, sketch, always, seeding.generator(0, Use.HINTS, index))
    _write(out, color, sketch, hint, 0)


def _write(out: dict[str, NDArray[Any]], color: Image, sketch: Image, hint: Image, dropout_key: int) -> None:
    _write_planes(out["color"], color)
    if cv2.hasNonZero(hint.reshape(len(hint), -1)):
        _write_planes(out["hint"], hint)
    else:
        out["hint"][...] = 0  # faster than plane after plane
    out["sketch"][0] = sketch
    out["dropout"][...] = np.uint64(dropout_key).astype(np.int64)


def _write_planes(planes: NDArray[Any], image: Image) -> None:
    for channel, plane in enumerate(planes):
        cv2.extractChannel(image, channel, plane)  # faster than a transposed copy
