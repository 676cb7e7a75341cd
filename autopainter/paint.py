"""Painting: a checkpoint and a sketch, with or without hints, to a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from autopainter import checkpoint, storage
from autopainter.config import Config, restore
from autopainter.data import pictures
from autopainter.errors import CorruptData, UserError
from autopainter.models.unet import UNet
from autopainter.pixels import network_input, to_pixels
from autopainter.trainer import build_generator

Image = NDArray[np.uint8]


class Painter:
    """A trained generator.

    Attributes:
        generator: the averaged generator, on the CPU, in evaluation mode.
        config: configuration of the run that it comes from.
        step: training steps behind it.
    """

    def __init__(self, generator: UNet, config: Config, step: int, manifest_id: str) -> None:
        self.config, self.step, self.manifest_id = config, step, manifest_id
        self.generator = generator.eval()

    @classmethod
    def load(cls, run_uri: str, step: int | None = None) -> "Painter":
        """Load the painter of a run.

        Args:
            run_uri: folder or s3:// URI of the run.
            step: a saved step; none: the newest that is undamaged.

        Raises:
            UserError: the run has no such checkpoint, or none of this program's version.
            CorruptData: the checkpoint asked for is damaged.
        """
        run = storage.open_store(run_uri)
        saved = checkpoint.steps(run)
        if not saved:
            raise UserError(f"{run_uri}: there is no checkpoint; is this STORAGE/NAME of a run that has saved one?")
        if step is not None and step not in saved:
            raise UserError(f"{run_uri}: there is no checkpoint of step {step}; saved steps: {saved}")
        for candidate in [step] if step is not None else reversed(saved):
            try:
                found = checkpoint.read(run, candidate)
                weights = checkpoint.load_weights(run, found)
                break
            except CorruptData:
                if candidate in (step, saved[0]):
                    raise
        config = restore(found.meta["config"], f"{run_uri}, step {found.step}")
        generator = build_generator(config)
        generator.load_state_dict(weights)
        return cls(generator, config, found.step, found.meta["manifest_id"])

    @torch.no_grad()
    def batch(self, sketch: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        """Paint uint8 [B, 1, H, W] sketches with uint8 [B, 4, H, W] hints (RGB, 0/1 mask): uint8 [B, 3, H, W].

        Any H and W: the edges are continued to the next size that the network takes, and cut off again.
        """
        height, width = sketch.shape[-2:]
        stride = 1 << self.generator.levels
        margins = (0, -width % stride, 0, -height % stride)
        condition = F.pad(network_input(sketch, hint), margins, mode="replicate")
        return to_pixels(self.generator(condition))[..., :height, :width]

    def paint(self, sketch: Image, hints: Image | None = None) -> Image:
        """Paint one picture.

        Args:
            sketch: uint8 [H, W], dark lines on white.
            hints: uint8 [H, W, 4] RGBA; a pixel is a hint where alpha is at least 128. None: no hints.

        Returns:
            uint8 [H, W, 3] RGB.

        Raises:
            UserError: the hints have another size than the sketch.
        """
        height, width = sketch.shape
        hint = np.zeros((height, width, 4), np.uint8)
        if hints is not None:
            if hints.shape != hint.shape:
                raise UserError(
                    f"the hints are {hints.shape[1]}x{hints.shape[0]}, the sketch is {width}x{height}:"
                    " they must be of one size"
                )
            hint = hints.copy()
            hint[..., 3] = hints[..., 3] >= 128
        painted = self.batch(
            torch.from_numpy(sketch)[None, None], torch.from_numpy(hint).permute(2, 0, 1)[None].contiguous()
        )
        return np.ascontiguousarray(painted[0].permute(1, 2, 0).numpy())


def read_sketch(path: Path, size: int | None = None) -> Image:
    """Read a sketch file as uint8 [H, W], transparency laid on white.

    Args:
        size: length that the longer edge is resized to; none: as it is.

    Raises:
        UserError: the file cannot be read or is no picture.
    """
    try:
        color = pictures.decode(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except pictures.BrokenInput as error:
        raise UserError(f"{path}: {error}") from None
    sketch = cv2.cvtColor(color, cv2.COLOR_RGB2GRAY)
    return pictures.resize(sketch, *_scaled(sketch, size)) if size else sketch


def read_hints(path: Path, size: int | None = None) -> Image:
    """Read a picture with transparency as uint8 [H, W, 4] RGBA; the opaque pixels are the hints.

    Raises:
        UserError: the file cannot be read or has no transparency.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        pictures.check_pixels(data)
    except pictures.BrokenInput as error:
        raise UserError(f"{path}: {error}") from None
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None or image.ndim != 3 or image.shape[2] != 4 or image.dtype != np.uint8:
        raise UserError(f"{path}: hints must be a PNG with transparency (RGBA, 8 bit); opaque pixels are the hints")
    image = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA)
    # No filter: a hint's edge must not mix with the nothing around it.
    return cv2.resize(image, _scaled(image, size), interpolation=cv2.INTER_NEAREST) if size else image


def _scaled(image: Image, longer: int) -> tuple[int, int]:
    """Width and height with a longer edge of ``longer``."""
    height, width = image.shape[:2]
    scale = longer / max(height, width)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def paint_files(
    painter: Painter, sketches: Sequence[Path], hints: Path | None, size: int | None, output: Path
) -> Iterator[Path]:
    """Paint sketch files one by one; yields each PNG as it is written.

    Args:
        hints: colour hints for every one of the sketches.
        size: length that the longer edge of a sketch is resized to before it is painted.
        output: a PNG file for one sketch; a folder for several.
    """
    read = read_hints(hints, size) if hints else None
    single = len(sketches) == 1 and output.suffix.lower() == ".png"
    if not single and output.suffix:
        raise UserError(f"--output: {output}: must be a folder for several sketches, and a .png file or folder for one")
    targets = [output if single else output / f"{path.stem}.png" for path in sketches]
    inputs = {path.resolve() for path in sketches}
    for path, target in zip(sketches, targets, strict=True):
        if target.resolve() in inputs:
            raise UserError(f"--output: {output}: {target} is a sketch itself; choose another place")
        if targets.count(target) > 1:
            raise UserError(f"--output: {output}: several sketches are named like {path.name}; paint them one by one")
    for path, target in zip(sketches, targets, strict=True):
        painted = painter.paint(read_sketch(path, size), read)
        target.parent.mkdir(parents=True, exist_ok=True)
        pictures.write_png(target, painted)
        yield target
