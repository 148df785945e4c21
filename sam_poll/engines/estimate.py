"""What a network takes of a device's memory before anything has been measured: weights exactly, the rest derived.

Pure: it reads sizes off modules, which may lie on torch's meta device, and multiplies. The derivation counts the
numbers alive at the worst moment of the eager network in inference mode; `tests/test_estimate.py` holds it against a
count of every tensor torch makes.

What can still go wrong here: what kernels take for themselves (cuDNN's, cuBLAS' workspaces) is only in `MARGIN_MIB`,
and a network with other blocks has another worst moment; the measured peak replaces the estimate after one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sam_poll.engines.memory import Call

MIB = 2**20
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
MARGIN_MIB = 48  # workspaces: cuBLAS takes 8 to 32 MiB a handle, cuDNN a few more
STRIDE = 16  # pixels of the encoder's input for one token of the embedding, in SAM1 and SAM2

# Half precision does not halve activations: under autocast layer norms give float32, and what they gave lives on.
# In the encoder one of 11 parts is such a norm, and its copy in half adds another half part: (10 + 2 + 1) / 22.
# In the decoder's attention 7 parts are alive, 4 of them out of layer norms: (4·2 + 3) / 14.
HALF_ENCODE = 13 / 22
HALF_DECODE = 11 / 14

# A decoder call is at its worst in the layer norm of the two-way transformer's image side: the keys, keys with their
# positions, values, what attention gave, the sum, its norm and the repeated embedding are alive, 7 parts of
# tokens × embedding width for each prompt. (Upscaling comes next to it.)
DECODE_PARTS = 7

# SAM2's embedding: the image's, and levels of a quarter and an eighth of its width at 4 and 16 times its tokens.
FINER = 1 + 4 // 4 + 16 // 8


@dataclass(frozen=True, slots=True)
class Footprint:
    """A network in numbers.

    `encoder` and `others` are its weights' counts: the image encoder's are stored in the step's precision, the others
    in float32. `blocks` are numbers alive for each pixel of the encoder's input and each picture at the worst moment;
    `once` for each pixel, and `fixed_mib`, come on top at any batch. `width` is the embedding's channels,
    `kept` how many times as many numbers an embedding has (SAM2's finer levels).
    """

    encoder: int
    others: int
    blocks: float
    once: float
    fixed_mib: float
    width: int
    kept: int

    def weights_mib(self, precision: str) -> float:
        """MiB of the weights on the device."""
        return (self.encoder * WIDTH[precision] + self.others * 4) / MIB

    def embedding_mib(self, precision: str, side: int) -> float:
        """MiB of one picture's embedding."""
        return self.kept * self.width * (side // STRIDE) ** 2 * WIDTH[precision] / MIB

    def call_mib(self, call: Call, precision: str, side: int, count: int) -> float:
        """MiB that a call takes on top of the weights: `count` pictures at once, or prompts."""
        half = WIDTH[precision] < WIDTH["float32"]
        if call == "encode":
            numbers, shrunk = (count * self.blocks + self.once) * side**2, HALF_ENCODE
            fixed_mib = MARGIN_MIB + self.fixed_mib
        else:
            numbers, shrunk = count * DECODE_PARTS * self.width * (side // STRIDE) ** 2, HALF_DECODE
            fixed_mib = MARGIN_MIB
        return fixed_mib + numbers * 4 * (shrunk if half else 1.0) / MIB


def footprint_of(model: Any) -> Footprint:
    """The footprint of a `Sam` of segment_anything or a `SAM2Base` of sam2, by its modules' sizes."""
    sizes: dict[str, int] = {name: weights.numel() for name, weights in _tensors(model)}
    encoder = sum(count for name, count in sizes.items() if name.startswith("image_encoder."))
    others = sum(sizes.values()) - encoder
    if hasattr(model.image_encoder, "trunk"):
        blocks, once = _hiera(model.image_encoder)
        return Footprint(encoder, others, blocks, once, 0.0, model.image_encoder.neck.d_model, FINER)
    blocks, fixed_mib = _vit(model.image_encoder)
    return Footprint(encoder, others, blocks, 0.0, fixed_mib, model.mask_decoder.transformer_dim, 1)


def _tensors(model: Any) -> Iterable[tuple[str, Any]]:
    """Weights and buffers, without the parts that only video needs (`Sam2Engine` drops them)."""
    found: Mapping[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return ((name, tensor) for name, tensor in found.items() if not name.startswith("memory_"))


def _hiera(encoder: Any) -> tuple[float, float]:
    """Numbers alive in SAM2's image encoder: for each pixel and picture, and for each pixel at any batch.

    In a block's MLP: the hidden layer before and after its activation, and three of the block's width (the block's
    input, the sum with the attention's result, its norm): 11 widths, at most in the first stage, whose tokens are
    four times as many as the next one's with half the width. Or in the neck: all levels' features and positions at
    its own width and the trunk's maps, and once four half widths of the finest level, of which sines and cosines are
    stacked.
    The input is 3 numbers a pixel.
    """
    stride, worst, maps = 4.0, 0.0, 0.0
    for block in encoder.trunk.blocks:
        if block.q_stride:
            stride *= block.q_stride[0]
        hidden = block.mlp.layers[0].out_features
        worst = max(worst, (3 * block.dim_out + 2 * hidden) / stride**2)
        maps += 0.0 if block.dim == block.dim_out else block.dim / (stride / 2) ** 2
    levels = sum(1 / (4 * 2**level) ** 2 for level in range(len(encoder.trunk.channel_list)))
    neck = 2 * encoder.neck.d_model * levels + maps
    sines = 4 * encoder.neck.d_model / 2 / 4**2
    return 3 + max(worst, neck), max(0.0, neck + sines - max(worst, neck))


def _vit(encoder: Any) -> tuple[float, float]:
    """Numbers alive for each pixel in SAM1's image encoder, and MiB that do not depend on the batch.

    As Hiera's MLP, or in attention: the block's input, its norm, query, key, value and result (6 widths) and, of each
    head, positions by row and by column (twice the grid's side). On top is the bias of positions
    (`attention.BIAS_MIB`).
    """
    from sam_poll.engines.attention import BIAS_MIB  # imports torch

    block = encoder.blocks[0]
    patch = encoder.patch_embed.proj.kernel_size[0]
    width, hidden, heads = block.norm1.normalized_shape[0], block.mlp.lin1.out_features, block.attn.num_heads
    grid = encoder.img_size // patch
    worst = max(3 * width + 2 * hidden, 6 * width + 2 * heads * grid)
    return 3 + worst / patch**2, BIAS_MIB
