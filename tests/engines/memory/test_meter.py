"""The memory plan with a meter, on a simulated GPU: choice by free memory, failures, recovery."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_poll.core.errors import DeviceError, DeviceOutOfMemoryError
from sam_poll.core.types import Box, Logits, Picture, Prompt, Size
from sam_poll.engines import devices, load, loader, resolve
from sam_poll.engines.memory.adaptive import AdaptiveEngine
from sam_poll.engines.memory.estimate import Footprint
from sam_poll.engines.memory.meter import MIB, CudaMeter, Reading
from sam_poll.engines.memory.plan import MemoryPlan, MemoryStep, cpu_step
from sam_poll.engines.memory.requirements import MemoryRequirements
from tests.support.fake_gpu import Card, CardEngine, OutOfMemoryError

# The footprints of published networks, as test_estimate.py computes them.
TINY = Footprint(27_219_136, 4_436_450, 69.0, 0.0, 256, 4)
LARGE = Footprint(212_703_280, 4_436_450, 102.0, 0.0, 256, 4)
VIT_H = Footprint(637_026_048, 4_064_560, 58.0, 128.0, 256, 1)

PICTURE = Picture(np.zeros((48, 64, 3), np.uint8), Size(64, 48), "a")
BOX = Prompt(box=Box(10, 10, 50, 40))
FIRST = MemoryStep("bfloat16", 64, 8, 1024, "cuda:0")


def on(
    card: Card, footprint: Footprint, first: MemoryStep = FIRST, **options: Any
) -> tuple[AdaptiveEngine, CardEngine, MemoryRequirements]:
    """Return an engine on a GPU; `truth` is the real need as a multiple of the estimate."""
    engine = CardEngine(card, footprint, truth=options.pop("truth", 1.0))
    needs = MemoryRequirements(
        footprint, options.pop("measured", None), patience=options.pop("patience", 50)
    )
    plan = MemoryPlan(first, half=options.pop("half", "bfloat16"), **options.pop("plan", {}))
    return AdaptiveEngine(engine, plan, needs=needs, meter=card, **options), engine, needs


def asked(adaptive: AdaptiveEngine, pictures: int = 1, prompts: int = 1) -> list[list[Logits]]:
    embeddings = adaptive.encode([adaptive.prepare(PICTURE)] * pictures)
    return [adaptive.decode(embedding, [BOX] * prompts) for embedding in embeddings]


# ── the step at the start ──


def test_model_too_large_in_float32_starts_in_half_precision() -> None:
    _, engine, _ = on(Card(2000), VIT_H, replace(FIRST, precision="float32"))
    assert [step.precision for step in engine.taken] == ["bfloat16"]


def test_model_whose_float32_weights_leave_no_memory_starts_in_half_precision() -> None:
    card = Card(VIT_H.weights_mib("float32") + 100)
    _, engine, _ = on(card, VIT_H, replace(FIRST, precision="float32"))
    assert [step.precision for step in engine.taken] == ["bfloat16"]


def test_model_whose_weights_never_fit_stays_on_the_cpu() -> None:
    card = Card(1000)
    adaptive, engine, _ = on(card, VIT_H)
    assert engine.taken == [cpu_step(1024)]
    assert card.held_mib == 0
    assert adaptive.ooms == 0
    assert len(asked(adaptive)) == 1


def test_model_that_fits_keeps_the_first_step() -> None:
    adaptive, engine, _ = on(Card(80_000), VIT_H, replace(FIRST, precision="float32"))
    asked(adaptive, 8, 64)
    assert engine.taken == [replace(FIRST, precision="float32")]
    assert adaptive.ooms == 0
    assert engine.step == adaptive.plan.first


def test_estimate_alone_does_not_reduce_the_side() -> None:
    """Half of the estimate is free, and half is needed: the step is tried and works."""
    room = LARGE.call_mib("encode", "bfloat16", 1024, 1) / 2
    adaptive, engine, _ = on(Card(LARGE.weights_mib("bfloat16") + room + 20), LARGE, truth=0.45)
    asked(adaptive)
    assert (engine.step.side, engine.step.device) == (1024, "cuda:0")


def test_stored_peak_counts_at_the_start() -> None:
    measured = {("encode", "bfloat16", 1024, 1): 900.0}
    adaptive, engine, _ = on(Card(LARGE.weights_mib("bfloat16") + 700), LARGE, measured=measured)
    assert engine.taken[0].side == 768
    asked(adaptive)
    assert adaptive.ooms == 0


# ── the size of a call ──


def test_calls_hold_as_many_pictures_and_prompts_as_fit() -> None:
    room = TINY.call_mib("encode", "bfloat16", 1024, 4) * 1.1 + 200
    adaptive, engine, _ = on(Card(TINY.weights_mib("bfloat16") + room), TINY)
    asked(adaptive, 8, 64)
    assert adaptive.ooms == 0
    assert engine.step.batch == 8  # a decode chose prompts only
    adaptive.encode([adaptive.prepare(PICTURE)] * 8)
    assert engine.step.batch == 4
    assert adaptive.plan.step == FIRST


def test_meter_is_read_once_per_call_while_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card, asked_for = Card(4024), list[str]()
    adaptive, _, _ = on(card, TINY)
    asked(adaptive, 8, 64)
    read = card.read
    monkeypatch.setattr(card, "read", lambda: asked_for.append("") or read())
    embeddings = adaptive.encode([adaptive.prepare(PICTURE)] * 8)
    assert len(asked_for) == 1
    for embedding in embeddings:
        adaptive.decode(embedding, [BOX] * 64)
    assert len(asked_for) == 1 + 8


def test_calls_shrink_and_grow_with_the_memory_of_other_processes() -> None:
    card = Card(4000)
    adaptive, engine, _ = on(card, LARGE)
    prepared = [adaptive.prepare(PICTURE)] * 8
    sizes = []
    for others in (0, 2500, 0):
        card.others_mib = others
        adaptive.encode(prepared)
        sizes.append(engine.step.batch)
    assert sizes[0] == sizes[2] == 8
    assert sizes[1] < 8
    assert adaptive.ooms == 0


def test_calls_respect_reserve_and_budget() -> None:
    for limits in ({"reserve_mib": 3000.0}, {"budget_mib": 1000.0}):
        card = Card(4000, **limits)
        adaptive, _, _ = on(card, LARGE)
        asked(adaptive, 8, 64)
        assert card.most_mib <= 1000
        assert adaptive.ooms == 0


def test_measured_peak_replaces_the_estimate() -> None:
    room = TINY.call_mib("encode", "bfloat16", 1024, 8) * 0.6
    card = Card(TINY.weights_mib("bfloat16") + room)
    adaptive, engine, needs = on(card, TINY, truth=0.5)
    prepared = [adaptive.prepare(PICTURE)] * 8
    sizes = []
    for count in (8, 1, 4, 8, 8):
        adaptive.encode(prepared[:count])
        sizes.append(engine.step.at_once("encode"))
    assert sizes[0] == 4  # by the estimate
    assert sizes[-1] == 8  # by the peak of fewer pictures
    assert ("encode", "bfloat16", 1024, 8) in needs.measured
    assert adaptive.ooms == 0


def test_masks_are_the_same_in_chunks() -> None:
    free, tight = on(Card(80_000), LARGE)[0], on(Card(700), LARGE)[0]
    for one, other in zip(asked(free, 5, 33), asked(tight, 5, 33), strict=True):
        for logits, expected in zip(one, other, strict=True):
            assert logits.score == expected.score
            np.testing.assert_array_equal(logits.pixels, expected.pixels)


# ── out of memory nevertheless ──


def test_estimate_that_was_too_low_is_corrected_by_one_failure() -> None:
    card = Card(LARGE.weights_mib("bfloat16") + LARGE.call_mib("encode", "bfloat16", 1024, 8) + 10)
    adaptive, engine, _ = on(card, LARGE, truth=1.5)
    prepared = [adaptive.prepare(PICTURE)] * 8
    for _ in range(5):
        assert len(adaptive.encode(prepared)) == 8
    assert adaptive.ooms == 1
    assert engine.step.batch == 4
    assert adaptive.plan.step == FIRST  # precision, side and device are unchanged


def test_failed_step_is_not_retried_without_more_memory() -> None:
    card = Card(LARGE.weights_mib("bfloat16") + 240)
    adaptive, engine, _ = on(card, LARGE, truth=2.0)
    for _ in range(20):
        asked(adaptive)
    assert adaptive.ooms == 2  # at 1024 and at 768
    assert engine.step.side == 512
    card.capacity_mib += 2000
    asked(adaptive)
    assert (engine.step.side, adaptive.plan.step) == (1024, FIRST)
    assert adaptive.ooms == 2


def test_failed_step_is_retried_after_enough_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process takes memory for an instant and frees it before the next reading."""
    card = Card(LARGE.weights_mib("bfloat16") + 600)
    adaptive, engine, _ = on(card, LARGE, patience=5)
    engine.fail("encode", OutOfMemoryError("CUDA out of memory"), times=1)
    sides = []
    for _ in range(8):
        asked(adaptive)
        sides.append(engine.step.side)
    assert sides[0] == 768
    assert sides[-1] == 1024


def test_cached_embeddings_are_evicted_before_the_side_is_reduced() -> None:
    card = Card(LARGE.weights_mib("bfloat16") + 350)
    adaptive, engine, _ = on(card, LARGE)
    kept: list[Any] = []
    given_up = []

    def evict() -> bool:
        given_up.append(len(kept))
        had, kept[:] = bool(kept), []
        return had

    adaptive.on_memory_pressure(evict)
    for _ in range(12):
        kept += adaptive.encode([adaptive.prepare(PICTURE)])
        gc.collect()
    assert given_up
    assert all(given_up)
    assert (engine.step.side, engine.step.device) == (1024, "cuda:0")


def test_cached_embeddings_do_not_prevent_a_step_up() -> None:
    """Regression: embeddings of the lower step filled the memory and prevented a step up."""
    room = LARGE.call_mib("encode", "bfloat16", 1024, 1)
    card = Card(LARGE.weights_mib("bfloat16") + 512 + 0.75 * room)
    adaptive, engine, _ = on(card, LARGE)
    kept: list[Any] = []

    def evict() -> bool:
        had, kept[:] = bool(kept), []
        return had

    def answer() -> None:
        kept.extend(adaptive.encode([adaptive.prepare(PICTURE)]))
        adaptive.decode(kept[-1], [BOX])
        while sum(each.nbytes for each in kept) > 512 * MIB:
            kept.pop(0)

    adaptive.on_memory_pressure(evict)
    answer()
    for _ in range(4):  # the wait doubles each time
        engine.fail("encode", OutOfMemoryError("CUDA out of memory"), times=2)
        answer()
        assert engine.step.side == 768
        for _ in range(500):
            answer()
            if engine.step.side == 1024:
                break
        assert engine.step.side == 1024


def test_gpu_filled_by_others_is_left_and_used_again_when_free() -> None:
    card = Card(4000)
    adaptive, engine, _ = on(card, LARGE)
    asked(adaptive)
    card.others_mib = 3800
    asked(adaptive)
    assert engine.step == cpu_step(1024)
    assert card.held_mib < 1
    assert adaptive.info.peak_mib is None
    asked(adaptive)
    card.others_mib = 0
    asked(adaptive)
    assert adaptive.plan.step == FIRST


def test_gpu_that_is_full_in_turns_is_not_used_each_time() -> None:
    card = Card(4000)
    adaptive, engine, _ = on(card, LARGE)
    for turn in range(400):
        card.others_mib = 3800 if turn % 2 else 0
        asked(adaptive)
    assert len(engine.taken) < 40


def test_free_memory_near_a_threshold_does_not_move_the_step() -> None:
    first = replace(FIRST, precision="float32")
    enough = LARGE.weights_mib("float32") + LARGE.call_mib("encode", "float32", 1024, 1)
    card = Card(enough)
    adaptive, engine, _ = on(card, LARGE, first)
    for turn in range(100):
        card.others_mib = 5 if turn % 2 else 0
        asked(adaptive)
    assert len(engine.taken) <= 3


def test_job_that_fits_no_step_is_rejected_with_numbers_and_the_next_succeeds() -> None:
    card = Card(600, reserve_mib=50)
    adaptive, engine, _ = on(card, LARGE)
    engine.fail("encode", MemoryError("no room on the host either"), times=99)
    with pytest.raises(DeviceOutOfMemoryError) as caught:
        adaptive.encode([adaptive.prepare(PICTURE)])
    reason = caught.value.reason
    for words in (
        "MiB needed",
        "MiB available to this process",
        "of 600 MiB free",
        "MiB held by this process",
        "no room on the host either",
    ):
        assert words in reason
    assert "budget" not in reason
    engine._faults.clear()
    assert len(asked(adaptive, 2, 3)) == 2


def test_error_includes_the_budget() -> None:
    adaptive, engine, _ = on(Card(9000, budget_mib=800), LARGE)
    engine.fail("encode", MemoryError("no"), times=99)
    with pytest.raises(DeviceOutOfMemoryError, match="budget 800 MiB"):
        adaptive.encode([adaptive.prepare(PICTURE)])


@pytest.mark.parametrize("fails_at", [(768,), (1024, 768, 512), (1024, 768, 512, 256)])
def test_weights_that_cannot_be_moved_step_down_at_the_start(
    fails_at: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = CardEngine.apply

    def failing(self: CardEngine, step: MemoryStep) -> None:
        if step.device != "cpu" and step.side in fails_at:
            raise OutOfMemoryError("CUDA out of memory")
        apply(self, step)

    monkeypatch.setattr(CardEngine, "apply", failing)
    adaptive, engine, _ = on(Card(9000), LARGE)
    asked(adaptive)
    left = [side for side in (1024, 768, 512, 256) if side not in fails_at]
    assert (engine.step.side, engine.step.device) == (
        (left[0], "cuda:0") if left else (1024, "cpu")
    )


def test_step_up_that_fails_costs_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(4000, others_mib=3800)
    adaptive, engine, _ = on(card, LARGE)
    card.others_mib = 0
    apply = engine.apply

    def failing(step: MemoryStep) -> None:
        if step.device != "cpu":
            raise OutOfMemoryError("CUDA out of memory while moving")
        apply(step)

    monkeypatch.setattr(engine, "apply", failing)
    for _ in range(10):
        assert len(asked(adaptive)) == 1
    assert adaptive.ooms < 12  # each step is tried once, not at each call
    monkeypatch.undo()
    card.capacity_mib = 9000
    for _ in range(20):
        asked(adaptive)
    assert adaptive.plan.step == FIRST


@pytest.mark.parametrize("where", ["read", "free"])
def test_fault_in_reading_or_freeing_memory_is_a_device_error(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(9000)
    adaptive, engine, _ = on(card, LARGE)
    prepared = adaptive.prepare(PICTURE)

    def fault() -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(*((card, "read") if where == "read" else (engine, "free")), fault)
    engine.fail("encode", OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(DeviceError, match="illegal memory access"):
        adaptive.encode([prepared])


def test_gpu_too_full_to_be_read_is_left_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Any:
        raise OutOfMemoryError("CUDA error: out of memory")

    card = Card(9000)
    monkeypatch.setattr(card, "read", full)
    adaptive, engine, _ = on(card, LARGE)
    assert engine.taken == [cpu_step(1024)]
    assert len(asked(adaptive)) == 1


# ── reported peaks ──


def test_info_reports_the_peak_of_the_last_calls() -> None:
    card = Card(80_000)
    adaptive, _, _ = on(card, LARGE)
    assert adaptive.info.peak_mib is None
    asked(adaptive, 8, 64)
    high = adaptive.info.peak_mib
    asked(adaptive)
    low = adaptive.info.peak_mib
    assert high is not None
    assert low is not None
    weights = LARGE.weights_mib("bfloat16")
    assert weights < low < weights + 700 < high


def test_measured_peaks_are_stored_once() -> None:
    handed: list[int] = []
    adaptive, _, _ = on(Card(80_000), TINY, keep=lambda measured: handed.append(len(measured)))
    for _ in range(5):
        asked(adaptive)
    assert handed == [1, 2]


# ── the CUDA meter, and loading with a meter ──


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace torch's memory functions; the values are in MiB."""
    values = SimpleNamespace(
        free=3000.0, total=4096.0, allocated=500.0, reserved=700.0, part=1.0, peak=650.0, resets=0
    )

    def reset(_: str) -> None:
        values.resets += 1

    answers = {
        "get_device_name": lambda _: "Card 4G",
        "mem_get_info": lambda _: (int(values.free * MIB), int(values.total * MIB)),
        "memory_allocated": lambda _: values.allocated * MIB,
        "memory_reserved": lambda _: values.reserved * MIB,
        "max_memory_allocated": lambda _: values.peak * MIB,
        "get_per_process_memory_fraction": lambda _: values.part,
        "reset_peak_memory_stats": reset,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer, raising=False)
    return values


def test_cuda_meter_counts_unused_reserved_memory_as_free_but_not_the_reserve(
    cuda: SimpleNamespace,
) -> None:
    assert CudaMeter("cuda:0", reserve_mib=256).read() == Reading(3000 + 200 - 256, 3000, 4096, 500)


def test_cuda_meter_is_limited_by_budget_and_process_fraction(
    cuda: SimpleNamespace,
) -> None:
    assert CudaMeter("cuda:0", budget_mib=1000).read() == Reading(500, 3000, 4096, 500, 1000)
    cuda.part = 0.25
    assert CudaMeter("cuda:0", budget_mib=2000).read() == Reading(1024 - 500, 3000, 4096, 500, 1024)
    cuda.free = cuda.reserved = cuda.allocated = 0
    assert CudaMeter("cuda:0", reserve_mib=256).read().free_mib == 0


def test_cuda_meter_works_without_the_process_fraction(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cuda, "get_per_process_memory_fraction")
    assert CudaMeter("cuda:0").read() == Reading(3200, 3000, 4096, 500)


def test_cuda_meter_measures_the_peak_from_start_and_names_gpu_and_torch(
    cuda: SimpleNamespace,
) -> None:
    meter = CudaMeter("cuda:0")
    meter.start()
    assert (meter.peak_mib(), cuda.resets) == (650, 1)
    assert "Card 4G" in meter.card
    assert torch.__version__ in meter.card


def loaded(
    card: Card, monkeypatch: pytest.MonkeyPatch, cache: Path, **options: Any
) -> AdaptiveEngine:
    """Load the bundled model on `cpu:0`, which the plan takes for a GPU, with a simulated meter."""
    monkeypatch.setenv("SAM_POLL_CACHE", str(cache))
    monkeypatch.setattr(devices, "choose", lambda *_: devices.Device("cpu:0", "float32", None))
    monkeypatch.setattr(loader, "_meter", lambda *_: card)
    engine = load(resolve("demo"), **options)
    assert isinstance(engine, AdaptiveEngine)
    return engine


def test_load_puts_a_model_larger_than_the_gpu_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = loaded(Card(2), monkeypatch, tmp_path)
    assert engine.info.device == "cpu"
    assert len(asked(engine)) == 1


@pytest.mark.slow
def test_load_reads_the_peaks_of_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Card, "peak_mib", lambda _: 123.4
    )  # the simulated GPU holds nothing of a real network
    first = loaded(Card(9000), monkeypatch, tmp_path)
    assert first.info.device == "cpu:0"
    assert first.info.peak_mib == 123.4
    assert (tmp_path / "peaks.json").is_file()
    second = loaded(Card(9000), monkeypatch, tmp_path, warmup=False)
    assert second._needs
    assert first._needs
    assert second._needs.measured.keys() == first._needs.measured.keys()
    assert (
        loaded(Card(9000, card="another"), monkeypatch, tmp_path, warmup=False)._needs.measured
        == {}
    )  # type: ignore[union-attr]


def test_load_works_for_a_user_without_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(loader, "cache_dir", nowhere)
    assert len(asked(loaded(Card(9000), monkeypatch, tmp_path))) == 1


# ── any GPU, any other processes ──


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(
    capacity=st.integers(10, 6000),
    footprint=st.sampled_from([TINY, LARGE, VIT_H]),
    first=st.sampled_from([FIRST, replace(FIRST, precision="float32")]),
    truth=st.floats(0.2, 3.0),
    jobs=st.lists(
        st.tuples(st.integers(0, 4000), st.integers(0, 9), st.integers(0, 70)),
        min_size=1,
        max_size=25,
    ),
)
def test_every_job_is_answered_for_any_gpu_and_other_processes(
    capacity: int,
    footprint: Footprint,
    first: MemoryStep,
    truth: float,
    jobs: list[tuple[int, int, int]],
) -> None:
    card = Card(capacity, reserve_mib=100)
    adaptive, engine, _ = on(card, footprint, first, truth=truth)
    for others, pictures, prompts in jobs:
        card.others_mib = others
        found = asked(adaptive, pictures, prompts)
        assert [len(each) for each in found] == [prompts] * pictures
        assert all(logits.score == 0.95 for each in found for logits in each)
        assert engine.step.network == adaptive.plan.step.network
    assert adaptive.ooms <= 12 * len(jobs)
