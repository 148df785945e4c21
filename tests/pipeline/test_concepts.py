"""Concept requests in the pipeline: what is found, in which order, and with which notes."""

from __future__ import annotations

import json
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest

from sam_poll import engines
from sam_poll.core.errors import PromptError
from sam_poll.core.types import (
    Box,
    ConceptRequest,
    Exemplar,
    InputTransform,
    Mask,
    Prompt,
    Result,
    Size,
)
from sam_poll.engines.fake import FakeEngine, drawn
from sam_poll.formats import registry
from sam_poll.imaging import found_objects, masks
from sam_poll.imaging.automatic_masks import pack
from sam_poll.imaging.masks import paste
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.pipeline.predictor import Predictor
from tests.conftest import BOX, Share, picture_bytes
from tests.support.pipelines import MemorySource, job, run
from tests.support.worker_pools import drain, equipped, pool_of


def found(request: ConceptRequest, engine: Any = None) -> Result:
    results: list[Result] = []
    source = MemorySource([job("j", prompts=request)])
    run(source, engine, on_result=results.append)
    assert not source.rejected
    (result,) = results
    return result


def refused(request: ConceptRequest, engine: Any = None) -> Any:
    source = MemorySource([job("j", prompts=request)])
    run(source, engine)
    assert not source.delivered
    return source.rejected["j"]


# The fake engine finds an object for each word: `a` and `e` in one quarter, `b` and `c` in others.


def test_objects_are_labelled_with_their_text_and_come_best_first() -> None:
    result = found(ConceptRequest(("a b", "c")))
    assert [mask.label for mask in result.masks] == ["a b", "c", "a b"]
    assert [mask.score for mask in result.masks] == pytest.approx([0.9, 0.9, 0.8])
    assert all(mask.area for mask in result.masks)
    assert result.prompts == ()


def test_exemplars_alone_have_their_label_and_with_a_text_its() -> None:
    exemplars = (Exemplar(Box(5, 5, 30, 30)), Exemplar(Box(40, 5, 60, 30), 0))
    (mask,) = found(ConceptRequest((), exemplars, "screw")).masks
    assert mask.label == "screw"
    assert (mask.left, mask.top) == (5, 5)
    assert {mask.label for mask in found(ConceptRequest(("a",), exemplars)).masks} == {"a"}


def test_nothing_found_is_an_answer_and_a_note() -> None:
    result = found(ConceptRequest(("nothing", "a"), threshold=0.4))
    assert [mask.label for mask in result.masks] == ["a"]
    assert result.notes == (
        'nothing found for "nothing": no object has a score above the threshold of 0.4',
    )
    assert found(ConceptRequest(("nothing",))).masks == ()


@pytest.mark.parametrize("name", registry.names())
def test_nothing_found_is_an_answer_in_every_format(name: str) -> None:
    source = MemorySource([job("j", prompts=ConceptRequest(("nothing",)))])
    formats = registry.load([name], registry.FormatOptions())
    Pipeline(FakeEngine(), formats).run(source, threading.Event())
    assert not source.rejected
    documents = source.delivered["j"]
    assert documents
    assert all(document.body or document.suffix == ".yolo.txt" for document in documents)


def test_the_threshold_is_exceeded_and_the_best_of_too_many_are_kept() -> None:
    assert len(found(ConceptRequest(("a b c",), threshold=0.75)).masks) == 2
    result = found(ConceptRequest(("a b c", "b"), max_objects=2))
    assert [mask.label for mask in result.masks] == ["a b c", "b", "a b c"]
    assert result.notes[0].startswith('more than 2 objects found for "a b c"')


def test_nearly_the_same_masks_of_two_texts_are_kept_and_noted() -> None:
    result = found(ConceptRequest(("a", "e", "b")))
    assert [mask.label for mask in result.masks] == ["a", "e", "b"]
    assert result.notes == ("objects 1 (a) and 2 (e) have nearly the same mask (IoU 1.00)",)


def test_masks_are_compared_only_where_their_boxes_are_nearly_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared: list[tuple[str, str]] = []
    real = masks.iou

    def iou(one: Mask, other: Mask) -> float:
        compared.append((one.label, other.label))
        return real(one, other)

    monkeypatch.setattr(masks, "iou", iou)
    found(ConceptRequest(("a", "b", "c", "e")))
    assert compared == [("a", "e")]


def test_notes_on_the_same_masks_end_after_some() -> None:
    texts = ("a", "e", "i", "m", "q", "u", "i m", "m q", "q u")
    objects = found_objects.search(
        FakeEngine(), embedded(FakeEngine()), ConceptRequest(texts, threshold=0.0)
    ).objects
    notes = found_objects.notes_on_same_masks(objects)
    assert len(notes) == 21
    assert "further objects" in notes[-1]


def embedded(engine: FakeEngine) -> Any:
    predictor = Predictor(engine)
    return predictor._embedding(predictor.embed(picture_bytes()))


def test_a_clipped_exemplar_is_a_note_and_one_outside_is_refused_with_its_place() -> None:
    result = found(ConceptRequest((), (Exemplar(Box(-2, 5, 30, 30)),)))
    assert result.notes == ("exemplars[0].box clipped to the picture: x0 -2 → 0",)
    error = refused(ConceptRequest((), (Exemplar(Box(500, 5, 530, 30)),)))
    assert (error.code, error.place) == ("prompt", "exemplars[0].box.x0")


def test_a_text_that_is_too_long_is_refused_with_its_place_before_the_network_runs() -> None:
    engine = FakeEngine()
    error = refused(ConceptRequest(("a", "very " * 40 + "long")), engine)
    assert (error.code, error.place) == ("prompt", "text[1]")
    assert "tokens" in error.reason
    assert engine.calls["encode"] == 0
    assert refused(ConceptRequest(("very " * 40,))).place == "text"


def test_a_model_that_takes_no_texts_refuses_them_and_names_one_that_does() -> None:
    demo = engines.load(engines.resolve("demo"), device="cpu", precision="float32", warmup=False)
    for request, place in (
        (ConceptRequest(("dog",)), "text"),
        (ConceptRequest((), (Exemplar(Box(1, 1, 9, 9)),)), "exemplars"),
    ):
        error = refused(request, demo)
        assert (error.code, error.place) == ("prompt", place)
        assert "facebook/sam3" in error.remedy
        with pytest.raises(PromptError, match="facebook/sam3"):
            Predictor(demo).find(Predictor(demo).embed(picture_bytes()), request)


def test_texts_for_one_picture_encode_it_once_and_stop_between_two_calls() -> None:
    engine = FakeEngine()
    request = ConceptRequest(("a", "b", "c"))
    stops: list[int] = []

    def step() -> None:
        stops.append(engine.calls["find"])
        if len(stops) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        found_objects.search(engine, embedded(engine), request, on_step=step)
    assert stops == [0, 1, 2]
    assert engine.calls["encode"] == 1


def test_the_predictor_finds_what_the_pipeline_finds() -> None:
    predictor = Predictor(FakeEngine())
    request = ConceptRequest(("a b", "c"))
    masks, _ = predictor.find(predictor.embed(picture_bytes()), request)
    assert [(m.label, m.left, m.top, m.area) for m in masks] == [
        (m.label, m.left, m.top, m.area) for m in found(request).masks
    ]


# ── from the folder ──


def test_texts_dropped_into_the_folder_come_back_beside_other_prompts(share: Share) -> None:
    share.pair("dog", prompt={"text": ["a", "b"]})
    share.drop("dog.box.json", {"image": "dog.jpg", **BOX})
    share.pair("cat", prompt={"text": "nothing"})
    share.pair("cow", prompt={"text": ["a", ""]})
    share.pair("hen", prompt={"exemplars": [{"box": {"x0": 500, "y0": 1, "x1": 510, "y1": 9}}]})
    engine = FakeEngine()
    stats = share.run_once(engine)
    assert (stats.answered, stats.rejected) == (3, 2)
    assert share.tree("output") == ["cat.mask.png", "dog.box.mask.png", "dog.mask.png"]
    assert share.error("cow")["place"] == "text[1]"
    assert share.error("hen")["place"] == "exemplars[0].box.x0"
    assert json.loads((share.done / "dog.json").read_text()) == {"text": ["a", "b"]}


@pytest.mark.slow
def test_texts_are_answered_by_worker_processes(share: Share) -> None:
    share.pair("dog", prompt={"text": ["a", "b"]})
    share.pair("cat", prompt={"text": "very " * 40})
    with pool_of(equipped) as pool:
        drain(share, pool)
    assert share.tree("output") == ["dog.mask.png"]
    assert share.error("cat")["place"] == "text"


# ── memory ──


def test_large_masks_beyond_the_room_are_packed_and_stay_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frame = InputTransform(Size(800, 600), 256, Size(256, 256), two_step=False)
    objects = []
    for number in range(40):
        plane = drawn(Prompt(box=Box(5 * number, 5, 800, 595 - 4 * number)), frame)
        packed = pack(plane, 0.9, 1.0, frame)
        assert packed
        objects.append(found_objects.FoundObject("dog", packed))
    plain = found_objects.masks(objects)
    monkeypatch.setattr(found_objects, "ROOM_BYTES", 1 << 20)
    monkeypatch.setattr(found_objects, "SMALL_BYTES", 1 << 10)
    tracemalloc.start()
    try:
        made = found_objects.masks(objects)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    whole = sum(mask.pixels.nbytes for mask in plain)
    assert kept < (1 << 20) + whole / 8 * 1.1
    assert peak < kept + 3 * 800 * 600
    assert whole > 8 * (1 << 20)
    for one, other in zip(made, plain, strict=True):
        assert (one.label, one.score, one.area) == (other.label, other.score, other.area)
        np.testing.assert_array_equal(paste(one, frame.size), paste(other, frame.size))
