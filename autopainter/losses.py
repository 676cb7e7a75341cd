"""The terms of Auto-Painter's objective (arXiv 1705.01908, section 3):

    L = w_p L_p + w_f L_f + w_G L_G + w_tv L_tv

Every term is a mean over batch, channels and pixels in float32, so a weight means the same at every image size and
batch size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from autopainter.config import Adversarial

_CHUNK_VALUES = 1 << 23  # 32 MiB of float32: a sample of relu2_2 at 512 px
_TV_EPSILON = 1e-8  # keeps the gradient of the square root finite on flat areas


def pixel(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_p: mean absolute difference of images in [-1, 1]."""
    return (painted.float() - target.float()).abs().mean()


class _MeanSquare(torch.autograd.Function):
    """Mean of (painted - target)^2 in float32, some samples at a time, without float32 copies of all of them."""

    @staticmethod
    def forward(ctx: Any, painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(painted, target)
        sums = [(a.float() - b.float()).square_().sum() for a, b in _some_samples(painted, target)]
        return torch.stack(sums).sum() / painted.numel()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        painted, target = ctx.saved_tensors
        factor, found = slope * (2 / painted.numel()), torch.empty_like(painted)
        for out, a, b in _some_samples(found, painted, target):
            out.copy_((a.float() - b.float()).mul_(factor))
        return found, -found if ctx.needs_input_grad[1] else None


def _some_samples(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same samples of all tensors, as many as make _CHUNK_VALUES."""
    samples = max(_CHUNK_VALUES // tensors[0][0].numel(), 1)
    return zip(*(tensor.split(samples) for tensor in tensors), strict=True)


def feature(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_f: mean squared difference of the feature maps phi(G(x)) and phi(y).

    The maps are the largest tensors of a step: nothing is kept beside them.
    """
    value: torch.Tensor = _MeanSquare.apply(painted, target)
    return value


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
    2017, equation 9); `hinge` (Lim and Ye 2017) and `wgan-gp` (Gulrajani et al. 2017, algorithm 1): -D(G).
    """
    logits = fake_logits.float()
    match kind:
        case "gan":
            return F.softplus(-logits).mean()
        case "lsgan":
            return (logits - 1).square().mean()
        case "hinge" | "wgan-gp":
            return -logits.mean()


def discriminator(real_logits: torch.Tensor, fake_logits: torch.Tensor, kind: Adversarial) -> torch.Tensor:
    """The discriminator's loss: the mean of its parts for real and painted images; for `wgan-gp` their sum.

    Halving the sum slows the discriminator against the generator (pix2pix, section 3.3). The critic of `wgan-gp`, which
    estimates a distance, is not slowed; its ``gradient_penalty`` is to be added.
    """
    real, fake = real_logits.float(), fake_logits.float()
    match kind:
        case "gan":
            parts = F.softplus(-real).mean(), F.softplus(fake).mean()
        case "lsgan":
            parts = (real - 1).square().mean(), fake.square().mean()
        case "hinge":
            parts = F.relu(1 - real).mean(), F.relu(1 + fake).mean()
        case "wgan-gp":
            return fake.mean() - real.mean()
    return (parts[0] + parts[1]) / 2


def gradient_penalty(
    critic: Callable[[torch.Tensor], torch.Tensor], real: torch.Tensor, fake: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """Mean of (|grad D(x)| - 1)^2 on lines between true and painted inputs (Gulrajani et al. 2017, equation 3).

    The norm is one a sample, over all other axes. D of a sample is the mean of its patches' logits, as in the loss.

    Args:
        critic: [B, C, H, W] to logits, one or more a sample; samples must not influence each other.
        real: [B, C, H, W], all that the critic sees of the true images: condition and image.
        fake: the same of the painted ones.
        alpha: [B] in [0, 1], the place on each line; 1 is real.
    """
    between = torch.lerp(fake.float(), real.float(), alpha.view(-1, 1, 1, 1)).requires_grad_()
    judged = critic(between).float().flatten(1).mean(dim=1).sum()
    (slopes,) = torch.autograd.grad(judged, between, create_graph=True)
    return (slopes.flatten(1).norm(dim=1) - 1).square().mean()
