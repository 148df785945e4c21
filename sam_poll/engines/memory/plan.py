"""The memory plan: the step of the ladder that the network runs on, and the step after it.

Pure: no torch, no clock; free memory and needs are passed in. The ladder is the one of
docs/architecture.md, those steps first that reduce quality least: half precision, fewer prompts per
decoder call, smaller batch, smaller encoder input, the CPU. A failed encode never reduces the
prompts per call, and a failed decode never reduces batch or side, because that would not help the
call that failed.

Where free memory can be read, the size of a call is chosen before each call (`chunked`). The steps
of the plan then change only precision, side and device, and the plan goes up as soon as a higher
step fits. Where it cannot be read, a higher step is tried after a number of successful calls.

Limitations: a step up may fail again. The plan then waits twice as long before the next try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol, TypeAlias

# `find` is a call of the decoder, too, with texts instead of prompts.
Call: TypeAlias = Literal["encode", "decode", "find"]

# Sides below the native one, in pixels. All are multiples of SAM's and Hiera's windows and strides.
SIDES = (768, 512, 256)
# Waiting times in calls. No measurements are recorded for these values.
PATIENCE = 50  # calls that must succeed before a step up is tried
MAX_PATIENCE = 3200  # PATIENCE, doubled six times
FIRST_WAIT = 8  # before a second step up, where the first one did not last


@dataclass(frozen=True, slots=True)
class MemoryStep:
    """A way to run the network.

    `precision` is the name of a torch dtype, `side` the side of the encoder's input in pixels,
    `device` torch's name of the device.
    """

    precision: str
    prompts_per_call: int
    batch: int
    side: int
    device: str

    def __str__(self) -> str:
        return (
            f"{self.precision} {self.side} on {self.device}, "
            f"batch {self.batch}, {self.prompts_per_call} prompts a call"
        )

    @property
    def network(self) -> NetworkKey:
        """Return the parts of the step whose change takes time: precision, side and device.

        The others only limit the size of a call.
        """
        return NetworkKey(self.precision, self.side, self.device)

    def at_once(self, call: Call) -> int:
        """Return the largest number of pictures or prompts in one call."""
        return self.batch if call == "encode" else self.prompts_per_call


class NetworkKey(NamedTuple):
    """Precision, side and device of a `MemoryStep`."""

    precision: str
    side: int
    device: str


class MemoryModel(Protocol):
    """The memory needs of a network, in MiB; see `requirements.MemoryRequirements`."""

    def weights_mib(self, step: MemoryStep) -> float:
        """Return the memory of the weights."""
        ...

    def call_mib(self, call: Call, step: MemoryStep, count: int) -> float:
        """Return the memory of a call with `count` pictures or prompts."""
        ...

    def kept_mib(self, call: Call, step: MemoryStep, count: int) -> float:
        """Return the memory that `count` pictures or prompts hold during the rest of the call."""
        ...

    def is_known(self, call: Call, step: MemoryStep) -> bool:
        """Return whether `call_mib` is based on a measured peak or a failure, not an estimate."""
        ...


def cpu_prompts(side: int) -> int:
    """Return the number of prompts in a decoder call on a CPU: 16 at side 256, 4 at 512, 1 at 1024.

    Measured on one core: below side 512 several prompts per call are twice as fast; at 1024 sixteen
    are twice as slow as one, because their features exceed the cache.
    """
    return max(1, 16 * 256**2 // side**2)


def cpu_step(side: int) -> MemoryStep:
    """Return the step to run a network on a CPU: float32, one picture at a time."""
    return MemoryStep("float32", cpu_prompts(side), 1, side, "cpu")


def _smaller_side(step: MemoryStep, min_side: int) -> MemoryStep | None:
    side = next((side for side in SIDES if min_side <= side < step.side), None)
    return replace(step, side=side) if side else None


def next_step(
    step: MemoryStep,
    first: MemoryStep,
    *,
    min_side: int = 256,
    half: str | None = None,
    call: Call | None = None,
) -> MemoryStep | None:
    """Return the next step below `step`; None where no step below could help `call`.

    `call` None means any call. `half` is the half precision that the device is good at; None if it
    has none.
    """
    on_cpu_as_last_resort = step.device == "cpu" and first.device != "cpu"
    if on_cpu_as_last_resort:
        return None
    if half and step.precision == "float32":
        return replace(step, precision=half)
    if call != "encode" and step.prompts_per_call > 1:
        return replace(step, prompts_per_call=max(1, step.prompts_per_call // 4))
    if call in (None, "encode") and step.batch > 1:
        return replace(step, batch=step.batch // 2)
    if call in (None, "encode") and (smaller := _smaller_side(step, min_side)):
        return smaller
    if first.device != "cpu":
        # The host has more memory: on the CPU the full side costs time but no quality.
        return cpu_step(first.side)
    return None


def ladder(first: MemoryStep, *, min_side: int = 256, half: str | None = None) -> list[MemoryStep]:
    """Return every step from `first` down to the last one, in order."""

    def walk() -> Iterator[MemoryStep]:
        step: MemoryStep | None = first
        while step:
            yield step
            step = next_step(step, first, min_side=min_side, half=half)

    return list(walk())


def smaller_chunk(step: MemoryStep, call: Call) -> MemoryStep | None:
    """Return the step with a smaller call; None where a call holds only one already."""
    if step.at_once(call) == 1:
        return None
    if call == "encode":
        return replace(step, batch=step.batch // 2)
    return replace(step, prompts_per_call=max(1, step.prompts_per_call // 4))


def chunked(
    step: MemoryStep, call: Call, count: int, free_mib: float, needs: MemoryModel
) -> MemoryStep:
    """Return `step` with as many pictures or prompts in one call as fit into `free_mib`.

    The number is reduced by the factors of the ladder, down to one.
    """

    def need_mib() -> float:
        at_once = min(count, step.at_once(call))
        return needs.call_mib(call, step, at_once) + needs.kept_mib(call, step, count - at_once)

    while need_mib() > free_mib:
        smaller = smaller_chunk(step, call)
        if not smaller:
            break
        step = smaller
    return step


def fits(
    step: MemoryStep, free_mib: float, needs: MemoryModel, *, here: MemoryStep, cautious: bool
) -> bool:
    """Return whether `step` fits into `free_mib`, with one picture and one prompt per call.

    `here` is the step whose weights are on the device now. With `cautious`, estimates count, too.
    Without it only known needs count: an estimate must not reduce the quality, and a try that fails
    costs milliseconds.
    """
    if step.device == "cpu":
        return True
    room_mib = free_mib - needs.weights_mib(step) + needs.weights_mib(here)
    calls: tuple[Call, ...] = ("encode", "decode", "find")
    return room_mib >= 0 and all(
        needs.call_mib(call, step, 1) <= room_mib
        for call in calls
        if cautious or needs.is_known(call, step)
    )


class MemoryPlan:
    """The current position on the ladder.

    Where free memory can be read, call `settle` before the first call of the network, `up` before
    the others, and `lower` after an out-of-memory error. Where it cannot be read, call `succeeded`
    after each call that succeeded, and `down` after an out-of-memory error.
    """

    def __init__(
        self,
        first: MemoryStep,
        *,
        min_side: int = 256,
        half: str | None = None,
        patience: int = PATIENCE,
    ) -> None:
        self._path = [first]  # the steps from the first to the current one
        self._min_side = min_side
        self._half = half
        self._patience = patience
        self._successes = 0
        # While a step up is on trial: the step to return to if it fails.
        self._fallback: MemoryStep | None = None
        self._calls_since_up = MAX_PATIENCE
        self._calls_since_down = MAX_PATIENCE
        self._wait = 0  # calls after a step down before the next step up

    @property
    def step(self) -> MemoryStep:
        """Return the step to run on now."""
        return self._path[-1]

    @property
    def first(self) -> MemoryStep:
        """Return the highest step, on which the plan started."""
        return self._path[0]

    def down(self, call: Call | None = None) -> MemoryStep | None:
        """Return the step to try after `call` failed; None where no step could help it."""
        if self._fallback:  # the step up was too early: memory is still short
            self._patience = min(self._patience * 2, MAX_PATIENCE)
            step: MemoryStep | None = self._fallback
        else:
            step = next_step(
                self.step, self.first, min_side=self._min_side, half=self._half, call=call
            )
        self._successes = 0
        self._fallback = None
        if step:
            self._path.append(step)
        return step

    def lower(self, step: MemoryStep, call: Call, count: int) -> MemoryStep | None:
        """Return the step to try after `call` with `count` pictures or prompts failed on `step`.

        The calls of `step` may be smaller than those of the plan's step. A smaller call does not
        change the plan's step, because its size is chosen again before the next call.
        """
        while following := next_step(
            step, self.first, min_side=self._min_side, half=self._half, call=call
        ):
            if following.network != step.network:
                return self._descend(following)
            if following.at_once(call) < count:
                return following
            step = following
        return None

    def settle(self, fits: Callable[[MemoryStep, bool], bool]) -> MemoryStep:
        """Go down to the first step that fits, and return it.

        `fits` takes a step and whether to be cautious, see the function `fits`. It is cautious
        where the next step costs no quality: half precision after float32.
        """
        while not fits(self.step, self._half is not None and self.step.precision == "float32"):
            bare = replace(self.step, batch=1, prompts_per_call=1)
            following = next_step(bare, self.first, min_side=self._min_side, half=self._half)
            if not following:
                break
            self._descend(following)
        return self.step

    def up(self, fits: Callable[[MemoryStep], bool]) -> MemoryStep | None:
        """Go up to the highest step that fits, and return it; None where no higher step fits.

        Call it once before each call of the network. The plan goes up as soon as memory is free
        again. But after a step up that did not last for `patience` calls it waits first, twice as
        long each time.
        """
        self._calls_since_up += 1
        self._calls_since_down += 1
        if self._calls_since_down < self._wait:
            return None
        index = next((index for index, step in enumerate(self._path[:-1]) if fits(step)), None)
        if index is None:
            return None
        del self._path[index + 1 :]
        self._calls_since_up = 0
        return self.step

    def _descend(self, step: MemoryStep) -> MemoryStep:
        """Go down to the precision, side and device of `step`, with the call sizes of `first`."""
        if step.device == self.first.device:
            step = replace(
                step, batch=self.first.batch, prompts_per_call=self.first.prompts_per_call
            )
        self._path.append(step)
        if self._calls_since_up < self._patience:
            self._wait = min(max(FIRST_WAIT, 2 * self._wait), MAX_PATIENCE)
        elif self._calls_since_down:  # 0 where several steps are taken in one descent
            self._wait = 0
        self._calls_since_up = MAX_PATIENCE
        self._calls_since_down = 0
        return step

    def succeeded(self) -> MemoryStep | None:
        """Count a call that succeeded, and return the higher step to try now, if any."""
        self._successes += 1
        if self._successes < self._patience:
            return None
        self._successes = 0
        self._fallback = None
        if len(self._path) == 1:
            return None
        self._fallback = self._path.pop()
        return self.step
