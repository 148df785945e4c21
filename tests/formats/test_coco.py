"""COCO instances: run lengths, areas, boxes, ids; read back by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sam_poll.core.types import Box, Mask, Prompt, Result, Size
from sam_poll.formats.coco import make, rle
from sam_poll.formats.registry import FormatOptions
from sam_poll.imaging.masks import column_runs
from tests.support.results import disc, filled, frames, mask_of, rectangle, result_of

SIZE = Size(60, 40)


def written(result: Result, **options: Any) -> dict[str, Any]:
    (document,) = make(FormatOptions(**options))(result)
    assert (document.suffix, document.media_type) == (".coco.json", "application/json")
    made: dict[str, Any] = json.loads(document.body)
    return made


@settings(deadline=None, max_examples=300)
@given(frames())
@example(np.ones((1, 1), bool))
@example(np.ones((3, 5), bool))
@example(np.pad(np.ones((1, 1), bool), 3))
@example(np.array([[1, 0, 1], [0, 0, 0], [1, 1, 0]], bool))
def test_a_mask_comes_back_from_its_run_lengths_exactly(frame: np.ndarray) -> None:
    size = Size(frame.shape[1], frame.shape[0])
    annotations = written(result_of(size, [mask_of(frame)]))["annotations"]
    assert len(annotations) == frame.any()
    for annotation in annotations:
        segmentation = annotation["segmentation"]
        assert segmentation["size"] == [size.height, size.width]
        assert np.array_equal(coco_mask.decode(segmentation), frame)
        assert annotation["area"] == np.count_nonzero(frame)
        assert annotation["bbox"] == coco_mask.toBbox(segmentation).tolist()


@settings(deadline=None, max_examples=200)
@given(frames())
@example(np.ones((4, 4), bool))
def test_run_lengths_are_those_that_pycocotools_makes_of_the_whole_picture(
    frame: np.ndarray,
) -> None:
    if not frame.any():
        return
    size = Size(frame.shape[1], frame.shape[0])
    runs = column_runs(mask_of(frame), size)
    assert sum(runs) == frame.size
    assert all(run > 0 for run in runs[1:])
    assert rle(mask_of(frame), size)["counts"] == coco_mask.encode(
        np.asfortranarray(frame.view(np.uint8))
    )["counts"].decode("ascii")


def test_run_lengths_cost_memory_by_the_object_and_not_by_the_picture() -> None:
    far = Mask("far", 0.9, 9_000, 9_000, np.ones((30, 30), bool))
    tracemalloc.start()
    found = rle(far, Size(10_000, 10_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert coco_mask.toBbox(found).tolist() == [9_000, 9_000, 30, 30]
    assert peak < 200_000


def test_all_of_a_file_is_what_coco_says_it_is() -> None:
    ring = disc(SIZE, 20, 20, 10, hole=4, label="wheel", score=0.97)
    made = written(
        result_of(SIZE, [ring, rectangle(SIZE, 30, 5, 50, 15, label="plate", score=float("nan"))])
    )
    assert made["images"] == [
        {"id": 1, "file_name": "done/cam1/dog.jpg", "width": 60, "height": 40}
    ]
    assert [(c["id"], c["name"]) for c in made["categories"]] == [(1, "plate"), (2, "wheel")]
    wheel, plate = made["annotations"]
    assert (wheel["id"], wheel["image_id"], wheel["category_id"], wheel["iscrowd"]) == (1, 1, 2, 0)
    assert (wheel["score"], wheel["attributes"], wheel["area"]) == (
        0.97,
        {"score": 0.97},
        ring.area,
    )
    assert (plate["id"], plate["category_id"], plate["bbox"]) == (2, 1, [30, 5, 20, 10])
    assert "score" not in plate
    assert plate["attributes"] == {}


def test_an_empty_mask_is_left_out_and_its_number_and_label_are_kept_for_it() -> None:
    made = written(
        result_of(
            SIZE, [rectangle(SIZE, 5, 5, 5, 5, label="ant"), rectangle(SIZE, 1, 1, 9, 9, label="b")]
        )
    )
    assert [annotation["id"] for annotation in made["annotations"]] == [2]
    assert [category["name"] for category in made["categories"]] == ["ant", "b"]
    assert made["images"][0]["notes"] == "object 1 (ant) is left out: its mask is empty"


def test_notes_of_the_job_and_of_prompts_are_kept() -> None:
    prompts = [Prompt("b", box=Box(1, 1, 9, 9), notes=("the box was clipped",))]
    made = written(
        result_of(
            SIZE, [rectangle(SIZE, 1, 1, 9, 9)], prompts=prompts, notes=("read at half its size",)
        )
    )
    assert made["images"][0]["notes"] == "read at half its size"
    assert made["annotations"][0]["notes"] == "the box was clipped"


@settings(deadline=None, max_examples=100)
@given(frames(), st.sampled_from([0.0, 1.0]))
def test_polygons_give_the_filled_mask_back_and_the_area_and_box_are_the_masks_own(
    frame: np.ndarray, tolerance: float
) -> None:
    size = Size(frame.shape[1], frame.shape[0])
    annotations = written(
        result_of(size, [mask_of(frame)]), coco="polygon", tolerance_px=tolerance, min_area_px=0
    )["annotations"]
    assert len(annotations) == frame.any()
    for annotation in annotations:
        polygons = annotation["segmentation"]
        assert all(len(polygon) >= 6 for polygon in polygons)
        drawn = coco_mask.decode(coco_mask.frPyObjects(polygons, size.height, size.width)).any(
            axis=2
        )
        if not tolerance:
            assert np.array_equal(drawn, filled(frame))
        assert annotation["area"] == np.count_nonzero(frame)
        rows, columns = np.flatnonzero(frame.any(axis=1)), np.flatnonzero(frame.any(axis=0))
        left, top, width, height = annotation["bbox"]
        assert (left, top) == (columns[0], rows[0])
        assert (left + width - 1, top + height - 1) == (columns[-1], rows[-1])


def test_an_object_of_specks_has_no_polygon_and_is_noted() -> None:
    made = written(result_of(SIZE, [rectangle(SIZE, 1, 1, 3, 3, label="speck")]), coco="polygon")
    assert made["annotations"] == []
    assert (
        "object 1 (speck) is left out: every part of it is below the minimum area"
        in made["images"][0]["notes"]
    )


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(), min_size=1), st.text(st.characters(), min_size=1))
@example("Tür 漢字 😀", "done/Größe/ä ö.jpg")
@example("\udfff\x00", "a\udc80b.jpg")
def test_any_label_and_any_name_come_back(label: str, name: str) -> None:
    if (
        max(label + name) >= "\ud800"
    ):  # two halves of one character side by side are that character in JSON
        label, name = (
            text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            for text in (label, name)
        )
    made = written(result_of(SIZE, [rectangle(SIZE, 1, 1, 9, 9, label=label)], name=name))
    assert made["images"][0]["file_name"] == name
    assert made["categories"][0]["name"] == label


@pytest.mark.parametrize("form", ["rle", "polygon"])
def test_pycocotools_reads_the_whole_file(form: str, tmp_path: Path) -> None:
    ring, plate = (
        disc(SIZE, 20, 20, 10, hole=4, label="wheel"),
        rectangle(SIZE, 30, 5, 50, 15, label="plate"),
    )
    (document,) = make(FormatOptions(coco=form, tolerance_px=0))(result_of(SIZE, [ring, plate]))  # type: ignore[arg-type]
    (tmp_path / "a.json").write_bytes(document.body)
    with contextlib.redirect_stdout(io.StringIO()):
        dataset = COCO(tmp_path / "a.json")
    for annotation, mask in zip(dataset.loadAnns(dataset.getAnnIds()), (ring, plate), strict=True):
        frame = np.zeros((SIZE.height, SIZE.width), bool)
        height, width = mask.pixels.shape
        frame[mask.top : mask.top + height, mask.left : mask.left + width] = mask.pixels
        assert np.array_equal(
            dataset.annToMask(annotation), frame if form == "rle" else filled(frame)
        )
        assert dataset.loadCats(annotation["category_id"])[0]["name"] == mask.label
