"""How much of a device's memory is free now, and how much a call took: the plan's only look at the device.

What can still go wrong here: other processes take memory between a reading and the call it was made for; the call then
runs out of memory, which is answered (`adaptive`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Reading:
    """In MiB: what we could still get, what the device has free for anybody, all it has, what is ours, our limit."""

    free_mib: float
    device_free_mib: float
    total_mib: float
    held_mib: float
    budget_mib: float | None = None

    def __str__(self) -> str:
        budget = f", budget {self.budget_mib:.0f} MiB" if self.budget_mib is not None else ""
        return (
            f"{self.free_mib:.0f} MiB could be had, {self.device_free_mib:.0f} of {self.total_mib:.0f} MiB free, "
            f"{self.held_mib:.0f} MiB ours{budget}"
        )


class Meter(Protocol):
    """One device's memory. All calls are made on the device thread."""

    @property
    def card(self) -> str:
        """What measured peaks are valid for: the device's kind and the software that runs it."""
        ...

    def read(self) -> Reading: ...
    def start(self) -> None:
        """From here on the peak counts."""
        ...

    def peak_mib(self) -> float:
        """The most that was ours at once since `start`."""
        ...


class CudaMeter:
    """A card as torch sees it. What torch holds without using it counts as free, `reserve_mib` never does."""

    def __init__(self, device: str, *, budget_mib: int | None = None, reserve_mib: int = 0) -> None:
        import torch

        self._cuda = torch.cuda
        self._device = device
        self._budget_mib = budget_mib
        self._reserve_mib = reserve_mib
        self.card = f"{torch.cuda.get_device_name(device)} torch {torch.__version__}"

    def read(self) -> Reading:
        device_free, total = (count / MIB for count in self._cuda.mem_get_info(self._device))
        held = self._cuda.memory_allocated(self._device) / MIB
        unused = self._cuda.memory_reserved(self._device) / MIB - held
        free = device_free + unused - self._reserve_mib
        limit = self._limit_mib(total)
        if limit is not None:
            free = min(free, limit - held)
        return Reading(max(0.0, free), device_free, total, held, limit)

    def _limit_mib(self, total_mib: float) -> float | None:
        """The least of the budget and the part of the card that this process was given, by whomever."""
        limits = [] if self._budget_mib is None else [float(self._budget_mib)]
        # Since torch 2.8; before, only `devices.limit_memory` sets it, and the budget and the reserve are what it sets.
        part = getattr(self._cuda, "get_per_process_memory_fraction", lambda _: 1.0)(self._device)
        if part < 1.0:
            limits.append(part * total_mib)
        return min(limits, default=None)

    def start(self) -> None:
        self._cuda.reset_peak_memory_stats(self._device)

    def peak_mib(self) -> float:
        return self._cuda.max_memory_allocated(self._device) / MIB
