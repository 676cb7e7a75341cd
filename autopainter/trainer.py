"""One training step: discriminator, then generator, over microbatches, with every random choice given by the batch."""

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from autopainter import arithmetic, compiling, memory, schedule
from autopainter.adam import Adam
from autopainter.config import Config
from autopainter.data.stream import Batch
from autopainter.data.upload import Upload
from autopainter.models import vgg
from autopainter.models.layers import initialise
from autopainter.models.patchgan import PatchGAN
from autopainter.models.unet import UNet, levels_for
from autopainter.objective import DISCRIMINATOR_TERMS, GENERATOR_TERMS, Objective, with_sum
from autopainter.parallel import GradientBuffer, Request
from autopainter.pixels import network_input, to_pixels, to_unit

SCALARS = (*DISCRIMINATOR_TERMS, *GENERATOR_TERMS, "discriminator/gradient_norm", "generator/gradient_norm")
"""What a step measures over the global batch: means of losses and accuracies, and norms of the mean gradients.

Those of the generator are 0 in a step that trains the discriminator alone.
"""
_CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_

T = TypeVar("T")


def build_generator(config: Config) -> UNet:
    """The generator of a configuration, with the weights that its seed gives."""
    network = UNet(
        levels=levels_for(config.data.image_size),
        width=config.model.generator_width,
        norm=config.model.norm,
        dropout=config.model.dropout,
        upsampling=config.model.upsampling,
        recompute=config.train.activation_checkpointing,
    )
    initialise(network, config.train.seed, 0)
    return network


class Trainer:
    """Networks, optimisers and the step that changes them.

    Its whole state is ``state()``: everything else is a function of the configuration and the step.

    Args:
        ladder: where to step down when the GPU's memory is too small; none: that is an error.
    """

    def __init__(self, config: Config, device: torch.device, ladder: memory.GpuLadder | None = None) -> None:
        self.config = config
        self.device = device
        self.ladder = ladder
        self._step = 0
        self._upload = Upload(device)
        self.generator = build_generator(config)
        self._place(self.generator)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)
        self.discriminator = PatchGAN(config.model.discriminator_width, config.model.norm)
        initialise(self.discriminator, config.train.seed, 1)
        self._place(self.discriminator)
        self.features: vgg.VGGFeatures | None = None
        if config.loss.feature_weight > 0:
            assert config.loss.vgg_weights is not None  # the configuration is validated
            self.features = vgg.load(config.loss.vgg_weights, config.loss.feature_layer, config.loss.vgg_sha256)
            self._place(self.features)
        self.generator_gradients = GradientBuffer(self.generator.forward_order(), len(GENERATOR_TERMS))
        self.discriminator_gradients = GradientBuffer(
            self.discriminator.parameters(), len(DISCRIMINATOR_TERMS) + len(Request)
        )
        self.objective = Objective(config, device, self.discriminator, self.features)
        if config.train.compile:
            for network in (self.generator, self.features, self.discriminator):
                # The gradient penalty needs second derivatives, which compiled code does not give.
                penalised = network is self.discriminator and config.loss.adversarial == "wgan-gp"
                if network and not penalised:
                    compiling.compile_network(network)
        self.optimizers = {
            name: Adam(network.named_parameters(), betas=(config.train.beta1, config.train.beta2))
            for name, network in (("generator", self.generator), ("discriminator", self.discriminator))
        }

    def step(self, step: int, batch: Batch, requests: Sequence[float] = ()) -> torch.Tensor:
        """Do one step.

        Args:
            step: its number, from 0.
            batch: this worker's samples of it.
            requests: what this worker asks of all workers, a number above 0 for each ``Request``; none: nothing.

        Returns:
            float32 [len(SCALARS) + len(Request)], on the device: the values that ``SCALARS`` names, over the global
            batch, and above 0 for each request that any worker made.

        Raises:
            torch.OutOfMemoryError: the memory is too small even on the lowest rung of the ladder.
        """
        self._step = step
        batch = self._upload(batch)
        painted = self._within_memory(lambda: self._discriminator_gradients(batch))
        asked = self.discriminator_gradients.scalars[len(DISCRIMINATOR_TERMS) :]
        if any(requests):
            asked.copy_(torch.tensor(requests))
        norms = [self._update("discriminator", self.discriminator_gradients, step)]

        if schedule.trains_generator(self.config, step):
            kept = [painted]  # a list, so that a failed attempt does not hold the graph for the next one
            del painted
            self._within_memory(lambda: self._generator_gradients(batch, kept.pop() if kept else None))
            updates = schedule.generator_updates(self.config, step)
            norms.append(self._update("generator", self.generator_gradients, updates))
            self._update_average(step)
        else:
            self.generator_gradients.zero()
            norms.append(torch.zeros_like(norms[0]))
        means = self.discriminator_gradients.scalars[: len(DISCRIMINATOR_TERMS)], self.generator_gradients.scalars
        return torch.cat([*means, torch.stack(norms), asked])

    def _update(self, name: str, buffer: GradientBuffer, updates: int) -> torch.Tensor:
        """Let a network make its step after so many; the norm of its gradient over the global batch."""
        buffer.average()
        norm = buffer.gradients.norm()
        if self.config.train.clip_norm is not None:
            buffer.gradients.mul_((self.config.train.clip_norm / (norm + _CLIP_EPSILON)).clamp(max=1))
        self.optimizers[name].step(updates, schedule.learning_rate(self.config, self._step))
        return norm

    def _within_memory(self, compute: Callable[[], T]) -> T:
        """Compute, as often as it takes to find a rung of the ladder with memory enough.

        Other workers need not know: they wait in the exchange of the gradients, which are the same on every rung.
        """
        while True:
            try:
                self.generator.recompute(self._rung.recompute)
                return compute()
            except RuntimeError as error:
                if memory.ran_out(error) != "gpu":
                    raise
                reason = str(error).strip().splitlines()[0][:200]
            # Only here, when the exception is gone, does nothing refer to the tensors of the failed attempt.
            memory.free()
            if self.ladder is None or not self.ladder.step_down(self._step, reason):
                raise torch.OutOfMemoryError(f"GPU memory is too small even with {self._rung}: {reason}")

    @property
    def _rung(self) -> memory.Rung:
        return self.ladder.rung if self.ladder else memory.rungs(self.config, 1)[0]

    def _parts(self, batch: Batch) -> list[Batch]:
        size = self._rung.microbatch
        return [batch.part(slice(first, first + size)) for first in range(0, len(batch.keys), size)]

    def _discriminator_gradients(self, batch: Batch) -> torch.Tensor | None:
        """Fill the discriminator's gradients; the painted batch with its graph if the generator can use it."""
        parts, painted = self._parts(batch), None
        keep = len(parts) == 1 and schedule.trains_generator(self.config, self._step)
        self.discriminator_gradients.zero()
        for number, part in enumerate(parts, 1):
            condition, target = self._inputs(part)
            with torch.set_grad_enabled(keep), arithmetic.autocast(self.config, self.device):
                painted = self.generator(condition, part.dropout)
            terms = self.objective.discriminator_terms(condition, target, painted.detach())
            terms[0] = terms[0] + self.objective.penalty(condition, target, painted.detach(), part.dropout)
            share = len(part.keys) / len(batch.keys)
            self.discriminator_gradients.backward(terms[0] * share, last=number == len(parts))
            means = self.discriminator_gradients.scalars[: len(DISCRIMINATOR_TERMS)]
            means += torch.stack([term.detach() for term in terms]) * share
        return painted if keep else None

    def _generator_gradients(self, batch: Batch, painted: torch.Tensor | None) -> None:
        """Fill the generator's gradients.

        With one part, what was painted for the discriminator serves the generator too; with more it is painted again
        (the same, dropout included), so that only one part's activations are alive at a time.
        """
        parts = self._parts(batch)
        self.generator_gradients.zero()
        for number, part in enumerate(parts, 1):
            condition, target = self._inputs(part)
            if painted is None or len(parts) > 1:
                with arithmetic.autocast(self.config, self.device):
                    painted = self.generator(condition, part.dropout)
            share = len(part.keys) / len(batch.keys)
            # Term after term down to the picture, so that only one term's activations are alive beside the generator's.
            picture, terms = painted.detach().requires_grad_(), []
            for weight, term in self.objective.generator_terms(condition, target, picture, self._step):
                if term.requires_grad:
                    (weight * share * term).backward(inputs=[picture])
                terms.append((weight, term.detach()))
            self.generator_gradients.backward(painted, picture.grad, last=number == len(parts))
            self.generator_gradients.scalars += with_sum(terms) * share

    @torch.no_grad()
    def terms(self, batch: Batch) -> dict[str, float]:
        """The means among ``SCALARS`` over a batch, with the networks as they are; nothing is changed.

        Batch norm takes its running statistics, so that one sample can be looked at alone. The discriminator's loss is
        without the gradient penalty.
        """
        batch = batch.to(self.device)
        condition, target = self._inputs(batch)
        networks = self.generator, self.discriminator
        for network in networks:
            network.eval()
        with arithmetic.autocast(self.config, self.device):
            painted = self.generator(condition, batch.dropout)
        discriminator = self.objective.discriminator_terms(condition, target, painted)
        generator = with_sum(self.objective.generator_terms(condition, target, painted, batch.step))
        values = torch.cat([torch.stack(discriminator), generator])
        for network in networks:
            network.train()
        return dict(zip(SCALARS, values.tolist(), strict=False))

    @torch.no_grad()  # without it, the average would keep the graph of every step since the start
    def _update_average(self, step: int) -> None:
        decay = schedule.average_decay(self.config, step)
        torch._foreach_lerp_(list(self.average.parameters()), list(self.generator.parameters()), 1 - decay)
        for mean, buffer in zip(self.average.buffers(), self.generator.buffers(), strict=True):
            mean.copy_(buffer)

    @torch.no_grad()
    def paint(self, sketch: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        """Paint with the averaged generator: uint8 [B, 1, H, W] and [B, 4, H, W] -> uint8 [B, 3, H, W]."""
        self.average.eval()
        return self._within_memory(lambda: self._paint(sketch, hint))

    def _paint(self, sketch: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
        painted = []
        for sketches, hints in zip(*(pixels.split(self._rung.microbatch) for pixels in (sketch, hint)), strict=True):
            condition = network_input(sketches.to(self.device), hints.to(self.device))
            with arithmetic.autocast(self.config, self.device):
                painted.append(to_pixels(self.average(self._format(condition))).cpu())
        return torch.cat(painted)

    def state(self) -> dict[str, torch.Tensor]:
        """All tensors that a later step depends on, by name; live, not copies."""
        tensors: dict[str, torch.Tensor] = {}
        for name, network in self._networks().items():
            tensors |= {f"{name}.{entry}": tensor for entry, tensor in network.state_dict().items()}
        for name, optimizer in self.optimizers.items():
            tensors |= {f"optimizer.{name}.{entry}": tensor for entry, tensor in optimizer.state().items()}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from what ``state`` gave.

        Raises:
            KeyError: a tensor is missing.
        """
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])

    def _networks(self) -> dict[str, torch.nn.Module]:
        return {"generator": self.generator, "average": self.average, "discriminator": self.discriminator}

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._format(network_input(batch.sketch, batch.hint)), self._format(to_unit(batch.color))

    def _format(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if self.config.train.channels_last else tensor

    def _place(self, network: torch.nn.Module) -> None:
        network.to(self.device)
        if self.config.train.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
