"""Matching of labels at corners and of masks, on hand-made views; for seams see test_mosaic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sam_poll.core.types import Size
from sam_poll.imaging.masks import tight
from sam_poll.mosaic import labels, seams, segment_tile
from sam_poll.mosaic.grid import Area, TileGrid
from sam_poll.mosaic.tile_store import TileResult, TileStore
from tests.support.mosaic_paths import state_of

CUT = TileGrid(Size(256, 256), 128, 40)
NORTH_WEST, NORTH_EAST, SOUTH_WEST, SOUTH_EAST = range(4)


def view(*rows: str) -> npt.NDArray[np.int64]:
    return np.array([[0 if c == "." else ord(c) for c in row] for row in rows], np.int64)


def around(one: list[str], other: list[str]) -> set[str]:
    return {chr(a) + chr(b) for a, b in seams.around(view(*one), view(*other))}


# ── corners, in the views of two tiles: one to the left, the other above ──


def test_around_joins_what_enters_left_and_leaves_above() -> None:
    assert around(["AAA.", "AA..", "A..."], ["bbb.", "bb..", "b..."]) == {"Ab"}


def test_around_ignores_what_ends_in_the_corner() -> None:
    ends_at_the_left_seam = [".AA.", ".AA.", "...."]
    ends_at_the_upper_seam = ["....", "AA..", "AA.."]
    assert around(ends_at_the_left_seam, ends_at_the_left_seam) == set()
    assert around(ends_at_the_upper_seam, ends_at_the_upper_seam) == set()


def test_around_ignores_views_that_agree_on_less_than_half() -> None:
    assert around(["A...", "AAA.", "AAA."], ["b...", "....", "...."]) == {
        "Ab"
    }  # all of the smaller label
    assert around(["AAA.", "A...", "A..."], ["bb..", "bbb.", "bbbb"]) == {"Ab"}
    assert around(["A...", "A...", "A...", "A..."], ["bbbb", "....", "....", "...."]) == set()


def test_around_keeps_two_neighbouring_objects_apart() -> None:
    one, other = ["AABB", "AABB", "BBBB"], ["ccdd", "ccdd", "dddd"]
    assert around(one, other) == {"Ac", "Bd"}


def test_around_ignores_an_empty_view() -> None:
    assert around(["...."] * 3, ["AAAA"] * 3) == set()


# ── tiles on disk ──


def kept(folder: Path, seen: dict[int, npt.NDArray[np.bool_]]) -> tuple[TileStore, labels.Tables]:
    """Return a mosaic whose tiles in `seen` have the labels of these pixels, the others none."""
    state = state_of(folder, {"of": "a test"})
    whole = Area(0, 0, *CUT.size)
    for tile in CUT:
        found = seen.get(tile.number, np.zeros((256, 256), bool)).astype(np.uint16)
        bands = {side: found[area.within(whole)] for side, area in CUT.bands(tile.number).items()}
        core = found[tile.core.within(whole)]
        count = int(tile.number in seen)
        areas = np.array([np.count_nonzero(core)] * count, np.int64)
        state.keep(
            tile.number,
            TileResult(
                core, bands, np.full(count, 0.9, np.float32), areas, core.size, skipped=False
            ),
        )
    return state, labels.tables(state, CUT)


def disc(x: float, y: float, radius: float) -> npt.NDArray[np.bool_]:
    rows, columns = np.indices((256, 256)) + 0.5
    return np.asarray(np.hypot(columns - x, rows - y) < radius)


def objects(state: TileStore, known: labels.Tables) -> int:
    sets, joins = labels.join_labels(state, CUT, known, lambda _: None)
    found = len(set(sets.roots()[1:].tolist()))
    assert joins == len(known.scores) - 1 - found
    return found


@pytest.mark.parametrize("tiles", [(NORTH_WEST, SOUTH_EAST), (NORTH_EAST, SOUTH_WEST)])
@pytest.mark.parametrize("centre", [(128, 128), (120, 131), (135, 122)])
def test_labels_of_two_diagonal_tiles_are_joined_over_a_corner(
    tmp_path: Path, tiles: tuple[int, int], centre: tuple[int, int]
) -> None:
    shape = disc(*centre, 50)
    assert objects(*kept(tmp_path, dict.fromkeys(tiles, shape))) == 1


@pytest.mark.parametrize("tiles", [(NORTH_WEST, SOUTH_EAST), (NORTH_EAST, SOUTH_WEST)])
def test_labels_of_two_objects_at_a_corner_stay_apart(
    tmp_path: Path, tiles: tuple[int, int]
) -> None:
    one, other = tiles
    east = {NORTH_WEST: -1, SOUTH_WEST: -1, NORTH_EAST: 1, SOUTH_EAST: 1}
    south = {NORTH_WEST: -1, NORTH_EAST: -1, SOUTH_WEST: 1, SOUTH_EAST: 1}
    seen = {tile: disc(128 + 26 * east[tile], 128 + 26 * south[tile], 34) for tile in (one, other)}
    assert not (seen[one] & seen[other]).any()
    assert objects(*kept(tmp_path, seen)) == 2


def test_labels_of_all_four_tiles_at_a_corner_are_joined(tmp_path: Path) -> None:
    assert objects(*kept(tmp_path, dict.fromkeys(range(4), disc(128, 128, 50)))) == 1


# ── order of masks ──


def test_paint_prefers_a_connected_mask_to_a_better_one_in_pieces() -> None:
    frame = np.zeros((100, 100), bool)
    frame[10:50, 10:50] = True
    exact = tight(frame.copy(), "object", 0.85)
    frame[10:20, 10:20] = False  # lacks a part of one object and holds half of another
    frame[60:90, 50:100] = True
    both = tight(frame, "object", 0.95)
    numbers: Any = np.zeros((100, 100), np.uint16)
    scores: list[float] = []
    segment_tile._paint(numbers, np.ones((100, 100), bool), scores, [both, exact], 20)
    assert scores[0] == 0.85
    assert (numbers[10:50, 10:50] == 1).all()
