"""Between stored pixels and what the networks take and give."""

import torch


def network_input(sketch: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
    """The generator's input from stored pixels.

    Args:
        sketch: uint8 [B, 1, H, W].
        hint: uint8 [B, 4, H, W], RGB and a 0/1 mask.

    Returns:
        float32 [B, 5, H, W]: sketch in [-1, 1], hint RGB in [-1, 1] inside the mask and 0 outside, mask.
    """
    mask = hint[:, 3:].float()
    return torch.cat([to_unit(sketch), to_unit(hint[:, :3]) * mask, mask], dim=1)


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to uint8 pixels."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
