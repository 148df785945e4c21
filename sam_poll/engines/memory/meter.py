"""Measurement of a device's free memory and of the peak of a call.

Limitations: other processes may take memory between a reading and the call that it was made for.
The call then runs out of memory, which `adaptive` handles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Reading:
    """A device's memory in MiB.

    - `free_mib`: memory that this process can still allocate.
    - `device_free_mib`: memory that is free for any process.
    - `total_mib`: all memory of the device.
    - `held_mib`: memory of this process's tensors.
    - `budget_mib`: limit of this process; None where there is none.
    """

    free_mib: float
    device_free_mib: float
    total_mib: float
    held_mib: float
    budget_mib: float | None = None

    def __str__(self) -> str:
        budget = f", budget {self.budget_mib:.0f} MiB" if self.budget_mib is not None else ""
        return (
            f"{self.free_mib:.0f} MiB available to this process, "
            f"{self.device_free_mib:.0f} of {self.total_mib:.0f} MiB free, "
            f"{self.held_mib:.0f} MiB held by this process{budget}"
        )


class Meter(Protocol):
    """A meter of one device's memory. All methods are called on the device thread."""

    @property
    def card(self) -> str:
        """Return the device's model and its software, for which measured peaks are valid."""
        ...

    def read(self) -> Reading:
        """Return the device's memory as it is now."""
        ...

    def start(self) -> None:
        """Start the measurement of a peak."""
        ...

    def peak_mib(self) -> float:
        """Return the largest memory of this process's tensors since `start`, in MiB."""
        ...


class CudaMeter:
    """A meter of a GPU, through torch.

    Memory that torch has reserved without using it counts as free; `reserve_mib` never does.
    """

    def __init__(self, device: str, *, budget_mib: int | None = None, reserve_mib: int = 0) -> None:
        import torch

        self._cuda = torch.cuda
        self._device = device
        self._budget_mib = budget_mib
        self._reserve_mib = reserve_mib
        self.card = f"{torch.cuda.get_device_name(device)} torch {torch.__version__}"

    def read(self) -> Reading:
        """Return the GPU's memory as it is now."""
        device_free, total = (count / MIB for count in self._cuda.mem_get_info(self._device))
        held = self._cuda.memory_allocated(self._device) / MIB
        unused = self._cuda.memory_reserved(self._device) / MIB - held
        free = device_free + unused - self._reserve_mib
        limit = self._limit_mib(total)
        if limit is not None:
            free = min(free, limit - held)
        return Reading(max(0.0, free), device_free, total, held, limit)

    def _limit_mib(self, total_mib: float) -> float | None:
        """Return the smaller of the budget and torch's memory fraction for this process."""
        limits = [] if self._budget_mib is None else [float(self._budget_mib)]
        # Torch can report the fraction since 2.8. In older versions it is assumed to be the one
        # that `devices.limit_memory` has set, which follows from the budget and the reserve.
        get_fraction = getattr(self._cuda, "get_per_process_memory_fraction", None)
        fraction = get_fraction(self._device) if get_fraction else 1.0
        if fraction < 1.0:
            limits.append(fraction * total_mib)
        return min(limits, default=None)

    def start(self) -> None:
        """Reset torch's peak of allocated memory."""
        self._cuda.reset_peak_memory_stats(self._device)

    def peak_mib(self) -> float:
        """Return torch's peak of allocated memory since `start`, in MiB."""
        return self._cuda.max_memory_allocated(self._device) / MIB
