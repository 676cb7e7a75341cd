"""Painting: a checkpoint and a sketch, with or without hints, to a picture."""

import logging
import os
from collections.abc import Iterable
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from autopainter import checkpoint, memory, storage
from autopainter.checkpoint import Checkpoint, Tensors
from autopainter.config import Config, restore
from autopainter.data import pictures
from autopainter.errors import CorruptData, UserError
from autopainter.models.unet import UNet
from autopainter.pixels import network_input, to_pixels
from autopainter.storage import Store
from autopainter.tiling import paint_tiles
from autopainter.trainer import build_generator

log = logging.getLogger(__name__)

Image = NDArray[np.uint8]
Step = int | Literal["best", "latest"]

NO_LAYER = "hints must be a PNG that is transparent around the strokes; its opaque pixels are the hints"
"""What is said of a picture that is given as hints."""
MAX_WHOLE = 4
"""Largest picture, in areas of a training image, that is painted at once if nothing else is asked for."""


class Painter:
    """A trained generator.

    Attributes:
        generator: the averaged generator, float32, in evaluation mode, on ``device``.
        device: where it paints.
        config: configuration of the run that it comes from.
        step: training steps behind it.
        manifest_id: the data set that it was trained on.
    """

    def __init__(
        self, generator: UNet, config: Config, step: int, manifest_id: str, device: torch.device | None = None
    ) -> None:
        self.config, self.step, self.manifest_id = config, step, manifest_id
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generator = generator.to(self.device).eval()

    @classmethod
    def load(
        cls, run_uri: str | os.PathLike[str], step: Step | None = None, device: torch.device | None = None
    ) -> "Painter":
        """Load the painter of a run.

        Args:
            run_uri: folder, as a text or a path, or s3:// URI of the run.
            step: a saved step; ``best``: of the checkpoints that were kept the one with the highest validation score;
                ``latest`` or none: the newest. Of these two a damaged one is named in a warning, and the next is taken.
            device: where to paint; none: on the GPU if there is one.

        Raises:
            UserError: that is no step, or the run has no such checkpoint, or none that this program can read.
            CorruptData: the checkpoint asked for is damaged, or all are.
        """
        if not (step in (None, "best", "latest") or isinstance(step, int | np.integer)):
            raise UserError(f"step: must be the number of a saved step, 'best' or 'latest', got {step!r}")
        run_uri = os.fspath(run_uri)
        run = storage.open_store(run_uri)
        found, weights = _read(run, _candidates(run, run_uri, step))
        place = f"{run_uri}, step {found.step}"
        config = restore(found.meta["config"], place)
        generator = build_generator(config)
        _check_fit(weights, generator.state_dict(), place)
        generator.load_state_dict(weights)
        return cls(generator, config, found.step, found.meta["manifest_id"], device)

    @torch.no_grad()
    def batch(self, sketch: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        """Paint uint8 [B, 1, H, W] sketches with uint8 [B, 4, H, W] hints (RGB, 0/1 mask): uint8 [B, 3, H, W].

        Any H and W: the edges are continued to the next size that the network takes, and cut off again. The result is
        on the device of the sketches.
        """
        height, width = sketch.shape[-2:]
        stride = 1 << self.generator.levels
        margins = (0, -width % stride, 0, -height % stride)
        condition = F.pad(network_input(sketch.to(self.device), hint.to(self.device)), margins, mode="replicate")
        return to_pixels(self.generator(condition))[..., :height, :width].to(sketch.device)

    def tiled(self, height: int, width: int) -> bool:
        """Whether a picture of this size is painted in tiles if nothing else is asked for."""
        return height * width > MAX_WHOLE * self.config.data.image_size**2

    def paint(self, sketch: Image, hints: Image | None = None, tiled: bool | None = None) -> Image:
        """Paint one picture.

        Args:
            sketch: uint8 [H, W], dark lines on white.
            hints: uint8 [H, W, 4] RGBA; a pixel is a hint where alpha is at least 128. None: no hints.
            tiled: paint it in blended tiles of the size that the network was trained on, in front of a small painting
                of the whole that is enlarged; none: if it is a large one.

        Returns:
            uint8 [H, W, 3] RGB.

        Raises:
            UserError: an array of another kind; the hints have another size than the sketch; too little memory.
        """
        if not (_is_pixels(sketch, 2) and sketch.size):
            raise UserError(
                f"the sketch is {_kind(sketch)}: it must be uint8 [height, width] of at least one pixel, such as"
                " numpy.asarray(image.convert('L'))"
            )
        height, width = sketch.shape
        hint = np.zeros((height, width, 4), np.uint8)
        if hints is not None:
            if not (_is_pixels(hints, 3) and hints.shape[2] == 4):
                raise UserError(
                    f"the hints are {_kind(hints)}: they must be uint8 [height, width, 4], such as"
                    " numpy.asarray(image.convert('RGBA'))"
                )
            if hints.shape != hint.shape:
                raise UserError(
                    f"the hints are {hints.shape[1]}x{hints.shape[0]}, the sketch is {width}x{height}:"
                    " they must be of one size"
                )
            hint = hints.copy()
            hint[..., 3] = hints[..., 3] >= 128
        # A copy, because torch takes no array that is read-only or mirrored, as a caller's may be.
        lines = torch.from_numpy(sketch.copy())[None, None]
        colors = torch.from_numpy(hint).permute(2, 0, 1)[None].contiguous()
        try:
            if self.tiled(height, width) if tiled is None else tiled:
                backdrop = torch.from_numpy(self._backdrop(sketch, hints)).permute(2, 0, 1)[None]
                painted = paint_tiles(self.batch, lines, colors, self.config.data.image_size, backdrop)
            else:
                painted = self.batch(lines, colors)
        except (RuntimeError, MemoryError) as error:
            if not memory.ran_out(error):
                raise
            raise UserError(f"too little memory to paint {width}x{height}; paint it in tiles, or smaller") from None
        return np.ascontiguousarray(painted[0].permute(1, 2, 0).numpy())

    def _backdrop(self, sketch: Image, hints: Image | None) -> Image:
        """The picture painted as small as the network was trained, and enlarged: its colours without its lines."""
        height, width = sketch.shape
        scale = self.config.data.image_size / max(height, width)
        size = max(round(width * scale), 1), max(round(height * scale), 1)
        few = None if hints is None else cv2.resize(hints, size, interpolation=cv2.INTER_NEAREST)
        return pictures.resize(self.paint(pictures.resize(sketch, *size), few, tiled=False), width, height)


def check_layer(layer: Image) -> Image:
    """Return a layer of hints, uint8 [H, W, 4] RGBA, whole.

    Raises:
        UserError: nothing in it is transparent, so it is a picture and no hints.
    """
    if (layer[..., 3] == 255).all():
        raise UserError(NO_LAYER)
    return layer


def _is_pixels(image: object, dimensions: int) -> bool:
    return isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == dimensions


def _kind(image: object) -> str:
    """What a caller gave instead of an image: its type, or an array's dtype and shape."""
    return f"{image.dtype} {list(image.shape)}" if isinstance(image, np.ndarray) else f"of type {type(image).__name__}"


def _candidates(run: Store, run_uri: str, step: Step | None) -> list[int]:
    """Steps of the checkpoints that will do, the first choice first."""
    if step == "best":
        found = checkpoint.survey(run)
        saved, wanted = found.steps, checkpoint.by_score(found.committed)
        absent = "there is no checkpoint with a score, so none is the best; use latest"
    else:
        saved = checkpoint.steps(run)
        wanted = saved[::-1] if step in (None, "latest") else [each for each in saved if each == step]
        absent = f"there is no checkpoint of step {step}"
    if not saved:
        raise UserError(f"{run_uri}: there is no checkpoint; is this STORAGE/NAME of a run that has saved one?")
    if not wanted:
        raise UserError(f"{run_uri}: {absent}; saved steps: {saved}")
    return wanted


def _read(run: Store, candidates: Iterable[int]) -> tuple[Checkpoint, Tensors]:
    """The first checkpoint that is undamaged; the others are named, be it as warnings or as the error."""
    damage: list[str] = []
    for step in candidates:
        try:
            found = checkpoint.read(run, step)
            weights = checkpoint.load_weights(run, found)
        except CorruptData as error:
            damage.append(f"checkpoint of step {step} is damaged: {error}")
            continue
        for reason in damage:
            log.warning("%s; step %d is used instead", reason, step)
        return found, weights
    raise CorruptData("; ".join(damage))


def _check_fit(weights: Tensors, wanted: Tensors, place: str) -> None:
    """Check that a checkpoint has the tensors of the network that this program builds of its configuration."""
    for name in sorted(weights.keys() | wanted.keys()):
        found, needed = (list(each[name].shape) if name in each else "none" for each in (weights, wanted))
        if found != needed:
            raise UserError(
                f"{place}: these are weights of another version of the model: {name} has shape {found}, and this"
                f" program's needs {needed}; paint with the version of autopainter that trained the run"
            )
