"""The memory plan: which step of the ladder the network runs on, what of it fits now, and which comes next.

Pure: no torch, no clock; free memory and needs are passed in. The ladder is the one of docs/architecture.md, least harm
first: half precision, fewer prompts per decoder call, smaller batch, smaller encoder input, the CPU. A failed encode
never costs prompts per call, and a failed decode never costs batch or side, because turning those dials would not help
the call that failed.

Where free memory can be read, how much of a batch goes into one call is chosen before each call (`chunked`), and only
precision, side and device are steps of the plan; it goes up as soon as a higher one fits. Elsewhere a step up is tried
after calls that worked.

What can still go wrong here: a step up may fail again; the plan then waits twice as long before it tries the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias

Call: TypeAlias = Literal["encode", "decode"]

SIDES = (768, 512, 256)  # below the native side, in pixels: all divide into SAM's and Hiera's windows and strides
PATIENCE = 50  # calls in a row that must succeed before a step up is tried
MAX_PATIENCE = 3200
FIRST_WAIT = 8  # calls before a second step up, where the first did not last


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

    @property
    def network(self) -> tuple[str, int, str]:
        """What is slow to change: precision, side, device. The rest is how much goes into one call."""
        return self.precision, self.side, self.device

    def at_once(self, call: Call) -> int:
        """Pictures or prompts in one call, at most."""
        return self.batch if call == "encode" else self.prompts_per_call


class Sized(Protocol):
    """What things take, in MiB (`needs.Needs`). `sure`: measured, or seen not to be enough; else an estimate."""

    def weights_mib(self, step: Step) -> float: ...
    def call_mib(self, call: Call, step: Step, count: int) -> float: ...
    def kept_mib(self, call: Call, step: Step, count: int) -> float: ...
    def sure(self, call: Call, step: Step) -> bool: ...


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


def smaller_chunk(step: Step, call: Call) -> Step | None:
    """The step with less in one call; None when one is in it."""
    if step.at_once(call) == 1:
        return None
    if call == "encode":
        return replace(step, batch=step.batch // 2)
    return replace(step, prompts_per_call=max(1, step.prompts_per_call // 4))


def chunked(step: Step, call: Call, count: int, free_mib: float, needs: Sized) -> Step:
    """`step` with as much in one call as `free_mib` holds: all of `count`, or less by the ladder's parts, or one."""

    def need_mib() -> float:
        at_once = min(count, step.at_once(call))
        return needs.call_mib(call, step, at_once) + needs.kept_mib(call, step, count - at_once)

    while need_mib() > free_mib:
        smaller = smaller_chunk(step, call)
        if not smaller:
            break
        step = smaller
    return step


def fits(step: Step, free_mib: float, needs: Sized, *, here: Step, cautious: bool) -> bool:
    """Whether `step` works in `free_mib`, one picture and one prompt at a time, when `here` is what lies there now.

    `cautious` believes estimates too. Otherwise only what is sure counts: an estimate must not cost quality, and a try
    that fails costs milliseconds.
    """
    if step.device == "cpu":
        return True
    room_mib = free_mib - needs.weights_mib(step) + needs.weights_mib(here)
    calls: tuple[Call, ...] = ("encode", "decode")
    return room_mib >= 0 and all(
        needs.call_mib(call, step, 1) <= room_mib for call in calls if cautious or needs.sure(call, step)
    )


class Plan:
    """Where on the ladder we stand. `down` after out of memory, `succeeded` after each call that worked.

    Where free memory can be read: `settle` before the first call, `up` before the others.
    """

    def __init__(self, first: Step, *, min_side: int = 256, half: str | None = None, patience: int = PATIENCE) -> None:
        self._taken = [first]
        self._min_side = min_side
        self._half = half
        self._patience = patience
        self._successes = 0
        self._fallback: Step | None = None  # while a step up is on trial: the step that worked
        self._since_up = self._since_down = MAX_PATIENCE  # calls
        self._wait = 0  # calls after a step down before the next step up

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

    def lower(self, step: Step, call: Call, count: int) -> Step | None:
        """As `down`, after `call` with so many in it failed on `step`, whose chunks are this plan's or less.

        Less in one call is no step of this plan: before the next call it is chosen anew.
        """
        while following := next_step(step, self.first, min_side=self._min_side, half=self._half, call=call):
            if following.network != step.network:
                return self._take(following)
            if following.at_once(call) < count:
                return following
            step = following
        return None

    def settle(self, fits: Callable[[Step, bool], bool]) -> Step:
        """Down to the first step that fits; `fits` gets a step and whether to be cautious about it.

        Estimates are believed where the step below costs no quality: half precision for float32.
        """
        while not fits(self.step, self._half is not None and self.step.precision == "float32"):
            bare = replace(self.step, batch=1, prompts_per_call=1)
            following = next_step(bare, self.first, min_side=self._min_side, half=self._half)
            if not following:
                break
            self._take(following)
        return self.step

    def up(self, fits: Callable[[Step], bool]) -> Step | None:
        """The highest of the steps that we came down from and that fits; None when none does. Asked once a call.

        At once when memory is back; but after a step up that did not last for `patience` calls only after a wait, which
        doubles each time.
        """
        self._since_up += 1
        self._since_down += 1
        if self._since_down < self._wait:
            return None
        index = next((index for index, step in enumerate(self._taken[:-1]) if fits(step)), None)
        if index is None:
            return None
        del self._taken[index + 1 :]
        self._since_up = 0
        return self.step

    def _take(self, step: Step) -> Step:
        """Goes down to `step`'s precision, side and device, with chunks as large as they were at the start."""
        if step.device == self.first.device:
            step = replace(step, batch=self.first.batch, prompts_per_call=self.first.prompts_per_call)
        self._taken.append(step)
        if self._since_up < self._patience:
            self._wait = min(max(FIRST_WAIT, 2 * self._wait), MAX_PATIENCE)
        elif self._since_down:  # not one more step of the same way down
            self._wait = 0
        self._since_up, self._since_down = MAX_PATIENCE, 0
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
