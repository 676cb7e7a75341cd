"""Whether tiles show in a painting: sketches painted at once, in tiles side by side, and in blended tiles.

    autopainter pack openmoji FOLDER --size 256 --limit 300
    mkdir SKETCHES; tar -xf FOLDER/train-00000.tar -C SKETCHES --wildcards '*.sketch.png'
    python scripts/measure_seams.py --run RUN SKETCHES

The step is the mean difference of the two pixels beside a place where a tile begins or ends, in grey levels of 8 bit
RGB. In the picture painted at once there is nothing there but what is in the picture itself.
"""

from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from autopainter import tiling
from autopainter.data import pictures
from autopainter.paint import Painter
from autopainter.sketches import plan, read_sketch

Image = NDArray[np.uint8]


def seams(length: int, tile: int) -> set[int]:
    """Where tiles begin or end in one direction, inside the picture."""
    starts = tiling.positions(length, tile)
    return {place for start in starts for place in (start, start + tile)} - {0, length}


def step_at(picture: Image, tile_edges: set[int]) -> float:
    """Mean step across these columns and, in a square picture, across these rows."""
    views = picture.astype(np.int16), picture.astype(np.int16).swapaxes(0, 1)
    return float(np.mean([np.abs(view[:, x] - view[:, x - 1]).mean() for view in views for x in tile_edges]))


def side_by_side(painter: Painter, sketch: Image, tile: int) -> Image:
    """Painted in tiles that do not overlap."""
    painted = np.empty((*sketch.shape, 3), np.uint8)
    for top in range(0, len(sketch), tile):
        for left in range(0, sketch.shape[1], tile):
            part = np.s_[top : top + tile, left : left + tile]
            painted[part] = painter.paint(sketch[part], tiled=False)
    return painted


@click.command()
@click.argument("sketches", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--run", required=True, help="Folder or s3:// URI of a run.")
@click.option("--times", type=click.IntRange(min=2), default=4, show_default=True, help="Edge, in trained sizes.")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Sketches that are painted.")
def main(sketches: tuple[Path, ...], run: str, times: int, limit: int) -> None:
    """Measure the seams in paintings of square sketches."""
    painter = Painter.load(run)
    tile = painter.config.data.image_size
    size = tile * times
    abutting, overlapping = set(range(tile, size, tile)), seams(size, tile)
    steps = []
    for job in plan(sketches, None, Path("unused"))[:limit]:
        sketch = pictures.resize(read_sketch(job.sketch), size, size)
        at_once = painter.paint(sketch, tiled=False)
        beside, blended = side_by_side(painter, sketch, tile), painter.paint(sketch, tiled=True)
        steps.append([step_at(beside, abutting), step_at(at_once, abutting),
                      step_at(blended, overlapping), step_at(at_once, overlapping)])  # fmt: skip
    side, once, blend, same = np.mean(steps, axis=0)
    click.echo(f"{len(steps)} sketches of {size}x{size}, tiles of {tile}x{tile}, {run}, step {painter.step}")
    click.echo(f"side by side {side:6.2f}   painted at once, same places {once:6.2f}")
    click.echo(f"blended      {blend:6.2f}   painted at once, same places {same:6.2f}")


if __name__ == "__main__":
    main()
