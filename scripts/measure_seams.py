"""How far tiles differ from one another, and what of it shows in a painting: sketches painted whole and in tiles.

    autopainter pack openmoji FOLDER --size 256 --limit 40
    tar -xf FOLDER/train-00000.tar -C SKETCHES --wildcards '*.sketch.png'
    python scripts/measure_seams.py --run RUN SKETCHES

Grey levels are those of 8 bit RGB. At each place where a tile begins or ends, "step" is the mean difference of the two
pixels beside it, and "drift" that of the mean colours of the two bands beside it, a sixteenth of a tile wide: a step is
seen as a line, a drift as another colour. "untiled" are the same places in the picture painted whole, where all that
there is is the picture's own.
"""

from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

from autopainter import tiling
from autopainter.paint import Painter
from autopainter.sketches import plan, read_sketch

Image = NDArray[np.uint8]


def seams(length: int, tile: int) -> set[int]:
    """Where tiles begin or end in one direction, inside the picture."""
    starts = tiling.positions(length, tile)
    return {place for start in starts for place in (start, start + tile)} - {0, length}


def across(picture: Image, places: set[int], band: int) -> float:
    """Mean difference of the mean colours of the ``band`` columns on either side of places, in grey levels."""
    values = picture.astype(np.float64)
    sides = [(values[:, x - band : x].mean(axis=1), values[:, x : x + band].mean(axis=1)) for x in places]
    return float(np.mean([np.abs(left - right).mean() for left, right in sides]))


def side_by_side(painter: Painter, sketch: Image, tile: int) -> Image:
    """Painted in tiles that do not overlap."""
    painted = np.empty((*sketch.shape, 3), np.uint8)
    for top in range(0, len(sketch), tile):
        for left in range(0, sketch.shape[1], tile):
            part = np.s_[top : top + tile, left : left + tile]
            painted[part] = painter.paint(sketch[part], tiled=False)
    return painted


@click.command()
@click.argument("sketches", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--run", required=True, help="Folder or s3:// URI of a run.")
@click.option("--step", type=int, help="A saved step; the newest if not given.")
@click.option("--times", type=click.IntRange(min=2), default=4, show_default=True, help="Edge, in trained sizes.")
@click.option("--limit", type=click.IntRange(min=1), default=40, show_default=True, help="Sketches that are painted.")
def main(sketches: tuple[Path, ...], run: str, step: int | None, times: int, limit: int) -> None:
    """Measure the seams of a run's paintings."""
    painter = Painter.load(run, step)
    tile = painter.config.data.image_size
    measured: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for job in plan(sketches, None, Path("unused"))[:limit]:
        sketch = read_sketch(job.sketch, tile * times)
        whole = painter.paint(sketch, tiled=False)
        for name, picture, places in (
            ("side by side", side_by_side(painter, sketch, tile), lambda length: set(range(tile, length, tile))),
            ("blended", painter.paint(sketch, tiled=True), lambda length: seams(length, tile)),
        ):
            for kind, painted in ((name, picture), (f"{name}, untiled", whole)):
                turned = painted.swapaxes(0, 1)
                for view in (painted, turned):
                    if found := places(view.shape[1]):
                        measured[kind].append((across(view, found, 1), across(view, found, tile // 16)))
    click.echo(
        f"{'':28}{'step':>8}{'drift':>8}   ({run}, step {painter.step}; {len(measured['blended']) // 2} sketches)"
    )
    for kind, values in measured.items():
        click.echo(f"{kind:28}{np.mean(values, axis=0)[0]:8.2f}{np.mean(values, axis=0)[1]:8.2f}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
