"""The terms of Auto-Painter's objective (arXiv 1705.01908, section 3):

    L = w_p L_p + w_f L_f + w_G L_G + w_tv L_tv

Every term is a mean over batch, channels and pixels in float32, so a weight means the same at every image size and
batch size.
"""

from typing import Literal

import torch
import torch.nn.functional as F

Adversarial = Literal["gan", "lsgan", "hinge"]

_TV_EPSILON = 1e-8  # keeps the gradient of the square root finite on flat areas


def pixel(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_p: mean absolute difference of images in [-1, 1]."""
    return (painted.float() - target.float()).abs().mean()


def feature(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_f: mean squared difference of the feature maps phi(G(x)) and phi(y)."""
    return (painted.float() - target.float()).square().mean()


def total_variation(painted: torch.Tensor) -> torch.Tensor:
    """L_tv: mean of sqrt((y[i+1,j] - y[i,j])^2 + (y[i,j+1] - y[i,j])^2) over the *painted* image.

    Args:
        painted: [B, C, H, W], H and W at least 2.
    """
    y = painted.float()
    down = y[..., 1:, :-1] - y[..., :-1, :-1]
    right = y[..., :-1, 1:] - y[..., :-1, :-1]
    return (down.square() + right.square() + _TV_EPSILON).sqrt().mean()


def generator_adversarial(fake_logits: torch.Tensor, kind: Adversarial) -> torch.Tensor:
    """L_G: how far the discriminator is from taking paintings for real.

    `gan`: -log D(G), the non-saturating form (Goodfellow et al. 2014, section 3); `lsgan`: (D(G) - 1)^2 (Mao et al.
    2017, equation 9); `hinge`: -D(G) (Lim and Ye 2017).
    """
    logits = fake_logits.float()
    match kind:
        case "gan":
            return F.softplus(-logits).mean()
        case "lsgan":
            return (logits - 1).square().mean()
        case "hinge":
            return -logits.mean()


def discriminator(real_logits: torch.Tensor, fake_logits: torch.Tensor, kind: Adversarial) -> torch.Tensor:
    """The discriminator's loss, the mean of its parts for real and painted images.

    Halving the sum slows the discriminator against the generator (pix2pix, section 3.3).
    """
    real, fake = real_logits.float(), fake_logits.float()
    match kind:
        case "gan":
            parts = F.softplus(-real).mean(), F.softplus(fake).mean()
        case "lsgan":
            parts = (real - 1).square().mean(), fake.square().mean()
        case "hinge":
            parts = F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    return (parts[0] + parts[1]) / 2
