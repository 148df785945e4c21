"""Overlays: what is drawn where, at which size; and that nothing a label or a mask can be makes
drawing fail.
"""

from __future__ import annotations

import dataclasses
import itertools
from importlib import resources

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sam_poll.core.types import Box, Mask, Picture, Point, Prompt, Result, RgbArray, Size
from sam_poll.formats import overlay as module
from sam_poll.formats.overlay import (
    BACKGROUND,
    CROWD,
    FOREGROUND,
    PALETTE,
    caption,
    colour,
    draw,
    make,
)
from sam_poll.formats.registry import FormatOptions
from tests.support.results import disc, frames, grey_picture, mask_of, rectangle, result_of

SIZE = Size(400, 300)
FONT = (
    resources.files("sam_poll")
    .joinpath("data/fonts/DejaVuSansCondensed-Bold.subset.ttf")
    .read_bytes()
)


def drawn(result: Result, options: FormatOptions | None = None) -> RgbArray:
    assert result.picture is not None
    return draw(result, result.picture, options or FormatOptions(), FONT)


def plain(
    masks: list[Mask], prompts: list[Prompt] | None = None, scale: int = 1, size: Size = SIZE
) -> Result:
    return result_of(size, masks, prompts=prompts or [], picture=grey_picture(size, scale))


def tinted(pixel: np.ndarray, number: int) -> bool:
    """Whether a grey pixel has been moved towards the object's colour."""
    grey_free = pixel.astype(float) - pixel.mean()
    wanted = np.array(colour(number), float) - np.mean(colour(number))
    return bool(grey_free @ wanted > 0.9 * np.linalg.norm(grey_free) * np.linalg.norm(wanted) > 0)


def test_without_the_picture_there_is_nothing_to_draw_on() -> None:
    assert make(FormatOptions())(result_of(SIZE, [rectangle(SIZE, 1, 1, 9, 9)])) == []


def test_the_jpeg_is_the_drawing() -> None:
    result = plain([disc(SIZE, 200, 150, 100)])
    (document,) = make(FormatOptions())(result)
    assert (document.suffix, document.media_type) == (".overlay.jpg", "image/jpeg")
    read = cv2.cvtColor(
        cv2.imdecode(np.frombuffer(document.body, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
    )
    assert np.abs(read.astype(int) - drawn(result).astype(int)).mean() < 3


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_masks_lie_where_the_object_is_at_every_decoded_scale(scale: int) -> None:
    size = Size(1203, 905)
    canvas = drawn(plain([disc(size, 800, 300, 200, hole=100)], scale=scale, size=size))
    assert canvas.shape == (-(-905 // scale), -(-1203 // scale), 3)
    for x, y, inside in [
        (950, 300, True),
        (800, 450, True),
        (800, 300, False),
        (800, 550, False),
        (300, 300, False),
    ]:
        assert tinted(canvas[y // scale, x // scale], 1) == inside


@pytest.mark.parametrize(
    ("most", "shape"), [(200, (150, 200, 3)), (400, (300, 400, 3)), (4000, (300, 400, 3))]
)
def test_an_overlay_is_never_longer_than_its_limit_and_never_enlarged(
    most: int, shape: tuple[int, ...]
) -> None:
    canvas = drawn(
        plain([rectangle(SIZE, 100, 100, 200, 200)]), FormatOptions(overlay_max_side=most)
    )
    assert canvas.shape == shape


def test_the_smaller_of_two_objects_is_drawn_over_the_larger_in_its_own_colour() -> None:
    small, large = rectangle(SIZE, 150, 100, 250, 200), rectangle(SIZE, 50, 50, 350, 280)
    for masks, number in (([small, large], 1), ([large, small], 2)):
        canvas = drawn(plain(masks))
        assert tinted(canvas[150, 200], number)
        assert tinted(canvas[150, 300], 3 - number)


def test_points_are_green_for_foreground_and_red_for_background_with_a_white_ring() -> None:
    prompts = [Prompt("x", points=(Point(100, 150), Point(300.5, 150, 0)))]
    canvas = drawn(plain([], prompts))
    for x, tint in ((100, FOREGROUND), (300, BACKGROUND)):
        assert np.abs(canvas[150, x].astype(int) - tint).max() <= 2
        around = canvas[140:161, x - 10 : x + 11].astype(int)
        assert (around.min(axis=2) > 235).any()


def test_a_box_is_dashed_in_the_colour_of_its_object_and_its_corners_are_drawn() -> None:
    canvas = drawn(plain([], [Prompt("x", box=Box(50, 60, 350, 240))]))
    side = canvas[59:61, 60:340].astype(int)
    near = (np.abs(side - PALETTE[0]).max(axis=2) < 40).any(axis=0)
    assert 0.3 < near.mean() < 0.9
    for y, x in ((60, 50), (60, 349), (239, 349), (239, 50)):
        corner = canvas[y - 2 : y + 3, x - 2 : x + 3].astype(int)
        assert (np.abs(corner - PALETTE[0]).max(axis=2) < 60).any()


def test_outer_borders_and_the_borders_of_holes_are_outlined() -> None:
    canvas = drawn(plain([disc(SIZE, 200, 150, 100, hole=50)])).astype(int)
    for y, x in ((250, 200), (150, 300), (200, 200), (150, 250)):
        border = canvas[y - 2 : y + 3, x - 2 : x + 3]
        assert (np.abs(border - PALETTE[0]).max(axis=2) < 30).any()


def test_lines_and_text_grow_with_the_picture() -> None:
    """The same scene four times as large, seen at the same size, changes its look only a little."""
    small, large = Size(400, 300), Size(1600, 1200)
    one = drawn(plain([disc(small, 200, 150, 80, label="wheel")], size=small))
    four = drawn(plain([disc(large, 800, 600, 320, label="wheel")], size=large))
    again = cv2.resize(four, (400, 300), interpolation=cv2.INTER_AREA)
    assert np.abs(one.astype(int) - again.astype(int)).mean() < 4


def test_colours_are_stable_and_neighbours_differ() -> None:
    made = [colour(n) for n in range(1, 200)]
    assert made[: len(PALETTE)] == list(PALETTE)
    assert made == [colour(n) for n in range(1, 200)]
    assert all(np.abs(np.subtract(a, b)).max() > 40 for a, b in itertools.pairwise(made))


def test_a_caption_is_the_label_and_its_score_with_two_digits() -> None:
    assert caption(Mask("dog", 0.934, 0, 0, np.ones((1, 1), bool))) == "dog 0.93"
    assert caption(Mask("dog", float("nan"), 0, 0, np.ones((1, 1), bool))) == "dog"


def test_labels_change_the_picture_and_umlauts_have_glyphs_of_their_own() -> None:
    looks = [
        drawn(plain([rectangle(SIZE, 100, 100, 300, 250, label=label)])).tobytes()
        for label in "aäæжß漢"
    ]
    assert len(set(looks)) == len(looks)
    # What the font lacks all looks the same: the box that says so.
    assert drawn(plain([rectangle(SIZE, 100, 100, 300, 250, label="字")])).tobytes() == looks[-1]


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(), max_size=300))
@example("\ud800\x00\n\u202e\U0001f600" * 50)
@example("")
def test_any_label_is_drawn_somehow(label: str) -> None:
    assert drawn(plain([rectangle(SIZE, 100, 100, 300, 250, label=label)])).shape == (300, 400, 3)


@settings(deadline=None, max_examples=60)
@given(frames(), st.integers(1, 8), st.integers(16, 40))
def test_any_mask_is_drawn_somehow_on_any_tiny_canvas(
    frame: np.ndarray, scale: int, most: int
) -> None:
    size = Size(frame.shape[1], frame.shape[0])
    prompts = [
        Prompt("x", points=(Point(0, 0), Point(size.width, size.height, 0)), box=Box(0, 0, *size))
    ]
    result = plain([mask_of(frame)], prompts, scale, size)
    assert drawn(result, FormatOptions(overlay_max_side=most)).dtype == np.uint8


def test_an_empty_mask_is_labelled_at_its_prompt() -> None:
    empty = mask_of(np.zeros((300, 400), bool), "cat")
    for prompt in (
        Prompt("cat", box=Box(200, 150, 300, 250)),
        Prompt("cat", points=(Point(200, 150),)),
    ):
        with_label, without = drawn(plain([empty], [prompt])), drawn(plain([], [prompt]))
        rows, columns = np.nonzero((with_label != without).any(axis=2))
        assert 100 <= rows.min() <= rows.max() < 150
        assert 200 <= columns.min() <= columns.max() < 280


def test_labels_of_a_few_objects_keep_out_of_each_others_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rects = tag_rects(monkeypatch, [rectangle(SIZE, 100 + i, 100 + i, 300, 250) for i in range(5)])
    assert len(rects) == 5
    assert all(disjoint(a, b) for i, a in enumerate(rects) for b in rects[:i])


def test_the_smallest_object_has_first_choice_of_a_place_for_its_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large, small = rectangle(SIZE, 100, 100, 300, 250), rectangle(SIZE, 100, 100, 120, 120)
    tags: dict[tuple[int, int, int], tuple[int, int, int, int]] = {}
    monkeypatch.setattr(
        module, "_tag", lambda pen, rect, text, font, tint, pad: tags.update({tint: rect})
    )
    drawn(plain([large, small]))
    assert tags[PALETTE[1]][3] <= 100, "above the small object"
    assert tags[PALETTE[0]][1] >= 100, "the large one's label had to give way"


def test_in_a_crowd_labels_without_a_free_place_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    same = [rectangle(SIZE, 100, 100, 200, 200)] * (CROWD + 1)
    crowded = tag_rects(monkeypatch, same)
    assert 1 <= len(crowded) < len(same)
    assert len(tag_rects(monkeypatch, same[:CROWD])) == CROWD


def tag_rects(
    monkeypatch: pytest.MonkeyPatch, masks: list[Mask]
) -> list[tuple[int, int, int, int]]:
    rects: list[tuple[int, int, int, int]] = []
    monkeypatch.setattr(module, "_tag", lambda pen, rect, *rest: rects.append(rect))
    drawn(plain(masks))
    return rects


def disjoint(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_labels_stay_on_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    corners = [(0, 0), (390, 0), (0, 290), (390, 290)]
    masks = [rectangle(SIZE, x, y, x + 10, y + 10, label="a rather long label") for x, y in corners]
    for left, top, right, bottom in tag_rects(monkeypatch, masks):
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300


def test_a_long_label_is_shortened_in_the_middle_so_that_its_score_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts: list[str] = []
    monkeypatch.setattr(module, "_tag", lambda pen, rect, text, *rest: texts.append(text))
    drawn(plain([rectangle(SIZE, 100, 100, 300, 250, label="W" * 300)]))
    assert texts[0].startswith("WWW")
    assert texts[0].endswith("… 0.90") or texts[0].endswith("…W 0.90")


def test_the_picture_itself_is_not_drawn_on() -> None:
    picture = Picture(np.full((300, 400, 3), 128, np.uint8), SIZE, "00")
    picture.pixels.flags.writeable = False
    drawn(dataclasses.replace(plain([disc(SIZE, 200, 150, 100)]), picture=picture))
    assert (picture.pixels == 128).all()
