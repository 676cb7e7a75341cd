"""Pictures larger than a network's memory or training allows: painted in overlapping tiles that are blended."""

import math
from collections.abc import Callable

import torch

from autopainter.data.hints import PAPER

OVERLAP = 0.25
"""Least share of a tile that its neighbour covers too; with 0.5 seams are no fainter and the work is twice as much."""


def paint_tiles(
    paint: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sketch: torch.Tensor,
    hint: torch.Tensor,
    tile: int,
    backdrop: torch.Tensor,
) -> torch.Tensor:
    """Paint in squares one after the other, so that memory does not grow with the picture but for the picture itself.

    Each is weighted with a Hann window, which falls to 0 at its edges (Harris 1978, doi 10.1109/PROC.1978.10837,
    equation 27a), and divided by the sum of the weights: the weighted overlap-add of short-time Fourier analysis in
    two dimensions. So no tile begins or ends with a step.

    Args:
        paint: from sketches and hints as below to pictures.
        sketch: uint8 [1, 1, H, W].
        hint: uint8 [1, 4, H, W].
        tile: edge of a tile in pixels; a picture that is smaller in one direction has one tile there, of its size.
        backdrop: uint8 [1, 3, H, W], what stands for tiles without a line or a hint: there is nothing in them that a
            network could tell their colour by, and one with instance norm sees shapes in the rounding errors.

    Returns:
        uint8 [1, 3, H, W], on the CPU.
    """
    height, width = sketch.shape[-2:]
    rows, columns = positions(height, tile), positions(width, tile)
    down, right = _window(min(tile, height)), _window(min(tile, width))
    painted = torch.zeros(1, 3, height, width)
    for top in rows:
        for left in columns:
            part = (..., slice(top, top + tile), slice(left, left + tile))
            bare = sketch[part].amin() > PAPER and not hint[part][:, 3].any()
            painted[part] += (backdrop[part] if bare else paint(sketch[part], hint[part])) * down[:, None] * right
    # The sum of the products is the product of the sums, since the tiles form a grid.
    painted /= _total(down, rows, height)[:, None]
    painted /= _total(right, columns, width)
    return painted.round_().to(torch.uint8)


def positions(length: int, tile: int) -> list[int]:
    """Where tiles begin in one direction: evenly, the last one ending at the end, overlapping by ``OVERLAP`` or more.

    Args:
        length: of the picture in pixels.
        tile: of a tile, likewise.
    """
    steps = max(math.ceil((length - tile) / (tile * (1 - OVERLAP))), 0)
    return [round(step * (length - tile) / steps) for step in range(steps + 1)] if steps else [0]


def _window(length: int) -> torch.Tensor:
    return torch.sin(torch.pi * (torch.arange(length) + 0.5) / length).square()


def _total(window: torch.Tensor, starts: list[int], length: int) -> torch.Tensor:
    total = torch.zeros(length)
    for start in starts:
        total[start : start + len(window)] += window
    return total
