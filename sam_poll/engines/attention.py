"""SAM1's attention in little memory: the same sums as segment_anything's, never all heads' maps at once.

Its own makes the whole map of every head, and three times over while positions are added: 3 GiB in float32 for vit_h at
side 1024, more than the weights. Here torch's fused kernel makes each map in pieces, and only the bias of relative
positions exists whole, for as many heads at once as fit into `BIAS_MIB`.

What can still go wrong here: torch falls back to a kernel that does make whole maps where it has no fused one (old
cards in float16); `BIAS_MIB` bounds these too, to about four times itself.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.image_encoder import get_rel_pos
from torch import Tensor

BIAS_MIB = 128


def install(encoder: Any) -> None:
    """Gives each attention of a segment_anything image encoder this way of computing it. Weights stay as they are."""
    for block in encoder.blocks:
        block.attn.forward = MethodType(attend, block.attn)


def attend(module: Any, x: Tensor) -> Tensor:
    """`Attention.forward` of segment_anything: x is batch×height×width×channels, and so is what comes out."""
    batch, height, width, _ = x.shape
    tokens, heads = height * width, module.num_heads
    qkv = module.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, batch * heads, tokens, -1).unbind(0)
    del qkv
    if not module.use_rel_pos:
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    else:
        mixed = _with_positions(module, q, k, v, (height, width))
    mixed = mixed.view(batch, heads, height, width, -1).permute(0, 2, 3, 1, 4)
    return module.proj(mixed.reshape(batch, height, width, -1))


def _with_positions(module: Any, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
    """Attention of (batch·heads)×tokens×channels, the decomposed relative positions of mvitv2 added to its maps."""
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
        mixed[here] = F.scaled_dot_product_attention(q[None, here], k[None, here], v[None, here], bias[None])[0]
        del bias  # before the next one is made
    return mixed
