"""The metrics of an evaluation against NumPy in float64; that batches and their sizes change nothing.

Run: pytest tests/test_evaluate_metrics.py
"""

import json

import numpy as np
import pytest
import torch

from autopainter.data.stream import Batch
from autopainter.evaluate.metrics import COLUMNS, FrechetVGG, Mean, Row, Target, hint_error, ssim
from autopainter.models.lpips import LPIPS
from autopainter.pixels import to_unit


def pictures(count, size=24, seed=0):
    random = np.random.default_rng(seed)
    base = random.integers(0, 256, (count, 3, 1, 1)) * np.linspace(0.3, 1, size)
    return torch.from_numpy((base + random.normal(0, 20, (count, 3, size, size))).clip(0, 255).astype(np.uint8))


def noisy(images, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, images.shape)
    return torch.from_numpy((images.numpy() + noise).clip(0, 255).astype(np.uint8))


# SSIM


def reference_ssim(one, other):
    """Wang et al. 2004 on one channel, with their window and constants; windows inside the picture only."""
    place = np.arange(-5, 6)
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window /= window.sum()

    def smooth(values):
        return (np.lib.stride_tricks.sliding_window_view(values, (11, 11)) * window).sum(axis=(2, 3))

    mean_one, mean_other = smooth(one), smooth(other)
    variance_one, variance_other = smooth(one**2) - mean_one**2, smooth(other**2) - mean_other**2
    covariance = smooth(one * other) - mean_one * mean_other
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean_one * mean_other + c1) * (2 * covariance + c2)
    return (above / ((mean_one**2 + mean_other**2 + c1) * (variance_one + variance_other + c2))).mean()


@pytest.mark.parametrize("size", [11, 24])
def test_ssim_is_that_of_wang_over_the_mean_of_the_channels(size):
    target = pictures(3, size)
    painted = torch.stack([noisy(target, sigma)[n] for n, sigma in enumerate((1, 20, 80))])
    found = ssim(painted, target)
    expected = [
        np.mean([reference_ssim(*channels) for channels in zip(one, other, strict=True)])
        for one, other in zip(painted.numpy().astype(float), target.numpy().astype(float), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, abs=5e-5)
    assert found[0] > found[1] > found[2]


def test_ssim_of_extremes():
    image = pictures(1)
    assert ssim(image, image).item() == pytest.approx(1, abs=1e-6)
    black, white = torch.zeros_like(image), torch.full_like(image, 255)
    assert 0 < ssim(black, white).item() < 1e-3
    assert ssim(white, white - 1).item() == pytest.approx(1, abs=1e-3)  # flat and nearly white, where float32 is worst


# The error inside hints


def test_the_hint_error_is_that_of_the_hinted_pixels_of_the_hinted_images():
    painted = torch.full((3, 3, 4, 4), 100, dtype=torch.uint8)
    hint = torch.zeros(3, 4, 4, 4, dtype=torch.uint8)
    hint[0, :, 0, 0] = torch.tensor([100, 130, 40, 1])  # 0, 30 and 60 away
    hint[0, :, 3, 2] = torch.tensor([100, 100, 100, 1])
    hint[1, :3] = 255  # colours without a mask are no hints
    hint[2, :, 1, 1] = torch.tensor([255, 0, 100, 1])
    assert hint_error(painted, hint).tolist() == pytest.approx([15, (155 + 100) / 3])
    assert hint_error(painted[1:2], hint[1:2]).shape == (0,)


# The Frechet distance


def reference_frechet(one, other):
    """The trace of the root of a product of two covariances is the sum of the singular values of the data's product."""
    means = [features.mean(axis=0) for features in (one, other)]
    rows = [(features - features.mean(axis=0)) / np.sqrt(len(features) - 1) for features in (one, other)]
    traces = sum(np.square(values).sum() for values in rows)
    return np.square(means[0] - means[1]).sum() + traces - 2 * np.linalg.norm(rows[0] @ rows[1].T, "nuc")


def features(count, seed):
    """Like those of a rectifier: many zeros, and channels of very different scales."""
    random = np.random.default_rng(seed)
    return np.exp(random.normal(0, 1, 512)) * np.maximum(random.normal(0.3, 1, (count, 512)), 0)


def frechet(one, other, sizes):
    distance = FrechetVGG()
    for first, stop in zip((0, *np.cumsum(sizes)), np.cumsum(sizes), strict=False):
        # Maps whose mean over places are the features.
        maps = [torch.from_numpy(v[first:stop])[:, :, None, None] * torch.tensor([[0.5, 1.5]]) for v in (one, other)]
        distance.add(*maps)
    return distance.value


@pytest.mark.parametrize("count", [2, 40, 600], ids=lambda count: f"{count} of rank {min(count - 1, 512)}")
def test_the_frechet_distance_is_that_of_numpy_in_batches_of_any_size(count):
    one, other = features(count, 0), features(count, 1)
    found = frechet(one, other, [1, count - 1])
    assert found == pytest.approx(reference_frechet(one, other), rel=3e-6)
    assert frechet(one, other, [count]) == pytest.approx(found, rel=3e-6)
    assert frechet(other, one, [count]) == pytest.approx(found, rel=3e-6)


def test_the_frechet_distance_of_known_gaussians():
    one = features(600, 0)
    assert 0 <= frechet(one[:40], one[:40], [40]) < 1e-3  # where rounding gives less than 0
    assert frechet(one, one + 0.5, [600]) == pytest.approx(512 * 0.25, rel=1e-6)  # means alone
    centred = one - one.mean(axis=0)
    expected = np.square(centred).sum() / 599 * (3 - 1) ** 2  # deviations alone: the sum of their squared differences
    assert frechet(centred, 3 * centred, [600]) == pytest.approx(expected, rel=1e-6)


def test_one_picture_has_no_frechet_distance():
    distance = FrechetVGG()
    assert distance.value is None
    distance.add(torch.rand(1, 512, 2, 2), torch.rand(1, 512, 2, 2))
    assert distance.value is None
    distance.add(torch.rand(1, 512, 2, 2), torch.rand(1, 512, 2, 2))
    assert distance.value > 0


# A row of the table


@pytest.fixture(scope="module")
def networks():
    """Both networks with random weights: of the real shapes, and made without a download."""
    torch.manual_seed(0)
    found = {net: LPIPS(net) for net in ("vgg", "alex")}
    for network in found.values():
        for head in network.heads:
            head.uniform_()
    return found


def batch_of(count):
    random = torch.Generator().manual_seed(0)
    hint = torch.randint(0, 256, (count, 4, 32, 32), generator=random, dtype=torch.uint8)
    hint[:, 3] = hint[:, 3] > 200
    hint[0, 3] = 0  # without hints
    keys = [f"k{n}" for n in range(count)]
    sketch = torch.full((count, 1, 32, 32), 255, dtype=torch.uint8)
    return Batch(0, keys, sketch, pictures(count, 32), hint, torch.zeros(count, dtype=torch.int64))


def scored(painted, batch, networks, size):
    row = Row(networks)
    for first in range(0, len(painted), size):
        rows = slice(first, first + size)
        row.add(painted[rows], Target(batch.part(rows), networks))
    return row


def test_a_row_holds_each_metric_as_a_mean_over_images(networks):
    batch = batch_of(5)
    painted = noisy(batch.color, 30)
    row = scored(painted, batch, networks, 2)
    values = row.values()
    assert list(values) == list(COLUMNS)
    assert row.hinted_images == 4
    assert values["ssim"] == pytest.approx(ssim(painted, batch.color).mean().item(), rel=1e-5)
    assert values["hint_error"] == pytest.approx(hint_error(painted, batch.hint).mean().item(), rel=1e-9)
    assert values["error"] == pytest.approx(np.abs(painted.numpy() - batch.color.numpy().astype(float)).mean())
    for net, network in networks.items():
        distances = network(to_unit(painted), to_unit(batch.color))
        assert values[f"lpips_{net}"] == pytest.approx(distances.mean().item(), rel=1e-4)
    maps = [networks["vgg"].maps(to_unit(images))[-1].mean(dim=(2, 3)).numpy() for images in (painted, batch.color)]
    assert values["fd_vgg"] == pytest.approx(reference_frechet(*(part.astype(float) for part in maps)), rel=1e-3)
    assert json.loads(json.dumps(values)) == values


def test_the_size_of_a_batch_changes_nothing(networks):
    batch = batch_of(5)
    painted = noisy(batch.color, 30)
    whole, single = (scored(painted, batch, networks, size).values() for size in (5, 1))
    assert single == pytest.approx(whole, rel=1e-3)


def test_without_networks_and_hints_the_metrics_are_absent():
    batch = batch_of(1)
    assert scored(batch.color, batch, {}, 1).values().keys() == {"psnr", "ssim", "error"}


def test_a_mean_of_nothing_is_none():
    mean = Mean()
    mean.add(torch.zeros(0))
    assert (mean.value, mean.count) == (None, 0)
    mean.add(torch.tensor([1, 2, 6], dtype=torch.uint8))
    assert (mean.value, mean.count) == (3.0, 3)
