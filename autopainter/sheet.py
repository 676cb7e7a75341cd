"""Contact sheets: one row a sample, sketch | painted | hints | painted with hints | target."""

from collections.abc import Iterable

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from autopainter.data import pictures
from autopainter.data.stream import Batch

Image = NDArray[np.uint8]

COLUMNS = ("sketch", "painted", "hints", "with hints", "target")
_GAP = 4
_HEADER = 22


def contact_sheet(
    parts: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]], *, columns: int = 1, tile: int | None = None
) -> Image:
    """Draw a sheet.

    Args:
        parts: batches of B samples with what was painted from the sketches alone and from sketches and hints, both
            uint8 [B, 3, S, S].
        columns: groups of five pictures side by side.
        tile: edge of a picture in the sheet; none: S.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    rows = [
        _row(batch, index, plain[index], hinted[index], tile)
        for batch, plain, hinted in parts
        for index in range(len(batch.keys))
    ]
    rows += [np.full_like(rows[0], 255)] * (-len(rows) % columns)
    height = len(rows) // columns
    header = _header(rows[0].shape[1])
    stacks = [np.vstack([header, *rows[first : first + height]]) for first in range(0, len(rows), height)]
    gap = np.full((stacks[0].shape[0], 5 * _GAP, 3), 255, np.uint8)
    return np.hstack([piece for stack in stacks for piece in (gap, stack)][1:])


def _row(batch: Batch, index: int, plain: torch.Tensor, hinted: torch.Tensor, tile: int | None) -> Image:
    lines = np.repeat(_picture(batch.sketch[index]), 3, axis=2)
    hint = _picture(batch.hint[index])
    faint = 255 - (255 - lines) // 4
    hints = np.where(hint[..., 3:] == 1, hint[..., :3], faint)
    tiles = (lines, _picture(plain), hints, _picture(hinted), _picture(batch.color[index]))
    return np.hstack([_framed(picture, tile) for picture in tiles])


def _picture(image: torch.Tensor) -> Image:
    picture: Image = image.numpy().transpose(1, 2, 0)
    return picture


def _framed(picture: Image, tile: int | None) -> Image:
    if tile:
        picture = pictures.resize(picture, tile, tile)
    return cv2.copyMakeBorder(picture, 0, _GAP, 0, _GAP, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def _header(width: int) -> Image:
    header = np.full((_HEADER, width, 3), 255, np.uint8)
    step = width // len(COLUMNS)
    for place, text in enumerate(COLUMNS):
        cv2.putText(header, text, (place * step + 2, 15), cv2.FONT_HERSHEY_SIMPLEX, step / 230, (60, 60, 60), 1,
                    cv2.LINE_AA)  # fmt: skip
    return header
