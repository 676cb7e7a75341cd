"""The training step: against a plain PyTorch one, and that microbatches, workers and resumes change nothing.

Reference: discriminator and generator steps written down with ordinary gradients, ``torch.nn.functional`` losses and
an Adam that is neither fused nor fed by a flat buffer. Whole runs are in other files.
Run: pytest tests/test_trainer.py
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from autopainter import checkpoint, config, parallel
from autopainter.data.stream import Batch
from autopainter.models.patchgan import PatchGAN
from autopainter.parallel import GradientBuffer
from autopainter.storage import open_store
from autopainter.trainer import SCALARS, Trainer, network_input, to_pixels, to_unit

CPU = torch.device("cpu")
SIZE = 32


def settings(feature_weights, *overrides):
    path, sha256 = feature_weights
    return [
        "run.name=test", "run.storage=unused", "data.manifest=unused", f"data.image_size={SIZE}",
        "model.generator_width=4", "model.discriminator_width=4", f"loss.vgg_weights={path}",
        f"loss.vgg_sha256={sha256}", "train.steps=9", "train.global_batch=4", "train.precision=float32", *overrides,
    ]  # fmt: skip


@pytest.fixture
def make(feature_weights):
    """Trainers of the test's configuration with some fields changed."""
    return lambda *overrides: Trainer(config.load(None, settings(feature_weights, *overrides), environment={}), CPU)


def batch(step, rows=4):
    """Random pixels; smooth areas and details, so that nothing about them is special."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.rand(rows, 8, SIZE, SIZE, generator=generator)
    coarse = F.interpolate(torch.rand(rows, 8, 4, 4, generator=generator), SIZE, mode="bilinear")
    pixels = ((0.3 * pixels + 0.7 * coarse) * 255).to(torch.uint8)
    mask = (pixels[:, 7:] > 140).to(torch.uint8)
    hint = torch.cat([pixels[:, 4:7] * mask, mask], dim=1)
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return Batch(step, [f"{step}-{row}" for row in range(rows)], pixels[:, :1], pixels[:, 1:4], hint, keys)


def run(trainer, steps):
    """Scalars of some steps."""
    return torch.stack([trainer.step(step, batch(step)) for step in steps])


def snapshot(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state().items()}


def changed(before, after):
    """Names of the tensors that are not equal bit for bit."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_close(state, expected, learning_rate=2e-4, steps=1):
    """Equal up to the order of float additions.

    The moments are linear in the gradients, so they show the gradients' error: 1e-5 of a tensor's largest. Adam divides
    a gradient by its own size, so where the true gradient is 0 (a bias in front of a norm) or nearly so, the noise
    itself decides a weight's step: 1 % of a step almost everywhere, and never more than the two whole steps.
    """
    for name, tensor in expected.items():
        error = (state[name] - tensor).abs()
        if "exp_avg" in name and not is_noise(name):
            assert error.max() <= 2e-5 * tensor.abs().max(), name
        elif not is_noise(name):
            assert error.max() <= 2 * steps * learning_rate, name
            assert (error > 0.01 * learning_rate).float().mean() < 0.01, name


def is_noise(name):
    """A bias in front of an instance norm has no influence, so its gradient is rounding errors."""
    return name.endswith("conv.bias") and "up.0" not in name or False
