"""What each call takes of the device's memory: estimated, measured once it has run, and more than was not enough.

Pure. A measured peak counts for its own number of pictures or prompts, and scales the estimate for other numbers. A
call that ran out of memory says that it needs more than was free: it is not tried again in the same memory, until
`PATIENCE` calls have worked (each time that it fails again, twice as many), because what was read as free may have been
taken by others in between.

What can still go wrong here: memory that is free in pieces only; torch's expandable segments make that rare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from sam_poll.engines.estimate import Footprint
from sam_poll.engines.memory import MAX_PATIENCE, PATIENCE, Call, Step

Key: TypeAlias = tuple[Call, str, int, int]  # call, precision, side, pictures or prompts at once

# A peak is what tensors take; what torch takes for them from the card is rounded up to blocks, and a little more.
MARGIN = 1.05
# What failed is tried again when there is this much more than what was not enough, so that noise does not start a try.
STEP_UP = 1.25


class Needs:
    """`memory.Sized` for one network on one device."""

    def __init__(
        self, footprint: Footprint, measured: Mapping[Key, float] | None = None, *, patience: int = PATIENCE
    ) -> None:
        self._footprint = footprint
        self.measured: dict[Key, float] = dict(measured or {})  # MiB on top of what was held before the call
        self._refused: dict[Key, float] = {}  # MiB that were not enough
        self._forgotten: set[Key] = set()
        self._patience = patience
        self._worked = 0

    def weights_mib(self, step: Step) -> float:
        """MiB of the weights on a device that is not the host."""
        return 0.0 if step.device == "cpu" else self._footprint.weights_mib(step.precision)

    def call_mib(self, call: Call, step: Step, count: int) -> float:
        """MiB that must be free for a call with `count` pictures or prompts."""
        key = (call, step.precision, step.side, count)
        estimate = self._footprint.call_mib(*key)
        if key in self.measured:
            need = self.measured[key] * MARGIN
        else:
            scales = [mib * MARGIN / self._footprint.call_mib(*known) for known, mib in self._like(key, self.measured)]
            need = estimate * max(scales, default=1.0)
        for known, mib in self._like(key, self._refused):
            if key not in self.measured or known[3] <= count:
                need = max(need, mib * STEP_UP * estimate / self._footprint.call_mib(*known))
        return need

    def kept_mib(self, call: Call, step: Step, count: int) -> float:
        """MiB of what `count` pictures or prompts leave on the device while others of the same call are at work."""
        return count * self._footprint.embedding_mib(step.precision, step.side) if call == "encode" else 0.0

    def sure(self, call: Call, step: Step) -> bool:
        """Whether anything is known of the call besides its estimate."""
        key = (call, step.precision, step.side, 1)
        return bool(self._like(key, self.measured) or self._like(key, self._refused))

    def worked(self, call: Call, step: Step, count: int, peak_mib: float) -> bool:
        """Learns from a call's peak; True when it is more than was known (by a MiB)."""
        key = (call, step.precision, step.side, count)
        for known, _ in self._like(key, self._refused):
            if known[3] <= count:
                del self._refused[known]
        self.calm()
        if peak_mib <= self.measured.get(key, -1.0) + 1.0:
            return False
        self.measured[key] = peak_mib
        return True

    def calm(self) -> None:
        """Counts a call that worked, on whatever device."""
        self._worked += 1
        if self._worked >= self._patience:
            self._worked = 0
            self._forgotten |= set(self._refused)
            self._refused.clear()

    def not_enough(self, call: Call, step: Step, count: int, free_mib: float) -> None:
        """Learns from a call that ran out of memory when `free_mib` were free."""
        key = (call, step.precision, step.side, count)
        self._refused[key] = max(free_mib, 1.0)
        self._worked = 0
        if key in self._forgotten:
            self._forgotten.discard(key)
            self._patience = min(self._patience * 2, MAX_PATIENCE)

    @staticmethod
    def _like(key: Key, known: Mapping[Key, float]) -> list[tuple[Key, float]]:
        """What is known of the same call, precision and side."""
        return [(other, mib) for other, mib in known.items() if other[:3] == key[:3]]
