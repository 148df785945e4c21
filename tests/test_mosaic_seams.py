"""Labels around seams and corners: which are one object, on views made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sam_poll.geometry import tight
from sam_poll.mosaic import labels, passes, seams
from sam_poll.mosaic.state import Done, State
from sam_poll.mosaic.tiles import Area, Cut
from sam_poll.types import Size
from tests.mosaic_paths import state_of

CUT = Cut(Size(256, 256), 128, 40)
NORTH_WEST, NORTH_EAST, SOUTH_WEST, SOUTH_EAST = range(4)


def view(*rows: str) -> npt.NDArray[np.int64]:
    return np.array([[0 if c == "." else ord(c) for c in row] for row in rows], np.int64)


def around(one: list[str], other: list[str]) -> set[str]:
    return {chr(a) + chr(b) for a, b in seams.around(view(*one), view(*other))}


# ── corners, as the two tiles beside them see them: one to the left, the other above ──


def test_what_comes_in_from_the_left_and_goes_on_above_is_one() -> None:
    assert around(["AAA.", "AA..", "A..."], ["bbb.", "bb..", "b..."]) == {"Ab"}


def test_what_ends_in_the_corner_joins_nothing() -> None:
    ends_at_the_left_seam = [".AA.", ".AA.", "...."]
    ends_at_the_upper_seam = ["....", "AA..", "AA.."]
    assert around(ends_at_the_left_seam, ends_at_the_left_seam) == set()
    assert around(ends_at_the_upper_seam, ends_at_the_upper_seam) == set()


def test_views_of_a_corner_that_agree_on_less_than_half_join_nothing() -> None:
    assert around(["A...", "AAA.", "AAA."], ["b...", "....", "...."]) == {"Ab"}  # all of the lesser
    assert around(["AAA.", "A...", "A..."], ["bb..", "bbb.", "bbbb"]) == {"Ab"}
    assert around(["A...", "A...", "A...", "A..."], ["bbbb", "....", "....", "...."]) == set()


def test_two_objects_beside_each_other_in_a_corner_stay_two() -> None:
    one, other = ["AABB", "AABB", "BBBB"], ["ccdd", "ccdd", "dddd"]
    assert around(one, other) == {"Ac", "Bd"}


def test_a_view_of_nothing_joins_nothing() -> None:
    assert around(["...."] * 3, ["AAAA"] * 3) == set()


# ── tiles on disk ──


def kept(folder: Path, seen: dict[int, npt.NDArray[np.bool_]]) -> tuple[State, labels.Tables]:
    """A mosaic of which each tile in `seen` has found what is set there of the whole picture, the others nothing."""
    state = state_of(folder, {"of": "a test"})
    whole = Area(0, 0, *CUT.size)
    for tile in CUT:
        found = seen.get(tile.number, np.zeros((256, 256), bool)).astype(np.uint16)
        bands = {side: found[area.within(whole)] for side, area in CUT.bands(tile.number).items()}
        core = found[tile.core.within(whole)]
        count = int(tile.number in seen)
        areas = np.array([np.count_nonzero(core)] * count, np.int64)
        state.keep(tile.number, Done(core, bands, np.full(count, 0.9, np.float32), areas, core.size, skipped=False))
    return state, labels.tables(state, CUT)


def disc(x: float, y: float, radius: float) -> npt.NDArray[np.bool_]:
    rows, columns = np.indices((256, 256)) + 0.5
    return np.asarray(np.hypot(columns - x, rows - y) < radius)


def objects(state: State, known: labels.Tables) -> int:
    sets, joins = labels.joined(state, CUT, known, lambda _: None)
    found = len(set(sets.roots()[1:].tolist()))
    assert joins == len(known.scores) - 1 - found
    return found


@pytest.mark.parametrize("tiles", [(NORTH_WEST, SOUTH_EAST), (NORTH_EAST, SOUTH_WEST)])
@pytest.mark.parametrize("centre", [(128, 128), (120, 131), (135, 122)])
def test_an_object_over_a_corner_is_one_where_only_two_tiles_across_have_seen_it(
    tmp_path: Path, tiles: tuple[int, int], centre: tuple[int, int]
) -> None:
    shape = disc(*centre, 50)
    assert objects(*kept(tmp_path, dict.fromkeys(tiles, shape))) == 1


@pytest.mark.parametrize("tiles", [(NORTH_WEST, SOUTH_EAST), (NORTH_EAST, SOUTH_WEST)])
def test_two_objects_that_face_each_other_across_a_corner_stay_two(tmp_path: Path, tiles: tuple[int, int]) -> None:
    one, other = tiles
    east = {NORTH_WEST: -1, SOUTH_WEST: -1, NORTH_EAST: 1, SOUTH_EAST: 1}
    south = {NORTH_WEST: -1, NORTH_EAST: -1, SOUTH_WEST: 1, SOUTH_EAST: 1}
    seen = {tile: disc(128 + 26 * east[tile], 128 + 26 * south[tile], 34) for tile in (one, other)}
    assert not (seen[one] & seen[other]).any()
    assert objects(*kept(tmp_path, seen)) == 2


def test_an_object_that_all_four_tiles_have_seen_is_one(tmp_path: Path) -> None:
    assert objects(*kept(tmp_path, dict.fromkeys(range(4), disc(128, 128, 50)))) == 1


# ── which mask takes a pixel ──


def test_a_mask_of_one_piece_comes_before_a_surer_one_of_several() -> None:
    frame = np.zeros((100, 100), bool)
    frame[10:50, 10:50] = True
    exact = tight(frame.copy(), "object", 0.85)
    frame[10:20, 10:20] = False  # it misses a piece of the one thing, and holds half of another
    frame[60:90, 50:100] = True
    both = tight(frame, "object", 0.95)
    numbers: Any = np.zeros((100, 100), np.uint16)
    scores: list[float] = []
    passes._paint(numbers, np.ones((100, 100), bool), scores, [both, exact], 20)
    assert scores[0] == 0.85
    assert (numbers[10:50, 10:50] == 1).all()
