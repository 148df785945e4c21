"""An engine that answers out of memory by stepping down the ladder and trying the same call again.

What can still go wrong here: the ladder's last step fails (`TooLargeError`, this job only), or the device itself fails
(`DeviceError`, the process must be replaced: a CUDA context does not survive a kernel fault).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from loguru import logger

from sam_poll.engines.faults import kind_of
from sam_poll.engines.memory import Call, Plan, Step
from sam_poll.errors import DeviceError, TooLargeError
from sam_poll.types import Embedding, Engine, Logits, ModelInfo, Picture, Prepared, Prompt

T = TypeVar("T")


class Steppable(Engine, Protocol):
    """An engine whose precision, chunk sizes, side and device can be changed between two calls."""

    def apply(self, step: Step) -> None: ...
    def free(self) -> None:
        """Gives memory that is not in use back to the device."""
        ...

    def memory_report(self) -> str:
        """The device's memory in words, for the error's reader."""
        ...


class AdaptiveEngine:
    """Wraps an engine and puts it on the plan's step. `encode` and `decode` are for the one device thread.

    `ooms` counts how often memory has not been enough.
    """

    def __init__(self, engine: Steppable, plan: Plan) -> None:
        self.engine = engine
        self.plan = plan
        self.ooms = 0
        self._let_go: Callable[[], bool] = lambda: False
        if not self._apply(plan.step):
            self._step_down("encode", "the model itself")

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    @property
    def batch(self) -> int:
        return self.plan.step.batch

    def prepare(self, picture: Picture) -> Prepared:
        return self.engine.prepare(picture)

    def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
        return self._call("encode", lambda: self.engine.encode(pictures))

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]:
        return self._call("decode", lambda: self.engine.decode(embedding, prompts))

    def relieve_by(self, let_go: Callable[[], bool]) -> None:
        self._let_go = let_go

    def _call(self, call: Call, run: Callable[[], T]) -> T:
        while True:
            try:
                result = run()
            except Exception as error:  # noqa: BLE001 - torch has no narrower class for all of its device errors
                reason = self._memory_reason(error)
            else:
                self._succeeded()
                return result
            # Out of the except block, so that the traceback no longer keeps the failed call's tensors alive.
            if self._let_go():
                logger.info("out of memory in {}: kept embeddings are given up, and it is tried again", call)
                self.engine.free()
            else:
                self._step_down(call, reason)

    def _memory_reason(self, error: Exception) -> str:
        """The first line of an out-of-memory error, which is counted; raises whatever is not one."""
        kind = kind_of(error)
        if kind == "device":
            remedy = "restart the process; if it comes again, look at the driver (dmesg) and the card"
            raise DeviceError(f"the device failed: {_first_line(error)}", remedy=remedy) from error
        if kind is None:
            raise error
        self.ooms += 1
        return _first_line(error)

    def _step_down(self, call: Call, reason: str) -> None:
        failed = self.plan.step
        self.engine.free()
        while step := self.plan.down(call):
            logger.warning("out of memory in {} at {}: trying again at {}", call, failed, step)
            if self._apply(step):
                self.engine.free()  # of what the step before held
                return
        raise TooLargeError(
            f"out of memory in {call} even at {failed} ({reason}; {self.engine.memory_report()})",
            remedy="free memory on the device, choose a smaller model, or lower memory.min_side",
        )

    def _succeeded(self) -> None:
        step = self.plan.succeeded()
        if not step:
            return
        logger.info("memory has been enough for a while: trying {}", step)
        if not self._apply(step):
            with contextlib.suppress(TooLargeError):  # there is an answer: the next call may fail, this one has not
                self._step_down("encode", "while stepping up")

    def _apply(self, step: Step) -> bool:
        """False when even the change of step runs out of memory (weights converted or moved)."""
        try:
            self.engine.apply(step)
        except Exception as error:  # noqa: BLE001 - as in _call
            self._memory_reason(error)
        else:
            return True
        self.engine.free()
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
