"""Attention in less memory and time: the same sums as the libraries', never all heads' maps at once.

segment_anything makes the whole map of every head, and three times over while positions are added: 3 GiB in float32 for
vit_h at side 1024, more than the weights. Here torch's fused kernel makes each map in pieces, and only the bias of
relative positions exists whole, for as many heads at once as fit into `BIAS_MIB`. Measured on one core of Zen 4, global
attention of vit_b at 1024: 4.2 → 1.5 s.

In bfloat16 on a CPU without AMX torch's fused kernel is no faster than in float32, while matrix products are more than
twice as fast; there maps of `ROWS` rows are made one after the other. Measured as above: 4 heads of 4096 tokens and 96
channels in 221 instead of 350 ms; the encoder of sam2.1_hiera_tiny in 2.46 instead of 2.99 s.

What can still go wrong here: torch falls back to a kernel that does make whole maps where it has no fused one (old
cards in float16); `BIAS_MIB` bounds these too, to about four times itself.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BIAS_MIB = 128
ROWS = 256  # of a map made at once: 4 heads of 256×4096 in bfloat16 are 8 MiB, which caches hold
LONG = 1024  # tokens; with fewer the fused kernel is as fast


def install(encoder: Any) -> None:
    """Gives each attention of a segment_anything image encoder this way of computing it. Weights stay as they are."""
    for block in encoder.blocks:
        block.attn.forward = MethodType(attend, block.attn)


def install_hiera(trunk: Any) -> None:
    """Gives each global attention of sam2's trunk the CPU's way in bfloat16."""
    for block in trunk.blocks:
        if block.window_size == 0 and not block.q_stride:
            block.attn.forward = MethodType(attend_hiera, block.attn)


def attend_hiera(module: Any, x: Tensor) -> Tensor:
    """`MultiScaleAttention.forward` of sam2 where queries are not pooled."""
    batch, height, width, _ = x.shape
    qkv = module.qkv(x).reshape(batch, height * width, 3, module.num_heads, -1)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return module.proj(attention(q, k, v).transpose(1, 2).reshape(batch, height, width, -1))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of batch×heads×tokens×channels, `bias` added to the maps, by the way that is fastest here."""
    if not _by_rows(q):
        return F.scaled_dot_product_attention(q, k, v, bias)
    mixed = torch.empty_like(q)
    keys = k.transpose(-1, -2) * q.shape[-1] ** -0.5
    with torch.autocast("cpu", enabled=False):  # which would take the softmax in float32, in memory
        for start in range(0, q.shape[-2], ROWS):
            here = slice(start, start + ROWS)
            rows = q[..., here, :] @ keys
            if bias is not None:
                rows += bias[..., here, :]
            mixed[..., here, :] = rows.softmax(-1) @ v
    return mixed


def _by_rows(q: Tensor) -> bool:
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[-2] < LONG or torch.compiler.is_compiling():
        return False
    return not getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # with AMX the fused kernel is fast


def attend(module: Any, x: Tensor) -> Tensor:
    """`Attention.forward` of segment_anything: x is batch×height×width×channels, and so is what comes out."""
    batch, height, width, _ = x.shape
    tokens, heads = height * width, module.num_heads
    qkv = module.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, batch * heads, tokens, -1).unbind(0)
    del qkv
    if not module.use_rel_pos:
        mixed = attention(q[None], k[None], v[None])[0]
    else:
        mixed = _with_positions(module, q, k, v, (height, width))
    mixed = mixed.view(batch, heads, height, width, -1).permute(0, 2, 3, 1, 4)
    return module.proj(mixed.reshape(batch, height, width, -1))


def _with_positions(module: Any, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
    """Attention of (batch·heads)×tokens×channels, the decomposed relative positions of mvitv2 added to its maps."""
    from segment_anything.modeling.image_encoder import get_rel_pos  # SAM2 does without the package

    height, width = size
    maps, tokens, channels = q.shape
    grid = q.reshape(maps, height, width, channels)
    by_row = torch.einsum("bhwc,hkc->bhwk", grid, get_rel_pos(height, height, module.rel_pos_h)).contiguous()
    by_column = torch.einsum("bhwc,wkc->bhwk", grid, get_rel_pos(width, width, module.rel_pos_w)).contiguous()
    mixed = torch.empty_like(v)
    at_once = max(1, BIAS_MIB * 2**20 // (tokens * tokens * by_row.element_size()))
    for start in range(0, maps, at_once):
        here = slice(start, start + at_once)
        bias = (by_row[here, :, :, :, None] + by_column[here, :, :, None, :]).view(-1, tokens, tokens)
        mixed[here] = attention(q[None, here], k[None, here], v[None, here], bias[None])[0]
        del bias  # before the next one is made
    return mixed
