"""The memory plan and the adaptive engine without torch: steps down and up, and the last step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_poll.core.errors import DeviceError, DeviceOutOfMemoryError
from sam_poll.core.types import Picture, Point, Prompt, Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.engines.memory.adaptive import AdaptiveEngine
from sam_poll.engines.memory.cuda_errors import classify_device_error
from sam_poll.engines.memory.plan import MemoryPlan, MemoryStep, ladder, next_step

GPU = MemoryStep("float32", 64, 8, 1024, "cuda:0")
PICTURE = Picture(np.zeros((48, 64, 3), np.uint8), Size(64, 48), "a")
PROMPTS = [Prompt(points=(Point(10, 10),))]


class OutOfMemoryError(RuntimeError):
    """An error with the name of torch's."""


def test_ladder_lowers_quality_last() -> None:
    steps = ladder(GPU, half="float16")
    assert steps == [
        GPU,
        MemoryStep("float16", 64, 8, 1024, "cuda:0"),
        MemoryStep("float16", 16, 8, 1024, "cuda:0"),
        MemoryStep("float16", 4, 8, 1024, "cuda:0"),
        MemoryStep("float16", 1, 8, 1024, "cuda:0"),
        MemoryStep("float16", 1, 4, 1024, "cuda:0"),
        MemoryStep("float16", 1, 2, 1024, "cuda:0"),
        MemoryStep("float16", 1, 1, 1024, "cuda:0"),
        MemoryStep("float16", 1, 1, 768, "cuda:0"),
        MemoryStep("float16", 1, 1, 512, "cuda:0"),
        MemoryStep("float16", 1, 1, 256, "cuda:0"),
        MemoryStep("float32", 1, 1, 1024, "cpu"),
    ]


def test_ladder_of_a_cpu_has_no_half_precision_and_no_fallback() -> None:
    first = MemoryStep("float32", 4, 2, 512, "cpu")
    assert ladder(first) == [
        first,
        MemoryStep("float32", 1, 2, 512, "cpu"),
        MemoryStep("float32", 1, 1, 512, "cpu"),
        MemoryStep("float32", 1, 1, 256, "cpu"),
    ]


steps = st.builds(
    MemoryStep,
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 200),
    st.integers(1, 20),
    st.sampled_from([256, 512, 1024, 1536]),
    st.sampled_from(["cpu", "cuda:0", "cuda:3"]),
)


@settings(deadline=None, max_examples=200)
@given(steps, st.sampled_from([128, 256, 300, 512, 1024]), st.sampled_from([None, "bfloat16"]))
def test_ladder_steps_need_less_memory_and_keep_the_minimum_side(
    first: MemoryStep, min_side: int, half: str | None
) -> None:
    walk = ladder(first, min_side=min_side, half=half)
    assert walk[0] == first
    assert len(walk) == len(set(walk)) < 30
    for before, after in pairwise(walk):
        assert after.side >= min(min_side, first.side)
        assert after.batch >= 1
        assert after.prompts_per_call >= 1
        if after.device == before.device:
            assert after.prompts_per_call <= before.prompts_per_call
            assert after.batch <= before.batch
            assert after.side <= before.side


def test_next_step_changes_only_what_helps_the_failed_call() -> None:
    half = replace(GPU, precision="bfloat16")
    assert next_step(GPU, GPU, half="bfloat16", call="encode") == half
    assert next_step(half, GPU, half="bfloat16", call="encode") == replace(half, batch=4)
    assert next_step(half, GPU, half="bfloat16", call="decode") == replace(
        half, prompts_per_call=16
    )
    last = replace(half, prompts_per_call=1)
    step = next_step(last, GPU, half="bfloat16", call="decode")
    assert step is not None
    assert (step.device, step.side) == ("cpu", 1024)


def test_plan_goes_up_by_the_steps_it_came_down() -> None:
    plan = MemoryPlan(GPU, half="float16", patience=3)
    down = [plan.step, plan.down(), plan.down()]
    assert [plan.succeeded() for _ in range(3)] == [None, None, down[1]]
    assert [plan.succeeded() for _ in range(3)] == [None, None, down[0]]
    assert [plan.succeeded() for _ in range(9)] == [None] * 9
    assert plan.step == GPU


def test_plan_returns_after_a_failed_step_up_and_waits_twice_as_long() -> None:
    plan = MemoryPlan(GPU, patience=2)
    worked = plan.down("decode")
    assert [plan.succeeded() for _ in range(2)][-1] == GPU
    assert plan.down("encode") == plan.step == worked
    assert [plan.succeeded() for _ in range(4)] == [None, None, None, GPU]


def test_plan_keeps_a_step_up_that_lasted() -> None:
    plan = MemoryPlan(GPU, patience=2)
    plan.down("decode")
    for _ in range(4):
        plan.succeeded()
    assert plan.down("encode") == replace(GPU, batch=4)


# ── where free memory can be read ──


def test_plan_does_not_record_smaller_calls_as_steps() -> None:
    plan = MemoryPlan(replace(GPU, precision="float16"), half="float16")
    step = plan.lower(plan.step, "encode", 8)
    assert step == replace(plan.first, batch=4)
    assert plan.step == plan.first
    step = plan.lower(replace(plan.first, batch=1), "encode", 1)
    assert step == plan.step == replace(plan.first, side=768)  # with the call sizes of the start


def test_plan_skips_calls_no_smaller_than_the_failed_one() -> None:
    plan = MemoryPlan(replace(GPU, precision="float16"), half="float16")
    assert plan.lower(plan.step, "decode", 5) == replace(plan.first, prompts_per_call=4)
    assert plan.lower(plan.step, "encode", 1) == replace(plan.first, side=768)


def test_plan_goes_up_to_the_highest_step_that_fits() -> None:
    plan = MemoryPlan(GPU, half="float16")
    plan.settle(lambda step, _: step.device == "cpu")
    assert plan.up(lambda _: False) is None
    assert plan.step.device == "cpu"
    assert plan.up(lambda step: step.side <= 512 and step.device != "cpu") == replace(
        GPU, precision="float16", side=512
    )
    assert plan.up(lambda _: True) == plan.step == GPU
    assert plan.up(lambda _: True) is None


def test_plan_waits_longer_after_each_step_up_that_did_not_last() -> None:
    plan = MemoryPlan(GPU, half="float16", patience=10)
    waits = []
    for _ in range(5):
        assert plan.lower(plan.step, "encode", 8)
        calls = 1
        while not plan.up(lambda _: True):
            calls += 1
        waits.append(calls)
    assert waits == [1, 8, 16, 32, 64]
    for _ in range(11):
        plan.up(lambda _: True)  # the step up lasts
    assert plan.lower(plan.step, "encode", 8)
    assert plan.up(lambda _: True) == GPU


def test_settle_trusts_estimates_only_where_the_next_step_costs_no_quality() -> None:
    asked: list[tuple[str, bool]] = []

    def fits(step: MemoryStep, cautious: bool) -> bool:
        asked.append((step.precision, cautious))
        return step.side == 768

    MemoryPlan(GPU, half="float16").settle(fits)
    assert asked == [("float32", True), ("float16", False), ("float16", False)]
    asked.clear()
    MemoryPlan(GPU).settle(fits)
    assert asked == [("float32", False), ("float32", False)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
        (MemoryError(), "memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: "
                "can't allocate memory: you tried"
            ),
            "memory",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB)"), "memory"),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            ),
            "memory",
        ),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "device"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device"),
        (RuntimeError("shape '[2, 3]' is invalid"), None),
        (ValueError("CUDA error in a file name"), None),
    ],
)
def test_classify_device_error_separates_memory_device_and_other_errors(
    error: Exception, kind: str | None
) -> None:
    assert classify_device_error(error) == kind


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def adaptive(fake: FakeEngine) -> AdaptiveEngine:
    return AdaptiveEngine(fake, MemoryPlan(fake.step, min_side=128, patience=4))


def test_adaptive_engine_retries_an_encode_one_step_lower(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    fake.fail("encode", OutOfMemoryError("CUDA out of memory"))
    assert len(adaptive.encode([adaptive.prepare(PICTURE)])) == 1
    assert fake.calls["encode"] == 2
    assert adaptive.batch == fake.batch == 2
    assert adaptive.info.step == str(adaptive.plan.step)


def test_adaptive_engine_retries_a_decode_with_fewer_prompts(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    [embedding] = adaptive.encode([adaptive.prepare(PICTURE)])
    fake.fail("decode", OutOfMemoryError("CUDA out of memory"), times=2)
    [logits] = adaptive.decode(embedding, PROMPTS)
    assert logits.frame.size == PICTURE.size
    assert [step.prompts_per_call for step in fake.applied] == [64, 16, 4]


def test_adaptive_engine_keeps_the_lower_step_until_enough_calls_succeeded(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    prepared = adaptive.prepare(PICTURE)
    fake.fail("encode", OutOfMemoryError("x"))
    batches = [adaptive.encode([prepared]) and adaptive.batch for _ in range(6)]
    assert batches == [2, 2, 2, 4, 4, 4]


def test_adaptive_engine_rejects_the_job_at_the_end_of_the_ladder_and_continues(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    prepared = adaptive.prepare(PICTURE)
    walk = [4, 2, 1]
    fake.fail("encode", OutOfMemoryError("tried to allocate 9 GiB"), times=len(walk))
    with pytest.raises(
        DeviceOutOfMemoryError, match=r"tried to allocate 9 GiB.*no memory at all"
    ) as caught:
        adaptive.encode([prepared])
    assert "batch 1" in caught.value.reason
    assert caught.value.remedy
    assert len(adaptive.encode([prepared])) == 1


def test_adaptive_engine_skips_a_step_that_cannot_be_applied(
    fake: FakeEngine, adaptive: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = fake.apply

    def apply(step: MemoryStep) -> None:
        if step.batch == 2:
            raise OutOfMemoryError("while converting the weights")
        taken(step)

    monkeypatch.setattr(fake, "apply", apply)
    fake.fail("encode", OutOfMemoryError("x"))
    adaptive.encode([adaptive.prepare(PICTURE)])
    assert adaptive.batch == 1


def test_adaptive_engine_answers_although_a_step_up_fails(
    fake: FakeEngine, adaptive: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = adaptive.prepare(PICTURE)
    fake.fail("encode", OutOfMemoryError("x"))
    adaptive.encode([prepared])
    taken = fake.apply

    def apply(step: MemoryStep) -> None:
        if step.batch == 4:
            raise OutOfMemoryError("not yet")
        taken(step)

    monkeypatch.setattr(fake, "apply", apply)
    assert [len(adaptive.encode([prepared])) for _ in range(5)] == [1] * 5
    assert adaptive.batch == fake.batch == 2


def test_adaptive_engine_does_not_retry_a_device_fault(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    fake.fail("encode", RuntimeError("CUDA error: an illegal memory access was encountered\nmore"))
    with pytest.raises(DeviceError, match="illegal memory access") as caught:
        adaptive.encode([adaptive.prepare(PICTURE)])
    assert caught.value.exit_code == 70
    assert fake.calls["encode"] == 1


def test_adaptive_engine_counts_out_of_memory_errors_only(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    assert adaptive.ooms == 0
    fake.fail("encode", OutOfMemoryError("CUDA out of memory"), times=2)
    adaptive.encode([adaptive.prepare(PICTURE)])
    fake.fail("encode", ValueError("odd"))
    with pytest.raises(ValueError, match="odd"):
        adaptive.encode([adaptive.prepare(PICTURE)])
    assert adaptive.ooms == 2


def test_adaptive_engine_passes_other_errors_unchanged(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    error = KeyError("a bug")
    fake.fail("encode", error)
    with pytest.raises(KeyError) as caught:
        adaptive.encode([adaptive.prepare(PICTURE)])
    assert caught.value is error


def test_adaptive_engine_frees_the_failed_calls_memory_before_the_retry(
    fake: FakeEngine, adaptive: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A traceback keeps the frames of the failed call alive, and with them its tensors."""
    alive: list[bool] = []

    class Tensor:
        count = 0

        def __init__(self) -> None:
            Tensor.count += 1

        def __del__(self) -> None:
            Tensor.count -= 1

    def encode(_: object) -> Iterator[None]:
        big = Tensor()
        raise OutOfMemoryError(f"{id(big)}")

    monkeypatch.setattr(fake, "encode", encode)
    monkeypatch.setattr(fake, "free", lambda: alive.append(Tensor.count > 0))
    with pytest.raises(DeviceOutOfMemoryError):
        adaptive.encode([adaptive.prepare(PICTURE)])
    assert alive
    assert not any(alive)
