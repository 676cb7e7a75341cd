"""The terms of the objective: values against formulas in float64 NumPy, gradients against finite differences of those.

Then one test for each fault of the earlier implementations (notes 2.2, 2.3) that would fail if it came back.
Run: pytest tests/test_losses.py
"""

import math

import numpy as np
import pytest
import torch

from autopainter import losses

KINDS = ["gan", "lsgan", "hinge", "wgan-gp"]


def total_variation(image):
    """The paper's formula pixel by pixel, a mean over all places that have both neighbours."""
    batch, channels, height, width = image.shape
    roots = [
        math.sqrt((plane[i + 1, j] - plane[i, j]) ** 2 + (plane[i, j + 1] - plane[i, j]) ** 2)
        for plane in image.reshape(batch * channels, height, width)
        for i in range(height - 1)
        for j in range(width - 1)
    ]
    return sum(roots) / len(roots)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


def discriminator(real, fake, kind):
    parts = {
        "gan": lambda: (-np.log(sigmoid(real)).mean(), -np.log(1 - sigmoid(fake)).mean()),
        "lsgan": lambda: (((real - 1) ** 2).mean(), (fake**2).mean()),
        "hinge": lambda: (np.maximum(0, 1 - real).mean(), np.maximum(0, 1 + fake).mean()),
        "wgan-gp": lambda: (-2 * real.mean(), 2 * fake.mean()),
    }[kind]()
    return sum(parts) / 2


def generator(fake, kind):
    return {
        "gan": lambda: -np.log(sigmoid(fake)).mean(),
        "lsgan": lambda: ((fake - 1) ** 2).mean(),
        "hinge": lambda: -fake.mean(),
        "wgan-gp": lambda: -fake.mean(),
    }[kind]()


def random(*shape, seed):
    return np.random.default_rng(seed).uniform(-1, 1, shape)


IMAGES = [random(2, 3, 4, 5, seed=seed) for seed in (0, 1)]
LOGITS = [3 * random(2, 1, 3, 4, seed=seed) for seed in (2, 3)]
TERMS = {
    "pixel": (losses.pixel, lambda a, b: np.abs(a - b).mean(), IMAGES),
    "feature": (losses.feature, lambda a, b: ((a - b) ** 2).mean(), IMAGES),
    "tv": (losses.total_variation, total_variation, IMAGES[:1]),
}
for kind in KINDS:
    TERMS[f"generator-{kind}"] = (
        lambda fake, kind=kind: losses.generator_adversarial(fake, kind),
        lambda fake, kind=kind: generator(fake, kind),
        LOGITS[:1],
    )
    TERMS[f"discriminator-{kind}"] = (
        lambda real, fake, kind=kind: losses.discriminator(real, fake, kind),
        lambda real, fake, kind=kind: discriminator(real, fake, kind),
        LOGITS,
    )


def differences(function, arguments, which, step=1e-6):
    """Central differences of a function of arrays by one of them."""
    gradient = np.zeros_like(arguments[which])
    for place in np.ndindex(gradient.shape):
        values = []
        for sign in (1, -1):
            moved = [argument.copy() for argument in arguments]
            moved[which][place] += sign * step
            values.append(function(*moved))
        gradient[place] = (values[0] - values[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("term", TERMS)
def test_terms_and_their_gradients(term):
    ours, reference, arrays = TERMS[term]
    tensors = [torch.tensor(array, dtype=torch.float32, requires_grad=True) for array in arrays]
    value = ours(*tensors)
    assert value.shape == ()
    assert value.item() == pytest.approx(reference(*arrays), rel=1e-5)
    value.backward()
    for which, tensor in enumerate(tensors):
        expected = differences(reference, arrays, which)
        assert np.abs(expected).max() > 0
        assert tensor.grad.numpy() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("values", [1, 2 * IMAGES[0][0].size])
def test_large_maps_are_compared_some_samples_at_a_time(values, monkeypatch):
    tensors = [torch.tensor(array, dtype=torch.bfloat16).repeat(3, 1, 1, 1).requires_grad_() for array in IMAGES]
    whole = losses.feature(*tensors)
    whole.backward()
    expected = [tensor.grad.clone() for tensor in tensors]
    monkeypatch.setattr(losses, "_CHUNK_VALUES", values)
    for tensor in tensors:
        tensor.grad = None
    parts = losses.feature(*tensors)
    parts.backward()
    assert torch.allclose(parts, whole)
    assert all(torch.equal(tensor.grad, right) for tensor, right in zip(tensors, expected, strict=True))


@pytest.mark.parametrize("term", TERMS)
def test_terms_are_means_over_the_batch(term):
    """So their weights do not depend on the batch size, and microbatches may be added up."""
    ours, _, arrays = TERMS[term]
    tensors = [torch.tensor(array, dtype=torch.float32) for array in arrays]
    assert torch.allclose(ours(*(tensor.repeat(3, 1, 1, 1) for tensor in tensors)), ours(*tensors))
    halves = [ours(*(tensor[row : row + 1] for tensor in tensors)) for row in range(2)]
    assert torch.allclose((halves[0] + halves[1]) / 2, ours(*tensors))


@pytest.mark.parametrize("term", TERMS)
def test_terms_are_computed_in_float32(term):
    ours, _, arrays = TERMS[term]
    tensors = [torch.tensor(array, dtype=torch.bfloat16) for array in arrays]
    with torch.autocast("cpu", torch.bfloat16):
        value = ours(*tensors)
    assert value.dtype == torch.float32
    assert value == ours(*(tensor.float() for tensor in tensors))


# Total variation


@pytest.mark.parametrize(("height", "width"), [(2, 2), (8, 8), (40, 24), (128, 128)])
def test_tv_of_a_slope_does_not_depend_on_the_image_size(height, width):
    """The authors sum over the pixels, so their weight means 786 times as much at 512x512."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    slope = (0.03 * y + 0.04 * x).expand(2, 3, -1, -1)
    assert losses.total_variation(slope).item() == pytest.approx(0.05, rel=1e-4)


def test_tv_is_the_mean_of_the_roots():
    """The notebook took the root of the means, where one edge on a flat image counts many times as much."""
    image = torch.zeros(1, 1, 11, 11)
    image[..., 5:] = 1
    assert losses.total_variation(image).item() == pytest.approx(10 / 100, abs=2e-4)


def test_tv_has_a_finite_gradient_on_flat_areas():
    image = torch.full((1, 3, 6, 6), 0.5, requires_grad=True)
    value = losses.total_variation(image)
    value.backward()
    assert value.item() == pytest.approx(0, abs=2e-4)
    assert torch.equal(image.grad, torch.zeros_like(image))


# Features and pixels


@pytest.mark.parametrize(("term", "power"), [(losses.pixel, 1), (losses.feature, 2)])
def test_pixels_are_compared_by_l1_and_features_by_l2(term, power):
    """The authors' code and the notebook compare features by L1, the paper by L2."""
    target, difference = (torch.tensor(array, dtype=torch.float32) for array in IMAGES)
    once, twice = (term(target + factor * difference, target) for factor in (1, 2))
    assert (twice / once).item() == pytest.approx(2**power, rel=1e-5)


# Adversarial


def test_the_generators_gradient_does_not_saturate():
    """At D = 0.05: -log D falls by 20 for each unit of D; log(1 - D) gives 1.05 and the notebook's -log(1 + D) 0.95."""
    probability = torch.tensor([[0.05]], requires_grad=True)
    losses.generator_adversarial(torch.logit(probability), "gan").backward()
    assert probability.grad.item() == pytest.approx(-20, rel=1e-4)
    logit = torch.logit(torch.tensor([[0.05]])).requires_grad_()
    losses.generator_adversarial(logit, "gan").backward()
    assert logit.grad.item() == pytest.approx(-0.95, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_not_squashed(kind):
    """A sigmoid in front, as in three of the authors' critics, would bound every term."""
    logits = torch.full((1, 1, 2, 2), 100.0)
    expected = {"gan": 100, "lsgan": 101**2, "hinge": 100, "wgan-gp": 100}[kind]
    assert losses.generator_adversarial(-logits, kind).item() == pytest.approx(expected)
    both = {"gan": 100, "lsgan": (101**2 + 100**2) / 2, "hinge": 101, "wgan-gp": 200}[kind]
    assert losses.discriminator(-logits, logits, kind).item() == pytest.approx(both)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_give_finite_values_and_gradients(kind, logit):
    logits = torch.full((1, 1, 2, 2), logit, requires_grad=True)
    value = losses.generator_adversarial(logits, kind) + losses.discriminator(logits, logits, kind)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kind", "undecided"), [("gan", math.log(2)), ("lsgan", 0.5), ("hinge", 1.0), ("wgan-gp", 0.0)]
)
def test_the_discriminators_two_parts_are_averaged(kind, undecided):
    zeros = torch.zeros(2, 1, 3, 3)
    assert losses.discriminator(zeros, zeros, kind).item() == pytest.approx(undecided)


@pytest.mark.parametrize("kind", KINDS)
def test_the_two_networks_pull_in_opposite_directions(kind):
    real, fake, painted = (torch.full((1, 1, 2, 2), 0.5, requires_grad=True) for _ in range(3))
    losses.discriminator(real, fake, kind).backward()
    assert (real.grad < 0).all()  # more logit for a true image, less for a painted one
    assert (fake.grad > 0).all()
    losses.generator_adversarial(painted, kind).backward()
    assert (painted.grad < 0).all()


# The gradient penalty


def penalty(weights, real, fake, alpha):
    """Of the critic mean(tanh(weights * x)), whose slopes are known, sample by sample."""
    found = []
    for one, other, place in zip(real, fake, alpha, strict=True):
        between = place * one + (1 - place) * other
        slopes = weights * (1 - np.tanh(weights * between) ** 2) / between.size
        found.append((math.sqrt((slopes**2).sum()) - 1) ** 2)
    return sum(found) / len(found)


ALPHA = np.array([0.2, 0.9])


def test_the_penalty_and_its_gradient():
    """The authors' slopes are summed over one axis only, and their places broadcast over the wrong one."""
    weights = 40 * random(1, 3, 4, 5, seed=4)
    tensor = torch.tensor(weights[0], dtype=torch.float32, requires_grad=True)
    real, fake, alpha = (torch.tensor(array, dtype=torch.float32) for array in (*IMAGES, ALPHA))
    value = losses.gradient_penalty(lambda x: torch.tanh(tensor * x), real, fake, alpha)
    assert value.item() == pytest.approx(penalty(weights[0], *IMAGES, ALPHA), rel=1e-4)
    value.backward()
    expected = differences(lambda w: penalty(w, *IMAGES, ALPHA), weights, 0)
    assert np.abs(expected).max() > 0
    assert tensor.grad.numpy() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_critic_of_slope_1_has_no_penalty():
    real, fake, alpha = (torch.tensor(array, dtype=torch.float32) for array in (*IMAGES, ALPHA))
    direction = torch.randn(60, generator=torch.Generator().manual_seed(0)).view(3, 4, 5)
    direction /= direction.norm()
    for factor, expected in ((1, 0.0), (3, 4.0)):
        value = losses.gradient_penalty(
            lambda x, factor=factor: factor * (x * direction).flatten(1).sum(1, True), real, fake, alpha
        )
        assert value.item() == pytest.approx(expected, abs=1e-5)


def test_the_penalty_is_a_mean_over_the_batch():
    real, fake, alpha = (torch.tensor(array, dtype=torch.float32) for array in (*IMAGES, ALPHA))
    values = [
        losses.gradient_penalty(lambda x: x.square(), real[rows], fake[rows], alpha[rows])
        for rows in (slice(0, 2), slice(0, 1), slice(1, 2))
    ]
    assert values[0].item() == pytest.approx((values[1] + values[2]).item() / 2)
