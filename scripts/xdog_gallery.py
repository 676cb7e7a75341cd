"""Draw docs/xdog-gallery.png: one picture, drawn by XDoG with one parameter varied in each row, and with jitter.

python scripts/xdog_gallery.py [-o PNG] [--picture FILE]
"""

from dataclasses import asdict, replace
from pathlib import Path

import click
import cv2
import numpy as np

from autopainter import seeding
from autopainter.data import pictures
from autopainter.data.sketch import AUTHORS, XDoG, jittered, xdog
from autopainter.data.sources import OpenMoji

EDGE = 160
LABEL = 18
VARIED = {
    "sigma": (0.5, 1.0, 1.5, 2.5, 4.0),
    "k": (1.3, 1.6, 2.0, 3.0, 5.0),
    "gamma": (0.90, 0.94, 0.97, 0.99, 1.0),
    "phi": (0.02, 0.05, 0.2, 1.0, 200.0),
    "epsilon": (-10.0, -2.0, 0.1, 2.0, 10.0),
    "sharpness": (0.5, 1.0, 3.0, 6.0, 12.0),
}
JITTERS = (0.5, 1.0)


def sample(size: int) -> pictures.Image:
    """A drawing of OpenMoji (CC BY-SA 4.0) with large and small shapes, in flat and in shaded colours."""
    source = OpenMoji(size)
    item = next(item for item in source.listing().items if item.key == "1F42F")
    (pair,) = source.pairs(item, source.fetch(item))
    shade = np.linspace(0.75, 1.0, size)[:, None, None]  # a gradient, which must not become a line
    return np.rint(pair.color * shade).astype(np.uint8)


def tile(image: pictures.Image, text: str) -> pictures.Image:
    """A picture, uint8 [EDGE, EDGE] or [EDGE, EDGE, 3], with a line of text below it."""
    color = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
    label = np.full((LABEL, EDGE, 3), 255, np.uint8)
    cv2.putText(label, text, (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    return cv2.copyMakeBorder(np.vstack([color, label]), 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=(225, 225, 225))


def row(color: pictures.Image, name: str) -> pictures.Image:
    """Drawings with one parameter varied; the authors' value is marked."""
    drawn = [(value, xdog(color, replace(AUTHORS, **{name: value}))) for value in VARIED[name]]
    own = asdict(AUTHORS)[name]
    return np.hstack([tile(image, f"{name} {value:g}{' *' if value == own else ''}") for value, image in drawn])


def jittered_row(color: pictures.Image, jitter: float, params: XDoG) -> pictures.Image:
    """Drawings of five samples."""
    return np.hstack([
        tile(xdog(color, jittered(params, jitter, seeding.generator(number))), f"jitter {jitter:g}, sample {number}")
        for number in range(5)
    ])  # fmt: skip


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), default=Path("docs/xdog-gallery.png"))
@click.option("--picture", type=click.Path(path_type=Path), help="Another picture.")
def main(output: Path, picture: Path | None) -> None:
    """Draw the gallery."""
    color = pictures.squares(pictures.decode(picture.read_bytes()), EDGE, "crop")[""] if picture else sample(EDGE)
    rows = [row(color, name) for name in VARIED] + [jittered_row(color, jitter, AUTHORS) for jitter in JITTERS]
    head = np.full((EDGE + LABEL + 4, rows[0].shape[1], 3), 255, np.uint8)
    head[:, : EDGE + 4] = tile(color, "picture")
    head[:, EDGE + 4 : 2 * (EDGE + 4)] = tile(xdog(color), "authors' parameters (*)")
    pictures.write_png(output, np.vstack([head, *rows]))
    click.echo(output)


if __name__ == "__main__":
    main()
