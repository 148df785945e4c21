"""Out-of-memory errors at each place of the device thread, with real networks.

The answer must be the same as without the error. The networks run on the CPU under torch's name
`cpu:0`, which the plan takes for a GPU, with a simulated meter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sam_poll.core.errors import DeviceError
from sam_poll.core.types import Box, Picture, Point, Prompt, Size
from sam_poll.engines import loader
from sam_poll.engines.base import TorchEngine
from sam_poll.engines.memory.adaptive import AdaptiveEngine
from sam_poll.engines.memory.plan import MemoryPlan, MemoryStep
from sam_poll.imaging import masks as geometry
from tests.support.engine_contract import drawn
from tests.support.failing_engine import FIRST, Failing, full, on_card
from tests.support.failing_engine import engine as engine
from tests.support.fake_gpu import Card

SIZE = Size(300, 200)
PICTURES = [Picture(drawn(*SIZE, seed=seed), SIZE, str(seed)) for seed in range(3)]
PROMPTS = [
    *(Prompt(box=Box(40 + 5 * place, 30, 200, 150 + 3 * place)) for place in range(5)),
    Prompt(points=(Point(150, 100),)),
    Prompt(points=(Point(150, 100), Point(10, 10, 0))),
]


def masks(engine: Any) -> list[np.ndarray]:
    """Return the masks of all pictures for all prompts, at full size."""
    embeddings = engine.encode([engine.prepare(picture) for picture in PICTURES])
    return [
        geometry.paste(geometry.mask_of(logits, "x"), SIZE)
        for embedding in embeddings
        for logits in engine.decode(embedding, PROMPTS)
    ]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], part: float = 1e-4) -> None:
    """Compare masks; another order of summation may change a pixel whose logit is close to zero."""
    assert len(found) == len(expected) == len(PICTURES) * len(PROMPTS)
    for one, other in zip(found, expected, strict=True):
        assert (one != other).mean() <= part


PLACES: dict[str, tuple[Callable[[TorchEngine], Any], str, bool]] = {
    "upload": (lambda engine: engine, "_upload", False),
    "normalising": (lambda engine: engine, "_square", True),
    "encoder": (lambda engine: engine, "_encode", True),
    "moving an embedding": (lambda engine: engine, "_on_device", False),
    "prompts to the device": (lambda engine: engine, "_prompt_batch", False),
    "prompt encoder": (lambda engine: engine, "_sparse", True),
    "decoder": (lambda engine: engine, "_masks", True),
    "logits back": (lambda _: torch.Tensor, "cpu", False),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("metered", [True, False])
def test_out_of_memory_anywhere_gives_the_same_answer(
    place: str, metered: bool, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptive = (
        on_card(engine)
        if metered
        else AdaptiveEngine(engine, MemoryPlan(replace(FIRST, device="cpu")))
    )
    expected = masks(adaptive)
    owner_of, name, after = PLACES[place]
    failing = Failing(monkeypatch, owner_of(engine), name, times=2, after=after)
    assert_same(masks(adaptive), expected)
    assert failing.left == 0
    assert adaptive.ooms == 2
    assert engine.step.side == 256  # smaller calls were enough


@pytest.mark.slow
def test_weights_that_cannot_be_moved_run_on_the_host(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = masks(on_card(engine))
    engine.apply(MemoryStep("float32", 1, 1, 256, "cpu"))
    real = type(engine.model).to

    def to(self: Any, *args: Any, **keywords: Any) -> Any:
        return (
            full() if args and args[0] == torch.device("cpu:0") else real(self, *args, **keywords)
        )

    monkeypatch.setattr(type(engine.model), "to", to)
    adaptive = on_card(engine)
    assert (adaptive.info.device, adaptive.info.side) == ("cpu", 256)
    assert_same(masks(adaptive), expected)
    monkeypatch.undo()
    for _ in range(60):  # until the failed step is retried
        adaptive.encode([adaptive.prepare(PICTURES[0])])
    assert adaptive.info.device == "cpu:0"
    assert_same(masks(adaptive), expected)


def test_change_of_step_that_fails_leaves_no_rounded_weights(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the encoder is in half precision when memory runs out; float32 comes next."""
    adaptive = on_card(engine, half="bfloat16")
    expected = masks(adaptive)
    real = engine._set_weights

    def halfway(dtype: torch.dtype) -> None:
        next(engine.model.image_encoder.children()).to(dtype)
        full()

    monkeypatch.setattr(engine, "_set_weights", halfway)
    with pytest.raises(torch.OutOfMemoryError):
        engine.apply(replace(FIRST, precision="bfloat16"))
    monkeypatch.setattr(engine, "_set_weights", real)
    engine.apply(FIRST)
    assert_same(masks(adaptive), expected, part=0)


@pytest.mark.slow
def test_step_up_out_of_memory_costs_no_answer_and_succeeds_later(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(9000)
    adaptive = on_card(engine, card, half="bfloat16")
    expected = masks(adaptive)
    with monkeypatch.context() as patch:
        Failing(patch, engine, "_encode", times=1)
        adaptive.encode([adaptive.prepare(PICTURES[0])])
    assert adaptive.info.precision == "bfloat16"
    card.capacity_mib *= 2  # more than the insufficient memory
    failing = Failing(monkeypatch, engine, "_restore", times=1)
    assert len(masks(adaptive)) == len(expected)
    assert failing.left == 0
    assert adaptive.info.precision == "bfloat16"
    card.capacity_mib *= 2
    for _ in range(12):
        adaptive.encode([adaptive.prepare(PICTURES[0])])
    assert adaptive.info.precision == "float32"
    assert_same(masks(adaptive), expected, part=0)


def test_warm_up_out_of_memory_does_not_fail_the_load(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptive = on_card(engine)
    failing = Failing(monkeypatch, engine, "_encode", times=2, after=True)
    loader.warm_up(adaptive, pictures=4)
    assert failing.left == 0
    assert engine.step.at_once("encode") == 1


@pytest.mark.parametrize("place", ["upload", "encoder", "decoder", "logits back"])
def test_kernel_fault_anywhere_is_a_device_error(
    place: str, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptive = on_card(engine)

    def fault(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    owner_of, name, _ = PLACES[place]
    monkeypatch.setattr(owner_of(engine), name, fault)
    with pytest.raises(DeviceError, match="illegal memory access"):
        masks(adaptive)
    assert adaptive.ooms == 0


# ── batches ──


def test_masks_are_the_same_batched_or_not(engine: TorchEngine) -> None:
    together = masks(on_card(engine))
    engine.apply(replace(FIRST, batch=1, prompts_per_call=1))
    assert_same(masks(engine), together)


def test_embedding_does_not_hold_its_batch(engine: TorchEngine) -> None:
    engine.apply(FIRST)
    embeddings: list[Any] = list(engine.encode([engine.prepare(picture) for picture in PICTURES]))
    for embedding in embeddings:
        for tensor in (embedding.image, *embedding.high_res):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
