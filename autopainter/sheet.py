"""Contact sheets: pictures in rows under headings."""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np
import torch

from autopainter.data import pictures
from autopainter.data.pictures import Image
from autopainter.data.stream import Batch

COLUMNS = ("sketch", "painted", "hints", "with hints", "target")
_GAP = 4
_HEADER = 22


def contact_sheet(
    parts: Iterable[tuple[Batch, torch.Tensor, torch.Tensor]], *, columns: int = 1, tile: int | None = None
) -> Image:
    """Draw samples, one row each: sketch | painted | hints | painted with hints | target.

    Args:
        parts: batches of B samples with what was painted from the sketches alone and from sketches and hints, both
            uint8 [B, 3, S, S].
        columns: groups of five pictures side by side.
        tile: edge of a picture in the sheet; none: S.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    rows = [
        [
            picture(batch.sketch[index]),
            picture(plain[index]),
            hints_on_sketch(batch.sketch[index], batch.hint[index]),
            picture(hinted[index]),
            picture(batch.color[index]),
        ]
        for batch, plain, hinted in parts
        for index in range(len(batch.keys))
    ]
    return grid(COLUMNS, rows, columns=columns, tile=tile)


def grid(
    headings: Sequence[str], rows: Sequence[Sequence[Image]], *, columns: int = 1, tile: int | None = None
) -> Image:
    """Draw rows of pictures under headings.

    Args:
        headings: one a picture of a row.
        rows: uint8 [S, S, 3] RGB pictures.
        columns: rows side by side.
        tile: edge that the pictures are resized to; none: S.

    Returns:
        uint8 [H, W, 3] RGB.
    """
    lines = [np.hstack([_framed(image, tile) for image in row]) for row in rows]
    lines += [np.full_like(lines[0], 255)] * (-len(lines) % columns)
    height = len(lines) // columns
    header = _header(headings, lines[0].shape[1])
    stacks = [np.vstack([header, *lines[first : first + height]]) for first in range(0, len(lines), height)]
    gap = np.full((stacks[0].shape[0], 5 * _GAP, 3), 255, np.uint8)
    return np.hstack([piece for stack in stacks for piece in (gap, stack)][1:])


def picture(image: torch.Tensor) -> Image:
    """uint8 [1 or 3, H, W] as uint8 [H, W, 3] RGB."""
    return np.ascontiguousarray(image.expand(3, -1, -1).numpy().transpose(1, 2, 0))


def hints_on_sketch(sketch: torch.Tensor, hint: torch.Tensor) -> Image:
    """Hints uint8 [4, H, W] (RGB, 0/1 mask) over the faint lines of the sketch uint8 [1, H, W]: uint8 [H, W, 3]."""
    faint = 255 - (255 - picture(sketch)) // 4
    return np.where(hint[3].numpy()[..., None] == 1, picture(hint[:3]), faint)


def _framed(image: Image, tile: int | None) -> Image:
    if tile:
        image = pictures.resize(image, tile, tile)
    return cv2.copyMakeBorder(image, 0, _GAP, 0, _GAP, cv2.BORDER_CONSTANT, value=(255, 255, 255))


def _header(headings: Sequence[str], width: int) -> Image:
    header = np.full((_HEADER, width, 3), 255, np.uint8)
    step = width // len(headings)
    for place, text in enumerate(headings):
        cv2.putText(header, text, (place * step + 2, 15), cv2.FONT_HERSHEY_SIMPLEX, step / 230, (60, 60, 60), 1,
                    cv2.LINE_AA)  # fmt: skip
    return header
