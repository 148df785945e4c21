"""Options of a job: formats of its own, the embedding, cancellation."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from sam_poll.core.errors import InputError, InternalError
from sam_poll.core.protocols import Format
from sam_poll.core.types import AutomaticMaskRequest, Job, OutputFile, Result
from sam_poll.engines.fake import FakeEngine
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.pipeline import Pipeline
from tests.conftest import wait_until
from tests.support.pipelines import MemorySource, job


def noted(name: str, seen: list[Result] | None = None) -> Format:
    def make(result: Result) -> Sequence[OutputFile]:
        if seen is not None:
            seen.append(result)
        return [OutputFile(f".{name}", "text/plain", name.encode())]

    return make


def run(source: MemorySource, engine: Any = None, formats: Any = None, **sizes: Any) -> Pipeline:
    pipeline = Pipeline(
        engine or FakeEngine(),
        formats or {n: noted(n) for n in "abc"},
        options=PipelineOptions(**sizes),
    )
    pipeline.run(source, threading.Event())
    return pipeline


def test_a_job_is_answered_in_the_formats_it_names_or_in_all() -> None:
    source = MemorySource(
        [job("one", 1, formats=("b",)), job("two", 2, formats=("c", "a")), job("all", 3)]
    )
    run(source)
    given = {
        name: [document.suffix for document in documents]
        for name, documents in source.delivered.items()
    }
    assert given == {"one": [".b"], "two": [".c", ".a"], "all": [".a", ".b", ".c"]}


@pytest.mark.parametrize("kept", [True, False])
def test_a_picture_is_kept_only_for_formats_that_draw_on_it(kept: bool) -> None:
    seen: list[Result] = []
    asked = job("drawn", formats=("a",), min_decode_side=1024 if kept else 0)
    run(MemorySource([asked]), formats={"a": noted("a", seen)}, pixels=not kept)
    assert (seen[0].picture is not None) is kept


def test_an_embedding_is_returned_on_request_and_nothing_is_decoded_for_it() -> None:
    seen: list[Result] = []
    engine = FakeEngine(side=1024)
    source = MemorySource(
        [job("asks", prompts=(), formats=("a",), embedding=True), job("not", formats=("a",))]
    )
    run(source, engine, {"a": noted("a", seen)})
    arrays = {result.job_id: result.embedding for result in seen}
    assert arrays["not"] is None
    assert np.shape(arrays["asks"]) == (1, 256, 64, 64)
    assert engine.calls == {"encode": 1, "decode": 1}


def test_a_cancelled_job_never_reaches_the_network() -> None:
    cancelled = threading.Event()
    cancelled.set()
    engine = FakeEngine()
    source = MemorySource(
        [job("gone", 1, cancelled=cancelled), job("here", 2, cancelled=threading.Event())]
    )
    run(source, engine)
    assert (list(source.delivered), source.released) == (["here"], ["gone"])
    assert len(engine.encoded) == 1


class OneFirst(MemorySource):
    """Hands the other jobs out when the first one is on the device."""

    def __init__(self, engine: FakeEngine, jobs: list[Job]) -> None:
        super().__init__(jobs)
        self.engine = engine

    def jobs(self, stop: threading.Event) -> Iterator[Job]:
        for number, one in enumerate(super().jobs(stop)):
            if number:
                wait_until(lambda: self.engine.calls["encode"])
            yield one


def test_a_job_cancelled_while_it_waits_for_the_device_is_left_out_of_its_batch() -> None:
    gate, cancelled = threading.Event(), threading.Event()
    engine = FakeEngine(gate=gate)
    source = OneFirst(
        engine,
        [job("first", 1), job("gone", 2, cancelled=cancelled), job("third", 3), job("fourth", 4)],
    )
    pipeline = Pipeline(engine, [noted("a")])
    thread = threading.Thread(target=pipeline.run, args=(source, threading.Event()))
    thread.start()
    wait_until(lambda: pipeline._device_queue.qsize() == 3)
    cancelled.set()
    gate.set()
    thread.join(60)
    assert (sorted(source.delivered), source.released) == (["first", "fourth", "third"], ["gone"])
    assert len(engine.encoded) == 3


class Leaving(FakeEngine):
    """Cancels its job while the network works on it."""

    def __init__(self, cancelled: threading.Event) -> None:
        super().__init__()
        self.cancelled = cancelled

    def candidates(self, *arguments: Any, **more: Any) -> Any:
        self.cancelled.set()
        return super().candidates(*arguments, **more)


@pytest.mark.slow
def test_automatic_masks_stop_between_two_steps_when_the_job_is_cancelled() -> None:
    cancelled = threading.Event()
    engine = Leaving(cancelled)
    source = MemorySource(
        [job("long", prompts=AutomaticMaskRequest(points_per_side=64), cancelled=cancelled)]
    )
    run(source, engine)
    assert source.released == ["long"]
    whole = FakeEngine()
    run(MemorySource([job("long", prompts=AutomaticMaskRequest(points_per_side=64))]), whole)
    assert engine.calls["decode"] < whole.calls["decode"]


def test_an_unexpected_error_rejects_the_job_with_internal_error() -> None:
    def broken(result: Result) -> Sequence[OutputFile]:
        raise ZeroDivisionError("odd")

    source = MemorySource([job("a")])
    pipeline = run(source, formats=[broken])
    assert isinstance(source.rejected["a"], InternalError)
    assert pipeline.stats.now().reasons == {InputError.code: 1}
