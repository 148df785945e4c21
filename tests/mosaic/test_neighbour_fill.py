"""Labels that a tile borrows from its neighbours: those that cross the seam and are missed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sam_poll.core.errors import UsageError
from sam_poll.core.types import AutomaticMaskRequest, Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.mosaic import assembly, labels, run, seams
from sam_poll.mosaic.grid import Area, TileGrid
from sam_poll.mosaic.neighbour_fill import NeighbourFill, borrow, oriented
from sam_poll.mosaic.run import MosaicOptions
from sam_poll.mosaic.segment_tile import MAX_LABELS, Labelled, Passes
from sam_poll.mosaic.tile_store import TileReader, TileResult, TileStore
from tests.support.mosaic_paths import mosaic, state_of
from tools import mosaics

REACH = 16
CUT = TileGrid(Size(192, 192), 64, REACH)
WHOLE = Area(0, 0, *CUT.size)
MIDDLE = 4  # of nine tiles
BESIDE = {"left": 3, "right": 5, "top": 1, "bottom": 7}
Frame = npt.NDArray[np.uint16]


def view(*rows: str) -> Frame:
    return np.array([[0 if c == "." else ord(c) for c in row] for row in rows], np.uint16)


def taken(
    mine: Frame, theirs: Frame, *, held: Frame | None = None, first: int = 1, min_area: int = 1
) -> list[str]:
    """Return the rows of the tile's half with the letters of the neighbour's labels it borrows."""
    new, of = borrow(mine, mine if held is None else held, theirs, first, min_area)
    assert (new[new > 0] >= first).all()
    return ["".join("." if n == 0 else chr(of[int(n) - first]) for n in row) for row in new]


# ── one seam with the tile on its right: three columns on each side ──

BLIND = view("...", "...")
NOTHING = ["...", "..."]


def test_borrow_takes_a_missed_label_that_crosses_the_seam() -> None:
    assert taken(BLIND, view(".aaaa.", ".aaaaa")) == ["aa.", "aaa"]
    assert taken(BLIND, view("aaaaaa", "bbbb..")) == ["aaa", "b.."]


def test_borrow_ignores_a_label_on_one_line_of_the_seam_only() -> None:
    assert taken(BLIND, view("aaa...", "aaa...")) == NOTHING
    assert taken(BLIND, view("...aaa", "...aaa")) == NOTHING
    assert taken(BLIND, view("aa.aaa", "aa.aaa")) == NOTHING
    assert taken(BLIND, view("aaaaaa", "...bbb")) == ["aaa", "..."]


def test_borrow_takes_a_label_of_which_more_than_half_is_missed() -> None:
    assert taken(view("...", ".zz"), view("aaaaaa", "aaaaa.")) == ["aaa", "a.."]
    assert taken(view("...", "zz."), view("aaaaa.", "aaaaa.")) == NOTHING
    assert taken(view("...", "zz."), view("aaaaaa", "aaaaa.")) == ["aaa", "..."]


def test_borrow_ignores_less_than_the_minimum_area() -> None:
    mine, theirs = view("...", "z.."), view("aaaaaa", "aaaa..")
    assert taken(mine, theirs, min_area=3) == ["aaa", "..."]
    assert taken(mine, theirs, min_area=4) == NOTHING


def test_borrow_ignores_a_label_without_free_pixel_at_the_seam() -> None:
    assert taken(view("z..", "z.."), view("aaaaaa", "aaaaaa")) == NOTHING


def test_borrow_takes_no_pixel_that_is_borrowed_already() -> None:
    theirs = view("aaaaaa", "aaaaaa")
    assert taken(BLIND, theirs, held=view("zzz", "zz.")) == NOTHING  # no contact is left
    assert taken(BLIND, theirs, held=view("zzz", ".zz")) == ["...", "a.."]
    assert taken(BLIND, theirs, held=view("zzz", ".zz"), min_area=2) == NOTHING


def test_borrow_stops_at_the_largest_label_number() -> None:
    theirs = view("aaaaaa", "bbbbbb")
    assert taken(BLIND, theirs, first=MAX_LABELS - 1) == ["aaa", "bbb"]
    assert taken(BLIND, theirs, first=MAX_LABELS) == ["aaa", "..."]
    assert taken(BLIND, theirs, first=MAX_LABELS + 1) == NOTHING


@pytest.mark.parametrize("side", BESIDE)
def test_oriented_band_has_the_tile_on_the_right_and_turns_back(
    side: str,
) -> None:
    area = CUT.bands(MIDDLE)[side]
    own = np.zeros((192, 192), bool)
    own[CUT[MIDDLE].core.within(WHOLE)] = True
    band = np.where(
        own[area.within(WHOLE)],
        np.arange(area.width * area.height).reshape(area.height, area.width),
        0,
    )
    band = band.astype(np.uint16)
    seen = oriented(band, side)
    assert seen.shape == (64, 2 * REACH)
    assert not seen[:, :REACH].any()
    np.testing.assert_array_equal(oriented(seen, side, back=True), band)


views = arrays.arrays(np.uint16, (6, 8), elements=st.integers(0, 4))


@given(views, views, st.integers(1, 8))
def test_borrow_takes_free_pixels_that_the_seam_joins_to_their_origin(
    seen: Frame, theirs: Frame, min_area: int
) -> None:
    mine = seen[:, 4:]
    new, of = borrow(mine, mine, theirs, 5, min_area)
    assert not mine[new > 0].any()
    assert sorted(set(new[new > 0].tolist())) == list(range(5, 5 + len(of)))
    np.testing.assert_array_equal(theirs[:, 4:][new > 0], of[new[new > 0] - 5])
    after = seen.copy()
    after[:, 4:][new > 0] = new[new > 0]
    joined = set(seams.matches(theirs, after, 4))
    assert {(int(label), 5 + n) for n, label in enumerate(of)} <= joined


# ── nine tiles on disk ──


def kept(folder: Path, seen: dict[int, Any], cut: TileGrid = CUT) -> TileStore:
    """Return a mosaic whose tiles in `seen` have the labels of these pixels, the others none.

    The scores of tile 3 are 0.3, 0.32, 0.33 and so on.
    """
    state = state_of(folder, {"of": "a test"})
    for tile in cut:
        found = np.zeros((cut.size.height, cut.size.width), np.uint16)
        window = tile.window.within(WHOLE)
        found[window] = np.asarray(seen.get(tile.number, found), np.uint16)[window]
        count = int(found.max())
        core = found[tile.core.within(WHOLE)]
        areas = np.bincount(core.ravel(), minlength=count + 1)[1:].astype(np.int64)
        bands = {side: found[area.within(WHOLE)] for side, area in cut.bands(tile.number).items()}
        scores = (tile.number / 10 + np.arange(1, count + 1) * (np.arange(count) > 0) / 100).astype(
            np.float32
        )
        state.keep(tile.number, TileResult(core, bands, scores, areas, core.size, skipped=False))
    return state


def box(x0: int, y0: int, x1: int, y1: int) -> npt.NDArray[np.bool_]:
    frame = np.zeros((192, 192), bool)
    frame[y0:y1, x0:x1] = True
    return frame


def whole(state: TileReader, cut: TileGrid = CUT) -> npt.NDArray[np.int64]:
    """Return the joined labels of the whole picture."""
    known = labels.tables(state, cut)
    roots = labels.join_labels(state, cut, known, lambda _: None)[0].roots()
    frame = np.zeros((192, 192), np.int64)
    for tile in cut:
        frame[tile.core.within(WHOLE)] = roots[known.of(state.numbers(tile.number), tile.number)]
    return frame


OVER = {
    "left": box(40, 80, 90, 110),
    "right": box(102, 80, 152, 110),
    "top": box(80, 40, 110, 90),
    "bottom": box(80, 102, 110, 152),
}
MISSING = box(
    64 + REACH, 64 + REACH, 128 - REACH, 128 - REACH
)  # deeper in the middle than any band


@pytest.mark.parametrize("side", BESIDE)
def test_neighbour_fill_completes_a_missed_object_within_the_band(
    tmp_path: Path, side: str
) -> None:
    state = kept(tmp_path, {BESIDE[side]: OVER[side]})
    frame = whole(NeighbourFill(state, CUT, 20))
    np.testing.assert_array_equal(frame > 0, OVER[side] & ~MISSING)
    assert len(np.unique(frame)) == 2
    assert np.count_nonzero(frame) > np.count_nonzero(whole(state))


@pytest.mark.parametrize("side", BESIDE)
def test_neighbour_fill_tables_and_bands_agree_with_the_labels(tmp_path: Path, side: str) -> None:
    state = kept(tmp_path, {BESIDE[side]: OVER[side], MIDDLE: box(90, 90, 100, 100)})
    view = NeighbourFill(state, CUT, 20)
    numbers, (scores, areas, valid, skipped) = view.numbers(MIDDLE), view.table(MIDDLE)
    np.testing.assert_array_equal(np.bincount(numbers.ravel())[1:], areas)
    np.testing.assert_allclose(scores, [MIDDLE / 10, BESIDE[side] / 10])
    assert (valid, skipped) == state.table(MIDDLE)[2:]
    frame = np.zeros((192, 192), np.uint16)
    frame[CUT[MIDDLE].core.within(WHOLE)] = numbers
    for name, area in CUT.bands(MIDDLE).items():
        [band] = view.bands(MIDDLE, name).values()
        np.testing.assert_array_equal(band, frame[area.within(WHOLE)])
        assert band.any() == (name == side)


def test_neighbour_fill_does_not_change_the_tiles_on_disk(tmp_path: Path) -> None:
    state = kept(tmp_path, {3: OVER["left"]})
    before = {tile.number: state.path(tile.number).read_bytes() for tile in CUT}
    whole(NeighbourFill(state, CUT, 20))
    assert {tile.number: state.path(tile.number).read_bytes() for tile in CUT} == before
    assert not state.numbers(MIDDLE).any()


def test_neighbour_fill_does_not_lend_borrowed_labels(tmp_path: Path) -> None:
    cut = TileGrid(CUT.size, 64, 64)  # a band is as wide as a tile
    state = kept(tmp_path, {3: box(10, 80, 192, 110)}, cut)
    frame = whole(NeighbourFill(state, cut, 20), cut)
    np.testing.assert_array_equal(frame > 0, box(10, 80, 128, 110))


def test_neighbour_fill_borrows_one_object_from_two_neighbours(
    tmp_path: Path,
) -> None:
    shape = box(40, 40, 94, 94)
    state = kept(tmp_path, dict.fromkeys((0, 1, 3), shape))
    view = NeighbourFill(state, CUT, 20)
    frame = whole(view)
    np.testing.assert_array_equal(frame > 0, shape & ~MISSING)
    assert len(np.unique(frame)) == 2
    np.testing.assert_allclose(view.table(MIDDLE)[0], [0.3, 0.1])


def test_neighbour_fill_processes_left_right_top_bottom(tmp_path: Path) -> None:
    shape = box(40, 40, 152, 152)
    state = kept(tmp_path, dict.fromkeys((0, 1, 2, 3, 5, 6, 7, 8), shape))
    view = NeighbourFill(state, CUT, 20)
    scores, areas, _, _ = view.table(MIDDLE)
    np.testing.assert_allclose(scores, [0.3, 0.5, 0.1, 0.7])
    assert areas.tolist() == [64 * REACH, 64 * REACH, 32 * REACH, 32 * REACH]
    np.testing.assert_array_equal(np.bincount(view.numbers(MIDDLE).ravel())[1:], areas)


def test_neighbour_fill_keeps_the_neighbours_score(tmp_path: Path) -> None:
    missed = [box(40, y, 90, y + 10) for y in (66, 80, 94)]
    seen = sum((n + 1) * shape for n, shape in enumerate(missed))
    state = kept(tmp_path, {3: seen, MIDDLE: missed[0]})
    np.testing.assert_allclose(NeighbourFill(state, CUT, 20).table(MIDDLE)[0], [0.4, 0.32, 0.33])


def test_neighbour_fill_changes_nothing_where_nothing_is_missed(tmp_path: Path) -> None:
    state = kept(tmp_path, dict.fromkeys(range(9), OVER["left"]))
    np.testing.assert_array_equal(whole(NeighbourFill(state, CUT, 20)), whole(state))


def test_neighbour_fill_does_not_depend_on_the_order_of_reading(tmp_path: Path) -> None:
    shapes = {
        number: box(20 + 9 * number, 30, 150, 190 - 11 * number) for number in (0, 2, 3, 5, 7)
    }
    state = kept(tmp_path, shapes)

    def read(order: list[int]) -> list[bytes]:
        view = NeighbourFill(state, CUT, 20)
        found = {number: (*view.table(number)[:2], view.numbers(number)) for number in order}
        return [part.tobytes() for number in range(9) for part in found[number]]

    assert read(list(range(9))) == read([8, 1, 6, 3, 4, 0, 2, 7, 5, 4, 4, 8, 1])


# ── whole mosaics ──

OPTIONS = MosaicOptions(
    64,
    REACH,
    Passes(AutomaticMaskRequest(points_per_side=4, min_area=20, iou=0.5, stability=0.5)),
    "fake",
)


class Blind:
    """A replacement of `label_window` that labels white pixels, except in one window."""

    def __init__(self, window: int) -> None:
        self._left = window

    def __call__(
        self, engine: Any, pixels: Any, valid: Any, options: Any, core: Any, on_step: Any
    ) -> Labelled:
        self._left -= 1
        found = (pixels[..., 0] > 200) & valid & (self._left != -1)
        return Labelled(found.astype(np.uint16), np.full(int(found.any()), 0.75, np.float32))


def drawn(folder: Path, **more: Any) -> tuple[Path, npt.NDArray[np.bool_]]:
    shape = box(40, 80, 90, 110)
    pixels = np.where(
        shape[..., None], 255, np.indices((192, 192)).sum(0)[..., None] % 2 + 5
    ).astype(np.uint8)
    mosaics.write(folder / "a.tif", np.repeat(pixels, 3, 2), **more)
    return folder / "a.tif", shape


def test_mosaic_contains_an_object_that_one_window_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, shape = drawn(tmp_path)
    monkeypatch.setattr(assembly, "label_window", Blind(MIDDLE))
    stats = mosaic(picture, tmp_path / "out", OPTIONS, FakeEngine)
    found = mosaics.read(tmp_path / "out" / run.RASTER)
    np.testing.assert_array_equal(found, shape & ~MISSING)
    assert (stats["labels_before"], stats["joins"], stats["labels"]) == (2, 1, 1)
    assert stats["labelled_px"] == np.count_nonzero(found)


def test_unfinished_mosaic_with_other_bands_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture, _ = drawn(tmp_path)

    def stopped(step: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "BAND", 8)
        with pytest.raises(KeyboardInterrupt):
            mosaic(picture, tmp_path / "out", OPTIONS, FakeEngine, stopped)
    with pytest.raises(UsageError, match=r"\(band differ\)"):
        mosaic(picture, tmp_path / "out", OPTIONS, FakeEngine)
