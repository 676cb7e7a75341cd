"""XDoG against an independent float64 reference, and the properties that a drawing has.

Run: pytest tests/test_sketch.py
"""

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest

from autopainter import seeding
from autopainter.data.sketch import XDoG, jittered, xdog
from autopainter.errors import UserError


def gaussian(image, sigma):
    """Separable Gaussian in float64, cut off at four standard deviations, borders mirrored."""
    radius = int(4 * sigma + 0.5)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padding = [(radius, radius) if a == axis else (0, 0) for a in (0, 1)]
        padded = np.pad(image, padding, mode="symmetric")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * radius + 1, axis=axis)
        image = windows @ kernel
    return image


def reference(color, params):
    """The formula of the docstring, step by step; returns the drawing in [0, 255] and the distance to the threshold."""
    luminance = color.astype(np.float64) @ [0.299, 0.587, 0.114]
    padded = np.pad(luminance, 1, mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    smooth = (windows.sum((2, 3)) + 4 * luminance) / 13
    sharp = np.clip(smooth + params.sharpness * (luminance - smooth), 0, 255)
    difference = gaussian(sharp, params.sigma) - params.gamma * gaussian(sharp, params.sigma * params.k)
    from_threshold = difference - params.epsilon
    return 255 * np.where(from_threshold >= 0, 1, 1 + np.tanh(params.phi * from_threshold)), from_threshold


@pytest.fixture
def scene():
    """Flat regions, a ramp, a thin line, black, and noise: uint8 [72, 90, 3]."""
    color = np.full((72, 90, 3), (200, 180, 90), np.uint8)
    color[10:40, 5:45] = (30, 60, 160)
    color[20:30, 50:88] = np.linspace(0, 255, 38, dtype=np.uint8)[None, :, None]
    color[50, :] = 20
    color[60:, 60:] = 0
    color[40:60, :30] = np.random.default_rng(0).integers(0, 256, (20, 30, 3))
    return color


@pytest.mark.parametrize(
    "params", [XDoG(phi=0.2), XDoG(sigma=0.8, k=1.6, gamma=0.98, phi=0.05, epsilon=-2, sharpness=1.0)]
)
def test_soft_lines_equal_the_reference(scene, params):
    expected, _ = reference(scene, params)
    drawing = xdog(scene, params)
    assert drawing.dtype == np.uint8
    assert drawing.shape == scene.shape[:2]
    assert np.abs(drawing - expected).max() <= 0.51
    assert expected.std() > 20  # the scene has something to draw


def test_the_authors_parameters_equal_the_reference(scene):
    expected, from_threshold = reference(scene, XDoG())
    decided = np.abs(from_threshold) > 1e-3  # float32 may fall on the other side of the step
    assert decided.mean() > 0.99
    assert np.abs(xdog(scene) - expected)[decided].max() <= 0.51


def test_sharpening_is_that_of_pillow(scene):
    """The authors sharpen with Pillow; inside the border, where Pillow does nothing, ours differs by rounding only."""
    grey = PIL.Image.fromarray(scene).convert("L")
    sharpened = np.asarray(PIL.ImageEnhance.Sharpness(grey).enhance(3.0))
    before = XDoG(sharpness=1.0, phi=0.2)
    theirs = xdog(np.repeat(sharpened[..., None], 3, axis=2), before)
    ours = xdog(scene, XDoG(sharpness=3.0, phi=0.2))
    inside = np.abs(ours.astype(int) - theirs)[16:-16, 16:-16]
    assert np.percentile(inside, 99) <= 40
    assert inside.mean() < 2


def test_lines_are_black_on_white():
    paper = np.full((64, 64, 3), 255, np.uint8)
    assert (xdog(paper) == 255).all()
    grey = np.full((64, 64, 3), 90, np.uint8)
    assert (xdog(grey) == 255).all()

    paper[:, 32] = 0
    drawing = xdog(paper)
    assert (drawing[:, 32] == 0).all()
    assert (drawing[:, :24] == 255).all()
    assert (drawing[:, 41:] == 255).all()


def test_an_edge_between_two_colours_is_drawn_on_its_darker_side():
    color = np.full((64, 64, 3), (240, 200, 60), np.uint8)
    color[:, 32:] = (40, 60, 120)
    drawing = xdog(color)
    assert (drawing[:, 34] == 0).all()
    assert (drawing[:, :31] == 255).all()
    assert (drawing[:, 48:] == 255).all()


def test_the_blurs_keep_their_fractions():
    """A faint edge: its D differs from that of flat grey by less than one grey level, which 8 bit blurs lose."""
    color = np.full((64, 64, 3), 40, np.uint8)
    color[:, 32:] = 38
    params = XDoG(sharpness=1.0, gamma=0.995)
    expected, from_threshold = reference(color, params)
    drawing = xdog(color, params)
    assert (expected == 0).any()
    assert 0 < np.ptp(from_threshold) < 1
    assert np.abs(drawing - expected).max() <= 0.51


@pytest.mark.parametrize("field", ["sigma", "k", "gamma", "phi", "epsilon", "sharpness"])
def test_parameters_out_of_range_are_named(field):
    with pytest.raises(UserError, match=f"xdog.{field}"):
        XDoG(**{field: float("nan")})


@pytest.mark.parametrize("jitter", [0.0, 0.3, 1.0])
def test_jitter_stays_in_its_bounds_and_uses_them(jitter):
    base = XDoG()
    drawn = [jittered(base, jitter, seeding.generator(number)) for number in range(400)]
    assert drawn[7] == jittered(base, jitter, seeding.generator(7))
    for values, least, most in (
        ([params.sigma for params in drawn], 1.5 * 2**-jitter, 1.5 * 2**jitter),
        ([params.gamma for params in drawn], 0.97 - 0.02 * jitter, 0.97 + 0.02 * jitter),
        ([1 / params.phi for params in drawn], 1 / 200, 1 / 200 + 30 * jitter),
    ):
        assert least * (1 - 1e-9) <= min(values) <= max(values) <= most * (1 + 1e-9)
        assert max(values) - min(values) >= 0.95 * (most - least)
    assert {(params.k, params.epsilon, params.sharpness) for params in drawn} == {(2.0, 0.1, 3.0)}
    assert (len(set(drawn)) == 1) == (jitter == 0)
