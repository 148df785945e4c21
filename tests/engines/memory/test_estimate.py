"""Memory estimates, compared with a count of every tensor on torch's meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam_poll.core.types import Box, Prompt, Size
from sam_poll.engines import edgetam, sam1, sam2, sam_hq
from sam_poll.engines.base import Features
from sam_poll.engines.memory.estimate import MARGIN_MIB, MIB, footprint_of
from sam_poll.engines.memory.plan import MemoryStep
from tests.support.networks import SMALL_SAM1, on_meta, small_sam_hq
from tests.support.networks import model as model


class Counted(TorchDispatchMode):
    """A context that counts the bytes of tensors: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
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


def encoder_of(model: Any) -> Callable[[torch.Tensor], Any]:
    if hasattr(model, "vision_encoder"):
        return model.vision_encoder
    return model.forward_image if hasattr(model, "forward_image") else model.image_encoder


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_estimate_of_an_encode_equals_its_tensors(model: Any, batch: int) -> None:
    with torch.inference_mode(), Counted() as counted:
        made = encoder_of(model)(torch.empty(batch, 3, 1024, 1024, device="meta"))
    del made
    estimate = footprint_of(model).call_mib("encode", "float32", 1024, batch) - MARGIN_MIB
    assert counted.peak / MIB <= estimate * 1.01
    assert estimate <= counted.peak / MIB * 1.25


@pytest.mark.parametrize("side", [256, 512, 768])
def test_estimate_of_an_encode_follows_the_side(side: int) -> None:
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


@pytest.mark.parametrize(
    "make",
    [
        demo_engine,
        lambda: sam1.Sam1Engine(sam1.build(SMALL_SAM1)),
        lambda: sam_hq.SamHqEngine(small_sam_hq(128)),
        lambda: edgetam.EdgeTamEngine(edgetam.build(edgetam.published_config(512))),
    ],
    ids=["sam2", "sam1", "sam-hq", "edgetam"],
)
@pytest.mark.parametrize("count", [1, 8])
def test_estimate_of_a_decode_equals_its_tensors(make: Callable[[], Any], count: int) -> None:
    engine, side = make(), 512
    engine.apply(MemoryStep("float32", count, 1, side, "cpu"))
    width, grid = footprint_of(engine.model).width, side // 16
    levels = (
        torch.randn(1, width // 8, 4 * grid, 4 * grid),
        torch.randn(1, width // 4, 2 * grid, 2 * grid),
    )
    features = Features(
        engine.frame_for(Size(400, 300), side),
        torch.randn(1, width, grid, grid),
        {"sam2": levels, "edgetam": levels, "sam-hq": levels[:1]}.get(engine.family, ()),
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
def test_estimate_counts_weights_exactly(name: str, float32_mib: int, half_mib: int) -> None:
    footprint = footprint_of(on_meta(name))
    assert footprint.weights_mib("float32") == pytest.approx(float32_mib, abs=1)
    assert footprint.weights_mib("bfloat16") == pytest.approx(half_mib, abs=1)


def test_estimate_in_half_precision_is_less_but_not_half() -> None:
    footprint = footprint_of(on_meta("sam2.1_hiera_tiny"))
    for call in ("encode", "decode"):
        full, half = (
            footprint.call_mib(call, precision, 1024, 8) for precision in ("float32", "float16")
        )
        assert full / 2 < half < full


# ── SAM 3 ──


def sam3_network(side: int, layers: int = 1) -> Any:
    """SAM 3 at its published widths, with few layers, for a side."""
    from transformers import Sam3Config, Sam3Model, Sam3TrackerConfig, Sam3TrackerModel

    from sam_poll.engines import sam3

    grid = side // 14
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": {
            "model_type": "sam3_vit_model",
            "num_hidden_layers": layers,
            "image_size": side,
            "global_attn_indexes": [0],
        },
        "backbone_feature_sizes": [[grid * 4] * 2, [grid * 2] * 2, [grid] * 2],
    }
    text = {"model_type": "clip_text_model", "hidden_size": 1024, "num_hidden_layers": layers}
    few = {"num_layers": layers}
    detector = Sam3Config(
        vision_config=vision,
        text_config={**text, "vocab_size": 514, "max_position_embeddings": 32},
        geometry_encoder_config=few,
        detr_encoder_config=few,
        detr_decoder_config=few,
    )
    prompts = {"image_size": side}
    tracker = Sam3TrackerConfig(vision_config=vision, prompt_encoder_config=prompts)
    pictures = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = SimpleNamespace(tokenizer=None, image_processor=pictures)
    models = (Sam3Model(detector).eval(), Sam3TrackerModel(tracker).eval())
    return sam3.Sam3Network(*models, processor).eval()


@pytest.mark.parametrize("batch", [1, 4])
def test_estimate_of_sam3_encoding_equals_its_tensors(batch: int) -> None:
    with torch.device("meta"):
        network = sam3_network(1008)
    with torch.inference_mode(), Counted() as counted:
        made = network.image_encoder(torch.empty(batch, 3, 1008, 1008, device="meta"))
    footprint = footprint_of(network)
    estimate = footprint.call_mib("encode", "float32", 1008, batch) - MARGIN_MIB
    assert counted.peak / MIB == pytest.approx(estimate, rel=0.05)
    kept = sum(level.nbytes for level in (made[0], *made[1])) / MIB
    assert kept == pytest.approx(batch * footprint.embedding_mib("float32", 1008), rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_estimate_of_sam3_finding_texts_equals_its_tensors(count: int) -> None:
    from sam_poll.engines import sam3

    engine = sam3.Sam3Engine(sam3_network(448))
    engine.step = MemoryStep("float32", count, 1, 448, "cpu")
    text = sam3.TextFeatures(torch.randn(1, 32, 256), torch.ones(1, 32, dtype=torch.int64))
    texts = [f"text {number}" for number in range(count)]
    engine._texts.update(dict.fromkeys(texts, text))
    grid = 448 // 14
    levels = tuple(torch.randn(1, 256, scale * grid, scale * grid) for scale in (4, 2, 1))
    frame = engine.frame_for(Size(400, 300), 448)
    features = Features(frame, torch.randn(1, 256, grid, grid), levels)
    with Counted() as counted:
        engine.find(features, texts, (), threshold=1.0, most=1)
    estimate = footprint_of(engine.model).call_mib("find", "float32", 448, count) - MARGIN_MIB
    assert counted.peak / MIB == pytest.approx(estimate, rel=0.25)
