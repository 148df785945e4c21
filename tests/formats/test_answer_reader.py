"""Answers are read back from their files, whatever format they were written in."""

from __future__ import annotations

import json
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_poll.core.errors import InputError
from sam_poll.core.types import Mask, Size
from sam_poll.formats import answer_reader, registry
from sam_poll.formats.answer_reader import Answer
from sam_poll.formats.registry import FormatOptions
from sam_poll.imaging.masks import paste
from tests.support.results import disc, rectangle, result_of

SIZE = Size(300, 200)
RING = disc(SIZE, 80, 80, 40, hole=15, label="ring", score=0.9)
PLATE = rectangle(SIZE, 150, 20, 280, 90, label="a plate & more", score=0.5)


def written(format: str, masks: list[Mask], **options: Any) -> list[bytes]:
    (make,) = registry.load([format], FormatOptions(**options))
    return [output.body for output in make(result_of(SIZE, masks))]


def drawn(answer: Answer, number: int) -> np.ndarray:
    (one,) = [one for one in answer.objects if one.number == number]
    frame = np.zeros((SIZE.height, SIZE.width), np.uint8)
    for part in one.parts:
        cv2.fillPoly(frame, [np.rint(polygon).astype(np.int32) for polygon in part], 1)
    return frame.astype(bool)


@pytest.mark.parametrize("format", answer_reader.READERS)
def test_objects_come_back_with_their_masks(format: str) -> None:
    answer = answer_reader.read(format, written(format, [RING, PLATE])[0])
    assert answer.size == SIZE
    assert [one.number for one in answer.objects] == [1, 2]
    for number, mask in ((1, RING), (2, PLATE)):
        true, shown = paste(mask, SIZE), drawn(answer, number)
        assert (true & shown).sum() / (true | shown).sum() > 0.98
    if format != "mask":
        assert answer.image == "done/cam1/dog.jpg"
        assert [(one.label, one.score) for one in answer.objects] == [
            ("ring", 0.9),
            ("a plate & more", 0.5),
        ]


@pytest.mark.parametrize(("format", "option"), [("coco", "coco"), ("cvat", "cvat")])
def test_polygons_come_back_as_one_object(format: str, option: str) -> None:
    two = Mask("pair", 0.7, 10, 10, np.pad(np.ones((20, 20), bool), ((0, 0), (0, 30)))[:, :50])
    pixels = two.pixels.copy()
    pixels[:, 35:] = True
    answer = answer_reader.read(
        format,
        written(format, [Mask("pair", 0.7, 10, 10, pixels), PLATE], **{option: "polygon"})[0],
    )
    assert [(one.label, len(one.parts)) for one in answer.objects] == [
        ("pair", 2),
        ("a plate & more", 1),
    ]


def test_a_single_mask_is_object_one() -> None:
    answer = answer_reader.read("mask", written("mask", [RING])[0])
    assert [one.number for one in answer.objects] == [1]


def test_an_empty_answer_has_no_objects() -> None:
    for format in answer_reader.READERS:
        assert answer_reader.read(format, written(format, [])[0]).objects == ()


def opex(**more: Any) -> dict[str, Any]:
    part = {"polygon": {"points": [[0, 0], [5, 0], [5, 5]]}, "label": "x", **more}
    return {"objects": [part], "meta": {"width": "10", "height": "10"}}


def coco(segmentation: Any) -> dict[str, Any]:
    return {
        "images": [{"width": 10, "height": 10, "file_name": "a.jpg"}],
        "annotations": [{"id": 1, "segmentation": segmentation}],
    }


@pytest.mark.parametrize(
    ("format", "document"),
    [
        ("opex", {}),
        ("opex", []),
        ("opex", {"objects": 5}),
        ("opex", opex(polygon={"points": [[0, 1e300], [1, 1], [2, 2]]})),
        ("opex", opex(polygon={"points": [["a", "b"]]})),
        ("opex", opex(meta={"holes": "[["})),
        ("opex", opex(meta={"object": "x"})),
        ("opex", {"objects": [], "meta": {"width": "-1", "height": "1"}}),
        ("coco", coco({"size": [10, 10], "counts": "o" * 100})),
        ("coco", coco({"size": [10, 10], "counts": [5, 1000]})),
        ("coco", coco({"size": [10, 10], "counts": [10**13]})),
        ("coco", coco({"size": [10, 10], "counts": "zzzzzzzzzzzzzzzzzzzz"})),
        ("coco", coco({"size": [99, 10], "counts": [100]})),
        ("coco", coco([[1, 2, 3]])),
        ("coco", {"images": [{"width": 10**9, "height": 10**9}], "annotations": []}),
        ("mask", b"no png"),
        ("mask", b""),
        ("cvat", b"<a/>"),
        ("cvat", b"<!DOCTYPE x [<!ENTITY a 'b'>]><a/>"),
        (
            "cvat",
            b'<a><image width="4" height="4"><mask rle="99" left="0" top="0" width="2" '
            b'height="2"/></image></a>',
        ),
        (
            "cvat",
            b'<a><image width="4" height="4"><mask rle="1" left="0" top="0" '
            b'width="100000" height="100000"/></image></a>',
        ),
        ("opex", b"[" * 100_000),
    ],
)
def test_what_is_no_answer_is_refused(format: str, document: Any) -> None:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(InputError):
        answer_reader.read(format, body)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(answer_reader.READERS)), st.data())
def test_damaged_files_are_read_or_refused(format: str, data: st.DataObject) -> None:
    body = bytearray(written(format, [RING, PLATE])[0])
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        answer = answer_reader.read(format, bytes(body))
    except InputError:
        return
    for one in answer.objects:
        for part in one.parts:
            assert all(np.isfinite(polygon).all() for polygon in part)
