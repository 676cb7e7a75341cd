"""What the networks are trained for: the terms of both networks' losses."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from autopainter import arithmetic, losses, schedule, seeding
from autopainter.config import Config
from autopainter.models.patchgan import PatchGAN
from autopainter.models.vgg import VGGFeatures
from autopainter.seeding import Use

DISCRIMINATOR_TERMS = ("discriminator/loss", "discriminator/accuracy_real", "discriminator/accuracy_fake")
"""What ``Objective.discriminator_terms`` gives; an accuracy is the share of patches taken for what they are."""
GENERATOR_TERMS = (
    "generator/loss", "generator/pixel", "generator/feature", "generator/adversarial", "generator/tv",
)  # fmt: skip
"""The weighted sum of what ``Objective.generator_terms`` gives, then the terms before their weights."""


class Objective:
    """The losses of a configuration.

    Images are float32 [B, C, H, W] in [-1, 1]; ``condition`` is what the generator sees, ``target`` the true picture.

    Args:
        features: the feature network; none: without the feature term.
    """

    def __init__(
        self, config: Config, device: torch.device, discriminator: PatchGAN, features: VGGFeatures | None
    ) -> None:
        self._config, self._device = config, device
        self._discriminator, self._features = discriminator, features

    def discriminator_terms(
        self, condition: torch.Tensor, target: torch.Tensor, painted: torch.Tensor
    ) -> list[torch.Tensor]:
        """The discriminator's loss, without a gradient penalty, and its accuracies."""
        with self._autocast():
            real, fake = self._judge(condition, target, painted)
        loss = losses.discriminator(real, fake, self._config.loss.adversarial)
        return [loss, (real > 0).float().mean(), (fake < 0).float().mean()]

    def penalty(
        self, condition: torch.Tensor, target: torch.Tensor, painted: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor | float:
        """The weighted gradient penalty of `wgan-gp`, in float32; 0 for the other losses.

        Args:
            keys: int64 [B], the samples' dropout keys, which choose the places.
        """
        if self._config.loss.adversarial != "wgan-gp":
            return 0.0
        alpha = seeding.uniform(keys ^ (seeding.key(Use.PENALTY) >> 1), (1,))
        channels = condition.shape[1]
        penalty = losses.gradient_penalty(
            lambda joint: self._discriminator(joint[:, :channels], joint[:, channels:]),
            torch.cat([condition, target], dim=1),
            torch.cat([condition, painted], dim=1),
            alpha,
        )
        return self._config.loss.penalty_weight * penalty

    def generator_terms(
        self, condition: torch.Tensor, target: torch.Tensor, painted: torch.Tensor, step: int
    ) -> Iterator[tuple[float, torch.Tensor]]:
        """The terms of the generator's loss with their weights in a step, each computed when it is asked for."""
        weights = self._config.loss
        yield weights.pixel_weight, losses.pixel(painted, target)
        yield weights.feature_weight, self._feature_loss(painted, target)
        with self._autocast():
            logits = self._discriminator(condition, painted)
        yield weights.adversarial_weight, losses.generator_adversarial(logits, weights.adversarial)
        varying = painted if weights.tv_of == "painted" else painted - target
        yield schedule.tv_weight(self._config, step), losses.total_variation(varying)

    def _judge(self, condition: torch.Tensor, target: torch.Tensor, painted: torch.Tensor) -> Sequence[torch.Tensor]:
        """Logits of true and of painted images."""
        if self._config.model.norm == "batch":  # its statistics are of one kind, not of both
            return [self._discriminator(condition, images) for images in (target, painted)]
        both: torch.Tensor = self._discriminator(torch.cat([condition, condition]), torch.cat([target, painted]))
        return both.chunk(2)

    def _feature_loss(self, painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if self._features is None:
            return painted.new_zeros((), dtype=torch.float32)
        with self._autocast():
            with torch.no_grad():
                wanted = self._features(target)
            return losses.feature(self._features(painted), wanted)

    def _autocast(self) -> torch.autocast:
        return arithmetic.autocast(self._config, self._device)


def with_sum(terms: Iterable[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """The weighted sum of terms, then the terms."""
    factors, values = zip(*terms, strict=True)
    return torch.stack([torch.stack([f * value for f, value in zip(factors, values, strict=True)]).sum(), *values])
