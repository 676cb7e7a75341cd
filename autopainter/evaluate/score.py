"""The scores that cost nothing, which training shows too, and painting a batch without and with its hints."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from autopainter.data.stream import Batch

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
