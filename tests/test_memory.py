"""The memory plan and the engine that follows it, without torch: the ladder, the way back, and the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_poll.engines.adaptive import AdaptiveEngine
from sam_poll.engines.fake import FakeEngine
from sam_poll.engines.faults import kind_of
from sam_poll.engines.memory import Plan, Step, ladder, next_step
from sam_poll.errors import DeviceError, TooLargeError
from sam_poll.types import Picture, Point, Prompt, Size

GPU = Step("float32", 64, 8, 1024, "cuda:0")
PICTURE = Picture(np.zeros((48, 64, 3), np.uint8), Size(64, 48), "a")
PROMPTS = [Prompt(points=(Point(10, 10),))]


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


def test_the_ladder_has_the_order_of_least_harm() -> None:
    steps = ladder(GPU, half="float16")
    assert steps == [
        GPU,
        Step("float16", 64, 8, 1024, "cuda:0"),
        Step("float16", 16, 8, 1024, "cuda:0"),
        Step("float16", 4, 8, 1024, "cuda:0"),
        Step("float16", 1, 8, 1024, "cuda:0"),
        Step("float16", 1, 4, 1024, "cuda:0"),
        Step("float16", 1, 2, 1024, "cuda:0"),
        Step("float16", 1, 1, 1024, "cuda:0"),
        Step("float16", 1, 1, 768, "cuda:0"),
        Step("float16", 1, 1, 512, "cuda:0"),
        Step("float16", 1, 1, 256, "cuda:0"),
        Step("float32", 1, 1, 1024, "cpu"),
    ]


def test_a_cpu_has_no_half_precision_and_no_cpu_to_fall_back_on() -> None:
    first = Step("float32", 4, 2, 512, "cpu")
    assert ladder(first) == [
        first,
        Step("float32", 1, 2, 512, "cpu"),
        Step("float32", 1, 1, 512, "cpu"),
        Step("float32", 1, 1, 256, "cpu"),
    ]


steps = st.builds(
    Step,
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(1, 200),
    st.integers(1, 20),
    st.sampled_from([256, 512, 1024, 1536]),
    st.sampled_from(["cpu", "cuda:0", "cuda:3"]),
)


@settings(deadline=None, max_examples=200)
@given(steps, st.sampled_from([128, 256, 300, 512, 1024]), st.sampled_from([None, "bfloat16"]))
def test_every_step_takes_less_than_the_one_before_and_no_side_goes_below_the_limit(
    first: Step, min_side: int, half: str | None
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


def test_a_failed_encode_costs_no_prompts_and_a_failed_decode_no_batch_and_no_side() -> None:
    half = replace(GPU, precision="bfloat16")
    assert next_step(GPU, GPU, half="bfloat16", call="encode") == half
    assert next_step(half, GPU, half="bfloat16", call="encode") == replace(half, batch=4)
    assert next_step(half, GPU, half="bfloat16", call="decode") == replace(half, prompts_per_call=16)
    last = replace(half, prompts_per_call=1)
    step = next_step(last, GPU, half="bfloat16", call="decode")
    assert step is not None
    assert (step.device, step.side) == ("cpu", 1024)


def test_the_plan_goes_up_again_by_the_way_it_came_down() -> None:
    plan = Plan(GPU, half="float16", patience=3)
    down = [plan.step, plan.down(), plan.down()]
    assert [plan.succeeded() for _ in range(3)] == [None, None, down[1]]
    assert [plan.succeeded() for _ in range(3)] == [None, None, down[0]]
    assert [plan.succeeded() for _ in range(9)] == [None] * 9
    assert plan.step == GPU


def test_a_step_up_that_fails_goes_back_to_what_worked_and_is_tried_half_as_often() -> None:
    plan = Plan(GPU, patience=2)
    worked = plan.down("decode")
    assert [plan.succeeded() for _ in range(2)][-1] == GPU
    assert plan.down("encode") == plan.step == worked
    assert [plan.succeeded() for _ in range(4)] == [None, None, None, GPU]


def test_a_step_up_that_proved_itself_is_no_longer_on_trial() -> None:
    plan = Plan(GPU, patience=2)
    plan.down("decode")
    for _ in range(4):
        plan.succeeded()
    assert plan.down("encode") == replace(GPU, batch=4)


# -- where free memory can be read -------------------------------------------------------------------------------------


def test_less_in_one_call_is_no_step_of_the_plan_but_another_network_is() -> None:
    plan = Plan(replace(GPU, precision="float16"), half="float16")
    step = plan.lower(plan.step, "encode", 8)
    assert step == replace(plan.first, batch=4)
    assert plan.step == plan.first
    step = plan.lower(replace(plan.first, batch=1), "encode", 1)
    assert step == plan.step == replace(plan.first, side=768)  # with as much in one call as at the start


def test_a_chunk_that_is_no_smaller_than_what_failed_is_not_tried() -> None:
    plan = Plan(replace(GPU, precision="float16"), half="float16")
    assert plan.lower(plan.step, "decode", 5) == replace(plan.first, prompts_per_call=4)
    assert plan.lower(plan.step, "encode", 1) == replace(plan.first, side=768)


def test_the_highest_step_that_fits_is_gone_back_to() -> None:
    plan = Plan(GPU, half="float16")
    plan.settle(lambda step, _: step.device == "cpu")
    assert plan.up(lambda _: False) is None
    assert plan.step.device == "cpu"
    assert plan.up(lambda step: step.side <= 512 and step.device != "cpu") == replace(
        GPU, precision="float16", side=512
    )
    assert plan.up(lambda _: True) == plan.step == GPU
    assert plan.up(lambda _: True) is None


def test_a_step_up_that_does_not_last_is_waited_for_longer_each_time() -> None:
    plan = Plan(GPU, half="float16", patience=10)
    waits = []
    for _ in range(5):
        assert plan.lower(plan.step, "encode", 8)
        calls = 1
        while not plan.up(lambda _: True):
            calls += 1
        waits.append(calls)
    assert waits == [1, 8, 16, 32, 64]
    for _ in range(11):
        plan.up(lambda _: True)  # it lasts
    assert plan.lower(plan.step, "encode", 8)
    assert plan.up(lambda _: True) == GPU


def test_only_where_the_step_below_costs_no_quality_is_an_estimate_believed() -> None:
    asked: list[tuple[str, bool]] = []

    def fits(step: Step, cautious: bool) -> bool:
        asked.append((step.precision, cautious))
        return step.side == 768

    Plan(GPU, half="float16").settle(fits)
    assert asked == [("float32", True), ("float16", False), ("float16", False)]
    asked.clear()
    Plan(GPU).settle(fits)
    assert asked == [("float32", False), ("float32", False)]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "memory"),
        (MemoryError(), "memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
            "memory",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5.05 GB)"), "memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "memory"),
        (RuntimeError("CUDA error: out of memory"), "memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "device"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "device"),
        (RuntimeError("shape '[2, 3]' is invalid"), None),
        (ValueError("CUDA error in a file name"), None),
    ],
)
def test_faults_are_told_apart(error: Exception, kind: str | None) -> None:
    assert kind_of(error) == kind


@pytest.fixture
def fake() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def adaptive(fake: FakeEngine) -> AdaptiveEngine:
    return AdaptiveEngine(fake, Plan(fake.step, min_side=128, patience=4))


def test_an_encode_out_of_memory_is_done_again_one_step_lower(fake: FakeEngine, adaptive: AdaptiveEngine) -> None:
    fake.fail("encode", OutOfMemoryError("CUDA out of memory"))
    assert len(adaptive.encode([adaptive.prepare(PICTURE)])) == 1
    assert fake.calls["encode"] == 2
    assert adaptive.batch == fake.batch == 2
    assert adaptive.info.step == str(adaptive.plan.step)


def test_a_decode_out_of_memory_is_done_again_with_fewer_prompts(fake: FakeEngine, adaptive: AdaptiveEngine) -> None:
    [embedding] = adaptive.encode([adaptive.prepare(PICTURE)])
    fake.fail("decode", OutOfMemoryError("CUDA out of memory"), times=2)
    [logits] = adaptive.decode(embedding, PROMPTS)
    assert logits.frame.size == PICTURE.size
    assert [step.prompts_per_call for step in fake.applied] == [64, 16, 4]


def test_the_step_is_remembered_and_taken_back_after_enough_good_calls(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    prepared = adaptive.prepare(PICTURE)
    fake.fail("encode", OutOfMemoryError("x"))
    batches = [adaptive.encode([prepared]) and adaptive.batch for _ in range(6)]
    assert batches == [2, 2, 2, 4, 4, 4]


def test_the_end_of_the_ladder_rejects_the_job_with_its_numbers_and_the_next_job_works(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    prepared = adaptive.prepare(PICTURE)
    walk = [4, 2, 1]
    fake.fail("encode", OutOfMemoryError("tried to allocate 9 GiB"), times=len(walk))
    with pytest.raises(TooLargeError, match=r"tried to allocate 9 GiB.*no memory at all") as caught:
        adaptive.encode([prepared])
    assert "batch 1" in caught.value.reason
    assert caught.value.remedy
    assert len(adaptive.encode([prepared])) == 1


def test_a_step_that_cannot_be_taken_is_skipped(
    fake: FakeEngine, adaptive: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = fake.apply

    def apply(step: Step) -> None:
        if step.batch == 2:
            raise OutOfMemoryError("while converting the weights")
        taken(step)

    monkeypatch.setattr(fake, "apply", apply)
    fake.fail("encode", OutOfMemoryError("x"))
    adaptive.encode([adaptive.prepare(PICTURE)])
    assert adaptive.batch == 1


def test_a_step_up_that_cannot_be_taken_costs_no_answer(
    fake: FakeEngine, adaptive: AdaptiveEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = adaptive.prepare(PICTURE)
    fake.fail("encode", OutOfMemoryError("x"))
    adaptive.encode([prepared])
    taken = fake.apply

    def apply(step: Step) -> None:
        if step.batch == 4:
            raise OutOfMemoryError("not yet")
        taken(step)

    monkeypatch.setattr(fake, "apply", apply)
    assert [len(adaptive.encode([prepared])) for _ in range(5)] == [1] * 5
    assert adaptive.batch == fake.batch == 2


def test_a_device_fault_ends_the_process_and_is_not_tried_again(fake: FakeEngine, adaptive: AdaptiveEngine) -> None:
    fake.fail("encode", RuntimeError("CUDA error: an illegal memory access was encountered\nmore"))
    with pytest.raises(DeviceError, match="illegal memory access") as caught:
        adaptive.encode([adaptive.prepare(PICTURE)])
    assert caught.value.exit_code == 70
    assert fake.calls["encode"] == 1


def test_every_time_memory_is_not_enough_is_counted_and_nothing_else(
    fake: FakeEngine, adaptive: AdaptiveEngine
) -> None:
    assert adaptive.ooms == 0
    fake.fail("encode", OutOfMemoryError("CUDA out of memory"), times=2)
    adaptive.encode([adaptive.prepare(PICTURE)])
    fake.fail("encode", ValueError("odd"))
    with pytest.raises(ValueError, match="odd"):
        adaptive.encode([adaptive.prepare(PICTURE)])
    assert adaptive.ooms == 2


def test_any_other_error_passes_unchanged(fake: FakeEngine, adaptive: AdaptiveEngine) -> None:
    error = KeyError("a bug")
    fake.fail("encode", error)
    with pytest.raises(KeyError) as caught:
        adaptive.encode([adaptive.prepare(PICTURE)])
    assert caught.value is error


def test_the_failed_calls_memory_is_let_go_before_the_next_try(
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
    with pytest.raises(TooLargeError):
        adaptive.encode([adaptive.prepare(PICTURE)])
    assert alive
    assert not any(alive)
