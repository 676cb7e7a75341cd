"""Which half is the drawing: right in either order, or refused with the reason that fits; never wrong.

On a few of the families that scripts/measure_sides.py measures in large numbers. Run: pytest tests/test_sides.py
"""

import itertools

import cv2
import measure_sides as sheets
import numpy as np
import pytest

from autopainter.data.sides import Undecided, drawing_side

GREY = "both halves are nearly grey"
COLOURFUL = "both halves are colourful"
STRANGERS = "do not show the same thing"
NO_DRAWING = "not dark lines on light paper"


@pytest.fixture(scope="module")
def emoji():
    """Some two hundred OpenMoji of the held-out half, from all over the set."""
    return list(sheets.openmoji(256, 1, step=10))


@pytest.fixture(scope="module")
def colourful(emoji):
    """Those that are surely pictures in colour: a fifth of the area and more has some."""
    return [one for one in emoji if (np.ptp(one.color, axis=2) > 60).mean() > 0.2]


def both_ways(picture, drawing, finish=np.asarray):
    """The answers for picture and drawing, and for drawing and picture; None for a refusal."""
    return [sheets.answer(finish(np.hstack(halves))) for halves in ((picture, drawing), (drawing, picture))]


def assert_refused(first, second, reason):
    """Both ways round, with the same reason but for the side that it names."""
    messages = []
    for halves in ((first, second), (second, first)):
        with pytest.raises(Undecided, match=reason) as caught:
            drawing_side(np.hstack(halves))
        messages.append(str(caught.value))
    swapped = messages[1].replace("left", "?").replace("right", "left").replace("?", "right")
    assert messages[0] == swapped


def test_of_openmoji_nearly_all_that_have_colour_are_told_and_none_wrongly(emoji, colourful):
    assert len(emoji) > 180
    assert len(colourful) >= 30
    told = [both_ways(one.color, one.lines) for one in emoji]
    told_xdog = [both_ways(one.color, sheets.draw(one.color)) for one in emoji[::2]]
    assert all(answers in (["right", "left"], [None, None]) for answers in told + told_xdog)
    refused = [one for one, answers in zip(emoji, told, strict=True) if answers == [None, None] and one.has_colour]
    assert len(refused) <= 0.05 * len(emoji)
    assert sum(one is other for one in refused for other in colourful) <= 1


RNG = np.random.default_rng(0)
DRAWINGS = {
    "xdog": lambda one: sheets.draw(one.color),
    "soft xdog": lambda one: sheets.draw(one.color, sheets.SOFT),
    "pencil": lambda one: sheets.pencil(RNG, one.lines),
    "blue ink": lambda one: sheets.ink(one.lines, sheets.BLUE),
    "yellowish scan": lambda one: sheets.scan(RNG, one.lines, sheets.YELLOWISH),
    "greyish scan": lambda one: sheets.scan(RNG, one.lines, sheets.GREYISH),
    "redrawn": lambda one: sheets.redrawn(RNG, one.lines),
}


@pytest.mark.parametrize("kind", DRAWINGS)
@pytest.mark.parametrize("finish", [np.asarray, sheets.jpeg], ids=["", "jpeg"])
def test_most_kinds_of_drawings_are_told_and_none_wrongly(colourful, kind, finish):
    answers = [both_ways(one.color, DRAWINGS[kind](one), finish) for one in colourful[:30]]
    assert all(told in (["right", "left"], [None, None]) for told in answers)
    assert answers.count(["right", "left"]) >= 24


def test_photographs_are_told(emoji):
    rng = np.random.default_rng(1)
    for _ in range(10):
        photo = sheets.photograph(rng, emoji)
        assert both_ways(photo, sheets.draw(photo)) == ["right", "left"]


@pytest.mark.parametrize("size", [(64, 64), (700, 700), (300, 500), (333, 128)])
def test_halves_of_any_size_and_shape_are_told(colourful, size):
    one = colourful[0]
    resized = [cv2.resize(half, size, interpolation=cv2.INTER_AREA) for half in (one.color, one.lines)]
    assert both_ways(*resized) == ["right", "left"]


def test_without_colour_nothing_is_decided(colourful):
    for one in colourful[:20]:
        assert_refused(sheets.saturate(one.color, 0), one.lines, GREY)
        assert_refused(sheets.saturate(one.color, 0), sheets.ink(one.lines, sheets.BLUE), GREY)
        assert_refused(sheets.draw(one.color), sheets.scan(RNG, one.lines, sheets.YELLOWISH), GREY)
        assert_refused(one.lines, one.lines, GREY)


def test_a_drawing_in_blue_ink_is_never_the_picture(emoji):
    """Blots of ink are areas of colour; under JPEG they are not quite of the lines' colour."""
    grey = [one for one in emoji if not one.has_colour]
    assert len(grey) > 10
    for one in grey:
        assert both_ways(one.color, sheets.ink(one.lines, sheets.BLUE), sheets.jpeg) == [None, None]
    blot = np.full((256, 256, 3), 255, np.uint8)
    cv2.circle(blot, (128, 128), 100, (40, 60, 200), 6)
    cv2.circle(blot, (128, 128), 50, (90, 60, 200), -1)
    black = np.repeat(blot.min(axis=2, keepdims=True), 3, axis=2)
    assert_refused(blot, black, "both may be drawings")


def test_two_pictures_are_refused(colourful):
    for one, other in itertools.pairwise(colourful[:20]):
        assert_refused(one.color, one.color, COLOURFUL)
        with pytest.raises(Undecided):
            drawing_side(np.hstack((one.color, other.color)))


def test_a_wide_picture_cut_in_the_middle_is_refused(emoji):
    rng = np.random.default_rng(2)
    for _ in range(10):
        with pytest.raises(Undecided):
            drawing_side(sheets.photograph(rng, emoji, 256, 512))


def test_the_drawing_of_something_else_is_refused(emoji):
    rng = np.random.default_rng(3)
    photos = [sheets.photograph(rng, emoji) for _ in range(8)]
    for one, other in itertools.pairwise(photos):
        assert_refused(one, sheets.draw(other), STRANGERS)


def test_light_lines_on_black_are_no_drawing(colourful):
    for one in colourful[:20]:
        assert_refused(one.color, 255 - one.lines, NO_DRAWING)


def test_a_grey_photograph_is_no_drawing(emoji):
    rng = np.random.default_rng(4)
    photo = sheets.photograph(rng, emoji)
    assert_refused(photo, sheets.saturate(photo, 0), NO_DRAWING)


@pytest.mark.parametrize("blank", [(255, 255, 255), (0, 0, 0), (240, 150, 30)])
def test_a_blank_half_is_named(colourful, blank):
    one = colourful[0]
    empty = np.full_like(one.color, blank)
    assert_refused(one.color, empty, "the right half is blank|the left half is blank")
    with pytest.raises(Undecided, match="the left half is blank"):
        drawing_side(np.hstack((empty, one.lines)))
