"""Small networks on a simulated GPU, with out-of-memory errors on demand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sam_poll.engines import checkpoint, resolve, sam1, sam2
from sam_poll.engines.base import TorchEngine
from sam_poll.engines.memory.adaptive import AdaptiveEngine
from sam_poll.engines.memory.estimate import footprint_of
from sam_poll.engines.memory.plan import MemoryPlan, MemoryStep
from sam_poll.engines.memory.requirements import MemoryRequirements
from tests.support.fake_gpu import Card
from tests.support.networks import SMALL_SAM1

FIRST = MemoryStep("float32", 8, 4, 256, "cpu:0")


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
    needs = MemoryRequirements(footprint_of(engine.model))
    return AdaptiveEngine(
        engine, MemoryPlan(FIRST, **options), needs=needs, meter=card or Card(9000)
    )


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Failing:
    """Makes `owner.name` run out of memory in its first `times` calls, before or after its work."""

    def __init__(
        self, patch: pytest.MonkeyPatch, owner: Any, name: str, times: int, after: bool = False
    ) -> None:
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
