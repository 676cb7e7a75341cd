"""Pieces that generator and discriminator share."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from autopainter import seeding
from autopainter.config import Norm
from autopainter.seeding import Use

_GROUP_CHANNELS = 16


def needs_bias(norm: Norm | None) -> bool:
    """Whether a convolution before this normalisation has a use for a bias.

    Instance and batch norm subtract it again: its true gradient is 0, and Adam would make steps of rounding errors.
    """
    return norm in (None, "group")


def norm_layer(kind: Norm, channels: int) -> nn.Module:
    """A normalisation layer with learned scale and shift.

    `instance` is the default: the authors train at batch size 1, where batch norm is instance norm, and it does not
    couple the samples of a batch, so the microbatch and the number of workers change nothing.
    """
    match kind:
        case "instance":
            return _InstanceNorm(channels, affine=True)
        case "batch":
            return nn.SyncBatchNorm(channels) if torch.cuda.is_available() else nn.BatchNorm2d(channels)
        case "group":
            return nn.GroupNorm(math.gcd(channels, max(channels // _GROUP_CHANNELS, 1)), channels)


class _InstanceNorm(nn.InstanceNorm2d):
    """Instance norm that keeps the memory order of its input; torch's own gives out channels first, to be undone next.

    It is given one long row a channel: on images of height and width, the gradients of torch 2.13 are wrong on a CPU if
    there is one sample and the gradient that arrives is channels-last.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = F.instance_norm(input.flatten(2), weight=self.weight, bias=self.bias, eps=self.eps)
        out = rows.unflatten(2, input.shape[2:])
        last = input.is_contiguous(memory_format=torch.channels_last)
        return out.contiguous(memory_format=torch.channels_last) if last else out


class KeyedDropout(nn.Module):
    """Dropout whose mask is a function of each sample's key, so it can be computed twice and in any batch."""

    def __init__(self, probability: float, layer: int) -> None:
        super().__init__()
        self.probability = probability
        self.salt = seeding.key(Use.DROPOUT, layer) >> 1

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """Drop values of ``x`` [B, C, H, W] by ``keys`` int64 [B]; no keys: no dropout."""
        if keys is None or self.probability == 0:
            return x
        kept = seeding.uniform(keys ^ self.salt, x.shape[1:]) >= self.probability
        return x * kept.to(x.dtype) / (1 - self.probability)


def initialise(network: nn.Module, seed: int, index: int) -> None:
    """Weights from N(0, 0.02), biases 0 (pix2pix, arXiv 1611.07004, appendix 6.2), as a function of the seed."""
    generator = torch.Generator().manual_seed(seeding.key(seed, Use.WEIGHTS, index) >> 1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
