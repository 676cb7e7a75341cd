"""Cleaning of photos of drawings, measured against the drawings that the photos are made of.

A photo here is paper and ink under uneven light, out of focus, with the paper's grain, the camera's noise and JPEG.
Run: pytest tests/test_cleaning.py
"""

import cv2
import numpy as np
import pytest

from autopainter.cleaning import clean

HEIGHT, WIDTH = 700, 500


@pytest.fixture(scope="module")
def lines():
    """Curves of 1 to 3 pixels and filled dots, 0 on 255."""
    random = np.random.default_rng(3)
    sketch = np.full((HEIGHT, WIDTH), 255, np.uint8)
    for _ in range(14):
        center, axes = random.integers((100, 100), (400, 600), 2), random.integers(25, 120, 2)
        angle, arc = random.uniform(0, 180), random.uniform(120, 360)
        width = int(random.integers(1, 4))
        cv2.ellipse(sketch, center.tolist(), axes.tolist(), angle, 0, arc, 0, width, cv2.LINE_AA)
    for _ in range(4):
        cv2.circle(sketch, random.integers((100, 100), (400, 600), 2).tolist(), 5, 0, -1, cv2.LINE_AA)
    return sketch


def photo(sketch, gradient=0.0, shadow=0.0, penumbra=15.0, noise=4.0, ink=0.25):
    """A photo, uint8 [H, W, 3] RGB.

    Args:
        gradient: share of the light that is lost from one corner to the other.
        shadow: share of the light that a shadow takes, beyond a slanted edge that is 2 * penumbra pixels wide.
        noise: the camera's, standard deviation in grey levels.
        ink: what ink reflects of the light; 0.65 is light pencil.
    """
    random = np.random.default_rng(0)
    height, width = sketch.shape
    y, x = np.mgrid[:height, :width] / max(height, width)
    light = 1 - gradient * (x * 0.6 + y * 0.6)
    light *= 1 - shadow * cv2.GaussianBlur((1.2 * x + y > 0.95).astype(np.float64), (0, 0), penumbra)
    grain = 0.03 * cv2.GaussianBlur(random.normal(0, 1, sketch.shape), (0, 0), 1.5)
    seen = cv2.GaussianBlur((0.92 * (ink + (1 - ink) * sketch / 255) + grain) * light * 245, (0, 0), 0.6)
    color = seen[..., None] * (1, 0.95, 0.85) + random.normal(0, noise, (*sketch.shape, 3))
    _, data = cv2.imencode(".jpg", np.clip(color, 0, 255)[..., ::-1].astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 85])
    return cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)


def error(found, sketch):
    """Mean absolute difference in grey levels."""
    return np.abs(found.astype(int) - sketch).mean()


def inked(found, sketch):
    """Share of the ink that was found, within a pixel of it, and share of what was found that is ink, likewise."""
    near = np.ones((3, 3), np.uint8)
    ours, theirs = ((picture < 128).astype(np.uint8) for picture in (found, sketch))
    return (
        (cv2.dilate(ours, near) & theirs).sum() / theirs.sum(),
        (cv2.dilate(theirs, near) & ours).sum() / max(ours.sum(), 1),
    )


def stains(found, sketch):
    """Share of the bare paper that is visibly not white."""
    bare = cv2.erode(sketch, np.ones((7, 7), np.uint8)) == 255
    return (found[bare] < 230).mean()


PHOTOS = {
    "even": {}, "gradient": {"gradient": 0.7}, "shadow": {"shadow": 0.45},
    "hard shadow": {"shadow": 0.45, "penumbra": 4},
    "both": {"gradient": 0.5, "shadow": 0.45}, "noise": {"gradient": 0.5, "shadow": 0.3, "noise": 12},
    "pencil": {"gradient": 0.5, "shadow": 0.45, "ink": 0.65},
}  # fmt: skip


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photo_becomes_the_drawing(lines, name):
    taken = photo(lines, **PHOTOS[name])
    found = clean(taken)
    raw = cv2.cvtColor(taken, cv2.COLOR_RGB2GRAY)
    share_found, share_ink = inked(found, lines)
    measured = (
        f"error {error(found, lines):.2f} of {error(raw, lines):.1f}, found {share_found:.3f}, ink {share_ink:.3f}"
    )
    assert error(found, lines) < error(raw, lines) / 8, measured
    assert share_found > 0.9, measured
    assert share_ink > 0.98, measured
    assert stains(found, lines) < 2e-3, measured


def test_lines_keep_smooth_edges(lines):
    found = clean(photo(lines))
    between = ((found > 20) & (found < 235)).sum() / (found < 235).sum()
    assert 0.2 < between < 0.8  # a hard threshold has none


def test_a_drawing_that_is_clean_stays_as_it_is(lines):
    assert error(clean(lines), lines) < 2
    assert (clean(lines)[cv2.erode(lines, np.ones((7, 7), np.uint8)) == 255] == 255).all()


@pytest.mark.parametrize("noise", [0.0, 4.0, 12.0])
def test_a_blank_sheet_becomes_white(noise):
    found = clean(photo(np.full((HEIGHT, WIDTH), 255, np.uint8), gradient=0.5, shadow=0.4, noise=noise))
    assert (found < 128).mean() <= (1e-4 if noise > 10 else 0)
    assert (found < 230).mean() < 2e-3


def test_large_photos_are_cleaned_as_small_ones_are(lines):
    large = cv2.resize(lines, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    found = clean(photo(large, gradient=0.5, shadow=0.45, penumbra=30))
    assert error(found, large) < 2
    assert min(inked(found, large)) > 0.97


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (40, 3), (2, 2, 3)])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_pictures_of_any_size_and_shade_are_taken(shape, level):
    found = clean(np.full(shape, level, np.uint8))
    assert found.shape == shape[:2]
    assert found.dtype == np.uint8
    assert (found == 255).all()
