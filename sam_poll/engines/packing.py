"""Tensors of embeddings as bytes in half precision, for the disk cache, and back.

Half-precision tensors are kept exactly. float32 is rounded to float16 (11 significant bits, against
8 of bfloat16), or to bfloat16 where a value is beyond the range of float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from sam_poll.core.types import PackedEmbedding, PackedLevel

Layout: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""The type that the network computes and the shape (1×C×h×w), for each tensor of an embedding."""

_FLOAT16_MAX = torch.finfo(torch.float16).max


def pack_level(level: Tensor) -> PackedLevel:
    """Copy a tensor to main memory, in half precision."""
    computed = level.dtype
    held = level.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if computed == torch.float32:
        in_range = bool(held.abs().max() <= _FLOAT16_MAX)
        held = held.to(torch.float16 if in_range else torch.bfloat16)
    # numpy has no bfloat16.
    data = held.flatten().view(torch.int16).numpy().data.cast("B")
    return PackedLevel(data, _name(held.dtype), _name(computed), tuple(held.shape))


def unpack_level(level: PackedLevel) -> Tensor:
    """Return the tensor on the CPU, in the type that the network computes."""
    held = torch.frombuffer(level.data, dtype=getattr(torch, level.dtype))
    return held.reshape(level.shape).to(getattr(torch, level.computed))


def layout_of(packed: PackedEmbedding) -> Layout:
    """Return the form of an embedding."""
    return tuple((level.computed, level.shape) for level in packed.levels)


def layout_of_batch(levels: Sequence[Tensor]) -> Layout:
    """Return the form of each embedding of a batch; `levels` are n×C×h×w."""
    return tuple((_name(level.dtype), (1, *level.shape[1:])) for level in levels)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
