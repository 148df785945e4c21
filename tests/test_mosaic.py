"""Mosaics: what is put together is what the tiles have seen, whole, once, on the map, and whenever it was stopped."""

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

from sam_poll.cli import app
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import PictureError, UsageError
from sam_poll.mosaic import passes, run, seams, work
from sam_poll.mosaic.passes import Labelled, Passes
from sam_poll.mosaic.run import Step, Wish
from sam_poll.mosaic.state import FOLDER, Done, State
from sam_poll.mosaic.tiles import Area, Cut
from sam_poll.types import Candidate, Embedding, Everything, Size
from tests.conftest import wait_until
from tests.mosaic_paths import lend_a_hand, mosaic, opened, state_of, work_of
from tools import mosaics

ASKED = Everything(points_per_side=4, min_area=20, iou=0.5, stability=0.5)
WISH = Wish(128, 32, Passes(ASKED), "fake")


@pytest.fixture(autouse=True)
def _pictures_on_no_map_are_meant() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def blobs(seed: int, size: Size, cells: float = 60) -> npt.NDArray[np.uint16]:
    """Regions of all forms, with holes and islands, the ground (0) among them; each 4-connected."""
    rng = np.random.default_rng(seed)
    shape = max(2, int(size.height / cells) + 2), max(2, int(size.width / cells) + 2)
    field = cv2.resize(rng.normal(0, 1, shape).astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    high = cv2.connectedComponents((field > 0.3).astype(np.uint8), connectivity=4)[1]
    low = cv2.connectedComponents((field < -0.3).astype(np.uint8), connectivity=4)[1]
    return np.where(high > 0, high, np.where(low > 0, low + high.max(), 0)).astype(np.uint16)


def shown(truth: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """A picture whose red and green tell each pixel's label, and whose blue is never all of one value."""
    blue = np.indices(truth.shape).sum(0) % 2 + 1
    return np.stack([truth & 255, truth >> 8, blue], 2).astype(np.uint8)


def sees(pixels: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_]) -> Labelled:
    """What a network that errs nowhere would find in a window: its own numbers for what is connected in it."""
    truth = pixels[..., 0].astype(np.int32) + 256 * pixels[..., 1].astype(np.int32)
    numbers, count = np.zeros(truth.shape, np.uint16), 0
    for label in np.unique(truth[truth > 0])[::-1]:
        pieces, parts = cv2.connectedComponents((truth == label).astype(np.uint8), connectivity=4)
        numbers[parts > 0] = parts[parts > 0] + count
        count += pieces - 1
    return Labelled(np.where(valid, numbers, 0).astype(np.uint16), np.full(count, 0.75, np.float32))


class Eyes:
    """In the place of passes over a tile; counts the windows."""

    def __init__(self) -> None:
        self.windows = 0

    def __call__(self, engine: Any, pixels: Any, valid: Any, wish: Any, core: Any, between: Any) -> Labelled:
        self.windows += 1
        return sees(pixels, valid)


@pytest.fixture
def eyes(monkeypatch: pytest.MonkeyPatch) -> Eyes:
    made = Eyes()
    monkeypatch.setattr(work, "labelled", made)
    return made


def same_up_to_names(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Whether two label maps say the same, 0 being 0 in both."""
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]).astype(np.int64), axis=1)
    counts = [len(np.unique(row)) for row in pairs]
    return counts[0] == counts[1] == pairs.shape[1] and bool(((pairs[0] == 0) == (pairs[1] == 0)).all())


def files(output: Path) -> dict[str, bytes]:
    """What was made; a GeoPackage holds the time, so of that only the rows."""
    found = {path.name: path.read_bytes() for path in output.iterdir()}
    _, _, geometry, fields = pyogrio.raw.read(output / run.GEOPACKAGE)
    found[run.GEOPACKAGE] = b"".join(geometry) + b"".join(np.ascontiguousarray(field).tobytes() for field in fields)
    return found


# ── tiles ──

cuts = st.builds(
    Cut,
    st.builds(Size, st.integers(1, 700), st.integers(1, 700)),
    tile=st.sampled_from([64, 128, 240]),
    padding=st.integers(8, 64),
)


@given(cuts)
def test_each_pixel_is_one_tiles_own_and_windows_show_all_that_tiles_need(cut: Cut) -> None:
    owned = np.zeros((cut.size.height, cut.size.width), np.uint8)
    whole = Area(0, 0, *cut.size)
    for tile in cut:
        owned[tile.core.within(whole)] += 1
        window = tile.window
        assert (window.width, window.height) == tuple(min(cut.tile + 2 * cut.padding, n) for n in cut.size)
        for area in (tile.core, *cut.bands(tile.number).values()):
            assert whole.x0 <= window.x0 <= area.x0 < area.x1 <= window.x1 <= whole.x1
            assert whole.y0 <= window.y0 <= area.y0 < area.y1 <= window.y1 <= whole.y1
    assert (owned == 1).all()


@given(cuts)
def test_both_tiles_of_a_seam_know_the_same_band(cut: Cut) -> None:
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


def test_an_object_on_both_sides_is_one() -> None:
    assert matched(["AAAAAA", "AAAAAA"], ["bbbbbb", "bbbbbb"]) == {"Ab"}


def test_both_arms_of_a_u_are_joined_to_its_bend() -> None:
    assert matched(["AAAAA.", "......", "BBBBB."], ["ccccc.", "......", "ccccc."]) == {"Ac", "Bc"}


def test_objects_that_end_at_the_seam_stay_two() -> None:
    assert matched(["AAABBB", "AAABBB"], ["cccddd", "cccddd"]) == {"Ac", "Bd"}


def test_the_longer_contact_wins() -> None:
    one = ["AAAAAA", "AAAAAA", "AAAAAA", "BBBBBB", "BBBBBB", "BBBBBB"]
    other = ["cccccc", "cccccc", "dddddd", "dddddd", "dddddd", "dddddd"]
    assert matched(one, other) == {"Ac", "Bd"}


def test_views_that_agree_at_the_seam_alone_join_nothing() -> None:
    one = ["AAAA..", "AAAA..", "AAAA.."]
    other = ["...ccc", "...ccc", "...ccc"]
    assert matched(one, other) == set()
    assert matched(["......"], ["cccccc"]) == set()


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6))
def test_two_true_views_of_a_band_join_what_is_one_and_nothing_else(seed: int) -> None:
    truth = blobs(seed, Size(40, 120), 15).astype(np.int64)
    other = np.where(truth > 0, truth + 1000, 0)
    found = set(seams.matches(truth, other, 20))
    across = {int(n) for n in np.unique(truth[:, 19:21]) if n}
    assert found == {(n, n + 1000) for n in across}


# ── the whole way, with eyes that err nowhere ──


@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 10**6), width=st.integers(130, 420), height=st.integers(100, 420))
def test_what_was_cut_is_whole_again(tmp_path_factory: Any, seed: int, width: int, height: int) -> None:
    truth = blobs(seed, Size(width, height))
    areas = np.bincount(truth.ravel())
    truth[np.isin(truth, np.flatnonzero(areas < ASKED.min_area))] = 0
    folder = tmp_path_factory.mktemp("whole")
    mosaics.write(folder / "a.tif", shown(truth))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "labelled", Eyes())
        stats = mosaic(folder / "a.tif", folder / "out", WISH, FakeEngine)
    labels = mosaics.read(folder / "out" / run.RASTER)
    assert same_up_to_names(labels, truth)
    assert stats["labels"] == labels.max() == len(np.unique(truth)) - 1
    assert stats["labelled_px"] == np.count_nonzero(truth)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    truth = blobs(3, Size(400, 300))
    truth[90:170, 90:170] = truth.max() + 1
    truth[110:150, 110:150] = 0  # a hole in which four tiles meet
    mosaics.write(tmp_path / "a.tif", shown(truth))
    return tmp_path / "a.tif"


def test_polygons_are_the_labels_with_their_holes_and_lie_on_the_map(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    mosaic(picture, out, WISH, FakeEngine)
    labels = mosaics.read(out / run.RASTER)
    meta, _, geometry, fields = pyogrio.raw.read(out / run.GEOPACKAGE, layer="labels")
    columns = dict(zip(meta["fields"], fields, strict=True))
    drawn = shapely.from_wkb(geometry)
    assert meta["crs"] == mosaics.CRS
    assert shapely.is_valid(drawn).all()
    assert shapely.get_num_interior_rings(shapely.get_parts(drawn)).sum() > 0, "nothing in the picture has a hole"
    with rasterio.open(out / run.RASTER) as file:
        again = rasterio.features.rasterize(
            zip(drawn, columns["label"].tolist(), strict=True), labels.shape, transform=file.transform, dtype="int32"
        )
    np.testing.assert_array_equal(again, labels)
    np.testing.assert_array_equal(columns["area_px"], np.bincount(labels.ravel())[columns["label"]])
    np.testing.assert_allclose(columns["area"], columns["area_px"] * mosaics.METRE**2)
    np.testing.assert_allclose(columns["perimeter"], shapely.length(drawn))
    np.testing.assert_allclose(columns["score"], 0.75)


def test_geojson_says_what_the_geopackage_says(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    mosaic(picture, out, WISH, FakeEngine)
    (one, _, drawn, fields), (two, _, again, others) = (
        pyogrio.raw.read(out / name) for name in (run.GEOPACKAGE, run.GEOJSON)
    )
    assert one["crs"] == two["crs"]
    assert list(one["fields"]) == list(two["fields"])
    for field, other in zip(fields, others, strict=True):
        np.testing.assert_allclose(field, other)
    assert shapely.equals_exact(shapely.from_wkb(drawn), shapely.from_wkb(again), 1e-6).all()


def test_the_raster_lies_where_the_picture_lies_tiled_and_compressed(picture: Path, eyes: Eyes) -> None:
    stats = mosaic(picture, picture.parent / "out", WISH, FakeEngine)
    with rasterio.open(picture) as before, rasterio.open(picture.parent / "out" / run.RASTER) as after:
        assert (after.crs, after.transform, after.shape) == (before.crs, before.transform, before.shape)
        assert (after.dtypes, after.nodata, after.profile["compress"]) == (("uint32",), 0, "deflate")
        assert after.block_shapes == [(128, 128)]
        assert stats["transform"] == list(before.transform)[:6]
        assert stats["crs"] == mosaics.CRS


def test_slivers_go_to_the_neighbour_with_the_longest_border_also_over_a_seam(tmp_path: Path, eyes: Eyes) -> None:
    truth = np.zeros((128, 300), np.uint16)
    truth[20:60, 128:200] = 1
    truth[20:23, 124:128] = 2  # 12 pixels, 3 of its edges on the seam to 1
    truth[23:26, 124:126] = 3  # 6 pixels: beside a sliver only
    truth[100:103, 10:13] = 4  # alone
    mosaics.write(tmp_path / "a.tif", shown(truth))
    stats = mosaic(tmp_path / "a.tif", tmp_path / "out", WISH, FakeEngine)
    truth[truth == 2] = 1
    truth[truth > 2] = 0
    np.testing.assert_array_equal(mosaics.read(tmp_path / "out" / run.RASTER), truth)
    assert (stats["slivers_merged"], stats["slivers_dropped"], stats["labels"]) == (1, 2, 1)


def test_a_picture_in_which_nothing_is_found_gives_empty_files(tmp_path: Path) -> None:
    mosaics.write(tmp_path / "a.tif", np.full((200, 200, 3), 80, np.uint8))

    def never() -> Any:
        raise AssertionError("there is no tile to compute")

    stats = mosaic(tmp_path / "a.tif", tmp_path / "out", WISH, never)
    assert (stats["tiles"], stats["tiles_skipped"], stats["labels"]) == (4, 4, 0)
    assert not mosaics.read(tmp_path / "out" / run.RASTER).any()
    assert len(pyogrio.raw.read(tmp_path / "out" / run.GEOPACKAGE)[2]) == 0
    assert json.loads((tmp_path / "out" / run.GEOJSON).read_text())["features"] == []


@pytest.mark.parametrize("kind", ["nodata", "alpha"])
def test_what_holds_no_data_gets_no_label_and_empty_tiles_are_skipped(tmp_path: Path, eyes: Eyes, kind: str) -> None:
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
    stats = mosaic(path, tmp_path / "out", WISH, FakeEngine)
    labels = mosaics.read(tmp_path / "out" / run.RASTER)
    assert labels[~gone].any()
    assert not labels[gone].any()
    assert (stats["tiles"], stats["tiles_skipped"], stats["valid_px"]) == (12, 6, 300 * 150)
    assert eyes.windows == 6


# ── stopped and started again ──


class StoppedError(Exception):
    pass


def stopping_at(number: int) -> Callable[[Step], None]:
    steps = iter(range(number, -1, -1))

    def on_step(_: Step) -> None:
        if next(steps) == 0:
            raise StoppedError

    return on_step


def test_stopped_anywhere_it_goes_on_and_ends_with_the_same_files(picture: Path, eyes: Eyes) -> None:
    tiles, wish = 4, Wish(208, 32, WISH.passes, "fake")
    told: list[Step] = []
    mosaic(picture, picture.parent / "whole", wish, FakeEngine, told.append)
    expected = files(picture.parent / "whole")
    assert [step.stage for step in told] == [s for s in run_stages() for _ in range(tiles)]
    eyes.windows = 0
    for number in range(len(told)):
        out = picture.parent / f"stopped-{number}"
        with pytest.raises(StoppedError):
            mosaic(picture, out, wish, FakeEngine, stopping_at(number))
        assert not (out / run.STATS).exists()
        mosaic(picture, out, wish, FakeEngine)
        assert files(out) == expected
    assert eyes.windows == tiles * len(told), "a finished tile was computed again"


def run_stages() -> list[str]:
    from sam_poll.mosaic_cli import STAGES

    return list(STAGES)


def test_a_finished_mosaic_is_not_made_again(picture: Path, eyes: Eyes) -> None:
    first = mosaic(picture, picture.parent / "out", WISH, FakeEngine)
    before = eyes.windows
    assert mosaic(picture, picture.parent / "out", WISH, FakeEngine) == first
    assert eyes.windows == before


@pytest.mark.parametrize("left", ["all", "some"])
def test_killed_while_clearing_up_it_is_finished_all_the_same(
    picture: Path, eyes: Eyes, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = picture.parent / "out"

    def killed(self: State) -> None:
        if left == "some":
            (self.folder / "job.json").unlink()
            next(self.folder.path.rglob("*.npz")).unlink()
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(State, "clear", killed)
        with pytest.raises(StoppedError):
            mosaic(picture, out, WISH, FakeEngine)
    before = eyes.windows
    mosaic(picture, out, WISH, FakeEngine)
    assert eyes.windows == before
    assert not (out / FOLDER).exists()


def test_an_unfinished_mosaic_of_another_kind_is_refused_and_left_alone(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    with pytest.raises(StoppedError):
        mosaic(picture, out, WISH, FakeEngine, stopping_at(3))
    with pytest.raises(UsageError, match="padding differ"):
        mosaic(picture, out, Wish(128, 16, WISH.passes, "fake"), FakeEngine)
    mosaic(picture, out, WISH, FakeEngine)
    assert eyes.windows == 12


def test_who_begins_the_same_mosaic_meanwhile_takes_tiles_of_it_and_ends_with_the_same(
    picture: Path, eyes: Eyes
) -> None:
    expected = mosaic(picture, picture.parent / "alone", WISH, FakeEngine)
    alone, out = eyes.windows, picture.parent / "out"
    fresh: list[set[int]] = [set(), set(), set()]
    all_here = threading.Barrier(3)

    def hand(own: set[int]) -> dict[str, Any]:
        met = False

        def on_step(step: Step) -> None:
            nonlocal met
            if step.stage == "tiles" and step.fresh:
                own.add(step.done)
                if not met:
                    met = True
                    all_here.wait(30)

        return mosaic(picture, out, WISH, FakeEngine, on_step)

    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(hand, fresh))
    assert made == [expected] * 3
    assert eyes.windows == 2 * alone, "a tile was made twice, or not at all"
    assert all(fresh)
    assert files(out) == files(picture.parent / "alone")
    assert not (out / FOLDER).exists()


def test_a_tile_whose_holder_hangs_is_made_by_who_waits_and_the_first_one_stays(
    picture: Path, eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = mosaic(picture, picture.parent / "alone", WISH, FakeEngine)
    with opened(picture) as source:
        hangs = work_of(source, picture, WISH, picture.parent / "out")
        with hangs.state.held(5) as ours:
            assert ours
            other = work_of(source, picture, WISH, picture.parent / "out")
            while (taken := other.take(FakeEngine)) is work.Taken.TILE:
                pass
            assert taken is work.Taken.WAIT
            assert other.take(FakeEngine) is work.Taken.WAIT
            monkeypatch.setattr(work, "LONG_S", 0.0)
            monkeypatch.setattr(work, "LONG", 0)
            assert mosaic(picture, picture.parent / "out", WISH, FakeEngine) == expected
            with pytest.raises(FileNotFoundError):
                hangs.take(FakeEngine)
    assert files(picture.parent / "out") == files(picture.parent / "alone")


def test_of_a_tile_that_was_made_twice_the_first_stays(tmp_path: Path) -> None:
    state = state_of(tmp_path, {})
    for label in (1, 2):
        numbers = np.full((4, 4), label, np.uint16)
        state.keep(3, Done(numbers, {}, np.zeros(2, np.float32), np.zeros(2, np.int64), 16, skipped=False))
    assert state.numbers(3)[0, 0] == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_hand_that_is_lent_takes_tiles_and_leaves_the_rest_to_others(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    lend_a_hand(picture, out, WISH, FakeEngine)
    assert eyes.windows == 12
    assert not (out / run.RASTER).exists()
    mosaic(picture, out, WISH, FakeEngine)
    assert eyes.windows == 12
    lend_a_hand(picture, out, WISH, FakeEngine)
    assert eyes.windows == 12
    assert not (out / FOLDER).exists()


def test_killed_between_tiles_the_command_goes_on(tmp_path: Path) -> None:
    mosaics.write(tmp_path / "a.tif", shown(blobs(5, Size(500, 500))))
    flags = ["--tile", "64", "--padding", "16", "-m", "fake", "--stability", "0.5", "--points-per-side", "4"]

    def command(out: str) -> list[str]:
        words = [sys.executable, "-m", "sam_poll", "mosaic", str(tmp_path / "a.tif"), "-o", str(tmp_path / out)]
        return [*words, *flags]

    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
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


def test_memory_does_not_grow_with_the_picture(tmp_path: Path, eyes: Eyes) -> None:
    peaks = []
    for times in (1, 1, 2, 2):  # the first warms up what is imported on the way
        mosaics.write(tmp_path / "a.tif", np.tile(shown(blobs(3, Size(512, 512))), (times, times, 1)))
        tracemalloc.start()
        mosaic(tmp_path / "a.tif", tmp_path / f"out-{len(peaks)}", Wish(128, 32, WISH.passes, "fake"), FakeEngine)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks[2:]) <= 1.1 * peaks[1]  # of two: what another thread takes just then is counted, too


# ── passes ──


class Clicked(FakeEngine):
    """Notes the clicks and thresholds of each call; finds nothing left of `from_x`."""

    def __init__(self, from_x: float = 0.0) -> None:
        super().__init__()
        self.from_x = from_x
        self.clicks: list[tuple[int, float, float]] = []
        self.points: list[tuple[float, float]] = []

    def candidates(self, embedding: Embedding, points: Any, *, iou: float, stability: float) -> list[Candidate]:
        self.clicks.append((len(points), iou, stability))
        self.points = list(points)
        points = [point for point in points if point[0] >= self.from_x]
        return super().candidates(embedding, points, iou=iou, stability=stability)


WINDOW = np.zeros((128, 128, 3), np.uint8), np.ones((128, 128), bool)
WHOLE = slice(None), slice(None)


def test_further_passes_click_only_where_nothing_is_yet() -> None:
    engine = Clicked()
    found = passes.labelled(engine, *WINDOW, Passes(Everything(4, 20, 0.5, 0.5), passes=2, target_coverage=1.0), WHOLE)
    assert len(found.scores) == 4
    assert engine.clicks[0][0] == 16
    assert engine.points
    assert all(found.numbers[int(y), int(x)] == 0 for x, y in engine.points)


def test_thresholds_go_down_only_when_a_pass_adds_nothing() -> None:
    engine = Clicked()
    passes.labelled(engine, *WINDOW, Passes(Everything(4, 20, 0.8, 0.7), passes=20, target_coverage=1.0), WHOLE)
    asked = list(dict.fromkeys((iou, stability) for _, iou, stability in engine.clicks))
    assert asked == [(0.8, 0.7), (0.7, 0.6), (0.6, 0.5), (0.5, 0.5)]
    first_two = [call for call in engine.clicks if call[1] == 0.8]
    assert sum(count for count, _, _ in first_two) > 16, "the second pass asked for less although the first found much"


def test_passes_end_at_the_target_coverage() -> None:
    engine = Clicked()
    passes.labelled(engine, *WINDOW, Passes(Everything(4, 20, 0.5, 0.5), passes=9, target_coverage=0.3), WHOLE)
    assert engine.clicks == [(16, 0.5, 0.5)]


def test_the_best_mask_takes_its_pixels_and_a_rim_of_another_is_none() -> None:
    from sam_poll.geometry import tight

    def box(x0: int, y0: int, x1: int, y1: int, score: float) -> Any:
        frame = np.zeros((100, 100), bool)
        frame[y0:y1, x0:x1] = True
        return tight(frame, "object", score)

    numbers, scores = np.zeros((100, 100), np.uint16), []
    masks = [box(10, 10, 50, 50, 0.9), box(8, 8, 52, 52, 0.8), box(40, 10, 90, 50, 0.7)]
    passes._paint(numbers, np.ones((100, 100), bool), scores, masks, 20)
    assert scores == [0.9, 0.7]
    assert (np.count_nonzero(numbers == 1), np.count_nonzero(numbers == 2)) == (1600, 1600)


def test_of_a_masks_pieces_the_largest_counts_and_those_that_may_go_on_outside_the_window() -> None:
    from sam_poll.geometry import tight

    frame = np.zeros((100, 100), bool)
    frame[10:50, 10:50] = True
    frame[60:90, 60:90] = True  # maybe another thing: left to its own mask
    frame[70:100, 10:40] = True  # may be joined to the largest behind the edge
    frame[98:100, 60:90] = True  # a speck
    numbers: Any = np.zeros((100, 100), np.uint16)
    scores: list[float] = []
    passes._paint(numbers, np.ones((100, 100), bool), scores, [tight(frame, "object", 0.9)], 20)
    assert scores == [0.9, 0.9]
    assert np.count_nonzero(numbers) == 1600 + 900
    assert numbers[20, 20] != numbers[80, 20] != 0
    assert not numbers[75, 75]


# ── sources ──


def read_whole(path: Path) -> tuple[Any, Any]:
    with opened(path) as source:
        return source.read(Area(0, 0, *source.size))


def test_plain_pictures_are_read_as_they_are(tmp_path: Path) -> None:
    pixels = shown(blobs(1, Size(70, 50)))
    cv2.imwrite(str(tmp_path / "a.png"), pixels[..., ::-1])
    seen, valid = read_whole(tmp_path / "a.png")
    np.testing.assert_array_equal(seen, pixels)
    assert valid.all()
    cv2.imwrite(str(tmp_path / "a.jpg"), pixels[..., ::-1])
    expected = cv2.imread(str(tmp_path / "a.jpg"))[..., ::-1]
    np.testing.assert_allclose(read_whole(tmp_path / "a.jpg")[0].astype(int), expected, atol=2)  # two decoders


def write_bands(path: Path, bands: npt.NDArray[Any], **more: Any) -> Path:
    count, height, width = bands.shape
    profile = {"driver": "GTiff", "dtype": bands.dtype, "count": count, "width": width, "height": height, **more}
    with rasterio.open(path, "w", **profile) as file:
        file.write(bands)
    return path


def test_other_than_8_bit_values_are_stretched_alike_everywhere(tmp_path: Path) -> None:
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


def test_palettes_grey_and_many_bands_become_rgb(tmp_path: Path) -> None:
    numbers = np.arange(200, dtype=np.uint8).reshape(1, 10, 20)
    np.testing.assert_array_equal(
        read_whole(write_bands(tmp_path / "grey.tif", numbers))[0], np.repeat(numbers[0][..., None], 3, 2)
    )
    many = np.concatenate([numbers + shift for shift in range(5)]).astype(np.uint8)
    np.testing.assert_array_equal(read_whole(write_bands(tmp_path / "many.tif", many))[0], np.moveaxis(many[:3], 0, 2))
    path = tmp_path / "palette.tif"
    with rasterio.open(path, "w", driver="GTiff", dtype="uint8", count=1, width=20, height=10) as file:
        file.write(
            numbers % 2,
        )
        file.write_colormap(1, {0: (10, 20, 30, 255), 1: (200, 100, 50, 255)})
    seen = read_whole(path)[0]
    assert {tuple(colour) for colour in seen.reshape(-1, 3).tolist()} == {(10, 20, 30), (200, 100, 50)}


def test_what_is_no_picture_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(b"nothing of the kind")
    with pytest.raises(PictureError, match="cannot be opened") as caught, opened(tmp_path / "a.tif"):
        pass
    assert caught.value.place == str(tmp_path / "a.tif")


def test_a_cut_file_is_refused_with_the_place(tmp_path: Path) -> None:
    mosaics.write(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8))
    body = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(body[: len(body) * 2 // 3])
    with pytest.raises(PictureError):
        mosaic(tmp_path / "cut.tif", tmp_path / "out", WISH, FakeEngine)


def test_a_picture_is_never_overwritten_by_its_own_labels(tmp_path: Path) -> None:
    mosaics.write(tmp_path / "labels.tif", shown(blobs(5, Size(100, 100))))
    before = (tmp_path / "labels.tif").read_bytes()
    with pytest.raises(UsageError, match="overwrite the picture"):
        mosaic(tmp_path / "labels.tif", tmp_path, WISH, FakeEngine)
    assert (tmp_path / "labels.tif").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["labels.tif"]


@pytest.mark.parametrize("name", ["two\nlines", os.fsdecode(b"no utf-8 \xff")])
def test_a_folder_whose_name_gdal_cannot_write_is_refused_before_anything_is_done(tmp_path: Path, name: str) -> None:
    mosaics.write(tmp_path / "a.tif", shown(blobs(5, Size(100, 100))))
    with pytest.raises(UsageError, match="its name"):
        mosaic(tmp_path / "a.tif", tmp_path / name, WISH, FakeEngine)
    assert not (tmp_path / name).exists()


def test_what_a_viewer_left_beside_an_older_output_is_not_played_into_the_new_one(picture: Path, eyes: Eyes) -> None:
    out = picture.parent / "out"
    out.mkdir()
    for ending in (".gpkg-wal", ".gpkg-shm", ".tif.ovr"):
        (out / f"labels{ending}").write_bytes(b"of an older one")
    mosaic(picture, out, WISH, FakeEngine)
    assert len(list(out.iterdir())) == 4


# ── the command ──


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["mosaic", *words])


def test_the_command_writes_all_four_files_and_says_so(picture: Path) -> None:
    out = picture.parent / "out"
    flags = ["--tile", "128", "--padding", "32", "--stability", "0.5", "--points-per-side", "4"]
    done = invoke(str(picture), "-o", str(out), "-m", "fake", *flags)
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == ["labels.geojson", "labels.gpkg", "labels.tif", "stats.json"]
    stats = json.loads((out / run.STATS).read_text())
    assert stats["labels"] > 0
    assert f"{stats['labels']} objects" in done.output


@pytest.mark.parametrize(
    ("flags", "code"),
    [(["--tile", "100"], 2), (["--tile", "64", "--padding", "80"], 2), (["--passes", "0"], 2)],
    ids=["tile", "padding", "passes"],
)
def test_flags_that_make_no_sense_are_refused(picture: Path, flags: list[str], code: int) -> None:
    assert invoke(str(picture), "-o", str(picture.parent / "out"), *flags).exit_code == code
    assert not (picture.parent / "out").exists()


def test_a_picture_that_is_not_there_ends_with_the_code_of_bad_pictures(tmp_path: Path) -> None:
    assert invoke(str(tmp_path / "none.tif"), "-o", str(tmp_path / "out"), "-m", "fake").exit_code == 3
