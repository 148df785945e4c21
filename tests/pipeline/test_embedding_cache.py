"""Kept embeddings: a picture is encoded once, as long as there is room for what came of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.core.protocols import Embedding
from sam_poll.core.types import InputTransform, Job, ModelInput, Prompt, Result, Size
from sam_poll.engines.fake import FakeEmbedding, FakeEngine
from sam_poll.imaging import decode as images
from sam_poll.pipeline.embedding_cache import EmbeddingCache
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.pipelines import ONE, MemorySource, run

FRAME = InputTransform(Size(4, 4), 4, Size(4, 4), two_step=False)


@given(
    st.integers(0, 5000), st.lists(st.tuples(st.integers(0, 9), st.integers(1, 2000)), max_size=60)
)
def test_the_cache_keeps_no_more_than_its_limit_but_always_the_last_embedding(
    limit: int, puts: list[tuple[int, int]]
) -> None:
    kept = EmbeddingCache(limit)
    for number, nbytes in puts:
        made = FakeEmbedding(FRAME, str(number), nbytes)
        kept.put((str(number), 4), made)
        found = kept.get((str(number), 4))
        assert found
        assert found.embedding is made
        there = [found.embedding for n in range(10) if (found := kept.get((str(n), 4)))]
        assert sum(found.nbytes for found in there) <= limit or there == [made]


def test_the_least_recently_used_embedding_is_dropped_first() -> None:
    kept = EmbeddingCache(3000)
    for name in "abc":
        kept.put((name, 4), FakeEmbedding(FRAME, name, 1000))
    kept.get(("a", 4))
    kept.put(("d", 4), FakeEmbedding(FRAME, "d", 1000))
    assert [name for name in "abcd" if kept.get((name, 4))] == ["a", "c", "d"]


def test_evict_frees_the_whole_room_and_returns_whether_there_was_anything() -> None:
    kept = EmbeddingCache(2000)
    assert not kept.evict()
    kept.put(("a", 4), FakeEmbedding(FRAME, "a", 1500))
    assert kept.evict()
    assert kept.get(("a", 4)) is None
    kept.put(("b", 4), FakeEmbedding(FRAME, "b", 1500))
    kept.put(("c", 4), FakeEmbedding(FRAME, "c", 400))
    assert kept.get(("b", 4))


def test_a_prompt_that_comes_after_its_picture_is_done_costs_no_second_encoding(
    share: Share,
) -> None:
    engine = FakeEngine()
    with Daemon(share, engine, settle_s=0.0, rescan_s=0.1, lone_s=0.0, mode="poll") as daemon:
        share.pair("dog")
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)
        share.drop("dog.ear.json", BOX)
        wait_until(lambda: daemon.pipeline.stats.now().answered == 2)
    assert share.tree("output") == ["dog.ear.mask.png", "dog.mask.png"]
    assert len(engine.encoded) == 1


class Patient(MemorySource):
    """Hands out a job when the one before it is answered."""

    def jobs(self, stop: threading.Event) -> Iterator[Job]:
        for waiting in self.waiting:
            yield waiting
            wait_until(lambda: waiting.id in self.delivered)  # noqa: B023  asked before the next turn


def test_a_cached_picture_is_not_decoded_again_and_its_answer_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode, decoded = images.decode, list[str]()
    monkeypatch.setattr(
        images, "decode", lambda *data, **more: decoded.append("") or decode(*data, **more)
    )
    deep = np.random.default_rng(0).integers(0, 60000, (48, 64), np.uint16)
    body = cv2.imencode(".png", deep)[
        1
    ].tobytes()  # 16 bits, of which a result has something to say
    found: dict[bool, list[Result]] = {True: [], False: []}
    for pixels, results in found.items():
        source = Patient([Job(f"j{n}", "deep.png", body, ONE) for n in range(3)])
        run(source, FakeEngine(), pixels=pixels, on_result=results.append)
        assert len(decoded) == (3 if pixels else 3 + 1)
    assert "16-bit" in found[True][0].notes[0]
    for decoded_anew, known in zip(*found.values(), strict=True):
        for what in ("job_id", "size", "notes", "prompts", "model"):
            assert getattr(decoded_anew, what) == getattr(known, what)
        assert np.array_equal(decoded_anew.masks[0].pixels, known.masks[0].pixels)


class Shrinking(FakeEngine):
    """Encodes at the side it has when it is asked; its memory is short the first time."""

    def __init__(self, sides: Iterator[int]) -> None:
        super().__init__()
        self.sides, self.decoded = sides, list[int]()

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        self.step = replace(self.step, side=next(self.sides))
        self._count("encode")
        frames = [
            replace(p.frame, side=self.step.side, region=Size(self.step.side, self.step.side))
            for p in pictures
        ]
        return [FakeEmbedding(frame, p.digest) for frame, p in zip(frames, pictures, strict=True)]

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Any]:
        self.decoded.append(embedding.frame.side)
        return super().decode(embedding, prompts)


@pytest.mark.parametrize("pixels", [True, False])
def test_an_embedding_of_a_smaller_side_is_not_used_when_memory_is_back(
    pixels: bool,
) -> None:
    engine = Shrinking(iter([128, 256]))

    class Recovering(Patient):
        def jobs(self, stop: threading.Event) -> Iterator[Job]:
            for number, waiting in enumerate(super().jobs(stop)):
                engine.step = replace(engine.step, side=[256, 128, 256, 256, 128][number])
                yield waiting

    body = picture_bytes(".png", 300, 300)
    results: list[Result] = []
    source = Recovering([Job(f"j{n}", "dog.png", body, ONE) for n in range(5)])
    run(source, engine, pixels=pixels, on_result=results.append)
    assert engine.decoded == [128, 128, 256, 256, 128]
    assert [result.model.side for result in results] == engine.decoded
    assert engine.calls["encode"] == 2
