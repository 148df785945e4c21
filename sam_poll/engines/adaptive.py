"""An engine that runs on the step that fits, and answers out of memory by a lower one and the same call again.

Where there is a meter, free memory is read before each call: the step goes up when a higher one fits, and as much goes
into one call as fits. Where there is none, it starts at the top and learns from failures alone.

What can still go wrong here: the ladder's last step fails (`TooLargeError`, this job only), or the device itself fails
(`DeviceError`, the process must be replaced: a CUDA context does not survive a kernel fault).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from loguru import logger

from sam_poll.engines.chunks import prompt_groups
from sam_poll.engines.faults import kind_of
from sam_poll.engines.memory import Call, Plan, Step, chunked, fits
from sam_poll.engines.meter import Meter, Reading
from sam_poll.engines.needs import Key, Needs
from sam_poll.errors import DeviceError, TooLargeError
from sam_poll.types import Candidate, Embedding, Engine, Logits, ModelInfo, Picture, Prepared, Prompt

T = TypeVar("T")

UP = 0.9  # of free memory that a higher step may fill: a little more or less free must not mean up and down


class Steppable(Engine, Protocol):
    """An engine whose precision, chunk sizes, side and device can be changed between two calls."""

    step: Step

    def apply(self, step: Step) -> None: ...
    def free(self) -> None:
        """Gives memory that is not in use back to the device."""
        ...

    def memory_report(self) -> str:
        """The device's memory in words, for the error's reader."""
        ...


class AdaptiveEngine:
    """Wraps an engine and puts it on the plan's step. `encode` and `decode` are for the one device thread.

    `meter` reads the memory of the plan's first device, and comes with `needs`, what things take there; `keep` is given
    the measured peaks when they say more than before. `engine` must not be on that device yet. `ooms` counts how often
    memory has not been enough.
    """

    def __init__(
        self,
        engine: Steppable,
        plan: Plan,
        *,
        needs: Needs | None = None,
        meter: Meter | None = None,
        keep: Callable[[dict[Key, float]], None] = lambda measured: None,
    ) -> None:
        self.engine = engine
        self.plan = plan
        self.ooms = 0
        self._needs, self._meter, self._keep = needs, meter, keep
        self._let_go: Callable[[], bool] = lambda: False
        self._peaks_mib: dict[Call, float] = {}  # of the last call of each kind, weights and all
        self._held_mib = 0.0  # before the call that runs
        self._sound = False  # the engine is wholly on its step
        self._reading: Reading | None = None  # the meter's, as long as nothing has changed it: asking takes time
        if meter:
            plan.settle(self._fits)
        self._change(plan.step, "the model itself")

    @property
    def info(self) -> ModelInfo:
        return replace(self.engine.info, peak_mib=max(self._peaks_mib.values(), default=None))

    @property
    def batch(self) -> int:
        return self.plan.step.batch

    def prepare(self, picture: Picture) -> Prepared:
        return self.engine.prepare(picture)

    def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
        return self._call("encode", len(pictures), lambda: self.engine.encode(pictures))

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]:
        count = max(map(len, prompt_groups(prompts)), default=0)
        return self._call("decode", count, lambda: self.engine.decode(embedding, prompts))

    def candidates(
        self, embedding: Embedding, points: Sequence[tuple[float, float]], *, iou: float, stability: float
    ) -> list[Candidate]:
        return self._call(
            "decode", len(points), lambda: self.engine.candidates(embedding, points, iou=iou, stability=stability)
        )

    def relieve_by(self, let_go: Callable[[], bool]) -> None:
        self._let_go = let_go

    # ── one call ──

    def _call(self, call: Call, count: int, run: Callable[[], T]) -> T:
        """`count`: pictures, or prompts that could share a call of the decoder."""
        self._reading = None
        self._get_ready(call, count)
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
            # Out of the except block, so that the traceback no longer keeps the failed call's tensors alive.
            if not self._relieved(call):
                self._step_down(call, count, self.engine.step, reason)

    def _get_ready(self, call: Call, count: int) -> None:
        """Before a call: mends what a failed change left, and puts the engine on what fits now."""
        if not self._meter or not self._needs:
            self._change(self.plan.step, "while changing the step")
            return
        if step := self.plan.up(lambda step: self._fits_above(step, call)):
            logger.info("memory is back: going up to {}", step)
        elif not self._fits(self.plan.step, False) and not (self._relieved(call) and self._fits(self.plan.step, False)):
            logger.warning("{} does not fit any more: going down to {}", self.engine.step, self.plan.settle(self._fits))
        if self.plan.step.network != self.engine.step.network or not self._sound:
            self._change(self.plan.step, "while changing the step")
        if self.engine.step.device != "cpu":
            free_mib = self._read().free_mib
            self._change(chunked(self.plan.step, call, count, free_mib, self._needs), "while changing the step")

    def _succeeded(self, call: Call, count: int) -> None:
        if not self._meter or not self._needs:
            self._try_higher()
            return
        step = self.engine.step
        if step.device == "cpu":
            self._peaks_mib.clear()
            self._needs.calm()
            return
        self._peaks_mib[call] = self._meter.peak_mib()
        # Where several chunks of a batch were encoded, the peak holds the embeddings of those before it.
        if count > 0 and (call == "decode" or count <= step.batch):
            peak_mib = self._peaks_mib[call] - self._held_mib
            if self._needs.worked(call, step, min(count, step.at_once(call)), peak_mib):
                self._keep(self._needs.measured)

    def _try_higher(self) -> None:
        step = self.plan.succeeded()
        if not step:
            return
        logger.info("memory has been enough for a while: trying {}", step)
        if not self._apply(step):
            with contextlib.suppress(TooLargeError):  # there is an answer: the next call may fail, this one has not
                self._step_down("encode", 1, step, "while stepping up")

    # ── memory ──

    def _fits(self, step: Step, cautious: bool, part: float = 1.0) -> bool:
        assert self._needs
        return fits(step, self._read().free_mib * part, self._needs, here=self.engine.step, cautious=cautious)

    def _fits_above(self, step: Step, call: Call) -> bool:
        """Whether a higher step fits, for which kept embeddings are given up if they are what is in its way."""
        if self._fits(step, True, UP):
            return True
        if call != "encode" or not self._needs:  # a decode's own embedding is no more in the way than elsewhere
            return False
        here, reading = self.engine.step, self._read()
        most_mib = reading.free_mib + max(0.0, reading.held_mib - self._needs.weights_mib(here))
        if not fits(step, most_mib * UP, self._needs, here=here, cautious=True):
            return False
        return self._relieved(call) and self._fits(step, True, UP)

    def _read(self) -> Reading:
        """The meter's reading; nothing free where the card is too full even for that."""
        assert self._meter
        if self._reading is None:
            try:
                self._reading = self._meter.read()
            except Exception as error:  # noqa: BLE001 - as in _call; a fault of the last call may show only here
                self._memory_reason(error)
                return Reading(0.0, 0.0, 0.0, 0.0)
        return self._reading

    def _free(self) -> None:
        self._reading = None
        try:
            self.engine.free()
        except Exception as error:  # noqa: BLE001 - as in _read
            self._memory_reason(error)

    def _relieved(self, call: Call) -> bool:
        """Whether kept embeddings could be given up."""
        if not self._let_go():
            return False
        logger.info("not enough memory in {}: kept embeddings are given up", call)
        self._free()
        return True

    def _memory_reason(self, error: Exception) -> str:
        """The first line of an out-of-memory error, which is counted; raises whatever is not one."""
        kind = kind_of(error)
        if kind == "device":
            remedy = "restart the process; if it comes again, look at the driver (dmesg) and the card"
            raise DeviceError(f"the device failed: {_first_line(error)}", remedy=remedy) from error
        if kind is None:
            raise error
        self.ooms += 1
        self._reading = None
        return _first_line(error)

    def _step_down(self, call: Call, count: int, failed: Step, reason: str) -> None:
        """To the next step that can be taken, after `call` with `count` to do has failed on `failed`."""
        self._free()
        while step := self._next(call, count, failed):
            logger.warning("out of memory in {} at {}: trying again at {}", call, failed, step)
            failed = step
            if self._apply(step):
                self._free()  # of what the step before held
                return
        raise TooLargeError(
            f"out of memory in {call} even at {failed} ({reason}; {self._numbers(call, failed, count)})",
            remedy="free memory on the device, choose a smaller model, or lower memory.min_side",
        )

    def _next(self, call: Call, count: int, failed: Step) -> Step | None:
        if not self._meter or not self._needs:
            return self.plan.down(call)
        at_once = max(1, min(count, failed.at_once(call)))
        free_mib = self._read().free_mib
        if failed.device != "cpu":
            self._needs.not_enough(call, failed, at_once, free_mib)
        step = self.plan.lower(failed, call, at_once)
        if not step or step.device == "cpu":
            return step
        return chunked(step, call, count, free_mib, self._needs)

    def _numbers(self, call: Call, step: Step, count: int) -> str:
        """What was needed and what there is, in words."""
        parts = []
        if self._needs:
            needed_mib = self._needs.call_mib(call, step, max(1, min(count, step.at_once(call))))
            parts.append(f"about {needed_mib:.0f} MiB needed")
        if self._meter:
            parts.append(f"on the card {self._read()}")
        return "; ".join([*parts, self.engine.memory_report()])

    def _change(self, step: Step, when: str) -> None:
        """Puts the engine on `step`, or, where not even that fits, on the next that does."""
        if (self._sound and step == self.engine.step) or self._apply(step):
            return
        self._step_down("encode", 1, step, when)

    def _apply(self, step: Step) -> bool:
        """False when even the change of step runs out of memory (weights converted or moved)."""
        if not self._sound or step.network != self.engine.step.network:
            self._reading = None
        self._sound = False
        try:
            self.engine.apply(step)
        except Exception as error:  # noqa: BLE001 - as in _call
            self._memory_reason(error)
        else:
            self._sound = True
            return True
        self._free()
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
