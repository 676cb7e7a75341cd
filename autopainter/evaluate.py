"""Scores on the validation split, with and without hints, beside what the bare sketch would score."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from autopainter.data import manifest as manifests
from autopainter.data import pictures
from autopainter.data.stream import Batch, validation_batches
from autopainter.paint import Painter
from autopainter.sheet import contact_sheet

_BATCH = 16
_SHEET_COLUMNS = 2
_SHEET_TILE = 96

Paint = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Score:
    """Means over images.

    Attributes:
        psnr: peak signal-to-noise ratio in dB, of 8 bit RGB; higher is better.
        error: mean absolute difference of 8 bit RGB values, in [0, 255]; lower is better.
    """

    psnr: float = 0.0
    error: float = 0.0
    images: int = 0

    def add(self, painted: torch.Tensor, target: torch.Tensor) -> "Score":
        """Take in a batch, both uint8 [B, 3, H, W]."""
        difference = painted.float() - target.float()
        noise = difference.square().mean(dim=(1, 2, 3)).clamp(min=1e-3)  # a perfect image is 78 dB, not infinity
        count = self.images + len(painted)
        self.psnr += ((10 * (255.0**2 / noise).log10()) - self.psnr).sum().item() / count
        self.error += (difference.abs().mean(dim=(1, 2, 3)) - self.error).sum().item() / count
        self.images = count
        return self


def paint_both(paint: Paint, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Paint a batch without and with its hints: two uint8 [B, 3, H, W]; ``paint`` takes sketches and hints."""
    return paint(batch.sketch, torch.zeros_like(batch.hint)), paint(batch.sketch, batch.hint)


def evaluate_run(run_uri: str, step: int | None, sheet: Path | None, samples: int) -> dict[str, Score]:
    """Score a run on its whole validation split.

    Args:
        run_uri: folder or s3:// URI of the run.
        step: a saved step; none: the newest.
        sheet: PNG file for a contact sheet.
        samples: samples in the sheet: the first of the split whose sketches differ.

    Returns:
        Scores by name: ``sketch`` (what the bare sketch would score), ``painted`` and ``painted with hints``.
    """
    painter = Painter.load(run_uri, step)
    manifest = manifests.load(painter.config.data.manifest)
    scores = {"sketch": Score(), "painted": Score(), "painted with hints": Score()}
    picked: dict[bytes, tuple[Batch, torch.Tensor, torch.Tensor]] = {}
    for batch in validation_batches(manifest, painter.config, _BATCH):
        plain, hinted = paint_both(painter.batch, batch)
        for name, painted in zip(scores, (batch.sketch.expand_as(batch.color), plain, hinted), strict=True):
            scores[name].add(painted, batch.color)
        for row in range(len(batch.keys)):
            rows = slice(row, row + 1)
            if len(picked) < samples:
                picked.setdefault(batch.sketch[row].numpy().tobytes(), (batch.part(rows), plain[rows], hinted[rows]))
    if sheet:
        columns = _SHEET_COLUMNS if len(picked) > 1 else 1
        pictures.write_png(sheet, contact_sheet(picked.values(), columns=columns, tile=_SHEET_TILE))
    return scores
