"""From the bytes of one pair to the pixels of one training sample."""

import cv2
import numpy as np
from numpy.typing import NDArray

from autopainter import seeding
from autopainter.config import Config
from autopainter.data import hints
from autopainter.data.sources import BrokenInput, check_pixels
from autopainter.errors import CorruptData
from autopainter.seeding import Use

Image = NDArray[np.uint8]

cv2.setNumThreads(1)  # the stream's own threads decode in parallel


def decode(color: bytes, sketch: bytes, name: str) -> tuple[Image, Image]:
    """Decode a pair's image files: uint8 [H, W, 3] RGB and uint8 [H, W].

    Raises:
        CorruptData: one of them is no image or too large a one, or their sizes differ.
    """
    try:
        check_pixels(color)
        check_pixels(sketch)
    except BrokenInput as error:
        raise CorruptData(f"{name}: {error}") from None
    pixels = cv2.imdecode(np.frombuffer(color, np.uint8), cv2.IMREAD_COLOR_RGB)
    lines = cv2.imdecode(np.frombuffer(sketch, np.uint8), cv2.IMREAD_GRAYSCALE)
    if pixels is None or lines is None or pixels.shape[:2] != lines.shape:
        raise CorruptData(f"{name}: not a pair of images of one size")
    return pixels, lines


def resize(image: Image, size: int) -> Image:
    """The one resampling filter of training, validation and painting: pixel areas, to ``size`` x ``size``."""
    if image.shape[:2] == (size, size):
        return image
    shrinks = max(image.shape[:2]) > size
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def augment(color: Image, sketch: Image, config: Config, random: np.random.Generator) -> tuple[Image, Image]:
    """Random crop and mirror, both images alike; [S, S, 3] and [S, S] with S = data.image_size."""
    height, width = sketch.shape
    edge = max(round(min(height, width) / config.data.crop_scale), 1)
    top, left = int(random.integers(height - edge + 1)), int(random.integers(width - edge + 1))
    window = (slice(top, top + edge), slice(left, left + edge))
    color, sketch = resize(color[window], config.data.image_size), resize(sketch[window], config.data.image_size)
    if config.data.flip and random.random() < 0.5:
        color, sketch = color[:, ::-1], sketch[:, ::-1]
    return np.ascontiguousarray(color), np.ascontiguousarray(sketch)


def training_sample(
    color: Image, sketch: Image, config: Config, position: int, out: dict[str, NDArray[np.generic]]
) -> None:
    """Make the sample of a global position and write it into one row of a batch's arrays."""
    seed = config.train.seed
    color, sketch = augment(color, sketch, config, seeding.generator(seed, Use.AUGMENT, position))
    hint = hints.draw(color, sketch, config.hints, seeding.generator(seed, Use.HINTS, position))
    _write(out, color, sketch, hint, seeding.key(seed, Use.DROPOUT, position))


def validation_sample(
    color: Image, sketch: Image, config: Config, index: int, out: dict[str, NDArray[np.generic]]
) -> None:
    """Make the sample of a validation index: not augmented, always hinted, the same at every step of every run."""
    color, sketch = resize(color, config.data.image_size), resize(sketch, config.data.image_size)
    always = config.hints.model_copy(update={"unhinted": 0.0})
    hint = hints.draw(color, sketch, always, seeding.generator(0, Use.HINTS, index))
    _write(out, color, sketch, hint, 0)


def _write(out: dict[str, NDArray[np.generic]], color: Image, sketch: Image, hint: Image, dropout_key: int) -> None:
    out["color"][:] = color.transpose(2, 0, 1)
    out["sketch"][0] = sketch
    out["hint"][:] = hint.transpose(2, 0, 1)
    out["dropout"][...] = np.uint64(dropout_key).astype(np.int64)
