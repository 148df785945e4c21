"""An engine that adapts to the free memory and retries on a lower step when it runs out.

With a meter, free memory is read before each call: the step goes up when a higher one fits, and as
much is put into one call as fits. Without a meter, the engine starts at the highest step and learns
from failures only.

Two errors leave this module. `DeviceOutOfMemoryError`: the last step of the ladder failed, which
concerns the current job only. `DeviceError`: the device itself failed; the process must be
replaced, because a CUDA context does not survive a kernel fault.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from loguru import logger

from sam_poll.core.errors import DeviceError, DeviceOutOfMemoryError
from sam_poll.core.protocols import Embedding, Engine
from sam_poll.core.types import (
    ConceptRequest,
    Exemplar,
    Logits,
    ModelInfo,
    ModelInput,
    PackedEmbedding,
    PackedMask,
    Picture,
    Prompt,
)
from sam_poll.engines.memory.batching import prompt_groups
from sam_poll.engines.memory.cuda_errors import classify_device_error
from sam_poll.engines.memory.meter import Meter, Reading
from sam_poll.engines.memory.plan import Call, MemoryPlan, MemoryStep, chunked, fits
from sam_poll.engines.memory.requirements import Key, MemoryRequirements

T = TypeVar("T")

# Fraction of the free memory that a higher step may fill. The rest keeps small changes of the free
# memory from moving the engine up and down.
STEP_UP_FRACTION = 0.9


class AdjustableEngine(Engine, Protocol):
    """An engine whose precision, chunk sizes, side and device can be changed between two calls."""

    step: MemoryStep

    def apply(self, step: MemoryStep) -> None:
        """Switch to `step`."""
        ...

    def free(self) -> None:
        """Return unused memory to the device."""
        ...

    def memory_report(self) -> str:
        """Return a description of the device's memory for error messages."""
        ...


class AdaptiveEngine:
    """Wraps an engine and keeps it on the step of the plan.

    Call `encode`, `decode` and `candidates` on the one device thread only.

    `meter` reads the memory of the plan's first device. It requires `needs`, the memory that calls
    take there. `keep` is called with the measured peaks whenever they exceed those known before.
    `engine` must not be on the device yet. `ooms` counts the out-of-memory errors.
    """

    def __init__(
        self,
        engine: AdjustableEngine,
        plan: MemoryPlan,
        *,
        needs: MemoryRequirements | None = None,
        meter: Meter | None = None,
        keep: Callable[[dict[Key, float]], None] = lambda measured: None,
    ) -> None:
        self.engine = engine
        self.plan = plan
        self.ooms = 0
        self._needs = needs
        self._meter = meter
        self._keep = keep
        self._evict: Callable[[], bool] = lambda: False
        # Peak of the last call of each kind, including the weights.
        self._peaks_mib: dict[Call, float] = {}
        self._held_mib = 0.0  # before the current call
        self._step_applied = False  # whether the last `engine.apply` succeeded
        # The meter's reading, reused until something may have changed it: reading takes time.
        self._reading: Reading | None = None
        if meter:
            plan.settle(self._fits)
        self._change(plan.step, "the model itself")

    @property
    def info(self) -> ModelInfo:
        """Return the engine's info with the highest memory peak of its last calls."""
        return replace(self.engine.info, peak_mib=max(self._peaks_mib.values(), default=None))

    @property
    def batch(self) -> int:
        """Return the largest number of pictures in one call, by the plan's step."""
        return self.plan.step.batch

    def prepare(self, picture: Picture) -> ModelInput:
        """Call `prepare` of the engine."""
        return self.engine.prepare(picture)

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        """Call `encode` of the engine, on a step that fits."""
        return self._call("encode", len(pictures), lambda: self.engine.encode(pictures))

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]:
        """Call `decode` of the engine, on a step that fits."""
        count = max(map(len, prompt_groups(prompts)), default=0)
        return self._call("decode", count, lambda: self.engine.decode(embedding, prompts))

    def candidates(
        self,
        embedding: Embedding,
        points: Sequence[tuple[float, float]],
        *,
        iou: float,
        stability: float,
    ) -> list[PackedMask]:
        """Call `candidates` of the engine, on a step that fits."""
        return self._call(
            "decode",
            len(points),
            lambda: self.engine.candidates(embedding, points, iou=iou, stability=stability),
        )

    def pack(self, embedding: Embedding) -> PackedEmbedding:
        """Call `pack` of the engine. Raises DeviceError where the device has failed."""
        try:
            return self.engine.pack(embedding)
        except Exception as error:
            self._memory_reason(error)
            raise

    def unpack(self, packed: PackedEmbedding) -> Embedding | None:
        """Call `unpack` of the engine."""
        return self.engine.unpack(packed)

    def check_concept(self, request: ConceptRequest) -> None:
        """Call `check_concept` of the engine."""
        self.engine.check_concept(request)

    def find(
        self,
        embedding: Embedding,
        texts: Sequence[str],
        exemplars: Sequence[Exemplar],
        *,
        threshold: float,
        most: int,
    ) -> list[list[PackedMask]]:
        """Call `find` of the engine, on a step that fits."""
        return self._call(
            "find",
            len(texts),
            lambda: self.engine.find(embedding, texts, exemplars, threshold=threshold, most=most),
        )

    def on_memory_pressure(self, evict: Callable[[], bool]) -> None:
        """Register the function that evicts cached embeddings; it returns whether any were."""
        self._evict = evict

    # ── one call ──

    def _call(self, call: Call, count: int, run: Callable[[], T]) -> T:
        """Run a call of the engine, stepping down until it succeeds.

        `count` is the number of pictures, or of prompts that could share a call of the decoder.
        Raises DeviceOutOfMemoryError or DeviceError.
        """
        self._reading = None
        self._prepare_step(call, count)
        while True:
            if self._meter:
                self._held_mib = self._read().held_mib
                self._meter.start()
            try:
                result = run()
            except Exception as error:  # noqa: BLE001 - torch has no narrower class for all of its device errors
                reason = self._memory_reason(error)
            else:
                self._succeeded(call, count)
                return result
            # After the except block, so that the traceback does not keep the failed call's
            # tensors alive.
            if not self._evicted(call):
                self._step_down(call, count, self.engine.step, reason)

    def _prepare_step(self, call: Call, count: int) -> None:
        """Put the engine on the step that fits now, and repair a change of step that failed."""
        if not self._meter or not self._needs:
            self._change(self.plan.step, "while changing the step")
            return
        if step := self.plan.up(lambda step: self._fits_above(step, call)):
            logger.info("memory is back: going up to {}", step)
        elif not self._fits(self.plan.step, False) and not (
            self._evicted(call) and self._fits(self.plan.step, False)
        ):
            logger.warning(
                "{} does not fit any more: going down to {}",
                self.engine.step,
                self.plan.settle(self._fits),
            )
        if self.plan.step.network != self.engine.step.network or not self._step_applied:
            self._change(self.plan.step, "while changing the step")
        if self.engine.step.device != "cpu":
            free_mib = self._read().free_mib
            self._change(
                chunked(self.plan.step, call, count, free_mib, self._needs),
                "while changing the step",
            )

    def _succeeded(self, call: Call, count: int) -> None:
        """Learn from a call that succeeded."""
        if not self._meter or not self._needs:
            self._try_higher()
            return
        step = self.engine.step
        if step.device == "cpu":
            self._peaks_mib.clear()
            self._needs.count_success()
            return
        self._peaks_mib[call] = self._meter.peak_mib()
        # Where a batch was encoded in several chunks, the peak includes the embeddings of the
        # earlier chunks and says nothing about one call.
        if count > 0 and (call != "encode" or count <= step.batch):
            peak_mib = self._peaks_mib[call] - self._held_mib
            at_once = min(count, step.at_once(call))
            if self._needs.record_peak(call, step, at_once, peak_mib):
                self._keep(self._needs.measured)

    def _try_higher(self) -> None:
        """Without a meter: try a higher step after enough calls that succeeded."""
        step = self.plan.succeeded()
        if not step:
            return
        logger.info("memory has been enough for a while: trying {}", step)
        if not self._apply(step):
            # The current call has its result; if no step fits, the next call raises.
            with contextlib.suppress(DeviceOutOfMemoryError):
                self._step_down("encode", 1, step, "while stepping up")

    # ── memory ──

    def _fits(self, step: MemoryStep, cautious: bool, fraction: float = 1.0) -> bool:
        """Return whether `step` fits into `fraction` of the free memory; see `plan.fits`."""
        assert self._needs
        return fits(
            step,
            self._read().free_mib * fraction,
            self._needs,
            here=self.engine.step,
            cautious=cautious,
        )

    def _fits_above(self, step: MemoryStep, call: Call) -> bool:
        """Return whether a higher step fits, evicting cached embeddings if that makes room."""
        if self._fits(step, True, STEP_UP_FRACTION):
            return True
        # Before a decode nothing is evicted: that would not free the embedding to be decoded.
        if call != "encode" or not self._needs:
            return False
        current = self.engine.step
        reading = self._read()
        evictable_mib = max(0.0, reading.held_mib - self._needs.weights_mib(current))
        most_mib = reading.free_mib + evictable_mib
        if not fits(step, most_mib * STEP_UP_FRACTION, self._needs, here=current, cautious=True):
            return False
        return self._evicted(call) and self._fits(step, True, STEP_UP_FRACTION)

    def _read(self) -> Reading:
        """Return the meter's reading; zero where the device is too full even for a reading."""
        assert self._meter
        if self._reading is None:
            try:
                self._reading = self._meter.read()
            # As in `_call`. A fault of the last call may be reported only here.
            except Exception as error:  # noqa: BLE001
                self._memory_reason(error)
                return Reading(0.0, 0.0, 0.0, 0.0)
        return self._reading

    def _free(self) -> None:
        self._reading = None
        try:
            self.engine.free()
        except Exception as error:  # noqa: BLE001 - as in _read
            self._memory_reason(error)

    def _evicted(self, call: Call) -> bool:
        """Evict cached embeddings and return whether there were any."""
        if not self._evict():
            return False
        logger.info("not enough memory in {}: cached embeddings are evicted", call)
        self._free()
        return True

    def _memory_reason(self, error: Exception) -> str:
        """Count an out-of-memory error and return its first line; raise any other error."""
        kind = classify_device_error(error)
        if kind == "device":
            remedy = (
                "restart the process; if the error recurs, check the driver (dmesg) and the GPU"
            )
            raise DeviceError(f"the device failed: {_first_line(error)}", remedy=remedy) from error
        if kind is None:
            raise error
        self.ooms += 1
        self._reading = None
        return _first_line(error)

    def _step_down(self, call: Call, count: int, failed: MemoryStep, reason: str) -> None:
        """Apply the next lower step that can be applied, after `call` failed on `failed`.

        Raises DeviceOutOfMemoryError where there is none.
        """
        self._free()
        while step := self._next(call, count, failed):
            logger.warning("out of memory in {} at {}: trying again at {}", call, failed, step)
            failed = step
            if self._apply(step):
                self._free()  # memory that the step before held
                return
        numbers = self._numbers(call, failed, count)
        raise DeviceOutOfMemoryError(
            f"out of memory in {call} even at {failed} ({reason}; {numbers})",
            remedy="free memory on the device, choose a smaller model, or lower memory.min_side",
        )

    def _next(self, call: Call, count: int, failed: MemoryStep) -> MemoryStep | None:
        """Return the step to try after `call` failed on `failed`; None where none is left."""
        if not self._meter or not self._needs:
            return self.plan.down(call)
        at_once = max(1, min(count, failed.at_once(call)))
        free_mib = self._read().free_mib
        if failed.device != "cpu":
            self._needs.record_failure(call, failed, at_once, free_mib)
        step = self.plan.lower(failed, call, at_once)
        if not step or step.device == "cpu":
            return step
        return chunked(step, call, count, free_mib, self._needs)

    def _numbers(self, call: Call, step: MemoryStep, count: int) -> str:
        """Return the needed and the available memory, for an error message."""
        parts = []
        if self._needs:
            needed_mib = self._needs.call_mib(call, step, max(1, min(count, step.at_once(call))))
            parts.append(f"about {needed_mib:.0f} MiB needed")
        if self._meter:
            parts.append(f"on the GPU {self._read()}")
        return "; ".join([*parts, self.engine.memory_report()])

    def _change(self, step: MemoryStep, when: str) -> None:
        """Put the engine on `step`, or on the next lower one where that does not fit either."""
        if (self._step_applied and step == self.engine.step) or self._apply(step):
            return
        self._step_down("encode", 1, step, when)

    def _apply(self, step: MemoryStep) -> bool:
        """Apply `step`; return False where converting or moving weights runs out of memory."""
        if not self._step_applied or step.network != self.engine.step.network:
            self._reading = None
        self._step_applied = False
        try:
            self.engine.apply(step)
        except Exception as error:  # noqa: BLE001 - as in _call
            self._memory_reason(error)
        else:
            self._step_applied = True
            return True
        self._free()
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
