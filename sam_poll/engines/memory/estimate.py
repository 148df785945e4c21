"""Estimate of the device memory that a network needs, before anything has been measured.

The weights are counted exactly, the rest is derived. Pure: the sizes are read from modules, which
may be on torch's meta device. The derivation counts the numbers alive at the moment when the eager
network, in inference mode, needs most memory; `tests/engines/memory/test_estimate.py` compares it
with a count of every tensor that torch allocates.

Limitations: workspaces of kernels (cuDNN, cuBLAS) are covered by `MARGIN_MIB` only, and a network
with other blocks may need most memory at another moment. The measured peak replaces the estimate
after one call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sam_poll.engines.memory.plan import Call

MIB = 2**20
WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of a number
# Workspaces: cuBLAS takes 8 to 32 MiB per handle, cuDNN a few more.
MARGIN_MIB = 48
STRIDE = 16  # pixels of the encoder's input per token of the embedding, in all families

# Half precision does not halve the activations: under autocast layer norms return float32, and
# their results stay alive. In the encoder one of 11 parts is such a norm, and its copy in half
# precision adds another half part: (10 + 2 + 1) / 22. In the decoder's attention 7 parts are
# alive, 4 of them results of layer norms: (4·2 + 3) / 14.
HALF_ENCODE = 13 / 22
HALF_DECODE = 11 / 14

# Nearly all of a detector's numbers are results of convolutions, which are in half precision.
HALF_FIND = 1 / 2

# A decoder call needs most memory in the layer norm on the image side of the two-way transformer.
# There the keys, the keys with positions, the values, the attention's result, the sum, its norm and
# the repeated embedding are alive: 7 parts of tokens × embedding width per prompt. (Upscaling needs
# nearly as much.)
DECODE_PARTS = 7
# SAM-HQ's decoder needs most in the layer norm of its mask features, which are 4 parts: a quarter
# of the channels at 16 times the tokens. Alive are they, their norm, this scaled and this shifted
# (16 parts), SAM's upscaled embedding (2) and the keys (1).
HQ_DECODE_PARTS = 19
# transformers' decoder keeps its positions and its input for each prompt, too (counted).
TRANSFORMERS_DECODE_PARTS = 10

# Size of SAM2's embedding as a multiple of its coarsest level: the finer levels have a quarter and
# an eighth of its channels at 4 and 16 times its tokens.
FINER = 1 + 4 // 4 + 16 // 8
# The same of SAM-HQ's, which has a second map, of an eighth of the channels at 16 times the tokens.
HQ_KEPT = 1 + 16 // 8


@dataclass(frozen=True, slots=True)
class Footprint:
    """The sizes of a network from which its memory is computed.

    - `encoder`, `others`: number of weights of the image encoder, stored in the step's precision,
      and of the other modules, stored in float32.
    - `blocks`: numbers alive per pixel of the encoder's input and picture, at most.
    - `fixed_mib`: MiB alive during a call of the encoder, independent of batch and side.
    - `width`: channels of the embedding's coarsest level.
    - `kept`: size of an embedding as a multiple of its coarsest level.
    - `decode_parts`: numbers alive for each prompt of a decoder call, as a multiple of the
      embedding's coarsest level.
    - `stride`: pixels of the encoder's input per token of the embedding.
    - `find`, `find_once`: numbers alive for each text of a concept request, and independent of
      their number; 0: the network takes none.
    """

    encoder: int
    others: int
    blocks: float
    fixed_mib: float
    width: int
    kept: int
    decode_parts: int = DECODE_PARTS
    stride: int = STRIDE
    find: int = 0
    find_once: int = 0

    def weights_mib(self, precision: str) -> float:
        """Return the MiB of the weights on the device."""
        return (self.encoder * WIDTH[precision] + self.others * 4) / MIB

    def embedding_mib(self, precision: str, side: int) -> float:
        """Return the MiB of one picture's embedding."""
        return self.kept * self.width * (side // self.stride) ** 2 * WIDTH[precision] / MIB

    def call_mib(self, call: Call, precision: str, side: int, count: int) -> float:
        """Return the MiB that a call takes on top of the weights.

        `count` is the number of pictures, prompts or texts in the call.
        """
        half = WIDTH[precision] < WIDTH["float32"]
        if call == "find" and not self.find:
            return 0.0
        if call == "encode":
            numbers = count * self.blocks * side**2
            half_factor = HALF_ENCODE
            fixed_mib = MARGIN_MIB + self.fixed_mib
        elif call == "find":
            numbers = count * self.find + self.find_once
            half_factor = HALF_FIND
            fixed_mib = MARGIN_MIB
        else:
            numbers = count * self.decode_parts * self.width * (side // self.stride) ** 2
            half_factor = HALF_DECODE
            fixed_mib = MARGIN_MIB
        return fixed_mib + numbers * 4 * (half_factor if half else 1.0) / MIB


def footprint_of(model: Any) -> Footprint:
    """Return the footprint of a network.

    It is a `Sam` of segment_anything or its kin, a `SAM2Base`, EdgeTAM or a `Sam3Network`.
    """
    if hasattr(model, "detector"):
        return _sam3(model)
    sizes: dict[str, int] = {name: weights.numel() for name, weights in _tensors(model)}
    encoder = sum(
        count
        for name, count in sizes.items()
        if name.startswith(("image_encoder.", "vision_encoder."))
    )
    others = sum(sizes.values()) - encoder
    if hasattr(model, "vision_encoder"):
        vision = model.config.vision_config
        return Footprint(
            encoder,
            others,
            _conv_pyramid(vision),
            0.0,
            vision.fpn_hidden_size,
            FINER,
            TRANSFORMERS_DECODE_PARTS,
        )
    if hasattr(model.image_encoder, "trunk"):
        blocks = _hiera(model.image_encoder)
        return Footprint(encoder, others, blocks, 0.0, model.image_encoder.neck.d_model, FINER)
    if hasattr(model.image_encoder, "layers"):
        blocks, fixed_mib = _tiny_vit(model.image_encoder), 0.0
    else:
        blocks, fixed_mib = _vit(model.image_encoder)
    width = model.mask_decoder.transformer_dim
    if not hasattr(model.mask_decoder, "hf_token"):
        return Footprint(encoder, others, blocks, fixed_mib, width, 1)
    # The early feature map is kept until the embedding is made.
    early = model.mask_decoder.compress_vit_feat[0].in_channels / STRIDE**2
    return Footprint(encoder, others, blocks + early, fixed_mib, width, HQ_KEPT, HQ_DECODE_PARTS)


def _tensors(model: Any) -> Iterable[tuple[str, Any]]:
    """Return weights and buffers without the modules for videos, which `Sam2Engine` removes."""
    tensors: Mapping[str, Any] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return ((name, tensor) for name, tensor in tensors.items() if not name.startswith("memory_"))


def _hiera(encoder: Any) -> float:
    """Return `blocks` of the `Footprint` of SAM2's image encoder.

    The peak is in the MLP of a block or in the neck:

    - MLP: the hidden layer before and after its activation (4 widths each), and three tensors of
      the block's width (the block's input, the sum with the attention's result, its norm): 11
      widths. The maximum is in the first stage, which has four times as many tokens as the next
      one, at half the width.
    - Neck: features of all levels at the neck's width, and the trunk's maps.

    The input adds 3 numbers per pixel.
    """
    stride = 4.0  # of Hiera's patch embedding
    worst = 0.0
    maps = 0.0
    for block in encoder.trunk.blocks:
        if block.q_stride:
            stride *= block.q_stride[0]
        hidden = block.mlp.layers[0].out_features
        worst = max(worst, (3 * block.dim_out + 2 * hidden) / stride**2)
        maps += 0.0 if block.dim == block.dim_out else block.dim / (stride / 2) ** 2
    levels = sum(1 / (4 * 2**level) ** 2 for level in range(len(encoder.trunk.channel_list)))
    return 3 + max(worst, encoder.neck.d_model * levels + maps)


def _vit(encoder: Any) -> tuple[float, float]:
    """Return `blocks` and `fixed_mib` of the `Footprint` of SAM1's image encoder.

    The peak is in the MLP, as in `_hiera`, or in attention: the block's input, its norm, query,
    key, value and result (6 widths) and, per head, the positions by row and by column (twice the
    grid's side). The bias of positions is independent of the batch (`attention.BIAS_MIB`).
    """
    from sam_poll.engines.kernels.attention import BIAS_MIB  # imports torch

    block = encoder.blocks[0]
    patch = encoder.patch_embed.proj.kernel_size[0]
    width = block.norm1.normalized_shape[0]
    hidden = block.mlp.lin1.out_features
    heads = block.attn.num_heads
    grid = encoder.img_size // patch
    worst = max(3 * width + 2 * hidden, 6 * width + 2 * heads * grid)
    return 3 + worst / patch**2, BIAS_MIB


def _tiny_vit(encoder: Any) -> float:
    """Return `blocks` of the `Footprint` of TinyViT, the image encoder of MobileSAM.

    The peak is in the first stage, which has the most tokens: the hidden layer of a convolution
    block (MBConv) before a convolution, after it, and after its norm, the block's input, and the
    stage's input. The input adds 3 numbers per pixel.
    """
    block = encoder.layers[0].blocks[0]
    stride = 4  # of TinyViT's patch embedding
    return 3 + (2 * block.in_chans + 3 * block.hidden_chans) / stride**2


def _conv_pyramid(vision: Any) -> float:
    """Return `blocks` of the `Footprint` of EdgeTAM's image encoder.

    The peak is in the neck: the backbone's maps, the features of all levels at the neck's width,
    and the enlarged features of the coarsest level. The input adds 3 numbers per pixel.
    """
    strides = [4 * 2**level for level in range(len(vision.backbone_channel_list))]
    widths = reversed(vision.backbone_channel_list)  # from the finest level on
    enlarged = vision.fpn_hidden_size / strides[2] ** 2
    return (
        3
        + enlarged
        + sum(
            (width + vision.fpn_hidden_size) / stride**2
            for width, stride in zip(widths, strides, strict=True)
        )
    )


def _sam3(network: Any) -> Footprint:
    """Return the footprint of an `engines.sam3.Sam3Network`.

    - Encoder: the peak is in the MLP, as in `_hiera`. The text encoder is stored like it.
    - Embedding: the tracker's levels as SAM2's, and the detector's three levels at full width.
    - A text: the finest level of the pixel decoder before and after a convolution and after its
      norm, and a mask for each query. Once: the detector's levels and their positions.
    """
    parts = (network.image_encoder, network.detector.text_encoder)
    encoder = sum(weights.numel() for part in parts for weights in part.parameters())
    everything = sum(weights.numel() for weights in network.parameters())
    config = network.detector.config
    backbone = config.vision_config.backbone_config
    width, patch = config.vision_config.fpn_hidden_size, backbone.patch_size
    tokens = (network.image_size // patch) ** 2
    blocks = 3 + (3 * backbone.hidden_size + 2 * backbone.intermediate_size) / patch**2
    levels = 16 + 4 + 1  # tokens of the detector's levels, as a multiple of the coarsest level's
    queries = config.detr_decoder_config.num_queries
    return Footprint(
        encoder,
        everything - encoder,
        blocks,
        fixed_mib=0.0,
        width=width,
        kept=FINER + levels,
        decode_parts=TRANSFORMERS_DECODE_PARTS,
        stride=patch,
        find=16 * tokens * (3 * width + queries),
        find_once=2 * levels * tokens * width,
    )
