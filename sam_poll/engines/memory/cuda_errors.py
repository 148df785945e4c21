"""Classification of torch's exceptions: out of memory, a broken device, or neither.

The classification uses the names of classes and the wording of messages instead of importing torch,
so that the fake engine and its tests work without torch.

Limitations: an error that a later version of torch words differently counts as neither.
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
_DEVICE_WORDS = (
    "cuda error",
    "cuda driver error",
    "cublas",
    "cudnn",
    "device-side assert",
    "nccl",
    "hip error",
)


def classify_device_error(error: BaseException) -> Literal["memory", "device"] | None:
    """Return `memory` or `device` for an error of torch; None for other errors.

    After `memory` the call can be retried a step lower; after `device` the process must be
    replaced.
    """
    classes = {cls.__name__ for cls in type(error).__mro__}
    if classes & _MEMORY_CLASSES:
        return "memory"
    if not isinstance(error, RuntimeError):
        return None
    message = str(error).lower()
    if any(word in message for word in _MEMORY_WORDS):
        return "memory"
    if "AcceleratorError" in classes or any(word in message for word in _DEVICE_WORDS):
        return "device"
    return None
