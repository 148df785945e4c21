"""Mosaics from start to finish: grid, seams, outputs, interruptions, passes, and the command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyogrio
import pytest
import rasterio
import rasterio.features
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.core.errors import PictureError, UsageError
from sam_poll.core.protocols import Embedding
from sam_poll.core.types import AutomaticMaskRequest, PackedMask, Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.mosaic import assembly, run, seams
from sam_poll.mosaic import segment_tile as passes
from sam_poll.mosaic.grid import Area, TileGrid
from sam_poll.mosaic.run import MosaicOptions, Step
from sam_poll.mosaic.segment_tile import Passes
from sam_poll.mosaic.tile_store import FOLDER, TileResult, TileStore
from tests.conftest import wait_until
from tests.support.mosaic_paths import assembly_of, help_with, mosaic, opened, state_of
from tests.support.mosaics import ASKED, OPTIONS, Eyes, blobs, files, invoke, shown
from tests.support.paths import ROOT
from tools import mosaics


@pytest.fixture(autouse=True)
def _pictures_on_no_map_are_meant() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


@pytest.fixture
def eyes(monkeypatch: pytest.MonkeyPatch) -> Eyes:
    made = Eyes()
    monkeypatch.setattr(assembly, "label_window", made)
    return made


def same_up_to_names(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Return whether two label maps are equal but for the numbers; 0 must be 0 in both."""
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]).astype(np.int64), axis=1)
    counts = [len(np.unique(row)) for row in pairs]
    return counts[0] == counts[1] == pairs.shape[1] and bool(
        ((pairs[0] == 0) == (pairs[1] == 0)).all()
    )


# ── tiles ──

cuts = st.builds(
    TileGrid,
    st.builds(Size, st.integers(1, 700), st.integers(1, 700)),
    tile=st.sampled_from([64, 128, 240]),
    padding=st.integers(8, 64),
)


@given(cuts)
def test_grid_covers_each_pixel_once_and_windows_contain_their_tiles(cut: TileGrid) -> None:
    owned = np.zeros((cut.size.height, cut.size.width), np.uint8)
    whole = Area(0, 0, *cut.size)
    for tile in cut:
        owned[tile.core.within(whole)] += 1
        window = tile.window
        assert (window.width, window.height) == tuple(
            min(cut.tile + 2 * cut.padding, n) for n in cut.size
        )
        for area in (tile.core, *cut.bands(tile.number).values()):
            assert whole.x0 <= window.x0 <= area.x0 < area.x1 <= window.x1 <= whole.x1
            assert whole.y0 <= window.y0 <= area.y0 < area.y1 <= window.y1 <= whole.y1
    assert (owned == 1).all()


@given(cuts)
def test_grid_gives_both_tiles_of_a_seam_the_same_band(cut: TileGrid) -> None:
    for tile in cut:
        for other, side, opposite in (
            (cut.right(tile.number), "right", "left"),
            (cut.below(tile.number), "bottom", "top"),
        ):
            assert (other is None) == (side not in cut.bands(tile.number))
            if other is not None:
                assert cut.bands(tile.number)[side] == cut.bands(other)[opposite]


# ── seams ──


def view(rows: list[str]) -> npt.NDArray[np.int64]:
    return np.array([[0 if c == "." else ord(c) for c in row] for row in rows], np.int64)


def matched(one: list[str], other: list[str], seam: int = 3) -> set[str]:
    return {chr(a) + chr(b) for a, b in seams.matches(view(one), view(other), seam)}


def test_matches_joins_an_object_on_both_sides() -> None:
    assert matched(["AAAAAA", "AAAAAA"], ["bbbbbb", "bbbbbb"]) == {"Ab"}


def test_matches_joins_both_arms_of_a_u() -> None:
    assert matched(["AAAAA.", "......", "BBBBB."], ["ccccc.", "......", "ccccc."]) == {"Ac", "Bc"}


def test_matches_keeps_objects_that_end_at_the_seam_apart() -> None:
    assert matched(["AAABBB", "AAABBB"], ["cccddd", "cccddd"]) == {"Ac", "Bd"}


def test_matches_prefers_the_longer_contact() -> None:
    one = ["AAAAAA", "AAAAAA", "AAAAAA", "BBBBBB", "BBBBBB", "BBBBBB"]
    other = ["cccccc", "cccccc", "dddddd", "dddddd", "dddddd", "dddddd"]
    assert matched(one, other) == {"Ac", "Bd"}


def test_matches_ignores_views_that_agree_at_the_seam_only() -> None:
    one = ["AAAA..", "AAAA..", "AAAA.."]
    other = ["...ccc", "...ccc", "...ccc"]
    assert matched(one, other) == set()
    assert matched(["......"], ["cccccc"]) == set()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_matches_joins_exactly_the_objects_of_two_true_views(seed: int) -> None:
    truth = blobs(seed, Size(40, 120), 15).astype(np.int64)
    other = np.where(truth > 0, truth + 1000, 0)
    found = set(seams.matches(truth, other, 20))
    across = {int(n) for n in np.unique(truth[:, 19:21]) if n}
    assert found == {(n, n + 1000) for n in across}


# ── whole mosaics, with a simulated network without errors ──


@pytest.mark.slow
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), width=st.integers(130, 420), height=st.integers(100, 420))
def test_mosaic_labels_equal_the_truth(
    tmp_path_factory: Any, seed: int, width: int, height: int
) -> None:
    truth = blobs(seed, Size(width, height))
    areas = np.bincount(truth.ravel())
    truth[np.isin(truth, np.flatnonzero(areas < ASKED.min_area))] = 0
    folder = tmp_path_factory.mktemp("whole")
    mosaics.write(folder / "a.tif", shown(truth))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "label_window", Eyes())
        stats = mosaic(folder / "a.tif", folder / "out", OPTIONS, FakeEngine)
    labels = mosaics.read(folder / "out" / run.RASTER)
    assert same_up_to_names(labels, truth)
    assert stats["labels"] == labels.max() == len(np.unique(truth)) - 1
    assert stats["labelled_px"] == np.count_nonzero(truth)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    truth = blobs(3, Size(400, 300))
    truth[90:170, 90:170] = truth.max() + 1
    truth[110:150, 110:150] = 0  # a hole at a corner of four tiles
    mosaics.write(tmp_path / "a.tif", shown(truth))
    return tmp_path / "a.tif"


def test_polygons_have_holes_and_are_georeferenced(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    mosaic(picture, out, OPTIONS, FakeEngine)
    labels = mosaics.read(out / run.RASTER)
    meta, _, geometry, fields = pyogrio.raw.read(out / run.GEOPACKAGE, layer="labels")
    columns = dict(zip(meta["fields"], fields, strict=True))
    drawn = shapely.from_wkb(geometry)
    assert meta["crs"] == mosaics.CRS
    assert shapely.is_valid(drawn).all()
    assert shapely.get_num_interior_rings(shapely.get_parts(drawn)).sum() > 0, (
        "nothing in the picture has a hole"
    )
    with rasterio.open(out / run.RASTER) as file:
        again = rasterio.features.rasterize(
            zip(drawn, columns["label"].tolist(), strict=True),
            labels.shape,
            transform=file.transform,
            dtype="int32",
        )
    np.testing.assert_array_equal(again, labels)
    np.testing.assert_array_equal(columns["area_px"], np.bincount(labels.ravel())[columns["label"]])
    np.testing.assert_allclose(columns["area"], columns["area_px"] * mosaics.METRE**2)
    np.testing.assert_allclose(columns["perimeter"], shapely.length(drawn))
    np.testing.assert_allclose(columns["score"], 0.75)


def test_geojson_equals_the_geopackage(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    mosaic(picture, out, OPTIONS, FakeEngine)
    (one, _, drawn, fields), (two, _, again, others) = (
        pyogrio.raw.read(out / name) for name in (run.GEOPACKAGE, run.GEOJSON)
    )
    assert one["crs"] == two["crs"]
    assert list(one["fields"]) == list(two["fields"])
    for field, other in zip(fields, others, strict=True):
        np.testing.assert_allclose(field, other)
    assert shapely.equals_exact(shapely.from_wkb(drawn), shapely.from_wkb(again), 1e-6).all()


def test_labels_raster_is_georeferenced_tiled_and_compressed(picture: Path, eyes: Eyes) -> None:
    stats = mosaic(picture, picture.parent / "out", OPTIONS, FakeEngine)
    with (
        rasterio.open(picture) as before,
        rasterio.open(picture.parent / "out" / run.RASTER) as after,
    ):
        assert (after.crs, after.transform, after.shape) == (
            before.crs,
            before.transform,
            before.shape,
        )
        assert (after.dtypes, after.nodata, after.profile["compress"]) == (
            ("uint32",),
            0,
            "deflate",
        )
        assert after.block_shapes == [(128, 128)]
        assert stats["transform"] == list(before.transform)[:6]
        assert stats["crs"] == mosaics.CRS


def test_slivers_are_merged_into_the_neighbour_with_the_longest_border(
    tmp_path: Path, eyes: Eyes
) -> None:
    truth = np.zeros((128, 300), np.uint16)
    truth[20:60, 128:200] = 1
    truth[20:23, 124:128] = 2  # 12 pixels, 3 of its edges on the seam to 1
    truth[23:26, 124:126] = 3  # 6 pixels that touch a sliver only
    truth[100:103, 10:13] = 4  # alone
    mosaics.write(tmp_path / "a.tif", shown(truth))
    stats = mosaic(tmp_path / "a.tif", tmp_path / "out", OPTIONS, FakeEngine)
    truth[truth == 2] = 1
    truth[truth > 2] = 0
    np.testing.assert_array_equal(mosaics.read(tmp_path / "out" / run.RASTER), truth)
    assert (stats["slivers_merged"], stats["slivers_dropped"], stats["labels"]) == (1, 2, 1)


def test_mosaic_without_objects_writes_empty_files(tmp_path: Path) -> None:
    mosaics.write(tmp_path / "a.tif", np.full((200, 200, 3), 80, np.uint8))

    def never() -> Any:
        raise AssertionError("there is no tile to compute")

    stats = mosaic(tmp_path / "a.tif", tmp_path / "out", OPTIONS, never)
    assert (stats["tiles"], stats["tiles_skipped"], stats["labels"]) == (4, 4, 0)
    assert not mosaics.read(tmp_path / "out" / run.RASTER).any()
    assert len(pyogrio.raw.read(tmp_path / "out" / run.GEOPACKAGE)[2]) == 0
    assert json.loads((tmp_path / "out" / run.GEOJSON).read_text())["features"] == []


@pytest.mark.parametrize("kind", ["nodata", "alpha"])
def test_nodata_gets_no_label_and_empty_tiles_are_skipped(
    tmp_path: Path, eyes: Eyes, kind: str
) -> None:
    pixels = shown(blobs(3, Size(400, 300)))
    gone = np.zeros((300, 400), bool)
    gone[:, 150:] = True
    if kind == "nodata":
        pixels[gone] = 255
        mosaics.write(tmp_path / "a.tif", pixels, nodata=255)
    else:
        four = np.dstack([pixels[..., ::-1], np.where(gone, 0, 255).astype(np.uint8)])
        cv2.imwrite(str(tmp_path / "a.png"), four)
    path = next(tmp_path.glob("a.*"))
    stats = mosaic(path, tmp_path / "out", OPTIONS, FakeEngine)
    labels = mosaics.read(tmp_path / "out" / run.RASTER)
    assert labels[~gone].any()
    assert not labels[gone].any()
    assert (stats["tiles"], stats["tiles_skipped"], stats["valid_px"]) == (12, 6, 300 * 150)
    assert eyes.windows == 6


# ── interrupted and continued ──


class StoppedError(Exception):
    pass


def stopping_at(number: int) -> Callable[[Step], None]:
    steps = iter(range(number, -1, -1))

    def on_tile(_: Step) -> None:
        if next(steps) == 0:
            raise StoppedError

    return on_tile


@pytest.mark.slow
def test_mosaic_stopped_anywhere_continues_and_writes_the_same_files(
    picture: Path, eyes: Eyes
) -> None:
    tiles, options = 4, MosaicOptions(208, 32, OPTIONS.passes, "fake")
    progress: list[Step] = []
    mosaic(picture, picture.parent / "whole", options, FakeEngine, progress.append)
    expected = files(picture.parent / "whole")
    assert [step.stage for step in progress] == [s for s in run_stages() for _ in range(tiles)]
    eyes.windows = 0
    for number in range(len(progress)):
        out = picture.parent / f"stopped-{number}"
        with pytest.raises(StoppedError):
            mosaic(picture, out, options, FakeEngine, stopping_at(number))
        assert not (out / run.STATS).exists()
        mosaic(picture, out, options, FakeEngine)
        assert files(out) == expected
    assert eyes.windows == tiles * len(progress), "a finished tile was computed again"


def run_stages() -> list[str]:
    from sam_poll.cli.mosaic import STAGES

    return list(STAGES)


def test_mosaic_that_is_finished_is_not_computed_again(picture: Path, eyes: Eyes) -> None:
    first = mosaic(picture, picture.parent / "out", OPTIONS, FakeEngine)
    before = eyes.windows
    assert mosaic(picture, picture.parent / "out", OPTIONS, FakeEngine) == first
    assert eyes.windows == before


@pytest.mark.parametrize("left", ["all", "some"])
def test_mosaic_killed_while_removing_its_folder_is_finished(
    picture: Path, eyes: Eyes, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = picture.parent / "out"

    def killed(self: TileStore) -> None:
        if left == "some":
            (self.folder / "job.json").unlink()
            next(self.folder.path.rglob("*.npz")).unlink()
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(TileStore, "clear", killed)
        with pytest.raises(StoppedError):
            mosaic(picture, out, OPTIONS, FakeEngine)
    before = eyes.windows
    mosaic(picture, out, OPTIONS, FakeEngine)
    assert eyes.windows == before
    assert not (out / FOLDER).exists()


def test_unfinished_mosaic_of_another_kind_is_refused_and_kept(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    with pytest.raises(StoppedError):
        mosaic(picture, out, OPTIONS, FakeEngine, stopping_at(3))
    with pytest.raises(UsageError, match="padding differ"):
        mosaic(picture, out, MosaicOptions(128, 16, OPTIONS.passes, "fake"), FakeEngine)
    mosaic(picture, out, OPTIONS, FakeEngine)
    assert eyes.windows == 12


def test_second_process_computes_tiles_and_returns_the_same(picture: Path, eyes: Eyes) -> None:
    expected = mosaic(picture, picture.parent / "alone", OPTIONS, FakeEngine)
    alone, out = eyes.windows, picture.parent / "out"
    fresh: list[set[int]] = [set(), set(), set()]
    all_here = threading.Barrier(3)

    def run_process(own: set[int]) -> dict[str, Any]:
        met = False

        def on_tile(step: Step) -> None:
            nonlocal met
            if step.stage == "tiles" and step.fresh:
                own.add(step.done)
                if not met:
                    met = True
                    all_here.wait(30)

        return mosaic(picture, out, OPTIONS, FakeEngine, on_tile)

    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(run_process, fresh))
    assert made == [expected] * 3
    assert eyes.windows == 2 * alone, "a tile was made twice, or not at all"
    assert all(fresh)
    assert files(out) == files(picture.parent / "alone")
    assert not (out / FOLDER).exists()


def test_tile_of_a_hanging_process_is_computed_by_a_waiting_one(
    picture: Path, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = mosaic(picture, picture.parent / "alone", OPTIONS, FakeEngine)
    with opened(picture) as source:
        hangs = assembly_of(source, picture, OPTIONS, picture.parent / "out")
        with hangs.tiles.held(5) as ours:
            assert ours
            other = assembly_of(source, picture, OPTIONS, picture.parent / "out")
            while (taken := other.take(FakeEngine)) is assembly.Taken.TILE:
                pass
            assert taken is assembly.Taken.WAIT
            assert other.take(FakeEngine) is assembly.Taken.WAIT
            monkeypatch.setattr(assembly, "LONG_S", 0.0)
            monkeypatch.setattr(assembly, "LONG", 0)
            assert mosaic(picture, picture.parent / "out", OPTIONS, FakeEngine) == expected
            with pytest.raises(FileNotFoundError):
                hangs.take(FakeEngine)
    assert files(picture.parent / "out") == files(picture.parent / "alone")


def test_tile_store_keeps_the_first_of_two_results(tmp_path: Path) -> None:
    state = state_of(tmp_path, {})
    for label in (1, 2):
        numbers = np.full((4, 4), label, np.uint16)
        state.keep(
            3,
            TileResult(
                numbers, {}, np.zeros(2, np.float32), np.zeros(2, np.int64), 16, skipped=False
            ),
        )
    assert state.numbers(3)[0, 0] == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_help_with_computes_tiles_and_writes_no_outputs(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    help_with(picture, out, OPTIONS, FakeEngine)
    assert eyes.windows == 12
    assert not (out / run.RASTER).exists()
    mosaic(picture, out, OPTIONS, FakeEngine)
    assert eyes.windows == 12
    help_with(picture, out, OPTIONS, FakeEngine)
    assert eyes.windows == 12
    assert not (out / FOLDER).exists()


@pytest.mark.slow
def test_command_continues_after_a_kill_between_tiles(tmp_path: Path) -> None:
    mosaics.write(tmp_path / "a.tif", shown(blobs(5, Size(500, 500))))
    flags = [
        "--tile",
        "64",
        "--padding",
        "16",
        "-m",
        "fake",
        "--stability",
        "0.5",
        "--points-per-side",
        "4",
    ]

    def command(out: str) -> list[str]:
        words = [
            sys.executable,
            "-m",
            "sam_poll",
            "mosaic",
            str(tmp_path / "a.tif"),
            "-o",
            str(tmp_path / out),
        ]
        return [*words, *flags]

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command("killed"), env=env)
    try:
        wait_until(lambda: len(list((tmp_path / "killed").glob(f"{FOLDER}/*/*.npz"))) >= 3, 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = len(list((tmp_path / "killed").glob(f"{FOLDER}/*/*.npz")))
    assert 3 <= done < 64, "it was killed too late to say anything"
    for out in ("killed", "whole"):
        assert CliRunner().invoke(app, command(out)[3:]).exit_code == 0
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.slow
def test_mosaic_memory_does_not_grow_with_the_picture(tmp_path: Path, eyes: Eyes) -> None:
    peaks = []
    for times in (1, 1, 2, 2):  # the first run imports modules
        mosaics.write(
            tmp_path / "a.tif", np.tile(shown(blobs(3, Size(512, 512))), (times, times, 1))
        )
        tracemalloc.start()
        mosaic(
            tmp_path / "a.tif",
            tmp_path / f"out-{len(peaks)}",
            MosaicOptions(128, 32, OPTIONS.passes, "fake"),
            FakeEngine,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (
        min(peaks[2:]) <= 1.1 * peaks[1]
    )  # the smaller of two: memory of other threads counts, too


# ── passes ──


class Clicked(FakeEngine):
    """An engine that records points and thresholds and finds nothing left of `from_x`."""

    def __init__(self, from_x: float = 0.0) -> None:
        super().__init__()
        self.from_x = from_x
        self.clicks: list[tuple[int, float, float]] = []
        self.points: list[tuple[float, float]] = []

    def candidates(
        self, embedding: Embedding, points: Any, *, iou: float, stability: float
    ) -> list[PackedMask]:
        self.clicks.append((len(points), iou, stability))
        self.points = list(points)
        points = [point for point in points if point[0] >= self.from_x]
        return super().candidates(embedding, points, iou=iou, stability=stability)


WINDOW = np.zeros((128, 128, 3), np.uint8), np.ones((128, 128), bool)
WHOLE = slice(None), slice(None)


def test_passes_click_only_where_there_is_no_label() -> None:
    engine = Clicked()
    found = passes.label_window(
        engine,
        *WINDOW,
        Passes(AutomaticMaskRequest(4, 20, 0.5, 0.5), passes=2, target_coverage=1.0),
        WHOLE,
    )
    assert len(found.scores) == 4
    assert engine.clicks[0][0] == 16
    assert engine.points
    assert all(found.numbers[int(y), int(x)] == 0 for x, y in engine.points)


def test_passes_lower_thresholds_only_when_a_pass_adds_nothing() -> None:
    engine = Clicked()
    passes.label_window(
        engine,
        *WINDOW,
        Passes(AutomaticMaskRequest(4, 20, 0.8, 0.7), passes=20, target_coverage=1.0),
        WHOLE,
    )
    asked = list(dict.fromkeys((iou, stability) for _, iou, stability in engine.clicks))
    assert asked == [(0.8, 0.7), (0.7, 0.6), (0.6, 0.5), (0.5, 0.5)]
    first_two = [call for call in engine.clicks if call[1] == 0.8]
    assert sum(count for count, _, _ in first_two) > 16, (
        "the second pass asked for less although the first found much"
    )


def test_passes_end_at_the_target_coverage() -> None:
    engine = Clicked()
    passes.label_window(
        engine,
        *WINDOW,
        Passes(AutomaticMaskRequest(4, 20, 0.5, 0.5), passes=9, target_coverage=0.3),
        WHOLE,
    )
    assert engine.clicks == [(16, 0.5, 0.5)]


def test_paint_gives_pixels_to_the_best_mask_and_drops_rims() -> None:
    from sam_poll.imaging.masks import tight

    def box(x0: int, y0: int, x1: int, y1: int, score: float) -> Any:
        frame = np.zeros((100, 100), bool)
        frame[y0:y1, x0:x1] = True
        return tight(frame, "object", score)

    numbers, scores = np.zeros((100, 100), np.uint16), []
    masks = [box(10, 10, 50, 50, 0.9), box(8, 8, 52, 52, 0.8), box(40, 10, 90, 50, 0.7)]
    passes._paint(numbers, np.ones((100, 100), bool), scores, masks, 20)
    assert scores == [0.9, 0.7]
    assert (np.count_nonzero(numbers == 1), np.count_nonzero(numbers == 2)) == (1600, 1600)


def test_paint_keeps_the_largest_piece_and_large_pieces_at_the_edge() -> None:
    from sam_poll.imaging.masks import tight

    frame = np.zeros((100, 100), bool)
    frame[10:50, 10:50] = True
    frame[60:90, 60:90] = True  # possibly another object: left to another mask
    frame[70:100, 10:40] = True  # may be one object with the largest piece, outside the window
    frame[98:100, 60:90] = True  # a speck
    numbers: Any = np.zeros((100, 100), np.uint16)
    scores: list[float] = []
    passes._paint(numbers, np.ones((100, 100), bool), scores, [tight(frame, "object", 0.9)], 20)
    assert scores == [0.9, 0.9]
    assert np.count_nonzero(numbers) == 1600 + 900
    assert numbers[20, 20] != numbers[80, 20] != 0
    assert not numbers[75, 75]


# ── pictures ──


def read_whole(path: Path) -> tuple[Any, Any]:
    with opened(path) as source:
        return source.read(Area(0, 0, *source.size))


def test_raster_reads_plain_pictures_unchanged(tmp_path: Path) -> None:
    pixels = shown(blobs(1, Size(70, 50)))
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., ::-1])
    seen, valid = read_whole(tmp_path / "a.png")
    np.testing.assert_array_equal(seen, pixels)
    assert valid.all()
    cv2.imwrite(str(tmp_path / "a.jpg"), pixels[..., ::-1])
    expected = cv2.imread(str(tmp_path / "a.jpg"))[..., ::-1]
    np.testing.assert_allclose(
        read_whole(tmp_path / "a.jpg")[0].astype(int), expected, atol=2
    )  # two decoders


def write_bands(path: Path, bands: npt.NDArray[Any], **more: Any) -> Path:
    count, height, width = bands.shape
    profile = {
        "driver": "GTiff",
        "dtype": bands.dtype,
        "count": count,
        "width": width,
        "height": height,
        **more,
    }
    with rasterio.open(path, "w", **profile) as file:
        file.write(bands)
    return path


def test_raster_stretches_all_tiles_alike(tmp_path: Path) -> None:
    ramp = np.linspace(1000, 3000, 100 * 80).reshape(1, 80, 100)
    with_gap = ramp.astype(np.float32)
    with_gap[0, :10, :10] = np.nan
    for bands in (ramp.astype(np.uint16), with_gap):
        path = write_bands(tmp_path / f"{bands.dtype}.tif", bands)
        seen, valid = read_whole(path)
        assert (seen[0, 20, 0], seen[-1, -1, 0]) == (0, 255)
        assert abs(int(seen[40, 0, 0]) - 128) < 4
        with opened(path) as source:
            np.testing.assert_array_equal(source.read(Area(30, 30, 60, 60))[0], seen[30:60, 30:60])
        assert valid.sum() == 8000 - (100 if bands.dtype == np.float32 else 0)


def test_raster_converts_palettes_grey_and_many_bands_to_rgb(tmp_path: Path) -> None:
    numbers = np.arange(200, dtype=np.uint8).reshape(1, 10, 20)
    np.testing.assert_array_equal(
        read_whole(write_bands(tmp_path / "grey.tif", numbers))[0],
        np.repeat(numbers[0][..., None], 3, 2),
    )
    many = np.concatenate([numbers + shift for shift in range(5)]).astype(np.uint8)
    np.testing.assert_array_equal(
        read_whole(write_bands(tmp_path / "many.tif", many))[0], np.moveaxis(many[:3], 0, 2)
    )
    path = tmp_path / "palette.tif"
    with rasterio.open(
        path, "w", driver="GTiff", dtype="uint8", count=1, width=20, height=10
    ) as file:
        file.write(
            numbers % 2,
        )
        file.write_colormap(1, {0: (10, 20, 30, 255), 1: (200, 100, 50, 255)})
    seen = read_whole(path)[0]
    assert {tuple(colour) for colour in seen.reshape(-1, 3).tolist()} == {
        (10, 20, 30),
        (200, 100, 50),
    }


def test_mosaic_refuses_what_is_not_a_picture_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"nothing of the kind")
    with (
        pytest.raises(PictureError, match="cannot be opened") as caught,
        opened(tmp_path / "a.tif"),
    ):
        pass
    assert caught.value.place == str(tmp_path / "a.tif")


def test_mosaic_refuses_a_truncated_file_with_the_tile(tmp_path: Path) -> None:
    mosaics.write(
        tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)
    )
    body = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(body[: len(body) * 2 // 3])
    with pytest.raises(PictureError):
        mosaic(tmp_path / "cut.tif", tmp_path / "out", OPTIONS, FakeEngine)


def test_mosaic_never_overwrites_its_picture(tmp_path: Path) -> None:
    mosaics.write(tmp_path / "labels.tif", shown(blobs(5, Size(100, 100))))
    before = (tmp_path / "labels.tif").read_bytes()
    with pytest.raises(UsageError, match="overwrite the picture"):
        mosaic(tmp_path / "labels.tif", tmp_path, OPTIONS, FakeEngine)
    assert (tmp_path / "labels.tif").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["labels.tif"]


@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"no utf-8 \xff")])
def test_mosaic_refuses_a_folder_name_that_gdal_cannot_write(tmp_path: Path, name: str) -> None:
    mosaics.write(tmp_path / "a.tif", shown(blobs(5, Size(100, 100))))
    with pytest.raises(UsageError, match="its name"):
        mosaic(tmp_path / "a.tif", tmp_path / name, OPTIONS, FakeEngine)
    assert not (tmp_path / name).exists()


def test_mosaic_ignores_the_journal_of_an_older_output(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    out.mkdir()
    for ending in (".gpkg-wal", ".gpkg-shm", ".tif.ovr"):
        (out / f"labels{ending}").write_bytes(b"of an older one")
    mosaic(picture, out, OPTIONS, FakeEngine)
    assert len(list(out.iterdir())) == 4


# ── the command ──


def test_command_writes_all_four_files_and_reports_them(picture: Path) -> None:
    out = picture.parent / "out"
    flags = ["--tile", "128", "--padding", "32", "--stability", "0.5", "--points-per-side", "4"]
    done = invoke(str(picture), "-o", str(out), "-m", "fake", *flags)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == [
        "labels.geojson",
        "labels.gpkg",
        "labels.tif",
        "stats.json",
    ]
    stats = json.loads((out / run.STATS).read_text())
    assert stats["labels"] > 0
    assert f"{stats['labels']} objects" in done.output


@pytest.mark.parametrize(
    ("flags", "code"),
    [(["--tile", "100"], 2), (["--tile", "64", "--padding", "80"], 2), (["--passes", "0"], 2)],
    ids=["tile", "padding", "passes"],
)
def test_command_refuses_invalid_flags(picture: Path, flags: list[str], code: int) -> None:
    assert invoke(str(picture), "-o", str(picture.parent / "out"), *flags).exit_code == code
    assert not (picture.parent / "out").exists()


def test_command_ends_with_the_picture_exit_code_for_a_missing_picture(tmp_path: Path) -> None:
    assert (
        invoke(str(tmp_path / "none.tif"), "-o", str(tmp_path / "out"), "-m", "fake").exit_code == 3
    )
