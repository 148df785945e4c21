"""Attention with the results of the libraries' own, in less memory and time.

segment_anything computes the whole attention map of every head, in three copies while positions
are added: 3 GiB in float32 for vit_h at side 1024, which is more than the weights. Here torch's
fused kernel computes each map in pieces. Only the bias of relative positions exists as a whole, for
as many heads at once as fit into `BIAS_MIB`. Measured on one core of Zen 4, global attention of
vit_b at side 1024: 4.2 → 1.5 s.

In bfloat16 on a CPU without AMX torch's fused kernel is no faster than in float32, while matrix
products are more than twice as fast. There the maps are computed `ROWS` rows at a time. Measured as
above: 4 heads of 4096 tokens and 96 channels in 221 instead of 350 ms; the encoder of
sam2.1_hiera_tiny in 2.46 instead of 2.99 s.

Limitations: where torch has no fused kernel (old GPUs in float16), it falls back to one that
computes whole maps. `BIAS_MIB` limits these, too, to about four times its value.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Limit of the bias that exists at one time, counted by `memory.estimate`. No measurement is
# recorded for this value.
BIAS_MIB = 128
# Rows of a map computed at once: 4 heads of 256×4096 in bfloat16 are 8 MiB, which CPU caches hold.
ROWS = 256
LONG = 1024  # tokens; for shorter sequences the fused kernel is as fast (measured)


def install(encoder: Any) -> None:
    """Replace the attention of a segment_anything image encoder by `attend`.

    The weights stay as they are.
    """
    for block in encoder.blocks:
        block.attn.forward = MethodType(attend, block.attn)


def install_hiera(trunk: Any) -> None:
    """Replace each global attention of sam2's trunk by `attend_hiera`.

    It differs from sam2's own in bfloat16 on a CPU only.
    """
    for block in trunk.blocks:
        if block.window_size == 0 and not block.q_stride:
            block.attn.forward = MethodType(attend_hiera, block.attn)


def attend_hiera(module: Any, x: Tensor) -> Tensor:
    """Compute `MultiScaleAttention.forward` of sam2 for blocks that do not pool their queries.

    `x` and the result are batch×height×width×channels.
    """
    batch, height, width, _ = x.shape
    qkv = module.qkv(x).reshape(batch, height * width, 3, module.num_heads, -1)
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return module.proj(attention(q, k, v).transpose(1, 2).reshape(batch, height, width, -1))


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the attention of batch×heads×tokens×channels, with `bias` added to the maps.

    Uses torch's fused kernel, or computes by rows where that is faster (`_by_rows`).
    """
    if not _by_rows(q):
        return F.scaled_dot_product_attention(q, k, v, bias)
    result = torch.empty_like(q)
    keys = k.transpose(-1, -2) * q.shape[-1] ** -0.5
    # Autocast would compute the softmax in float32 and so double its memory.
    with torch.autocast("cpu", enabled=False):
        for start in range(0, q.shape[-2], ROWS):
            block = slice(start, start + ROWS)
            rows = q[..., block, :] @ keys
            if bias is not None:
                rows += bias[..., block, :]
            result[..., block, :] = rows.softmax(-1) @ v
    return result


def _by_rows(q: Tensor) -> bool:
    """Return whether computing by rows is faster than torch's fused kernel."""
    if (
        q.device.type != "cpu"
        or q.dtype != torch.bfloat16
        or q.shape[-2] < LONG
        or torch.compiler.is_compiling()
    ):
        return False
    # With AMX the fused kernel is fast. Not every version of torch has this private function.
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    return not has_amx()


def attend(module: Any, x: Tensor) -> Tensor:
    """Compute `Attention.forward` of segment_anything.

    `x` and the result are batch×height×width×channels.
    """
    batch, height, width, _ = x.shape
    tokens = height * width
    heads = module.num_heads
    qkv = module.qkv(x).reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.reshape(3, batch * heads, tokens, -1).unbind(0)
    del qkv
    if not module.use_rel_pos:
        result = attention(q[None], k[None], v[None])[0]
    else:
        result = _with_positions(module, q, k, v, (height, width))
    result = result.view(batch, heads, height, width, -1).permute(0, 2, 3, 1, 4)
    return module.proj(result.reshape(batch, height, width, -1))


def _with_positions(module: Any, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the attention of (batch·heads)×tokens×channels with relative positions.

    The decomposed relative positions of MViTv2 are added to the maps, as in segment_anything's
    `add_decomposed_rel_pos`.
    """
    # Imported here, because SAM2 works without this package.
    from segment_anything.modeling.image_encoder import get_rel_pos

    height, width = size
    maps, tokens, channels = q.shape
    grid = q.reshape(maps, height, width, channels)
    by_row = torch.einsum(
        "bhwc,hkc->bhwk", grid, get_rel_pos(height, height, module.rel_pos_h)
    ).contiguous()
    by_column = torch.einsum(
        "bhwc,wkc->bhwk", grid, get_rel_pos(width, width, module.rel_pos_w)
    ).contiguous()
    result = torch.empty_like(v)
    at_once = max(1, BIAS_MIB * 2**20 // (tokens * tokens * by_row.element_size()))
    for start in range(0, maps, at_once):
        block = slice(start, start + at_once)
        bias = (by_row[block, :, :, :, None] + by_column[block, :, :, None, :]).view(
            -1, tokens, tokens
        )
        result[block] = attention(q[None, block], k[None, block], v[None, block], bias[None])[0]
        del bias  # freed before the next one is computed
    return result
