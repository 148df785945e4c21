"""Mosaics of texts: a layer of labels for each text, joined over tiles, interrupted, refused."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyogrio
import pytest
import rasterio
import rasterio.features
import shapely

from sam_poll.core.errors import PromptError, UsageError
from sam_poll.core.protocols import Embedding
from sam_poll.core.types import (
    AutomaticMaskRequest,
    Box,
    ConceptRequest,
    Exemplar,
    ModelInput,
    PackedMask,
    Prompt,
    Size,
)
from sam_poll.engines import concepts
from sam_poll.engines.fake import FakeEmbedding, FakeEngine, drawn
from sam_poll.formats import registry
from sam_poll.imaging.automatic_masks import pack
from sam_poll.mosaic import job as jobs
from sam_poll.mosaic import run
from sam_poll.mosaic.assembly import MosaicOptions, Step
from sam_poll.mosaic.segment_tile import Passes, label_texts
from sam_poll.mosaic.tile_store import FOLDER
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.runtime import builders
from tests.conftest import Share
from tests.support.mosaic_jobs import NAMES, source
from tests.support.mosaic_paths import help_with, mosaic
from tests.support.mosaics import files, invoke
from tools import mosaics

SIZE = Size(400, 300)
TILE, PADDING = 128, 32
CHANNELS = {"red": 0, "green": 1, "blue": 2}
TEXTS = ("red", "green", "blue")
OPTIONS = MosaicOptions(
    TILE,
    PADDING,
    Passes(AutomaticMaskRequest(min_area=20)),
    "seeing",
    ConceptRequest(TEXTS, threshold=0.3),
)


@pytest.fixture(autouse=True)
def _pictures_on_no_map_are_meant() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


@dataclass(frozen=True, slots=True, eq=False)
class SeenEmbedding(FakeEmbedding):
    """The pixels of a window."""

    pixels: npt.NDArray[np.uint8] = field(kw_only=True)


class Seeing(FakeEngine):
    """An engine that finds `red`, `green` and `blue`: each value of that colour is an object.

    The value divided by 255 is the score. The side is that of the windows, so that masks are exact.
    """

    def __init__(self) -> None:
        super().__init__(side=TILE + 2 * PADDING)

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        super().encode(pictures)
        return [SeenEmbedding(one.frame, one.digest, pixels=one.pixels) for one in pictures]

    def find(
        self,
        embedding: Embedding,
        texts: Sequence[str],
        exemplars: Sequence[Exemplar],
        *,
        threshold: float,
        most: int,
    ) -> list[list[PackedMask]]:
        assert isinstance(embedding, SeenEmbedding)
        return [self._seen(embedding, text, threshold)[:most] for text in texts]

    def _seen(self, embedding: SeenEmbedding, text: str, threshold: float) -> list[PackedMask]:
        plane = embedding.pixels[..., CHANNELS[text]]
        values = [value for value in np.unique(plane)[::-1].tolist() if value > 255 * threshold]
        packed = (
            pack(np.where(plane == value, 1, -1).astype(np.float32), value / 255, 1.0, frame)
            for value in values
            for frame in [embedding.frame]
        )
        return [mask for mask in packed if mask]


def scene() -> npt.NDArray[np.uint8]:
    """Return a picture of red and green objects; seams are at x 128, 256, 384 and y 128, 256."""
    pixels = np.zeros((SIZE.height, SIZE.width, 3), np.uint8)
    red, green = pixels[..., 0], pixels[..., 1]
    red[90:170, 90:170] = 200  # in four tiles
    red[110:150, 110:150] = 0  # its hole
    red[20:60, 200:395] = 150  # in three tiles
    red[200:210, 20:40] = 40  # below the threshold
    green[140:200, 120:300] = 250  # covers a part of the first
    green[30:50, 210:280] = 100  # inside the second, with a lower score
    green[3:6, 3:6] = 220  # smaller than the minimum area
    return pixels


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    mosaics.write(tmp_path / "a.tif", scene())
    return tmp_path / "a.tif"


def table(output: Path) -> tuple[dict[str, Any], Any]:
    meta, _, geometry, fields = pyogrio.raw.read(output / run.GEOPACKAGE, layer="labels")
    return dict(zip(meta["fields"], fields, strict=True)), shapely.from_wkb(geometry)


def rasterized(shapes: Any, output: Path) -> npt.NDArray[np.bool_]:
    with rasterio.open(output / run.RASTER) as file:
        burnt = rasterio.features.rasterize(shapes, file.shape, transform=file.transform)
    return np.asarray(burnt > 0)


def test_objects_of_texts_are_whole_over_tiles_and_keep_their_overlaps(picture: Path) -> None:
    out = picture.parent / "out"
    stats = mosaic(picture, out, OPTIONS, Seeing)
    columns, shapes = table(out)
    assert list(columns) == ["label", "score", "area_px", "area", "perimeter", "class"]
    found = sorted(
        zip(columns["class"].tolist(), np.round(columns["score"] * 255).tolist(), strict=True)
    )
    assert found == [("green", 100), ("green", 250), ("red", 150), ("red", 200)]
    assert len(set(columns["label"].tolist())) == 4
    pixels = scene()
    pixels[3:6, 3:6] = 0
    for text, score, area_px, shape in zip(
        columns["class"], columns["score"], columns["area_px"], shapes, strict=True
    ):
        expected = pixels[..., CHANNELS[text]] == round(score * 255)
        np.testing.assert_array_equal(rasterized([shape], out), expected)
        assert area_px == np.count_nonzero(expected)
    assert stats["classes"] == {"red": 2, "green": 2, "blue": 0}
    assert stats["labels"] == 4
    assert 'nothing found for "blue"' in stats["notes"]
    assert stats["job"]["text"] == list(TEXTS)
    assert stats["job"]["threshold"] == 0.3
    assert "passes" not in stats["job"]


def test_the_raster_has_the_object_with_the_higher_score_where_two_texts_overlap(
    picture: Path,
) -> None:
    out = picture.parent / "out"
    stats = mosaic(picture, out, OPTIONS, Seeing)
    columns, _ = table(out)
    score_of = np.zeros(5)
    score_of[columns["label"]] = columns["score"] * 255
    pixels = scene()
    pixels[3:6, 3:6] = 0
    pixels[pixels < 0.3 * 255] = 0
    highest = pixels.max(axis=2)
    np.testing.assert_allclose(score_of[mosaics.read(out / run.RASTER)], highest, atol=0.02)
    assert stats["labelled_px"] == np.count_nonzero(highest)
    assert stats["coverage"] == round(np.count_nonzero(highest) / highest.size, 6)


def test_geojson_of_texts_has_the_class_too(picture: Path) -> None:
    out = picture.parent / "out"
    mosaic(picture, out, OPTIONS, Seeing)
    features = json.loads((out / run.GEOJSON).read_text())["features"]
    columns, _ = table(out)
    assert [one["properties"]["class"] for one in features] == columns["class"].tolist()


def test_nothing_found_is_an_answer_with_the_column_of_the_class(picture: Path) -> None:
    out = picture.parent / "out"
    only_blue = replace(OPTIONS, concept=ConceptRequest(("blue",)))
    stats = mosaic(picture, out, only_blue, Seeing)
    columns, shapes = table(out)
    assert (stats["labels"], stats["coverage"], len(shapes)) == (0, 0.0, 0)
    assert "class" in columns
    assert not mosaics.read(out / run.RASTER).any()


# ── one window ──


class Finding(FakeEngine):
    """An engine that finds the same objects, given as boxes with scores, for every text."""

    def __init__(self, *found: tuple[float, Box]) -> None:
        super().__init__(side=128)
        self.found = found

    def find(self, embedding: Embedding, texts: Any, *_: Any, **__: Any) -> list[list[PackedMask]]:
        planes = [(score, drawn(Prompt(box=box), embedding.frame)) for score, box in self.found]
        masks = [pack(plane, score, 1.0, embedding.frame) for score, plane in planes]
        return [[mask for mask in masks if mask] for _ in texts]


def labelled(engine: FakeEngine) -> Any:
    pixels, valid = np.zeros((128, 128, 3), np.uint8), np.ones((128, 128), bool)
    valid[:, 120:] = False
    [made] = label_texts(engine, pixels, valid, ConceptRequest(("dog",)))
    assert not made.numbers[:, 120:].any()
    return made


def test_of_overlapping_finds_of_one_text_the_best_gets_the_pixels() -> None:
    best, beside = Box(10, 10, 60, 60), Box(45, 10, 95, 60)
    made = labelled(Finding((0.9, best), (0.8, Box(12, 12, 60, 60)), (0.7, beside)))
    assert made.scores.tolist() == pytest.approx([0.9, 0.7])
    assert made.numbers[35, 52] == 1
    assert made.numbers[35, 80] == 2


def test_a_tile_keeps_more_objects_than_a_request_may_have_by_default() -> None:
    boxes = [Box(x, y, x + 8, y + 8) for x in range(0, 118, 9) for y in range(0, 118, 9)]
    assert len(boxes) > ConceptRequest(("dog",)).max_objects
    assert len(labelled(Finding(*((0.9, box) for box in boxes))).scores) == len(boxes)


# ── interrupted and shared ──


class StoppedError(Exception):
    pass


def stopping_at(number: int) -> Callable[[Step], None]:
    steps = iter(range(number, -1, -1))

    def on_tile(_: Step) -> None:
        if next(steps) == 0:
            raise StoppedError

    return on_tile


@pytest.mark.slow
def test_a_mosaic_of_texts_continues_after_an_interruption_with_the_same_files(
    picture: Path,
) -> None:
    engine = Seeing()
    progress: list[Step] = []
    mosaic(picture, picture.parent / "whole", OPTIONS, Seeing, progress.append)
    expected = files(picture.parent / "whole")
    assert all(0 <= step.done <= step.total for step in progress)
    starts = [step.stage for step in progress if not step.done]
    assert starts == ["seams", "slivers", "labels", "polygons"]
    cuts = (5, 11, 12 + 20, 12 + 36 + 20, len(progress) - 1)
    for number in cuts:
        out = picture.parent / f"stopped-{number}"
        with pytest.raises(StoppedError):
            mosaic(picture, out, OPTIONS, lambda: engine, stopping_at(number))
        other = replace(OPTIONS, concept=ConceptRequest(("red",), threshold=0.3))
        with pytest.raises(UsageError, match="text differ"):
            mosaic(picture, out, other, Seeing)
        mosaic(picture, out, OPTIONS, lambda: engine)
        assert files(out) == expected
        assert not (out / FOLDER).exists()
    skipped = json.loads((picture.parent / "whole/stats.json").read_text())["tiles_skipped"]
    assert engine.calls["encode"] == (12 - skipped) * len(cuts), "a tile was computed again"


def test_a_helper_computes_tiles_of_texts(picture: Path) -> None:
    mosaic(picture, picture.parent / "alone", OPTIONS, Seeing)
    out, engine = picture.parent / "out", Seeing()
    help_with(picture, out, OPTIONS, Seeing)
    mosaic(picture, out, OPTIONS, lambda: engine)
    assert engine.calls["encode"] == 0
    assert files(out) == files(picture.parent / "alone")


# ── refused ──


class Wordless(FakeEngine):
    def check_concept(self, request: ConceptRequest) -> None:
        raise concepts.refusal("sam2.1_hiera_tiny", request)


@pytest.mark.parametrize("call", [mosaic, help_with], ids=["mosaic", "helper"])
def test_a_network_without_texts_is_refused_before_anything_is_written(
    picture: Path, call: Callable[..., Any]
) -> None:
    out = picture.parent / "out"
    with pytest.raises(PromptError, match="takes no texts") as caught:
        call(picture, out, OPTIONS, Wordless)
    assert "facebook/sam3" in (caught.value.remedy or "")
    assert not out.exists()
    assert mosaic(picture, out, OPTIONS, Seeing)["labels"] == 4


# ── the command ──

FLAGS = ("--tile", "128", "--padding", "32", "--min-area", "20")


def test_command_finds_several_texts(picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builders, "engine_of", lambda *_, **__: Seeing())
    out = picture.parent / "out"
    texts = ("--text", "red", "--text", "green", "--threshold", "0.5")
    done = invoke(str(picture), "-o", str(out), "-m", "fake", *FLAGS, *texts)
    assert done.exit_code == 0, done.output
    assert "3 objects" in done.output
    columns, _ = table(out)
    assert sorted(columns["class"].tolist()) == ["green", "red", "red"]


@pytest.mark.parametrize(
    ("flags", "place"),
    [
        *((("--text", "red", flag, "1"), flag) for flag in ("--passes", "--points-per-side")),
        *((("--text", "red", flag, "0.8"), flag) for flag in ("--iou", "--stability")),
        (("--text", "red", "--target-coverage", "0.95"), "--target-coverage"),
        (("--threshold", "0.5"), "--threshold"),
        (("--text", "red", "--threshold", "1.5"), "--threshold"),
        (("--text", " "), "--text"),
        (("--text", "red", "--text", "red"), "--text"),
    ],
)
def test_command_refuses_flags_that_do_not_go_with_texts(
    picture: Path, flags: tuple[str, ...], place: str
) -> None:
    done = invoke(str(picture), "-o", str(picture.parent / "out"), "-m", "fake", *flags)
    assert done.exit_code == 2, done.output
    assert place in done.output
    assert not (picture.parent / "out").exists()


def test_command_refuses_a_network_without_texts_with_the_models_that_take_them(
    picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builders, "engine_of", lambda *_, **__: Wordless())
    done = invoke(str(picture), "-o", str(picture.parent / "out"), "-m", "fake", "--text", "red")
    assert done.exit_code == PromptError.exit_code
    assert "facebook/sam3" in done.output
    assert not (picture.parent / "out").exists()


# ── in the folder ──


def answer(share: Share, engine: FakeEngine) -> None:
    chosen = registry.load(["mask"], registry.FormatOptions())
    made = Pipeline(engine, chosen, tiled_jobs=partial(jobs.begin, model="seeing"))
    with source(share, once=True) as opened:
        made.run(opened, threading.Event())


def drop(share: Share, stem: str, **options: Any) -> None:
    mosaics.write(share.input / f"{stem}.tif", scene())
    share.drop(f"{stem}.json", {"mosaic": options})


def test_dropped_mosaic_of_texts_gives_the_outputs_of_the_command(share: Share) -> None:
    drop(share, "ortho", text=list(TEXTS), threshold=0.3, tile=TILE, padding=PADDING, min_area=20)
    mosaic(share.input / "ortho.tif", share.root / "alone", OPTIONS, Seeing)
    answer(share, Seeing())
    assert share.tree("output") == [f"ortho{name}" for name in NAMES]
    for name in ("labels.tif", "labels.geojson", "stats.json"):
        answered = (share.output / f"ortho.{name}").read_bytes()
        assert answered == (share.root / "alone" / name).read_bytes()


def test_dropped_mosaic_of_texts_that_the_network_cannot_take_is_rejected(share: Share) -> None:
    drop(share, "long", text=["red", "a " * 31])
    answer(share, Seeing())
    assert share.error("long")["place"] == "mosaic.text[1]"
    drop(share, "words", text="red")
    answer(share, Wordless())
    assert share.error("words")["place"] == "mosaic.text"
    assert "facebook/sam3" in share.error("words")["remedy"]
