"""What a job may ask for beside its prompts: formats of its own, the embedding, and not to be worked on in vain."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import InputError, UnforeseenError
from sam_poll.pipeline import Pipeline, Sizes
from sam_poll.types import Document, Everything, Format, Job, Result
from tests.conftest import wait_until
from tests.test_pipeline import MemoryDoor, job


def noted(name: str, seen: list[Result] | None = None) -> Format:
    def make(result: Result) -> Sequence[Document]:
        if seen is not None:
            seen.append(result)
        return [Document(f".{name}", "text/plain", name.encode())]

    return make


def run(door: MemoryDoor, engine: Any = None, formats: Any = None, **sizes: Any) -> Pipeline:
    pipeline = Pipeline(engine or FakeEngine(), formats or {n: noted(n) for n in "abc"}, sizes=Sizes(**sizes))
    pipeline.run(door, threading.Event())
    return pipeline


def test_each_job_is_answered_in_the_formats_it_names_and_in_all_where_it_names_none() -> None:
    door = MemoryDoor([job("one", 1, formats=("b",)), job("two", 2, formats=("c", "a")), job("all", 3)])
    run(door)
    given = {name: [document.suffix for document in documents] for name, documents in door.delivered.items()}
    assert given == {"one": [".b"], "two": [".c", ".a"], "all": [".a", ".b", ".c"]}


@pytest.mark.parametrize("kept", [True, False])
def test_the_picture_is_kept_for_those_formats_that_draw_on_it_only(kept: bool) -> None:
    seen: list[Result] = []
    asked = job("drawn", formats=("a",), cover=1024 if kept else 0)
    run(MemoryDoor([asked]), formats={"a": noted("a", seen)}, pixels=not kept)
    assert (seen[0].picture is not None) is kept


def test_an_embedding_is_handed_out_to_who_asks_for_it_and_nothing_is_decoded_for_that() -> None:
    seen: list[Result] = []
    engine = FakeEngine(side=1024)
    door = MemoryDoor([job("asks", prompts=(), formats=("a",), embedding=True), job("not", formats=("a",))])
    run(door, engine, {"a": noted("a", seen)})
    arrays = {result.job_id: result.embedding for result in seen}
    assert arrays["not"] is None
    assert np.shape(arrays["asks"]) == (1, 256, 64, 64)
    assert engine.calls == {"encode": 1, "decode": 1}


def test_a_job_that_nobody_waits_for_never_reaches_the_network() -> None:
    gone = threading.Event()
    gone.set()
    engine = FakeEngine()
    door = MemoryDoor([job("gone", 1, gone=gone), job("here", 2, gone=threading.Event())])
    run(door, engine)
    assert (list(door.delivered), door.released) == (["here"], ["gone"])
    assert len(engine.encoded) == 1


class OneFirst(MemoryDoor):
    """Hands the others out when the first is on the device."""

    def __init__(self, engine: FakeEngine, jobs: list[Job]) -> None:
        super().__init__(jobs)
        self.engine = engine

    def jobs(self, stop: threading.Event) -> Iterator[Job]:
        for number, one in enumerate(super().jobs(stop)):
            if number:
                wait_until(lambda: self.engine.calls["encode"])
            yield one


def test_a_job_given_up_while_it_waits_for_the_device_is_left_out_of_its_batch() -> None:
    gate, gone = threading.Event(), threading.Event()
    engine = FakeEngine(gate=gate)
    door = OneFirst(engine, [job("first", 1), job("gone", 2, gone=gone), job("third", 3), job("fourth", 4)])
    pipeline = Pipeline(engine, [noted("a")])
    thread = threading.Thread(target=pipeline.run, args=(door, threading.Event()))
    thread.start()
    wait_until(lambda: pipeline._device_queue.qsize() == 3)
    gone.set()
    gate.set()
    thread.join(60)
    assert (sorted(door.delivered), door.released) == (["first", "fourth", "third"], ["gone"])
    assert len(engine.encoded) == 3


class Leaving(FakeEngine):
    """The one who waits leaves while the network works for him."""

    def __init__(self, gone: threading.Event) -> None:
        super().__init__()
        self.gone = gone

    def candidates(self, *arguments: Any, **more: Any) -> Any:
        self.gone.set()
        return super().candidates(*arguments, **more)


def test_everything_is_broken_off_between_two_steps_when_nobody_waits_any_more() -> None:
    gone = threading.Event()
    engine = Leaving(gone)
    door = MemoryDoor([job("long", prompts=Everything(points_per_side=64), gone=gone)])
    run(door, engine)
    assert door.released == ["long"]
    whole = FakeEngine()
    run(MemoryDoor([job("long", prompts=Everything(points_per_side=64))]), whole)
    assert engine.calls["decode"] < whole.calls["decode"]


def test_a_surprise_of_ours_is_told_apart_from_a_refusal_and_counts_as_one() -> None:
    def broken(result: Result) -> Sequence[Document]:
        raise ZeroDivisionError("odd")

    door = MemoryDoor([job("a")])
    pipeline = run(door, formats=[broken])
    assert isinstance(door.rejected["a"], UnforeseenError)
    assert pipeline.stats.now().reasons == {InputError.code: 1}
