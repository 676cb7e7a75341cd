"""The generator: pix2pix's U-Net (Isola et al. 2017, arXiv 1611.07004, appendix 6.1.1) on sketch and hints."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autopainter.config import Norm, Recompute, Upsampling
from autopainter.models.layers import KeyedDropout, needs_bias, norm_layer

INPUT_CHANNELS = 5
"""Sketch, hint R, G, B, hint mask."""
_MAX_LEVELS = 8
_DROPOUT_BLOCKS = 3


def levels_for(size: int) -> int:
    """Stride-2 levels for images of edge ``size``: as many as divide it evenly, at most 8 (8 at 512)."""
    twos = (size & -size).bit_length() - 1
    return min(twos, _MAX_LEVELS)


class _Down(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Norm | None, activate: bool) -> None:
        super().__init__()
        self.activation = nn.LeakyReLU(0.2) if activate else nn.Identity()
        self.conv = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=needs_bias(norm))
        self.norm = norm_layer(norm, outputs) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.conv(self.activation(x)))
        return out


class _ResizeConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias))


class _Up(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, norm: Norm | None, dropout: KeyedDropout | None, upsampling: Upsampling
    ) -> None:
        super().__init__()
        bias = needs_bias(norm)
        self.conv = (
            nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=bias)
            if upsampling == "transposed"
            else _ResizeConv(inputs, outputs, bias)
        )
        self.norm = norm_layer(norm, outputs) if norm else nn.Identity()
        self.dropout = dropout

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None, keys: torch.Tensor | None) -> torch.Tensor:
        joined = x if skip is None else torch.cat([x, skip], dim=1)
        out: torch.Tensor = self.norm(self.conv(torch.relu(joined)))
        return self.dropout(out, keys) if self.dropout else out


class UNet(nn.Module):
    """Encoder and decoder of 4x4 convolutions of stride 2 with skips between equal sizes.

    Args:
        levels: stride-2 levels; the image's edges must be multiples of 2**levels.
        width: channels of the first level, doubled at each level up to 8 * width.
        norm: normalisation; none after the first and at the innermost convolution, where a map can be 1x1.
        dropout: probability in the three innermost decoder blocks.
        upsampling: how the decoder doubles a map: by a 4x4 transposed convolution of stride 2, or by nearest pixels and
            a 3x3 convolution, which weighs all places alike (Odena et al. 2016, "Deconvolution and checkerboard
            artifacts").
        recompute: blocks whose activations are recomputed in the backward pass instead of kept.
    """

    def __init__(
        self,
        levels: int,
        width: int,
        norm: Norm,
        dropout: float,
        upsampling: Upsampling = "transposed",
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        self.levels = levels
        self.recompute(recompute)
        widths = [min(width << level, 8 * width) for level in range(levels)]
        self.down = nn.ModuleList(
            _Down(
                inputs=widths[level - 1] if level else INPUT_CHANNELS,
                outputs=widths[level],
                norm=norm if 0 < level < levels - 1 else None,
                activate=level > 0,
            )
            for level in range(levels)
        )
        self.up = nn.ModuleList(
            _Up(
                inputs=widths[level] * (1 if level == levels - 1 else 2),
                outputs=widths[level - 1] if level else 3,
                norm=norm if level else None,
                dropout=KeyedDropout(dropout, level) if level > 0 and level >= levels - _DROPOUT_BLOCKS else None,
                upsampling=upsampling,
            )
            for level in range(levels)
        )

    def recompute(self, blocks: Recompute) -> None:
        """Choose the blocks whose activations are recomputed: none, the two largest levels, or all."""
        self.recomputed = {"none": 0, "outer": 2, "all": self.levels}[blocks]

    def forward_order(self) -> list[nn.Parameter]:
        """All parameters in the order in which the forward pass uses them."""
        return [parameter for block in (*self.down, *reversed(self.up)) for parameter in block.parameters()]

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        """Paint.

        Args:
            x: [B, 5, H, W], H and W multiples of 2**levels: sketch in [-1, 1], hint RGB in [-1, 1] where the mask is
                1 and 0 elsewhere, hint mask in {0, 1}.
            keys: int64 [B], the samples' dropout keys; none: no dropout.

        Returns:
            [B, 3, H, W] RGB in [-1, 1].
        """
        skips: list[torch.Tensor] = []
        for level, down in enumerate(self.down):
            x = self._block(level, down, x)
            skips.append(x)
        x = skips.pop()
        for level in reversed(range(self.levels)):
            skip = None if level == self.levels - 1 else skips.pop()
            x = self._block(level, self.up[level], x, skip, keys)
        return torch.tanh(x.float())  # bfloat16 has fewer steps near 1 than a pixel has

    def _block(self, level: int, block: nn.Module, *inputs: torch.Tensor | None) -> torch.Tensor:
        if level < self.recomputed and torch.is_grad_enabled():
            # Nothing inside draws from a generator, so there is no random state to keep.
            out: torch.Tensor = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            out = block(*inputs)
        return out
