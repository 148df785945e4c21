"""Out of memory at each place of the device thread, with real networks: the job is answered as if nothing had been.

The networks run on the CPU, which torch also knows as `cpu:0`: to the plan that is a card, with a told meter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sam_poll import geometry
from sam_poll.engines import checkpoint, loader, resolve, sam1, sam2
from sam_poll.engines.adaptive import AdaptiveEngine
from sam_poll.engines.base import TorchEngine
from sam_poll.engines.estimate import footprint_of
from sam_poll.engines.memory import Plan, Step
from sam_poll.engines.needs import Needs
from sam_poll.errors import DeviceError
from sam_poll.types import Box, Picture, Point, Prompt, Size
from tests.engine_contract import drawn
from tests.fake_card import Card
from tests.test_engines import SMALL_SAM1

FIRST = Step("float32", 8, 4, 256, "cpu:0")
SIZE = Size(300, 200)
PICTURES = [Picture(drawn(*SIZE, seed=seed), SIZE, str(seed)) for seed in range(3)]
PROMPTS = [
    *(Prompt(box=Box(40 + 5 * place, 30, 200, 150 + 3 * place)) for place in range(5)),
    Prompt(points=(Point(150, 100),)),
    Prompt(points=(Point(150, 100), Point(10, 10, 0))),
]


def demo() -> TorchEngine:
    spec = resolve("demo")
    path = spec.checkpoint
    assert path
    weights = checkpoint.read(path)
    model = sam2.build(sam2.read_config(sam2.find_config(str(spec.config))), "demo")
    checkpoint.fill(model, weights, place="demo", config="demo")
    return sam2.Sam2Engine(model, weights=lambda: checkpoint.read(path))


def small_sam1() -> TorchEngine:
    torch.manual_seed(3)
    model = sam1.build({**SMALL_SAM1, "img_size": 256})
    model.image_encoder.pos_embed.data.normal_()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return sam1.Sam1Engine(model, weights=lambda: weights)


@pytest.fixture(params=[demo, small_sam1], ids=["sam2", "sam1"])
def engine(request: pytest.FixtureRequest) -> TorchEngine:
    return request.param()


def on_card(engine: TorchEngine, card: Card | None = None, **options: Any) -> AdaptiveEngine:
    needs = Needs(footprint_of(engine.model))
    return AdaptiveEngine(engine, Plan(FIRST, **options), needs=needs, meter=card or Card(9000))


def masks(engine: Any) -> list[np.ndarray]:
    """All pictures' masks for all prompts, at full size."""
    embeddings = engine.encode([engine.prepare(picture) for picture in PICTURES])
    return [
        geometry.paste(geometry.mask_of(logits, "x"), SIZE)
        for embedding in embeddings
        for logits in engine.decode(embedding, PROMPTS)
    ]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], part: float = 1e-4) -> None:
    """Sums in another order may turn a pixel whose logit is close to zero."""
    assert len(found) == len(expected) == len(PICTURES) * len(PROMPTS)
    for one, other in zip(found, expected, strict=True):
        assert (one != other).mean() <= part


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Failing:
    """Replaces `owner.name`, which runs out of memory the first `times` times, before or after its work."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, times: int, after: bool = False) -> None:
        self.left = times
        real = getattr(owner, name)

        def guarded(*args: Any, **keywords: Any) -> Any:
            if self.left and not after:
                self.left -= 1
                full()
            made = real(*args, **keywords)
            if self.left:
                self.left -= 1
                full()
            return made

        patch.setattr(owner, name, guarded)


PLACES: dict[str, tuple[Callable[[TorchEngine], Any], str, bool]] = {
    "upload": (lambda engine: engine, "_upload", False),
    "normalising": (lambda engine: engine, "_square", True),
    "encoder": (lambda engine: engine, "_encode", True),
    "moving an embedding": (lambda engine: engine, "_here", False),
    "prompts to the device": (lambda engine: engine, "_prompt_batch", False),
    "prompt encoder": (lambda engine: engine, "_sparse", True),
    "decoder": (lambda engine: engine, "_masks", True),
    "logits back": (lambda _: torch.Tensor, "cpu", False),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("metered", [True, False])
def test_out_of_memory_anywhere_is_answered_as_if_nothing_had_been(
    place: str, metered: bool, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptive = on_card(engine) if metered else AdaptiveEngine(engine, Plan(replace(FIRST, device="cpu")))
    expected = masks(adaptive)
    owner_of, name, after = PLACES[place]
    failing = Failing(monkeypatch, owner_of(engine), name, times=2, after=after)
    assert_same(masks(adaptive), expected)
    assert failing.left == 0
    assert adaptive.ooms == 2
    assert engine.step.side == 256  # less at once was enough


def test_weights_that_do_not_get_to_the_card_run_on_the_host(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = masks(on_card(engine))
    engine.apply(Step("float32", 1, 1, 256, "cpu"))
    real = type(engine.model).to

    def to(self: Any, *args: Any, **keywords: Any) -> Any:
        return full() if args and args[0] == torch.device("cpu:0") else real(self, *args, **keywords)

    monkeypatch.setattr(type(engine.model), "to", to)
    adaptive = on_card(engine)
    assert (adaptive.info.device, adaptive.info.side) == ("cpu", 256)
    assert_same(masks(adaptive), expected)
    monkeypatch.undo()
    for _ in range(60):  # what failed is tried again
        adaptive.encode([adaptive.prepare(PICTURES[0])])
    assert adaptive.info.device == "cpu:0"
    assert_same(masks(adaptive), expected)


def test_a_change_that_fails_in_the_middle_leaves_no_rounded_weights_behind(
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


def test_stepping_up_out_of_memory_costs_no_answer_and_succeeds_later(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(9000)
    adaptive = on_card(engine, card, half="bfloat16")
    expected = masks(adaptive)
    with monkeypatch.context() as patch:
        Failing(patch, engine, "_encode", times=1)
        adaptive.encode([adaptive.prepare(PICTURES[0])])
    assert adaptive.info.precision == "bfloat16"
    card.capacity_mib *= 2  # more than what was not enough
    failing = Failing(monkeypatch, engine, "_restore", times=1)
    assert len(masks(adaptive)) == len(expected)
    assert failing.left == 0
    assert adaptive.info.precision == "bfloat16"
    card.capacity_mib *= 2
    for _ in range(12):
        adaptive.encode([adaptive.prepare(PICTURES[0])])
    assert adaptive.info.precision == "float32"
    assert_same(masks(adaptive), expected, part=0)


def test_out_of_memory_in_the_warm_up_is_no_failure_to_load(
    engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    adaptive = on_card(engine)
    failing = Failing(monkeypatch, engine, "_encode", times=2, after=True)
    loader.warm_up(adaptive, pictures=4)
    assert failing.left == 0
    assert engine.step.at_once("encode") == 1


@pytest.mark.parametrize("place", ["upload", "encoder", "decoder", "logits back"])
def test_a_kernel_fault_anywhere_is_a_device_error(
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


# -- batches -----------------------------------------------------------------------------------------------------------


def test_masks_are_the_same_batched_or_not(engine: TorchEngine) -> None:
    together = masks(on_card(engine))
    engine.apply(replace(FIRST, batch=1, prompts_per_call=1))
    assert_same(masks(engine), together)


def test_an_embedding_that_is_kept_does_not_hold_its_batch(engine: TorchEngine) -> None:
    engine.apply(FIRST)
    embeddings: list[Any] = list(engine.encode([engine.prepare(picture) for picture in PICTURES]))
    for embedding in embeddings:
        for tensor in (embedding.image, *embedding.high_res):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
