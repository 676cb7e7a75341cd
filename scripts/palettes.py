"""One sketch painted in four palettes: held-out sketches with their own hints, whose hues are then turned.

It prints how far the painting is from the hints' colours where they lie, beside a painting that was given none.

    .venv/bin/python scripts/palettes.py --run s3://autopainter/runs/quickstart-64 -o palettes.png
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from autopainter.data import manifest as manifests
from autopainter.data import pictures
from autopainter.data.samples import turn_hues
from autopainter.data.stream import validation_batches
from autopainter.evaluate.metrics import hint_error
from autopainter.paint import Painter
from autopainter.sheet import grid, hints_on_sketch, picture

TURNS = (0, 90, 180, 270)
"""Degrees on the colour circle."""


def turned(hint: torch.Tensor, degrees: int) -> torch.Tensor:
    """Hints uint8 [4, H, W] with the hues of their colours turned."""
    colors = turn_hues(np.ascontiguousarray(hint[:3].permute(1, 2, 0).numpy()), degrees)
    return torch.cat([torch.from_numpy(colors).permute(2, 0, 1) * hint[3:], hint[3:]])


def main() -> None:
    """Paint, print, write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="Folder or s3:// URI of a trained run.")
    parser.add_argument("--samples", type=int, default=4, help="Sketches: those with the most hints.")
    parser.add_argument("--columns", type=int, default=2, help="Sketches side by side.")
    parser.add_argument("--tile", type=int, default=128, help="Edge of a picture in the sheet.")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="PNG")
    options = parser.parse_args()
    painter = Painter.load(options.run)
    manifest = manifests.load(painter.config.data.manifest)
    found = [
        (float(hint[3].float().mean()), number, sketch, hint)
        for batch in validation_batches(manifest, painter.config, 64)
        for number, sketch, hint in zip(batch.keys, batch.sketch, batch.hint, strict=True)
    ]
    rows, with_hints, without = [], [], []
    for _, _, sketch, hint in sorted(found, key=lambda one: one[:2], reverse=True)[: options.samples]:
        palettes = torch.stack([turned(hint, degrees) for degrees in TURNS])
        painted = painter.batch(sketch.expand(len(palettes), -1, -1, -1), palettes)
        (plain,) = painter.batch(sketch[None], torch.zeros_like(hint)[None])
        rows += [
            [picture(sketch), *(hints_on_sketch(sketch, palette) for palette in palettes)],
            [picture(plain), *(picture(image) for image in painted)],
        ]
        with_hints += hint_error(painted, palettes).tolist()
        without += hint_error(plain.expand_as(painted), palettes).tolist()
    print(f"mean colour error inside the hints, of 255: {np.mean(with_hints):.1f}")
    print(f"of paintings without them: {np.mean(without):.1f}")
    headings = ["sketch, no hints", *(f"hues + {degrees}" if degrees else "its own" for degrees in TURNS)]
    pictures.write_png(options.output, grid(headings, rows, columns=options.columns, tile=options.tile))


if __name__ == "__main__":
    main()
