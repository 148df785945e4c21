"""The drawn scenes: the same seed draws the same scene, the truth is the picture's, prompts lie
where they say.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import scenes

some_scenes = st.builds(
    scenes.draw,
    seed=st.integers(0, 10**9),
    size=st.tuples(st.integers(96, 300), st.integers(96, 300)),
    difficulty=st.floats(0, 1),
)


def test_the_same_seed_draws_the_same_scene_and_another_seed_another() -> None:
    first = scenes.draw(5)
    again = scenes.draw(5)
    other = scenes.draw(6)
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.labels, again.labels)
    assert first.kinds == again.kinds
    assert not np.array_equal(first.pixels, other.pixels)


@settings(deadline=None, max_examples=25)
@given(scene=some_scenes)
def test_picture_and_truth_have_one_size_and_every_shape_is_seen_in_one_piece(
    scene: scenes.Scene,
) -> None:
    assert scene.pixels.dtype == np.uint8
    assert scene.pixels.shape == (scene.size.height, scene.size.width, 3)
    assert 1 <= len(scene.kinds) <= 3
    assert scene.labels.max() == len(scene.kinds)
    for mask in scene.masks:
        assert mask.sum() >= 15
        assert cv2.connectedComponents(mask.astype(np.uint8))[0] == 2


@pytest.mark.parametrize("seed", range(20))
def test_every_pixel_inside_a_shape_is_painted_unlike_the_ground(seed: int) -> None:
    scene = scenes.draw(seed, difficulty=0, count=(1, 1))
    inside = cv2.erode(scene.mask(1).astype(np.uint8), np.ones((5, 5))) > 0
    outside = cv2.dilate(scene.mask(1).astype(np.uint8), np.ones((5, 5))) == 0
    pixels = scene.pixels.astype(int)
    shape, ground = np.median(pixels[inside], 0), np.median(pixels[outside], 0)
    channel = int(np.argmax(np.abs(shape - ground)))
    like_shape = np.abs(pixels - shape)[..., channel] < np.abs(pixels - ground)[..., channel]
    assert like_shape[inside].mean() > 0.97
    assert like_shape[outside].mean() < 0.03


@pytest.mark.parametrize("kind", ["ring", "frame"])
def test_a_ring_has_a_hole_that_shows_the_ground(kind: str) -> None:
    mask = scenes.draw(1, count=(1, 1), kinds=[kind]).mask(1)
    contours, parents = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    assert len(contours) == 2
    assert sorted(parents[0, :, 3] >= 0) == [False, True]


@pytest.mark.parametrize("kind", scenes.KINDS)
def test_every_kind_of_shape_is_drawn_at_its_size(kind: str) -> None:
    scene = scenes.draw(3, (400, 300), difficulty=0, count=(1, 1), radius=(50, 60), kinds=[kind])
    assert scene.kinds == (kind,)
    box = scenes.box_of(scene.mask(1))
    assert 40 <= max(box.x1 - box.x0, box.y1 - box.y0) <= 122


def test_an_unknown_kind_of_shape_or_prompt_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no shape is called 'heart'.*ellipse"):
        scenes.draw(0, kinds=["heart"])
    with pytest.raises(ValueError, match=r"no prompt is called 'wish'.*box"):
        scenes.prompt_for(np.ones((4, 4), bool), "wish", np.random.default_rng(0))


def test_a_large_scene_holds_many_shapes_of_the_radius_asked_for() -> None:
    scene = scenes.draw(2, (1600, 900), count=(12, 12), radius=(40, 90))
    assert len(scene.kinds) >= 10
    for number in range(1, len(scene.kinds) + 1):
        box = scenes.box_of(scene.mask(number))
        assert max(box.x1 - box.x0, box.y1 - box.y0) <= 2 * 90 + 3


def test_hard_scenes_are_noisier_than_easy_ones() -> None:
    def noise(difficulty: float) -> float:
        pictures = [scenes.draw(seed, difficulty=difficulty).pixels for seed in range(8)]
        return float(
            np.mean([np.abs(p.astype(int) - cv2.medianBlur(p, 5)).mean() for p in pictures])
        )

    assert noise(1.0) > 2 * noise(0.0)


@settings(deadline=None, max_examples=25)
@given(scene=some_scenes, seed=st.integers(0, 1000))
def test_points_lie_inside_or_outside_as_their_label_says(scene: scenes.Scene, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for mask in scene.masks:
        for kind in scenes.PROMPTS:
            prompt = scenes.prompt_for(mask, kind, rng)
            assert ("box" in kind) == (prompt.box is not None)
            for point in prompt.points:
                assert mask[int(point.y), int(point.x)] == bool(point.label)


@settings(deadline=None, max_examples=25)
@given(scene=some_scenes, seed=st.integers(0, 1000))
def test_boxes_are_tight_or_loose_by_no_more_than_their_slack_and_inside_the_picture(
    scene: scenes.Scene, seed: int
) -> None:
    for mask in scene.masks:
        ys, xs = np.nonzero(mask)
        tight, loose = (
            scenes.box_of(mask),
            scenes.box_of(mask, np.random.default_rng(seed), slack=0.05),
        )
        assert (tight.x0, tight.y0, tight.x1, tight.y1) == (
            xs.min(),
            ys.min(),
            xs.max() + 1,
            ys.max() + 1,
        )
        width, height = tight.x1 - tight.x0, tight.y1 - tight.y0
        assert abs(loose.x0 - tight.x0) <= 0.05 * width
        assert abs(loose.y1 - tight.y1) <= 0.05 * height
        assert 0 <= loose.x0 < loose.x1 <= scene.size.width
        assert 0 <= loose.y0 < loose.y1 <= scene.size.height


def test_extreme_points_touch_all_four_sides_of_the_box() -> None:
    mask = scenes.draw(4).mask(1)
    box, (top, left, bottom, right) = scenes.box_of(mask), scenes.extreme_points(mask)
    assert (top.y, left.x, bottom.y + 1, right.x + 1) == (box.y0, box.x0, box.y1, box.x1)
    assert all(mask[int(p.y), int(p.x)] for p in (top, left, bottom, right))


def test_a_mask_that_fills_the_picture_has_no_background_point() -> None:
    with pytest.raises(ValueError, match="no outside"):
        scenes.point_off(np.ones((8, 8), bool), np.random.default_rng(0))


def test_iou_is_one_for_equal_masks_zero_for_disjoint_ones_and_one_for_two_empty_ones() -> None:
    a = np.zeros((4, 4), bool)
    b = a.copy()
    assert scenes.iou(a, b) == 1
    a[:2], b[2:] = True, True
    assert scenes.iou(a, a) == 1
    assert scenes.iou(a, b) == 0
    b[:] = True
    assert scenes.iou(a, b) == 0.5
