"""The memory plan: which step of the ladder the network runs on, and which comes next when memory runs out.

Pure: no torch, no clock. The ladder is the one of docs/architecture.md, least harm first: half precision, fewer prompts
per decoder call, smaller batch, smaller encoder input, the CPU. A failed encode never costs prompts per call, and a
failed decode never costs batch or side, because turning those dials would not help the call that failed.

What can still go wrong here: a step up may fail again; the plan then waits twice as long before it tries the next time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

Call: TypeAlias = Literal["encode", "decode"]

SIDES = (768, 512, 256)  # below the native side, in pixels: all divide into SAM's and Hiera's windows and strides
PATIENCE = 50  # calls in a row that must succeed before a step up is tried
MAX_PATIENCE = 3200


@dataclass(frozen=True, slots=True)
class Step:
    """How the network is run: `precision` is a torch dtype's name, `side` the encoder's input in pixels."""

    precision: str
    prompts_per_call: int
    batch: int
    side: int
    device: str

    def __str__(self) -> str:
        return (
            f"{self.precision} {self.side} on {self.device}, batch {self.batch}, {self.prompts_per_call} prompts a call"
        )


def cpu_prompts(side: int) -> int:
    """How many prompts a decoder call should hold on a CPU: 16 at side 256, 4 at 512, 1 at 1024.

    Measured on one core: below side 512 more prompts a call are twice as fast, at 1024 sixteen are twice as slow as
    one, because their features leave the cache.
    """
    return max(1, 16 * 256**2 // side**2)


def cpu_step(side: int) -> Step:
    """The plain way to run on a CPU."""
    return Step("float32", cpu_prompts(side), 1, side, "cpu")


def _smaller_side(step: Step, min_side: int) -> Step | None:
    side = next((side for side in SIDES if min_side <= side < step.side), None)
    return replace(step, side=side) if side else None


def next_step(
    step: Step, first: Step, *, min_side: int = 256, half: str | None = None, call: Call | None = None
) -> Step | None:
    """The next step below `step`, or None when there is none that could help `call` (None: any call).

    `half` is the half precision that the device is good at, None if it has none.
    """
    on_cpu_as_last_resort = step.device == "cpu" and first.device != "cpu"
    if on_cpu_as_last_resort:
        return None
    if half and step.precision == "float32":
        return replace(step, precision=half)
    if call != "encode" and step.prompts_per_call > 1:
        return replace(step, prompts_per_call=max(1, step.prompts_per_call // 4))
    if call != "decode" and step.batch > 1:
        return replace(step, batch=step.batch // 2)
    if call != "decode" and (smaller := _smaller_side(step, min_side)):
        return smaller
    if first.device != "cpu":
        # The host has the room: back to the full side, which costs time but no quality.
        return cpu_step(first.side)
    return None


def ladder(first: Step, *, min_side: int = 256, half: str | None = None) -> list[Step]:
    """Every step from `first` down to the last resort, in order."""

    def walk() -> Iterator[Step]:
        step: Step | None = first
        while step:
            yield step
            step = next_step(step, first, min_side=min_side, half=half)

    return list(walk())


class Plan:
    """Where on the ladder we stand. `down` after out of memory, `succeeded` after each call that worked."""

    def __init__(self, first: Step, *, min_side: int = 256, half: str | None = None, patience: int = PATIENCE) -> None:
        self._taken = [first]
        self._min_side = min_side
        self._half = half
        self._patience = patience
        self._successes = 0
        self._fallback: Step | None = None  # while a step up is on trial: the step that worked

    @property
    def step(self) -> Step:
        """The step to run on now."""
        return self._taken[-1]

    @property
    def first(self) -> Step:
        """The step we started on and would like to be on."""
        return self._taken[0]

    def down(self, call: Call | None = None) -> Step | None:
        """The step to try after `call` failed; None when nothing is left that could help it."""
        if self._fallback:  # the memory that we hoped for has not come back
            self._patience = min(self._patience * 2, MAX_PATIENCE)
            step: Step | None = self._fallback
        else:
            step = next_step(self.step, self.first, min_side=self._min_side, half=self._half, call=call)
        self._successes, self._fallback = 0, None
        if step:
            self._taken.append(step)
        return step

    def succeeded(self) -> Step | None:
        """Counts a call that worked; the step to go up to when it is time to try that, else None."""
        self._successes += 1
        if self._successes < self._patience:
            return None
        self._successes, self._fallback = 0, None
        if len(self._taken) == 1:
            return None
        self._fallback = self._taken.pop()
        return self.step
