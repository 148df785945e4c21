"""The device memory that each call needs, learned from measured peaks and from failures. Pure.

Before the first measurement the need is estimated. A measured peak counts for its own number of
pictures or prompts and scales the estimate for other numbers. A call that ran out of memory shows
that it needs more than was free. It is not retried in the same memory until `PATIENCE` calls have
succeeded; that number doubles each time that the call fails again. The retry makes sense because
other processes may have taken the memory between the reading and the failed call.

Limitations: memory that is free but fragmented; torch's expandable segments make that rare.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from sam_poll.engines.memory.estimate import Footprint
from sam_poll.engines.memory.plan import MAX_PATIENCE, PATIENCE, Call, MemoryStep

# Call, precision, side, pictures or prompts at once.
Key: TypeAlias = tuple[Call, str, int, int]

# A peak is the memory of tensors. Torch allocates it on the GPU in blocks, which takes a little
# more.
MARGIN = 1.05
# A failed call is retried when the free memory is larger than the insufficient one by this factor,
# so that small changes do not start a retry.
STEP_UP = 1.25


class MemoryRequirements:
    """The memory needs (`plan.MemoryModel`) of one network on one device.

    `measured` holds the measured peaks in MiB, on top of the memory held before the call.
    """

    def __init__(
        self,
        footprint: Footprint,
        measured: Mapping[Key, float] | None = None,
        *,
        patience: int = PATIENCE,
    ) -> None:
        self._footprint = footprint
        self.measured: dict[Key, float] = dict(measured or {})
        self._insufficient: dict[Key, float] = {}  # MiB that were free when the call failed
        self._forgotten: set[Key] = set()  # failures after which the call may be retried
        self._patience = patience
        self._successes = 0  # since the last failure, or since failures were forgotten

    def weights_mib(self, step: MemoryStep) -> float:
        """Return the MiB of the weights on the device; 0 for a step on the CPU."""
        return 0.0 if step.device == "cpu" else self._footprint.weights_mib(step.precision)

    def call_mib(self, call: Call, step: MemoryStep, count: int) -> float:
        """Return the MiB that must be free for a call with `count` pictures or prompts."""
        key = (call, step.precision, step.side, count)
        estimate = self._footprint.call_mib(*key)
        if key in self.measured:
            need = self.measured[key] * MARGIN
        else:
            scales = [
                mib * MARGIN / self._footprint.call_mib(*known)
                for known, mib in self._same_kind(key, self.measured)
            ]
            need = estimate * max(scales, default=1.0)
        for known, mib in self._same_kind(key, self._insufficient):
            if key not in self.measured or known[3] <= count:
                need = max(need, mib * STEP_UP * estimate / self._footprint.call_mib(*known))
        return need

    def kept_mib(self, call: Call, step: MemoryStep, count: int) -> float:
        """Return the MiB that `count` pictures leave on the device during the rest of the call.

        Decoded prompts leave nothing there.
        """
        if call != "encode":
            return 0.0
        return count * self._footprint.embedding_mib(step.precision, step.side)

    def is_known(self, call: Call, step: MemoryStep) -> bool:
        """Return whether the need is based on more than an estimate: on a peak or a failure."""
        key = (call, step.precision, step.side, 1)
        return bool(self._same_kind(key, self.measured) or self._same_kind(key, self._insufficient))

    def record_peak(self, call: Call, step: MemoryStep, count: int, peak_mib: float) -> bool:
        """Learn from the peak of a call that succeeded.

        Returns whether the peak exceeds the one known before by more than 1 MiB.
        """
        key = (call, step.precision, step.side, count)
        for known, _ in self._same_kind(key, self._insufficient):
            if known[3] <= count:
                del self._insufficient[known]
        self.count_success()
        if peak_mib <= self.measured.get(key, -1.0) + 1.0:
            return False
        self.measured[key] = peak_mib
        return True

    def count_success(self) -> None:
        """Count a call that succeeded, on any device."""
        self._successes += 1
        if self._successes >= self._patience:
            self._successes = 0
            self._forgotten |= set(self._insufficient)
            self._insufficient.clear()

    def record_failure(self, call: Call, step: MemoryStep, count: int, free_mib: float) -> None:
        """Learn from a call that ran out of memory when `free_mib` were free."""
        key = (call, step.precision, step.side, count)
        self._insufficient[key] = max(free_mib, 1.0)
        self._successes = 0
        if key in self._forgotten:
            self._forgotten.discard(key)
            self._patience = min(self._patience * 2, MAX_PATIENCE)

    @staticmethod
    def _same_kind(key: Key, known: Mapping[Key, float]) -> list[tuple[Key, float]]:
        """Return the entries of `known` for the same call, precision and side."""
        return [(other, mib) for other, mib in known.items() if other[:3] == key[:3]]
