"""Painting in tiles: every pixel is painted, from its own surroundings, and no tile begins or ends with a step.

The painters here are plain functions whose right result is known. Run: pytest tests/test_tiling.py
"""

import itertools

import pytest
import torch

from autopainter.tiling import OVERLAP, paint_tiles, positions


def pixels(channels, height, width, value=0):
    return torch.full((1, channels, height, width), value, dtype=torch.uint8)


def inked(height, width):
    """A sketch that is black all over, and no hints."""
    return pixels(1, height, width), pixels(4, height, width)


@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 48, 49, 64, 65, 100, 1000])
def test_tiles_cover_a_length_evenly_and_overlap(length, tile):
    starts = positions(length, tile)
    assert starts[0] == 0
    assert starts[-1] == max(length - tile, 0)
    steps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(0 < step <= tile * (1 - OVERLAP) for step in steps)
    assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 32), (100, 70), (20, 75), (5, 7), (64, 31)])
def test_what_depends_on_the_pixel_alone_is_as_if_painted_at_once(height, width):
    random = torch.Generator().manual_seed(0)
    sketch = torch.randint(0, 256, (1, 1, height, width), generator=random, dtype=torch.uint8)
    hint = torch.randint(0, 256, (1, 4, height, width), generator=random, dtype=torch.uint8)
    sizes = set()

    def paint(sketch, hint):
        sizes.add(tuple(sketch.shape[2:]))
        assert hint.shape[2:] == sketch.shape[2:]
        return sketch // 2 + hint[:, :3] // 2

    painted = paint_tiles(paint, sketch // 2, hint, 32, pixels(3, height, width))
    assert painted.dtype == torch.uint8
    assert torch.equal(painted, paint(sketch // 2, hint))
    sizes.discard((height, width))
    assert sizes <= {(min(height, 32), min(width, 32))}


def test_tiles_that_differ_are_blended_without_a_step():
    colors = []

    def paint(sketch, hint):
        colors.append(len(colors) % 2 * 255)  # neighbours are black and white
        return torch.full((1, 3, *sketch.shape[2:]), colors[-1], dtype=torch.uint8)

    painted = paint_tiles(paint, *inked(32, 128), 32, pixels(3, 32, 128))[0, 0].int()
    assert colors == [0, 255, 0, 255, 0]  # every 24 pixels
    assert painted.max() - painted.min() >= 250
    # The 8 pixels that two tiles share go from one to the other, steepest in the middle: 0.23 of 255.
    steps = painted.diff(dim=1).abs()
    assert steps.max() <= 60
    assert (steps > 0).sum() > 0.2 * steps.numel()
    assert torch.equal(painted, painted[:1].expand_as(painted))


def test_tiles_without_a_line_or_a_hint_are_those_of_the_backdrop():
    sketch, hint = pixels(1, 32, 200, 255), pixels(4, 32, 200)
    sketch[..., 10, 3] = 0
    hint[:, 3, 20, 197] = 1
    painted = paint_tiles(lambda s, _: pixels(3, *s.shape[2:], 40), sketch, hint, 32, pixels(3, 32, 200, 90))[0, 0]
    assert (painted[:, :20] == 40).all()
    assert (painted[:, -20:] == 40).all()
    assert (painted[:, 40:-40] == 90).all()
