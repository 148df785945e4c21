"""The estimates of memory against a count of every tensor that torch makes, without weights: on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from segment_anything import sam_model_registry
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam_poll.engines import attention, sam1, sam2
from sam_poll.engines.base import Features
from sam_poll.engines.catalog import MODELS
from sam_poll.engines.estimate import MARGIN_MIB, MIB, footprint_of
from sam_poll.engines.memory import Step
from sam_poll.types import Box, Prompt, Size
from tests.test_engines import SMALL_SAM1


class Counted(TorchDispatchMode):
    """Bytes of the tensors made within it: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and (key := (storage := tensor.untyped_storage())._cdata) not in self._known
            ):
                self._known[key] = storage.nbytes()
                self.alive += storage.nbytes()
                self.peak = max(self.peak, self.alive)
                weakref.finalize(storage, self._drop, key)
        return made

    def _drop(self, key: int) -> None:
        self.alive -= self._known.pop(key, 0)


def on_meta(name: str) -> Any:
    """A published architecture without weights."""
    if name.startswith("sam_"):
        with torch.device("meta"):
            model = sam_model_registry[name.removeprefix("sam_")]()
        attention.install(model.image_encoder)
        return model.eval()
    config = str(MODELS[name].config)
    return sam2.build(sam2.read_config(sam2.find_config(config)), config).to("meta").eval()


def encoder_of(model: Any) -> Callable[[torch.Tensor], Any]:
    return model.forward_image if hasattr(model, "forward_image") else model.image_encoder


@pytest.fixture(scope="module", params=["sam2.1_hiera_tiny", "sam2.1_hiera_base_plus", "sam_vit_b", "sam_vit_h"])
def model(request: pytest.FixtureRequest) -> Any:
    return on_meta(request.param)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_an_encodes_estimate_is_what_its_tensors_take(model: Any, batch: int) -> None:
    with torch.inference_mode(), Counted() as counted:
        made = encoder_of(model)(torch.empty(batch, 3, 1024, 1024, device="meta"))
    del made
    estimate = footprint_of(model).call_mib("encode", "float32", 1024, batch) - MARGIN_MIB
    assert counted.peak / MIB <= estimate * 1.01
    assert estimate <= counted.peak / MIB * 1.25


@pytest.mark.parametrize("side", [256, 512, 768])
def test_an_encodes_estimate_follows_the_side(side: int) -> None:
    small = on_meta("sam2.1_hiera_tiny")
    small.image_size = side
    with torch.inference_mode(), Counted() as counted:
        made = encoder_of(small)(torch.empty(4, 3, side, side, device="meta"))
    del made
    estimate = footprint_of(small).call_mib("encode", "float32", side, 4) - MARGIN_MIB
    assert 0.8 * estimate <= counted.peak / MIB <= estimate * 1.01


def demo_engine() -> sam2.Sam2Engine:
    spec = "demo"
    from sam_poll.engines import resolve

    config = str(resolve(spec).config)
    return sam2.Sam2Engine(sam2.build(sam2.read_config(sam2.find_config(config)), config))


@pytest.mark.parametrize("make", [demo_engine, lambda: sam1.Sam1Engine(sam1.build(SMALL_SAM1))], ids=["sam2", "sam1"])
@pytest.mark.parametrize("count", [1, 8])
def test_a_decodes_estimate_is_what_its_tensors_take(make: Callable[[], Any], count: int) -> None:
    engine, side = make(), 512
    engine.apply(Step("float32", count, 1, side, "cpu"))
    width, grid = footprint_of(engine.model).width, side // 16
    levels = (torch.randn(1, width // 8, 4 * grid, 4 * grid), torch.randn(1, width // 4, 2 * grid, 2 * grid))
    features = Features(
        engine.frame_for(Size(400, 300), side), torch.randn(1, width, grid, grid), levels * (engine.family == "sam2")
    )
    prompts = [Prompt(box=Box(10, 10, 200 + place, 200)) for place in range(count)]
    engine.decode(features, prompts)
    with Counted() as counted:
        engine.decode(features, prompts)
    estimate = footprint_of(engine.model).call_mib("decode", "float32", side, count) - MARGIN_MIB
    assert counted.peak / MIB == pytest.approx(estimate, rel=0.25)


@pytest.mark.parametrize(
    ("name", "float32_mib", "half_mib"),
    [("sam2.1_hiera_tiny", 121, 69), ("sam2.1_hiera_large", 828, 423), ("sam_vit_h", 2446, 1231)],
)
def test_weights_are_counted_exactly(name: str, float32_mib: int, half_mib: int) -> None:
    footprint = footprint_of(on_meta(name))
    assert footprint.weights_mib("float32") == pytest.approx(float32_mib, abs=1)
    assert footprint.weights_mib("bfloat16") == pytest.approx(half_mib, abs=1)


def test_half_precision_takes_less_but_not_half_of_the_activations() -> None:
    footprint = footprint_of(on_meta("sam2.1_hiera_tiny"))
    for call in ("encode", "decode"):
        full, half = (footprint.call_mib(call, precision, 1024, 8) for precision in ("float32", "float16"))
        assert full / 2 < half < full
