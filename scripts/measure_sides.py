"""How often ``drawing_side`` is right, refuses and is wrong: families of rendered sheets, each both ways round.

A pair is right if both ways round are answered rightly, wrong if any of them is answered wrongly, else refused. Of
things that are no pairs every answer is wrong. The pictures are OpenMoji, in two halves by the CRC of their group: the
thresholds were tuned on ``even``, and ``odd`` is held out. Takes some five minutes on one core.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import click
import cv2
import numpy as np
from numpy.typing import NDArray

from autopainter.data.sides import Undecided, drawing_side
from autopainter.data.sketch import XDoG, xdog
from autopainter.data.sources import NoDrawing, OpenMoji

Image = NDArray[np.uint8]  # [H, W, 3] RGB, in this file also the drawings
Rng = np.random.Generator

SOFT = XDoG(phi=0.2)
SOFTER = XDoG(gamma=0.98, phi=0.05, epsilon=-2)
YELLOWISH, GREYISH, BLUE = (245, 232, 190), (200, 200, 196), (40, 60, 200)


class Pictured(NamedTuple):
    """A colour picture and its line art, both uint8 [S, S, 3] RGB."""

    group: str
    color: Image
    lines: Image

    @property
    def has_colour(self) -> bool:
        """Whether any pixel has some: a tenth of OpenMoji is drawn in greys alone."""
        return int(np.ptp(self.color, axis=2).max()) > 25


def openmoji(size: int, parity: int, step: int = 1) -> Iterator[Pictured]:
    """Every ``step``-th of the OpenMoji pictures whose group has a CRC of this parity."""
    source = OpenMoji(size)
    items = [item for item in source.listing().items if zlib.crc32(item.group.encode()) % 2 == parity]
    for item in items[::step]:
        try:
            pair = source.pairs(item, source.fetch(item))[0]
        except NoDrawing:
            continue
        assert pair.sketch is not None  # OpenMoji's are drawn
        yield Pictured(item.group, pair.color, cv2.cvtColor(pair.sketch, cv2.COLOR_GRAY2RGB))


def draw(color: Image, params: XDoG = XDoG()) -> Image:  # noqa: B008  (frozen)
    """The drawing by XDoG."""
    return cv2.cvtColor(xdog(color, params), cv2.COLOR_GRAY2RGB)


def saturate(color: Image, factor: float) -> Image:
    """Scale the saturation; 0 is grey."""
    grey = cv2.cvtColor(color, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    return _to_bytes(grey + factor * (color - grey))


def jpeg(image: Image, quality: int = 60) -> Image:
    """Through JPEG, with the colours at half the resolution."""
    data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cast(Image, cv2.imdecode(data, cv2.IMREAD_COLOR_RGB))


def ink(lines: Image, color: tuple[int, int, int], paper: tuple[int, int, int] = (255, 255, 255)) -> Image:
    """The drawing in another ink, on another paper."""
    share = lines.astype(np.float32) / 255
    return _to_bytes(share * np.array(paper, np.float32) + (1 - share) * np.array(color, np.float32))


def scan(rng: Rng, lines: Image, paper: tuple[int, int, int], color: tuple[int, int, int] = (60, 60, 65)) -> Image:
    """Soft lines on tinted paper, in uneven light (up to 15 %), with its texture and some noise."""
    height, width = lines.shape[:2]
    page = ink(cv2.GaussianBlur(lines, (0, 0), rng.uniform(0.8, 1.8)), color, paper).astype(np.float32)
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0.3, 1, height)[:, None, None]
    page *= 1 - rng.uniform(0, 0.15) * (across * down).astype(np.float32)
    return _to_bytes(page + _texture(rng, (height, width), 32, 2) + rng.normal(0, 3, page.shape))


def pencil(rng: Rng, lines: Image) -> Image:
    """Soft grey lines: blurred, and of 30 % to 70 % of the contrast."""
    soft = cv2.GaussianBlur(lines, (0, 0), rng.uniform(1, 2.5)).astype(np.float32)
    return _to_bytes(250 - rng.uniform(0.3, 0.7) * (255 - soft))


def redrawn(rng: Rng, lines: Image) -> Image:
    """As by another hand: every line displaced by about 1 % of the width, here this way and there that way."""
    height, width = lines.shape[:2]
    shift = _texture(rng, (height, width), height // 5, width / 100)
    across, down = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(lines, across + shift[..., 0], down + shift[..., 1], cv2.INTER_LINEAR, borderValue=(255,) * 3)


def stamp(rng: Rng, drawing: Image) -> Image:
    """A red disc of 3 % of the area somewhere on it."""
    height, width = drawing.shape[:2]
    radius = round((0.03 * height * width / np.pi) ** 0.5)
    center = (int(rng.integers(radius, width - radius)), int(rng.integers(radius, height - radius)))
    return cv2.circle(drawing.copy(), center, radius, (200, 40, 40), -1)


def photograph(rng: Rng, emoji: Sequence[Pictured], height: int = 384, width: int = 512) -> Image:
    """Like a photograph: things in their own light before a shaded, textured background; out of focus, noisy."""
    top, bottom, side = rng.uniform(20, 235, (3, 3))
    down, across = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    scene = top * (1 - down) + bottom * down + (side - top) * across / 2
    scene = np.clip(scene + _texture(rng, (height, width), int(rng.integers(4, 64)), rng.uniform(3, 25)), 0, 255)
    for _ in range(int(rng.integers(3, 15))):
        size = int(rng.integers(height // 8, height // 2))
        thing = cv2.resize(emoji[int(rng.integers(len(emoji)))].color, (size, size), interpolation=cv2.INTER_AREA)
        outside = np.where(thing.min(axis=2) > 250, 255, 0).astype(np.uint8)
        cv2.floodFill(outside, None, (0, 0), 128)
        mask = cv2.GaussianBlur((outside != 128).astype(np.float32), (0, 0), 0.7)[..., None]
        light = rng.uniform(0.5, 1.1) * (1 - rng.uniform(0, 0.5) * np.linspace(0, 1, size)[:, None, None])
        y, x = int(rng.integers(height - size)), int(rng.integers(width - size))
        scene[y : y + size, x : x + size] *= 1 - mask
        scene[y : y + size, x : x + size] += thing * light * mask
    scene = cv2.GaussianBlur(scene, (0, 0), rng.uniform(0.4, 1.2))
    return _to_bytes(scene + rng.normal(0, rng.uniform(0, 6), scene.shape))


def _texture(rng: Rng, shape: tuple[int, int], cell: int, strength: float) -> NDArray[np.float32]:
    """Smooth noise, float32 [H, W, 3], of this standard deviation at the corners of its cells, in pixels."""
    coarse = rng.normal(0, strength, (max(2, shape[0] // cell), max(2, shape[1] // cell), 3)).astype(np.float32)
    return cv2.resize(coarse, shape[::-1], interpolation=cv2.INTER_CUBIC)


def _to_bytes(values: NDArray[np.floating]) -> Image:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


Two = tuple[Image, Image]  # a picture and its drawing, or whatever is no pair
Finish = Callable[[Image], Image]


class Family(NamedTuple):
    """Sheets of one kind; ``finish`` is what the whole sheet went through."""

    name: str
    twos: Iterator[Two]
    are_pairs: bool = True
    finish: Finish = np.asarray


def pair_families(rng: Rng, emoji: Sequence[Pictured], few: int) -> Iterator[Family]:
    """Pairs of a picture and its drawing; all the pictures in the ordinary families, ``few`` in the others."""
    every = [one for one in emoji if one.has_colour]
    some, grey = every[:few], [one for one in emoji if not one.has_colour]
    photos = [photograph(rng, emoji) for _ in range(few)]
    yield Family("line art", ((e.color, e.lines) for e in every))
    yield Family("line art, JPEG 60", ((e.color, e.lines) for e in every), finish=jpeg)
    yield Family("XDoG, authors'", ((e.color, draw(e.color)) for e in every))
    yield Family("XDoG, authors', JPEG 60", ((e.color, draw(e.color)) for e in every), finish=jpeg)
    yield Family("XDoG, soft (phi 0.2)", ((e.color, draw(e.color, SOFT)) for e in every))
    yield Family("XDoG, softer (phi 0.05, gamma 0.98, epsilon -2)", ((e.color, draw(e.color, SOFTER)) for e in some))
    yield Family("line art, 64 pixels", ((e.color, e.lines) for e in some), finish=partial(_to_height, 64))
    yield Family("line art, 900 pixels", ((e.color, e.lines) for e in some[:100]), finish=partial(_to_height, 900))
    yield Family("photographs, XDoG", ((p, draw(p)) for p in photos))
    yield Family("photographs, XDoG, JPEG 60", ((p, draw(p)) for p in photos), finish=jpeg)
    yield Family("photographs, XDoG, soft", ((p, draw(p, SOFT)) for p in photos))
    yield Family("photographs of saturation 0.3, XDoG", ((saturate(p, 0.3), draw(p)) for p in photos))
    yield Family("pencil", ((e.color, pencil(rng, e.lines)) for e in some))
    yield Family("pencil, JPEG 60", ((e.color, pencil(rng, e.lines)) for e in some), finish=jpeg)
    yield Family("scan of yellowish paper", ((e.color, scan(rng, e.lines, YELLOWISH)) for e in some))
    yield Family("the same, JPEG 60", ((e.color, scan(rng, e.lines, YELLOWISH)) for e in some), finish=jpeg)
    yield Family("scan of greyish paper", ((e.color, scan(rng, e.lines, GREYISH, (100, 100, 100))) for e in some))
    yield Family("blue ink", ((e.color, ink(e.lines, BLUE)) for e in some))
    yield Family("blue ink, JPEG 60", ((e.color, ink(e.lines, BLUE)) for e in some), finish=jpeg)
    yield Family("scan of blue ink on yellowish paper", ((e.color, scan(rng, e.lines, YELLOWISH, BLUE)) for e in some))
    yield Family("lines 1 % out of place", ((e.color, redrawn(rng, e.lines)) for e in some))
    yield Family("line art with a red stamp", ((e.color, stamp(rng, e.lines)) for e in some))
    yield Family("inverted line art", ((e.color, 255 - e.lines) for e in some))
    yield Family("inverted XDoG", ((e.color, 255 - draw(e.color)) for e in some))
    for factor in (0.3, 0.15, 0.05, 0):
        faded = [saturate(e.color, factor) for e in some]
        yield Family(f"saturation {factor}, line art", ((f, e.lines) for f, e in zip(faded, some, strict=True)))
        yield Family(f"saturation {factor}, XDoG", ((f, draw(f)) for f in faded))
    yield Family("pictures without colour, line art", ((e.color, e.lines) for e in grey))
    yield Family("pictures without colour, XDoG", ((e.color, draw(e.color)) for e in grey))
    yield Family("pictures without colour, blue ink", ((e.color, ink(e.lines, BLUE)) for e in grey))
    yield Family("the same, JPEG 60", ((e.color, ink(e.lines, BLUE)) for e in grey), finish=jpeg)
    yield Family("pictures without colour, yellowish scan", ((e.color, scan(rng, e.lines, YELLOWISH)) for e in grey))
    yield Family("the same in blue ink", ((e.color, scan(rng, e.lines, YELLOWISH, BLUE)) for e in grey))
    yield Family("pictures without colour, red stamp on line art", ((e.color, stamp(rng, e.lines)) for e in grey))


def other_families(rng: Rng, emoji: Sequence[Pictured], few: int) -> Iterator[Family]:
    """What is no pair of a picture and its drawing."""
    some = [one for one in emoji if one.has_colour][:few]
    strangers = [(a, b) for a in some for b in [emoji[int(rng.integers(len(emoji)))]] if a.group != b.group]
    photos = [photograph(rng, emoji) for _ in range(few)]
    wide = [photograph(rng, emoji, 384, 1024) for _ in range(few)]
    shifted = list(itertools.pairwise(photos))
    white = np.full_like(some[0].color, 255)
    yield Family("two pictures", ((a.color, b.color) for a, b in strangers), False)
    yield Family("two photographs", iter(shifted), False)
    yield Family("two drawings of one picture", ((e.lines, draw(e.color)) for e in some), False)
    yield Family(
        "the same, one on yellowish paper", ((draw(e.color), scan(rng, e.lines, YELLOWISH)) for e in some), False
    )
    yield Family("two drawings", ((a.lines, b.lines) for a, b in strangers), False)
    yield Family("twice the same picture", ((e.color, e.color) for e in some), False)
    yield Family("twice the same picture, JPEG 60", ((e.color, e.color) for e in some), False, jpeg)
    yield Family("twice the same drawing", ((e.lines, e.lines) for e in some), False)
    yield Family("wide photograph cut in the middle", ((w[:, :512], w[:, 512:]) for w in wide), False)
    yield Family("picture cut in the middle", ((e.color[:, :128], e.color[:, 128:]) for e in some), False)
    yield Family("XDoG cut in the middle", ((d[:, :128], d[:, 128:]) for d in (draw(e.color) for e in some)), False)
    yield Family("picture, white", ((e.color, white) for e in some), False)
    yield Family("drawing, white", ((e.lines, white) for e in some), False)
    yield Family("drawing, one colour", ((e.lines, np.full_like(white, rng.integers(0, 256, 3))) for e in some), False)
    yield Family("drawing, noise", ((e.lines, rng.integers(0, 256, white.shape, np.uint8)) for e in some), False)
    yield Family("photograph, its grey copy", ((p, saturate(p, 0)) for p in photos), False)
    yield Family("picture, its grey copy", ((e.color, saturate(e.color, 0)) for e in some), False)
    yield Family("photograph, a stranger's XDoG", ((a, draw(b)) for a, b in shifted), False)
    yield Family("picture, a stranger's line art", ((a.color, b.lines) for a, b in strangers), False)
    yield Family("picture, a stranger's XDoG", ((a.color, draw(b.color)) for a, b in strangers), False)


def _to_height(height: int, sheet: Image) -> Image:
    width = 2 * round(sheet.shape[1] * height / sheet.shape[0] / 2)
    method = cv2.INTER_AREA if height < sheet.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(sheet, (width, height), interpolation=method)


def measure(family: Family) -> list[int]:
    """Number of pairs that are right, refused and wrong."""
    counts = [0, 0, 0]
    for two in family.twos:
        answers = [answer(family.finish(np.hstack(halves))) for halves in (two, two[::-1])]
        truth = ["right", "left"] if family.are_pairs else [None, None]
        wrong = any(told not in (None, side) for told, side in zip(answers, truth, strict=True))
        counts[2 if wrong else 1 if None in answers else 0] += 1
    return counts


def answer(sheet: Image) -> str | None:
    """The half that is taken for the drawing; None for a refusal."""
    try:
        return drawing_side(sheet)
    except Undecided:
        return None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--half", type=click.Choice(["even", "odd"]), default="odd", show_default=True, help="odd is held out.")
@click.option("--few", type=click.IntRange(min=20), default=200, show_default=True, help="Pairs of most families.")
@click.option("--most", type=click.IntRange(min=20), default=5000, show_default=True, help="Pairs of the first five.")
def main(half: str, few: int, most: int) -> None:
    """Print a table of families of sheets: how many are answered rightly, refused, and answered wrongly."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng(0)
    emoji = list(openmoji(256, ["even", "odd"].index(half)))
    emoji = [emoji[index] for index in rng.permutation(len(emoji))[:most]]  # few of them are then of all kinds
    print("| family | pairs | right | refused | wrong |\n| --- | --: | --: | --: | --: |")
    for title, families in (("pairs", pair_families), ("no pairs", other_families)):
        print(f"| **{title}** | | | | |")
        for family in families(rng, emoji, few):
            counts = measure(family)
            right = f"{counts[0]}" if family.are_pairs else ""
            refused = f"{counts[1]} ({100 * counts[1] / sum(counts):.1f} %)"
            print(f"| {family.name} | {sum(counts)} | {right} | {refused} | {counts[2]} |", flush=True)


if __name__ == "__main__":
    main()
