"""Which shapes are one object, and how a turned box becomes an upright one."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sam_poll.core.errors import PromptError
from sam_poll.core.types import Box, Point, Prompt, Size
from sam_poll.prompts.importers.shapes import (
    Shape,
    box_shape,
    objects,
    prompts_of,
    unambiguous_objects,
    with_negatives,
)

SIZE = Size(640, 480)
edge = st.floats(-100, 740, allow_nan=False)


def box(x0: float, y0: float, x1: float, y1: float, label: str = "dog", group: int = 0) -> Shape:
    return Shape("box", label, ((x0, y0), (x1, y1)), group)


def clicks(
    *points: tuple[float, float], label: str = "dog", group: int = 0, negative: bool = False
) -> Shape:
    return Shape("points", label, points, group, negative)


# ── turned boxes ──


@given(
    x0=edge,
    y0=edge,
    width=st.floats(0.5, 300),
    height=st.floats(0.5, 300),
    degrees=st.floats(-720, 720),
)
def test_a_turned_box_is_the_hull_of_its_four_turned_corners(
    x0: float, y0: float, width: float, height: float, degrees: float
) -> None:
    x1, y1 = x0 + width, y0 + height
    centre = complex((x0 + x1) / 2, (y0 + y1) / 2)
    turn = complex(math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    turned = [
        (complex(*corner) - centre) * turn + centre
        for corner in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    ]
    hull = (
        (min(c.real for c in turned), min(c.imag for c in turned)),
        (
            max(c.real for c in turned),
            max(c.imag for c in turned),
        ),
    )
    made = box_shape((x0, y0, x1, y1), "dog", rotation=degrees)
    for corner, expected in zip(made.points, hull, strict=True):
        assert corner == pytest.approx(expected, abs=1e-6)


@given(
    x0=edge,
    y0=edge,
    width=st.floats(0.5, 300),
    height=st.floats(0.5, 300),
    degrees=st.floats(-720, 720),
)
def test_a_turned_box_that_meets_the_picture_is_cut_to_it_and_another_is_left_to_be_refused(
    x0: float, y0: float, width: float, height: float, degrees: float
) -> None:
    assume(degrees % 360)
    corners = (x0, y0, x0 + width, y0 + height)
    (a, b), (c, d) = box_shape(corners, "dog", rotation=degrees).points
    cut = box_shape(corners, "dog", rotation=degrees, size=SIZE).points
    if a < SIZE.width and b < SIZE.height and c > 0 and d > 0:
        assert cut == ((max(a, 0), max(b, 0)), (min(c, SIZE.width), min(d, SIZE.height)))
        assert cut[0][0] < cut[1][0]
        assert cut[0][1] < cut[1][1]
    else:
        assert cut == ((a, b), (c, d))


def test_turning_goes_clockwise_as_the_screen_shows_it() -> None:
    """A long flat box turned by a quarter stands upright; by 30° its right end goes down."""
    assert box_shape((0, 40, 100, 60), "a", rotation=90).points == (
        pytest.approx((40, 0)),
        pytest.approx((60, 100)),
    )
    half_w = 50 * math.cos(math.pi / 6) + 10 * 0.5
    assert box_shape((0, 40, 100, 60), "a", rotation=30).points[1][0] == pytest.approx(50 + half_w)


@pytest.mark.parametrize("rotation", [0.0, 360.0, -720.0])
def test_a_box_that_is_not_turned_keeps_its_very_numbers(rotation: float) -> None:
    assert box_shape((0.1, 0.2, 700.3, 0.7), "a", rotation=rotation, size=SIZE).points == (
        (0.1, 0.2),
        (700.3, 0.7),
    )


@pytest.mark.parametrize("corners", [(9, 1, 3, 5), (1, 5, 3, 5), (4, 4, 4, 4)])
def test_turning_mends_no_box_that_is_inside_out(
    corners: tuple[float, float, float, float],
) -> None:
    x0, y0, x1, y1 = corners
    assert box_shape(corners, "a", rotation=45, size=SIZE).points == ((x0, y0), (x1, y1))


# ── objects ──


def test_a_box_and_points_of_its_group_refine_one_object() -> None:
    shapes = [
        clicks((5, 5), group=1),
        box(0, 0, 9, 9, group=1),
        clicks((1, 1), group=1, negative=True),
    ]
    assert prompts_of(shapes) == (Prompt("dog", (Point(5, 5, 1), Point(1, 1, 0)), Box(0, 0, 9, 9)),)


def test_the_label_of_an_object_is_its_boxs_then_its_positive_points() -> None:
    assert (
        prompts_of([clicks((5, 5), label="spot", group=1), box(0, 0, 9, 9, "dog", 1)])[0].label
        == "dog"
    )
    negative = clicks((1, 1), label="background", group=1, negative=True)
    assert prompts_of([negative, clicks((5, 5), label="spot", group=1)])[0].label == "spot"


def test_without_a_group_each_box_and_each_points_shape_is_an_object_in_the_files_order() -> None:
    shapes = [clicks((1, 1), (2, 2), label="a"), box(0, 0, 9, 9, "b"), clicks((3, 3), label="c")]
    assert [(p.label, len(p.points), p.box is not None) for p in prompts_of(shapes)] == [
        ("a", 2, False),
        ("b", 0, True),
        ("c", 1, False),
    ]


def test_points_of_one_group_without_box_are_one_object() -> None:
    assert prompts_of([clicks((1, 1), group=7), clicks((2, 2), group=7)]) == (
        Prompt("dog", (Point(1, 1), Point(2, 2))),
    )


def test_in_a_group_of_several_boxes_points_belong_to_the_one_they_lie_in() -> None:
    shapes = [box(0, 0, 9, 9, "a", 1), box(20, 0, 29, 9, "b", 1), clicks((25, 5), (29, 9), group=1)]
    asked = objects(shapes)
    assert [(a.prompt.label, len(a.prompt.points)) for a in asked] == [("a", 0), ("b", 2)]
    assert asked[1].shapes == (shapes[1], shapes[2])
    for lost in (clicks((15, 5), group=1), clicks((5, 5), (25, 5), group=1)):
        with pytest.raises(PromptError, match="in 0 of them") as caught:
            objects([*shapes[:2], lost])
        assert caught.value.place == "group 1"
    with pytest.raises(PromptError, match="in 2 of them"):
        objects([box(0, 0, 9, 9, group=1), box(0, 0, 8, 8, group=1), clicks((5, 5), group=1)])


def test_negative_points_without_group_belong_to_the_only_object_or_the_only_box_around_them() -> (
    None
):
    away = clicks((100, 100), label="background", negative=True)
    assert [p.label for p in prompts_of([clicks((5, 5)), away])[0].points] == [1, 0]
    inside = clicks((25, 5), label="background", negative=True)
    two = [box(0, 0, 9, 9, "a"), box(20, 0, 29, 9, "b")]
    assert [len(p.points) for p in prompts_of([*two, inside])] == [0, 1]
    with pytest.raises(PromptError, match="lie in 0 boxes of 2 objects"):
        objects([*two, away])
    with pytest.raises(PromptError, match="lie in 2 boxes of 2 objects"):
        objects([box(0, 0, 9, 9), box(0, 0, 8, 8), clicks((5, 5), negative=True)])


def test_negative_points_alone_are_refused() -> None:
    with pytest.raises(PromptError, match="negative points only"):
        objects([clicks((5, 5), group=2, negative=True)])
    with pytest.raises(PromptError, match="negative points only"):
        objects([clicks((5, 5), negative=True)])


def test_a_negative_box_is_refused() -> None:
    with pytest.raises(PromptError, match="cannot be negative"):
        objects([Shape("box", "dog", ((0, 0), (9, 9)), negative=True)])


def test_further_labels_can_mean_negative_points_and_boxes_of_them_stay_boxes() -> None:
    shapes = with_negatives(
        [box(0, 0, 9, 9), clicks((5, 5), label="not"), box(1, 1, 2, 2, "not")], ["not"]
    )
    assert [shape.negative for shape in shapes] == [False, True, False]


shape = st.one_of(
    st.builds(lambda x, y, g: box(x, y, x + 10, y + 10, group=g), edge, edge, st.integers(0, 3)),
    st.builds(
        lambda x, y, g, n: clicks((x, y), group=g, negative=n),
        edge,
        edge,
        st.integers(0, 3),
        st.booleans(),
    ),
)


@given(st.lists(shape, max_size=12))
def test_every_shape_is_in_exactly_one_object_or_the_picture_is_refused(
    shapes: list[Shape],
) -> None:
    try:
        asked = objects(shapes)
    except PromptError:
        return
    assert sorted(map(repr, (s for a in asked for s in a.shapes))) == sorted(map(repr, shapes))
    boxes = [s for s in shapes if s.kind == "box"]
    assert sum(a.prompt.box is not None for a in asked) == len(boxes)
    assert all(a.prompt.box or any(p.label for p in a.prompt.points) for a in asked)


def test_stray_points_concern_only_boxes_around_them_and_points_without_a_group() -> None:
    pair = [box(0, 0, 20, 20, "a", 1), clicks((5, 5), group=1)]
    certain = box(30, 0, 40, 10, "b")
    own = clicks((35, 5), negative=True)  # in `certain` only
    doubtful = [box(10, 0, 25, 20, "c"), box(12, 0, 25, 20, "d", 4)]
    stray = clicks((15, 15), negative=True)
    loose = clicks((90, 90), label="e")
    shapes = [*doubtful, *pair, stray, certain, own, loose]
    with pytest.raises(PromptError):
        objects(shapes)
    assert [one.shapes for one in unambiguous_objects(shapes)] == [tuple(pair), (certain, own)]
    away = clicks((99, 1), negative=True)  # in no box: it cannot belong to one
    assert [one.shapes[0] for one in unambiguous_objects([*doubtful, *pair, away, loose])] == [
        *doubtful,
        pair[0],
    ]


def test_an_ambiguous_group_concerns_no_other_shapes() -> None:
    lost = [box(0, 0, 9, 9, group=1), box(0, 0, 8, 8, group=1), clicks((5, 5), group=1)]
    empty = [clicks((50, 50), group=2, negative=True)]
    pair = [box(0, 0, 20, 20, "a", 3), clicks((5, 5), group=3)]
    loose = [clicks((90, 90), label="e"), box(5, 5, 40, 40)]
    assert [one.shapes for one in unambiguous_objects([*lost, *loose, *empty, *pair])] == [
        (loose[0],),
        (loose[1],),
        tuple(pair),
    ]


@given(st.lists(shape, max_size=12))
def test_certain_objects_have_no_shape_twice_and_whole_groups(shapes: list[Shape]) -> None:
    certain = unambiguous_objects(shapes)
    used = [id(s) for one in certain for s in one.shapes]
    assert len(used) == len(set(used))
    assert set(used) <= set(map(id, shapes))
    for group in {s.group for s in shapes if s.kind == "points" and s.group}:
        members = [id(s) in used for s in shapes if s.group == group]
        assert all(members) or not any(members)


@pytest.mark.slow
def test_thousands_of_boxes_and_negative_points_find_each_other() -> None:
    """25 million pairs, in less than two seconds; this test's own time limit is what would notice
    minutes.
    """
    boxes = [box(20 * n, 0, 20 * n + 10, 10) for n in range(5000)]
    points = [clicks((20 * n + 5, 5), negative=True) for n in range(5000)]
    assert all(len(asked.shapes) == 2 for asked in objects([*boxes, *points]))
    lost = clicks((-5, -5), negative=True)
    assert all(len(one.shapes) == 2 for one in unambiguous_objects([*boxes, *points, lost]))
