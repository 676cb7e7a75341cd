"""Augmentation and colour hints: what is done to both images alike, and where hints may be.

Hints follow the paper authors' procedure (gen_sketch/color.py) and are checked against the blurred target, made here
once more. Run: pytest tests/test_samples.py
"""

import struct
import zlib

import cv2
import numpy as np
import pytest

from autopainter import config as configuration
from autopainter import seeding
from autopainter.config import Hints
from autopainter.data import hints, pictures, samples
from autopainter.data.samples import augment, decode
from autopainter.data.sketch import XDoG, xdog
from autopainter.errors import CorruptData
from autopainter.seeding import Use

SIZE = 64


def settings(*texts):
    needed = ["run.name=a", "run.storage=/tmp", "data.manifest=m", "train.steps=1", "loss.feature_weight=0"]
    return configuration.load(None, [*needed, f"data.image_size={SIZE}", *texts], {})


def picture(height, width, seed=0):
    """Smooth colours without a symmetry, and a sketch that is their green channel."""
    random = np.random.default_rng(seed)
    color = cv2.resize(random.integers(0, 256, (5, 7, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    return color, np.ascontiguousarray(color[..., 1])


def cartoon(seed=0, size=SIZE):
    """Flat discs with dark outlines on white, and their line art."""
    random = np.random.default_rng(seed)
    color, sketch = np.full((size, size, 3), 255, np.uint8), np.full((size, size), 255, np.uint8)
    for _ in range(5):
        center = tuple(int(v) for v in random.integers(size // 6, size - size // 6, 2))
        radius = int(random.integers(size // 8, size // 4))
        for image, inside, line in ((color, random.integers(60, 220, 3).tolist(), (20, 20, 20)), (sketch, 255, 0)):
            cv2.circle(image, center, radius, inside, -1)
            cv2.circle(image, center, radius, line, max(size // 64, 1))
    return color, sketch


def files(color, sketch):
    return cv2.imencode(".png", color[..., ::-1])[1].tobytes(), cv2.imencode(".png", sketch)[1].tobytes()


# Decoding


def test_a_pair_is_decoded_as_rgb_and_grey():
    color, sketch = picture(20, 30)
    for got, expected in zip(decode(*files(color, sketch), "x"), (color, sketch), strict=True):
        assert got.dtype == np.uint8
        assert (got == expected).all()


def png_header(width, height):
    """A PNG that says it is of a size, without the pixels."""

    def part(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(bytes(99))) + part(b"IEND", b"")


PAIR = files(*picture(40, 40))


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: b"", id="empty"),
        pytest.param(lambda file: b"no image at all", id="text"),
        pytest.param(lambda file: file[: len(file) // 2], id="cut off"),
        pytest.param(lambda file: file[:40], id="header only"),
        pytest.param(lambda file: files(*picture(40, 41))[0], id="of another size"),
        pytest.param(lambda file: png_header(40_000, 40_000), id="says it is huge"),
    ],
)
def test_broken_bytes_name_the_sample(half, damage):
    pair = list(PAIR)
    pair[half] = damage(pair[half])
    with pytest.raises(CorruptData, match="shard 3: sample k") as caught:
        decode(*pair, "shard 3: sample k")
    assert "\n" not in str(caught.value)


def test_images_are_bounded_in_pixels_as_when_packing():
    """A small file cannot fill the memory of the training job."""
    edge = 8200
    assert edge * edge > pictures.MAX_PIXELS
    huge = cv2.imencode(".png", np.zeros((edge, edge), np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    assert len(huge) < 1 << 20
    with pytest.raises(CorruptData):
        decode(huge, huge, "bomb")


# Resizing and augmentation


@pytest.mark.parametrize(("height", "width"), [(66, 66), (48, 48), (200, 130), (130, 200), (32, 100), (5, 3)])
@pytest.mark.parametrize("shares", [(1.0, 1.0), (512 / 530, 512 / 530), (0.5, 0.5), (0.3, 1.0)])
def test_both_images_are_augmented_alike(height, width, shares):
    config = settings(f"data.crop_min={shares[0]}", f"data.crop_max={shares[1]}")
    color, sketch = picture(height, width)
    for position in range(12):
        cropped, lines = augment(color, sketch, config, seeding.generator(0, Use.AUGMENT, position))
        assert cropped.shape == (SIZE, SIZE, 3)
        assert lines.shape == (SIZE, SIZE)
        assert cropped.dtype == lines.dtype == np.uint8
        assert np.abs(cropped[..., 1].astype(int) - lines).max() <= 1  # one filter on three channels and on one


def test_crops_and_flips_vary_and_are_all_there():
    """A picture whose pixels say where they were: the crops are of the right size and reach every edge."""
    config = settings("data.crop_min=0.5", "data.crop_max=0.5")
    edge = 2 * SIZE
    rows, columns = np.mgrid[:edge, :edge].astype(np.uint8)
    places = np.stack([rows, columns, np.zeros_like(rows)], axis=2)
    lefts, tops, flips = set(), set(), 0
    count = 1000
    for position in range(count):
        cropped, _ = augment(places, rows, config, seeding.generator(3, Use.AUGMENT, position))
        flipped = cropped[0, 0, 1] > cropped[0, -1, 1]
        first = cropped[:, ::-1] if flipped else cropped
        top, left = first[0, 0, :2].tolist()
        assert (first == places[top : top + SIZE, left : left + SIZE]).all()
        tops.add(top)
        lefts.add(left)
        flips += int(flipped)
    assert {0, edge - SIZE} <= tops <= set(range(edge - SIZE + 1))
    assert {0, edge - SIZE} <= lefts <= set(range(edge - SIZE + 1))
    assert 430 < flips < 570  # four standard deviations


def test_nothing_is_flipped_if_the_configuration_says_so():
    config = settings("data.flip=no", "data.crop_min=1", "data.crop_max=1")
    color, sketch = picture(SIZE, SIZE)
    for position in range(20):
        cropped, lines = augment(color, sketch, config, seeding.generator(0, Use.AUGMENT, position))
        assert (cropped == color).all()
        assert (lines == sketch).all()


def test_random_resized_crops_are_of_all_sizes_between_the_bounds():
    """A ramp: the step from pixel to pixel says how large a part of it the crop shows."""
    edge = 256
    ramp = np.repeat(np.arange(edge, dtype=np.uint8)[None, :, None], edge, axis=0).repeat(3, axis=2)
    config = settings("data.crop_min=0.4", "data.crop_max=0.9", "data.flip=no")
    shares = []
    for position in range(300):
        cropped, _ = augment(ramp, None, config, seeding.generator(0, Use.AUGMENT, position))
        row = cropped[0, :, 0].astype(int)
        shares.append((row[-1] - row[0]) * SIZE / (SIZE - 1) / edge)
    assert 0.39 < min(shares) < 0.43
    assert 0.87 < max(shares) < 0.91
    assert abs(np.mean(shares) - 0.65) < 0.04


def test_colour_jitter_turns_colours_and_keeps_greys_grey_and_paper_white():
    color, sketch = cartoon(3)
    color[:4], color[4:8] = 255, 120
    hues = set()
    for position in range(30):
        random = seeding.generator(0, Use.COLOR_JITTER, position)
        turned, lines = samples.jitter_colors(color, sketch, 1.0, random)
        assert turned.dtype == lines.dtype == np.uint8
        assert (turned[:4] >= 254).all()
        grey = turned[4:8].astype(int)
        assert np.ptp(grey, axis=2).max() <= 1  # no colour from nowhere
        assert abs((255 - grey.mean()) / (255 - 120) - (255.0 - lines.min()) / (255 - sketch.min())) < 0.3
        hues.add(tuple(turned[20, 20] // 4))
    assert len(hues) > 15
    still, same = samples.jitter_colors(color, sketch, 0.0, seeding.generator(0))
    assert np.abs(still.astype(int) - color).max() <= 1
    assert (same == sketch).all()


def test_drawings_on_the_fly_are_of_the_final_picture_and_never_twice_the_same():
    color, _ = cartoon(size=80)
    config = settings("sketch.mode=on_the_fly", "sketch.jitter=1")

    def make(config, position):
        out = row()
        samples.training_sample(color, None, config, position, out)
        return out

    drawings = [make(config, position) for position in range(8)]
    assert len({out["sketch"].tobytes() for out in drawings}) == 8
    assert (make(config, 5)["sketch"] == drawings[5]["sketch"]).all()
    fixed = make(settings("sketch.mode=on_the_fly", "sketch.jitter=0", "sketch.phi=0.2"), 5)
    assert (fixed["sketch"][0] == xdog(fixed["color"].transpose(1, 2, 0), XDoG(phi=0.2))).all()
    assert (fixed["color"] == drawings[5]["color"]).all()  # the lines do not change the crop
    out = row()
    samples.validation_sample(color, None, config, 0, out)
    assert (out["sketch"][0] == xdog(np.ascontiguousarray(out["color"].transpose(1, 2, 0)))).all()


def test_the_parameters_of_drawings_on_the_fly_are_those_of_packing():
    configured = configuration.Sketch().model_dump(exclude={"mode", "jitter"})
    assert XDoG(**configured) == XDoG()


def row():
    return {"sketch": np.zeros((1, SIZE, SIZE), np.uint8), "color": np.zeros((3, SIZE, SIZE), np.uint8),
            "hint": np.zeros((4, SIZE, SIZE), np.uint8), "dropout": np.zeros((), np.int64)}  # fmt: skip


def test_a_sample_is_a_function_of_its_seed_and_position():
    color, sketch = cartoon(size=80)

    def make(position, *texts):
        out = row()
        samples.training_sample(color, sketch, settings(*texts), position, out)
        return out

    base, again = make(5), make(5)
    assert all((base[name] == again[name]).all() for name in base)
    assert (make(5, "hints.unhinted=1")["color"] == base["color"]).all()  # hints and crops draw apart
    for other in (make(6), make(5, "train.seed=1")):
        assert (other["color"] != base["color"]).any()
        assert other["dropout"] != base["dropout"]
    hinted = [make(position, "hints.unhinted=0")["hint"] for position in range(4)]
    assert len({hint.tobytes() for hint in hinted}) == 4


@pytest.mark.parametrize("unhinted", [0, 1])
def test_nothing_is_left_of_what_was_in_the_memory_of_a_batch(unhinted):
    clean, used = row(), {name: np.full_like(array, 7) for name, array in row().items()}
    for out in (clean, used):
        samples.training_sample(*cartoon(size=80), settings(f"hints.unhinted={unhinted}"), 5, out)
    assert all((clean[name] == used[name]).all() for name in clean)


# Turned hues


@pytest.mark.parametrize(("degrees", "expected"), [(0, (255, 0, 0)), (120, (0, 255, 0)), (240, (0, 0, 255))])
def test_hues_are_turned_on_the_circle(degrees, expected):
    image = np.array([[(255, 0, 0), (0, 0, 0), (255, 255, 255), (90, 90, 90)]], np.uint8)
    turned = samples.turn_hues(image, degrees).astype(int)
    assert np.abs(turned[0, 0] - expected).max() <= 6  # hues are 256ths of the circle
    assert (turned[0, 1:] == image[0, 1:]).all()


def test_hinted_samples_are_recoloured_with_their_hints():
    color, sketch = cartoon(size=80)

    def make(position, *texts):
        out = row()
        samples.training_sample(color, sketch, settings("hints.unhinted=0.3", *texts), position, out)
        return out

    recoloured = 0
    for position in range(40):
        own, turned = make(position, "hints.recolored=0"), make(position, "hints.recolored=1")
        assert (own["sketch"] == turned["sketch"]).all()
        assert (own["hint"][3] == turned["hint"][3]).all()
        hinted = own["hint"][3] == 1
        if not hinted.any():
            assert (own["color"] == turned["color"]).all()  # what nobody steers keeps its colours
            continue
        recoloured += (own["color"] != turned["color"]).any()
        difference = [np.abs(out["hint"][:3].astype(int) - out["color"])[:, hinted].mean() for out in (own, turned)]
        assert abs(difference[0] - difference[1]) < 12  # the hints still are the target's colours
    assert recoloured > 10
    half = [(make(n, "hints.recolored=0.5")["color"] != make(n, "hints.recolored=0")["color"]).any() for n in range(40)]
    assert 4 < sum(half) < recoloured


# Hints


def draw(config, seed, color=None, sketch=None):
    if color is None:
        color, sketch = cartoon(seed)
    return color, sketch, hints.draw(color, sketch, config, seeding.generator(0, Use.HINTS, seed))


def blurred(color):
    return cv2.GaussianBlur(color, (0, 0), max(5 * color.shape[0] / 512, 0.3))


def test_the_mask_is_0_or_1_and_colours_are_only_inside():
    for seed in range(100):
        _, _, hint = draw(Hints(), seed)
        assert hint.dtype == np.uint8
        assert hint.shape == (SIZE, SIZE, 4)
        assert set(np.unique(hint[..., 3])) <= {0, 1}
        assert not hint[hint[..., 3] == 0].any()


def test_blocks_show_the_blurred_target():
    covered = 0
    for seed in range(60):
        color, _, hint = draw(Hints(unhinted=0, max_strokes=0), seed)
        inside = hint[..., 3] == 1
        assert (hint[inside][:, :3] == blurred(color)[inside]).all()
        covered += inside.sum()
    assert covered > 60 * 9


def test_a_wide_blur_is_close_to_a_gaussian():
    for seed in range(10):
        color, sketch = cartoon(seed, 512)
        hint = draw(Hints(unhinted=0, max_strokes=0), seed, color, sketch)[2]
        inside = hint[..., 3] == 1
        difference = np.abs(hint[inside][:, :3].astype(int) - blurred(color)[inside])
        assert difference.mean() < 2
        assert difference.max() < 40  # grey levels, across an edge


def test_blocks_are_square_and_of_one_colour_along_their_diagonal():
    seen = 0
    for seed in range(80):
        color, sketch, hint = draw(Hints(unhinted=0, max_blocks=1, max_strokes=0), seed)
        ys, xs = np.nonzero(hint[..., 3])
        if not len(ys):
            continue
        seen += 1
        edge = np.ptp(ys) + 1
        assert edge == np.ptp(xs) + 1
        assert edge**2 == len(ys)
        assert edge <= 3  # 24 pixels at 512
        diagonal = blurred(color).astype(int).sum(axis=2)[ys.min() + np.arange(edge), xs.min() + np.arange(edge)]
        assert np.abs(diagonal - diagonal[0]).max() < 30
        assert sketch[ys.min(), xs.min()] > 230  # it begins between the lines
        assert color[ys.min(), xs.min()].min() < 245  # and where there is colour
    assert seen > 20


@pytest.mark.parametrize("size", [64, 256])
def test_a_stroke_has_one_colour_which_the_target_has_where_it_begins(size):
    near = []
    for seed in range(60):
        color, sketch = cartoon(seed, size)
        hint = draw(Hints(unhinted=0, max_blocks=0, max_strokes=1), seed, color, sketch)[2]
        inside = hint[..., 3] == 1
        if not inside.any():
            continue
        colors = np.unique(hint[inside][:, :3], axis=0)
        assert len(colors) == 1
        soft = blurred(color)
        same = np.abs(soft.astype(int) - colors[0]).max(axis=2) <= (0 if size == 64 else 24)  # a wide blur is near it
        begins = inside & (color.min(axis=2) < 245) & (sketch > 230) & same
        assert begins.any()
        near.append((np.abs(colors[0].astype(int) - color[inside]).mean(axis=1) < 15).mean())
        assert np.count_nonzero(inside) <= (120 + 16) * 16 * (size / 512) ** 2 * 1.5 + 9
    assert len(near) > 15
    assert np.mean(near) > 0.6  # the width of a short stroke may reach over a line


def test_hints_are_close_to_the_target():
    distances = []
    for seed in range(200):
        color, _, hint = draw(Hints(unhinted=0), seed)
        inside = hint[..., 3] == 1
        distances += np.abs(hint[inside][:, :3].astype(int) - blurred(color)[inside]).mean(axis=1).tolist()
    assert len(distances) > 2000
    assert np.median(distances) < 5
    assert np.mean(distances) < 25


@pytest.mark.parametrize("kind", ["white", "lines"])
def test_there_are_no_hints_where_there_is_nothing_to_hint(kind):
    color, sketch = np.full((SIZE, SIZE, 3), 250, np.uint8), np.full((SIZE, SIZE), 255, np.uint8)
    if kind == "lines":
        color[:], sketch[:] = 90, 0
    for seed in range(30):
        assert not draw(Hints(unhinted=0), seed, color, sketch)[2].any()


def test_one_coloured_pixel_is_enough_to_begin():
    color, sketch = np.full((SIZE, SIZE, 3), 250, np.uint8), np.full((SIZE, SIZE), 255, np.uint8)
    color[20, 30] = 100
    found = [draw(Hints(unhinted=0, max_blocks=0, max_strokes=4), seed, color, sketch)[2] for seed in range(20)]
    assert any(hint.any() for hint in found)
    assert all(hint[20, 30, 3] == 1 for hint in found if hint.any())


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_samples_without_hints(share):
    color, sketch = cartoon(1)
    count = 800
    config = Hints(unhinted=share, max_blocks=30, max_strokes=10)  # none by chance is rare
    bare = sum(not draw(config, seed, color, sketch)[2].any() for seed in range(count)) / count
    assert abs(bare - share) < 4 * (share * (1 - share) / count) ** 0.5 + 0.02


def test_no_blocks_and_no_strokes_are_no_hints():
    assert not any(draw(Hints(unhinted=0, max_blocks=0, max_strokes=0), seed)[2].any() for seed in range(10))


def test_the_target_and_sketch_stay_as_they_are():
    color, sketch = cartoon(2)
    before = color.copy(), sketch.copy()
    draw(Hints(unhinted=0), 2, color, sketch)
    assert (color == before[0]).all()
    assert (sketch == before[1]).all()
