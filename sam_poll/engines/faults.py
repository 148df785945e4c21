"""What an exception out of torch means to us: out of memory, a broken device, or something else.

Without importing torch, by the names that torch gives its classes and messages, so that the fake engine and its tests
need no torch. What can still go wrong here: a message that a later torch words differently is taken for our bug.
"""

from __future__ import annotations

from typing import Literal

_MEMORY_CLASSES = {"OutOfMemoryError", "MemoryError"}
_MEMORY_WORDS = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # c10's CPU allocator
    "not enough memory",
    "alloc_failed",  # cuBLAS and cuDNN
)
_DEVICE_WORDS = ("cuda error", "cuda driver error", "cublas", "cudnn", "device-side assert", "nccl", "hip error")


def kind_of(error: BaseException) -> Literal["memory", "device"] | None:
    """`memory`: try again a step lower. `device`: the process must be replaced. None: neither."""
    classes = {cls.__name__ for cls in type(error).__mro__}
    if classes & _MEMORY_CLASSES:
        return "memory"
    if not isinstance(error, RuntimeError):
        return None
    words = str(error).lower()
    if any(word in words for word in _MEMORY_WORDS):
        return "memory"
    if "AcceleratorError" in classes or any(word in words for word in _DEVICE_WORDS):
        return "device"
    return None
