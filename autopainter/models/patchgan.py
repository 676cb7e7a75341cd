"""The discriminator: pix2pix's 70x70 PatchGAN (arXiv 1611.07004, appendix 6.1.2)."""

import torch
from torch import nn

from autopainter.config import Norm
from autopainter.models.layers import needs_bias, norm_layer
from autopainter.models.unet import INPUT_CHANNELS


class PatchGAN(nn.Module):
    """Judges every 70x70 patch of a painting, given the sketch and the hints that it was made from.

    Convolutions C64-C128-C256 of stride 2 and C512-1 of stride 1, all 4x4; no sigmoid: the losses take logits.
    """

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        channels = [INPUT_CHANNELS + 3, width, 2 * width, 4 * width, 8 * width]
        layers: list[nn.Module] = []
        for place in range(4):
            stride, bias = 2 if place < 3 else 1, needs_bias(norm if place else None)
            layers.append(nn.Conv2d(channels[place], channels[place + 1], 4, stride, padding=1, bias=bias))
            if place:
                layers.append(norm_layer(norm, channels[place + 1]))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(channels[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, condition: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Logits of "real" for each patch: [B, 1, H/8 - 2, W/8 - 2].

        Args:
            condition: [B, 5, H, W], the generator's input.
            image: [B, 3, H, W] RGB in [-1, 1], painted or true.
        """
        logits: torch.Tensor = self.layers(torch.cat([condition, image], dim=1))
        return logits
