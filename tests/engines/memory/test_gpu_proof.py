"""The memory plan on a GPU of 3.93 GiB: full-resolution masks of a 20-megapixel photo at side 1024.

The tests run on a real GPU, with random weights, where there is one, and on a simulated GPU with
the sizes and estimates of the real architectures. Figures are printed (`pytest -s`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sam_poll.core.protocols import Engine
from sam_poll.core.types import Box, Picture, Prompt, Size
from sam_poll.engines import load, resolve, sam1, sam2
from sam_poll.engines.catalog import MODELS
from sam_poll.engines.memory.adaptive import AdaptiveEngine
from sam_poll.engines.memory.estimate import footprint_of
from sam_poll.engines.memory.plan import MemoryPlan, MemoryStep
from sam_poll.engines.memory.requirements import MemoryRequirements
from sam_poll.imaging import masks
from tests.support.engine_contract import drawn
from tests.support.fake_gpu import Card, CardEngine
from tests.support.networks import on_meta

LIMIT_MIB = int(3.93 * 1024)
CONTEXT_MIB = 450  # upper limit of CUDA's own memory on such a GPU
PHOTO = Size(5184, 3888)
NAMES = ["sam2.1_hiera_tiny", "sam2.1_hiera_large", "sam_vit_h"]
OBJECTS = 50


def objects() -> list[Prompt]:
    """Return boxes all over the photo, in rows of ten."""
    corners = [(100 + 500 * (place % 10), 100 + 740 * (place // 10)) for place in range(OBJECTS)]
    return [Prompt(box=Box(x, y, x + 450, y + 600)) for x, y in corners]


# ── on a simulated GPU ──


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "card",
    [Card(80_000, budget_mib=LIMIT_MIB), Card(LIMIT_MIB, others_mib=CONTEXT_MIB, reserve_mib=256)],
    ids=["large card, limited", "small card"],
)
def test_published_models_run_at_full_side_by_estimate(
    name: str, precision: str, card: Card
) -> None:
    card = Card(card.capacity_mib, card.others_mib, card.reserve_mib, card.budget_mib)
    footprint = footprint_of(on_meta(name))
    engine = CardEngine(card, footprint)
    plan = MemoryPlan(MemoryStep(precision, 64, 8, 1024, "cuda:0"), half="bfloat16")
    adaptive = AdaptiveEngine(engine, plan, needs=MemoryRequirements(footprint), meter=card)
    picture = Picture(np.zeros((8, 8, 3), np.uint8), PHOTO, "photo")
    peaks = []
    for embedding in adaptive.encode([adaptive.prepare(picture)] * 8):
        assert len(adaptive.decode(embedding, objects())) == OBJECTS
        peaks.append(adaptive.info.peak_mib or 0)
    info = adaptive.info
    print(f"{name}: {info.step}: {max(peaks):.0f} MiB of {LIMIT_MIB}")  # noqa: T201
    assert (info.side, info.device, adaptive.ooms) == (1024, "cuda:0", 0)
    assert max(peaks) <= LIMIT_MIB


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_simulated_ladder_answers_on_every_step(name: str) -> None:
    footprint = footprint_of(on_meta(name))
    card = Card(8000)
    engine = CardEngine(card, footprint, truth=0.9)
    plan = MemoryPlan(MemoryStep("float32", 64, 8, 1024, "cuda:0"), half="bfloat16")
    adaptive = AdaptiveEngine(engine, plan, needs=MemoryRequirements(footprint), meter=card)
    picture = Picture(np.zeros((8, 8, 3), np.uint8), PHOTO, "photo")
    seen = []
    for limit_mib in [8000, *range(4000, 0, -40)]:
        card.capacity_mib = limit_mib
        embeddings = adaptive.encode([adaptive.prepare(picture)] * 8)
        assert [len(adaptive.decode(embedding, objects())) for embedding in embeddings] == [
            OBJECTS
        ] * 8
        del embeddings
        if (network := engine.step.network) not in seen:
            seen.append(network)
    print(f"{name}: {seen}, out of memory {adaptive.ooms} times")  # noqa: T201
    assert seen[0] == ("float32", 1024, "cuda:0")
    assert seen[1] == ("bfloat16", 1024, "cuda:0")
    assert seen[-1] == ("float32", 1024, "cpu")
    sides = [side for precision, side, device in seen if device != "cpu"]
    assert sides == sorted(sides, reverse=True)


# ── on a real GPU ──

on_card = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]


def random_checkpoint(name: str, folder: Path) -> tuple[Path, str | None]:
    """Write a checkpoint of a published architecture with random weights."""
    torch.manual_seed(0)
    path, config = folder / f"{name}.pt", MODELS[name].config
    if config:
        model = sam2.build(sam2.read_config(sam2.find_config(config)), config)
    else:
        model = sam1.build(sam1.architecture(on_meta(name).state_dict()))
        for key, weights in model.named_parameters():
            if "pos" in key:  # zeros in a new model, which would hide whether they are used
                weights.data.normal_(std=0.02)
    torch.save({"model": model.state_dict()} if config else model.state_dict(), path)
    return path, config


def photo() -> Picture:
    small = drawn(PHOTO.width // 4, PHOTO.height // 4)
    return Picture(cv2.resize(small, tuple(PHOTO), interpolation=cv2.INTER_CUBIC), PHOTO, "photo")


def full_masks(engine: Engine, embedding: Any) -> int:
    """Return the number of masks at the photo's full resolution."""
    count = 0
    for logits in engine.decode(embedding, objects()):
        mask = masks.mask_of(logits, "x")
        assert logits.frame.size == PHOTO
        assert np.isfinite(logits.pixels).all()
        assert mask.left + mask.pixels.shape[1] <= PHOTO.width
        assert mask.top + mask.pixels.shape[0] <= PHOTO.height
        count += 1
    return count


@pytest.fixture
def unlimited() -> Iterator[None]:
    """Lift the memory limit afterwards."""
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, 0)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore the peaks of other runs."""
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path / "cache"))


def of_card(marks: list[Any]) -> Any:
    def marked(function: Any) -> Any:
        for mark in marks:
            function = mark(function)
        return pytest.mark.usefixtures("unlimited", "own_cache")(function)

    return marked


@of_card(on_card)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["auto", "float32"])
def test_gpu_of_four_gib_segments_a_photo_at_full_resolution(
    name: str, precision: str, tmp_path: Path
) -> None:
    path, config = random_checkpoint(name, tmp_path)
    torch.cuda.empty_cache()
    engine = load(
        resolve(str(path), config=config),
        device="cuda",
        precision=precision,
        budget_mib=LIMIT_MIB,
        reserve_mib=0,
    )
    assert isinstance(engine, AdaptiveEngine)
    torch.cuda.reset_peak_memory_stats()
    source = photo()
    peaks = []
    for embedding in engine.encode([engine.prepare(source)] * 8):
        assert full_masks(engine, embedding) == OBJECTS
        peaks.append(engine.info.peak_mib or 0)
    info = engine.info
    reserved_mib = torch.cuda.max_memory_reserved() / 2**20
    words = (
        f"peak {max(peaks):.0f} MiB, reserved {reserved_mib:.0f} MiB, "
        f"out of memory {engine.ooms} times"
    )
    print(f"{name} {precision}: {info.step}: {words}")  # noqa: T201
    assert (info.side, info.device) == (1024, "cuda:0")
    assert reserved_mib <= LIMIT_MIB
    assert (tmp_path / "cache" / "peaks.json").is_file()
    path.unlink()


@of_card(on_card)
def test_real_ladder_answers_under_ever_smaller_limits(tmp_path: Path) -> None:
    path, config = random_checkpoint("sam2.1_hiera_tiny", tmp_path)
    total_mib = torch.cuda.get_device_properties(0).total_memory / 2**20
    engine = load(
        resolve(str(path), config=config), device="cuda", precision="float32", reserve_mib=0
    )
    assert isinstance(engine, AdaptiveEngine)
    source, devices = photo(), []
    for limit_mib in (
        4000,
        2000,
        1000,
        700,
        500,
        400,
        300,
        250,
        200,
        170,
        140,
        120,
        100,
        80,
        60,
        40,
        20,
    ):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit_mib / total_mib, 0)
        embeddings = engine.encode([engine.prepare(source)] * 3)
        assert [full_masks(engine, embedding) for embedding in embeddings] == [OBJECTS] * 3
        del embeddings
        devices.append(engine.info.device)
        print(f"{limit_mib} MiB: {engine.info.step}, out of memory {engine.ooms} times so far")  # noqa: T201
    assert devices[0] == "cuda:0"
    assert devices[-1] == "cpu"
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
    assert full_masks(engine, engine.encode([engine.prepare(source)])[0]) == OBJECTS
    assert engine.info.device == "cuda:0"


@of_card(on_card)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_estimates_hold_on_a_real_gpu(name: str, precision: str, tmp_path: Path) -> None:
    path, config = random_checkpoint(name, tmp_path)
    spec = resolve(str(path), config=config)
    engine = load(spec, device="cuda", precision=precision, max_batch=4, warmup=True)
    assert isinstance(engine, AdaptiveEngine)
    assert engine._needs
    footprint, source = footprint_of(on_meta(name)), photo()
    for count in (1, 4):
        for embedding in engine.encode([engine.prepare(source)] * count)[:1]:
            engine.decode(embedding, objects())
    for key, measured in sorted(engine._needs.measured.items()):
        estimate = footprint.call_mib(*key)
        print(f"{name} {key}: measured {measured:.0f} MiB, estimated {estimate:.0f}")  # noqa: T201
        assert measured <= 1.3 * estimate + 64  # workspaces of the GPU libraries
    path.unlink()
