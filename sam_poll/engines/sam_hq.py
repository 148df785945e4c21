"""The engines of SAM-HQ and MobileSAM, built on the modules of the package `segment-anything-hq`.

Both are SAM1 with other parts: MobileSAM has TinyViT for its image encoder; SAM-HQ has SAM's
encoder or TinyViT, and a mask decoder with one more output token, whose mask is computed from an
early feature map of the encoder, too, and is added to SAM's own mask.

As for SAM1, the architecture is derived from the weights, and the package's predictor is not used.
The package's own loading is not used either: it ignores weights that do not fit, and computes
TinyViT's attention biases before the weights are loaded.

Limitations: the shapes of TinyViT's weights do not tell the side that it was trained at; it is
taken for 1024 pixels, as in all published checkpoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor

from sam_poll.core.errors import ModelError
from sam_poll.engines import sam1
from sam_poll.engines.base import Features
from sam_poll.engines.memory.plan import MemoryStep
from sam_poll.engines.sam1 import Sam1Engine

with warnings.catch_warnings():
    # It imports parts of timm by their former paths, and replaces timm's own TinyViT models in
    # timm's registry.
    warnings.simplefilter("ignore")
    import segment_anything_hq as library
    from segment_anything_hq import modeling

# Of `TinyViT` in segment_anything_hq.build_sam: the encoder's input in pixels, the pixels of a
# token's side, and the channels of the embedding, which its neck fixes.
TINY_SIDE = 1024
TINY_PATCH = 16
TINY_WIDTH = 256
# `embed_dims` and `depths` of the published TinyViT (5 million parameters).
TINY_5M = ((64, 128, 160, 320), (2, 2, 6, 2))


@dataclass(frozen=True, slots=True)
class Architecture:
    """The architecture that the shapes of a checkpoint's weights imply.

    - `encoder`: the arguments of `TinyViT` if `tiny`, else those of `ImageEncoderViT`.
    - `early_width`: channels of the feature map that SAM-HQ's decoder takes from the encoder; None
      for SAM's own decoder.
    """

    encoder: Mapping[str, Any]
    tiny: bool
    early_width: int | None

    @property
    def type(self) -> str | None:
        """The published model that has this architecture, as in `sam1.TYPES`, or `mobile_sam`.

        `sam1.HQ` for another SAM-HQ, None for another MobileSAM.
        """
        if self.tiny:
            sizes = tuple(self.encoder["embed_dims"]), tuple(self.encoder["depths"])
            size = "vit_tiny" if sizes == TINY_5M else None
        else:
            size = sam1.type_of(self.encoder)
        if self.early_width:
            return f"{sam1.HQ}_{size}" if size else sam1.HQ
        return "mobile_sam" if size == "vit_tiny" else size


def architecture(weights: Mapping[str, Tensor]) -> Architecture:
    """Return the architecture that the shapes of `weights` imply.

    Raises ModelError where weights are missing.
    """
    compression = weights.get("mask_decoder.compress_vit_feat.0.weight")
    early_width = None if compression is None else compression.shape[0]
    if "image_encoder.patch_embed.proj.weight" in weights:
        encoder = sam1.architecture(weights)
        if early_width and not encoder["global_attn_indexes"]:
            raise ModelError("not a SAM-HQ checkpoint: no block has global attention")
        return Architecture(encoder, False, early_width)
    return Architecture(_tiny_vit(weights), True, early_width)


def _tiny_vit(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `TinyViT`."""

    def shape(key: str) -> torch.Size:
        return weights[f"image_encoder.{key}"].shape

    try:
        stages = range(1 + max(_numbers(weights, "image_encoder.layers.")))
        blocks = [f"layers.{stage}.blocks.0" for stage in stages]
        widths = [shape("patch_embed.seq.2.c.weight")[0]]
        widths += [shape(f"layers.{stage}.downsample.conv1.c.weight")[0] for stage in stages[:-1]]
        # Attention has one bias for each head and each distance, |Δx| and |Δy|, within a window.
        biases = [shape(f"{block}.attn.attention_biases") for block in blocks[1:]]
        return {
            "img_size": TINY_SIDE,
            "num_classes": shape("head.weight")[0],
            "embed_dims": widths,
            "depths": [
                1 + max(_numbers(weights, f"image_encoder.layers.{stage}.blocks."))
                for stage in stages
            ],
            # The first stage is convolutions: its number of heads and its window are not used.
            "num_heads": [1, *(heads for heads, _ in biases)],
            "window_sizes": [1, *(isqrt(distances) for _, distances in biases)],
            "mlp_ratio": shape(f"{blocks[1]}.mlp.fc1.weight")[0] / widths[1],
            "mbconv_expand_ratio": shape(f"{blocks[0]}.conv1.c.weight")[0] / widths[0],
            "local_conv_size": shape(f"{blocks[1]}.local_conv.c.weight")[-1],
            "drop_path_rate": 0.0,
        }
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"not a checkpoint with TinyViT: {error} is missing") from error


def _numbers(weights: Mapping[str, Tensor], prefix: str) -> set[int]:
    """Return the numbers that follow `prefix` in the names of the weights."""
    return {int(key[len(prefix) :].split(".")[0]) for key in weights if key.startswith(prefix)}


def published(name: str) -> Architecture:
    """Return the architecture of the published model `name`, a name of the catalogue."""
    if name == "mobile_sam":
        return architecture(library.sam_model_registry_baseline["vit_tiny"]().state_dict())
    size = name.removeprefix(f"{sam1.HQ}_")
    # TinyViT is small, and cannot be built without weights.
    with torch.device("cpu" if size == "vit_tiny" else "meta"):
        return architecture(library.sam_model_registry[size]().state_dict())


def build(found: Architecture) -> Any:
    """Return a `segment_anything_hq.modeling.Sam` with random weights, on the CPU.

    All arguments that `found` does not have are those of segment_anything_hq.build_sam.
    """
    encoder: Any
    if found.tiny:
        encoder = modeling.TinyViT(**found.encoder)
        side, patch = TINY_SIDE, TINY_PATCH
        width = TINY_WIDTH
    else:
        encoder = sam1.vit(modeling, found.encoder)
        side, patch = found.encoder["img_size"], found.encoder["patch_size"]
        width = found.encoder["out_chans"]
    arguments = sam1.decoder_arguments(modeling, width)
    if found.early_width:
        decoder = modeling.MaskDecoderHQ(**arguments, vit_dim=found.early_width)
    else:
        decoder = modeling.MaskDecoder(**arguments)
    return sam1.assemble(modeling, encoder, decoder, side=side, patch=patch, width=width)


# ── the image encoders ──


def install(encoder: Any) -> None:
    """Replace the forward pass of an encoder of the library by that of this module."""
    is_tiny = isinstance(encoder, modeling.TinyViT)
    encoder.forward = MethodType(tiny_vit_forward if is_tiny else vit_forward, encoder)


def vit_forward(encoder: Any, square: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `ImageEncoderViT.forward`, but keep the first of its early feature maps only.

    The library keeps one for each block with global attention, and its decoder takes the first.
    `square` is n×3×side×side. Returns the embedding, n×C×h×w, and the early map, n×h×w×C'.
    """
    x = encoder.patch_embed(square) + encoder.pos_embed
    early = None
    for block in encoder.blocks:
        x = block(x)
        if early is None and block.window_size == 0:
            early = x
    assert early is not None, "SAM's encoders have blocks with global attention"
    return encoder.neck(x.permute(0, 3, 1, 2)), early


def tiny_vit_forward(encoder: Any, square: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `TinyViT.forward`, which takes inputs of 1024 pixels only, for any side.

    Arguments and results as those of `vit_forward`.
    """
    x = encoder.patch_embed(square)
    early = x
    for stage, layer in enumerate(encoder.layers):
        x = layer(x)
        if stage == 1:
            early = x
    grid = (isqrt(x.shape[1]), -1)
    image = encoder.neck(x.unflatten(1, grid).permute(0, 3, 1, 2))
    return image, early.unflatten(1, grid)


class TinyViTSides:
    """Sets TinyViT up for other sides than 1024 pixels.

    Its attention is within windows, whatever the side, and its layers only have to know how many
    tokens they get.
    """

    def __init__(self, encoder: Any) -> None:
        self._native_side = int(encoder.img_size)
        self._resolutions = [
            (module, module.input_resolution)
            for module in encoder.modules()
            if hasattr(module, "input_resolution")
        ]

    def set(self, side: int) -> None:
        """Tell all layers the number of their rows and columns of tokens."""
        for module, native in self._resolutions:
            module.input_resolution = tuple(length * side // self._native_side for length in native)


# ── the engines ──


class _LibraryEngine(Sam1Engine):
    """What the engines of both families have in common: the image encoders."""

    def _sides_of(self, encoder: Any) -> Any:
        install(encoder)
        if isinstance(encoder, modeling.TinyViT):
            return TinyViTSides(encoder)
        return super()._sides_of(encoder)


class MobileSamEngine(_LibraryEngine):
    """An engine (`core.protocols.Engine`) of SAM with an encoder of `segment_anything_hq`."""

    family: ClassVar[str] = "mobile-sam"
    # Arguments of the decoder of SAM-HQ, which this one ignores.
    _decoder_options: ClassVar[dict[str, Any]] = {"hq_token_only": False, "interm_embeddings": None}

    def _encode(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        image, _ = self.model.image_encoder(square)
        return image, ()


class SamHqEngine(_LibraryEngine):
    """An engine (`core.protocols.Engine`) that runs a SAM-HQ.

    `hq_token_only` is that of the library's predictor: the mask is that of SAM-HQ's own output
    token alone, not the sum of this and SAM's mask.
    """

    family: ClassVar[str] = "sam-hq"

    def __init__(
        self,
        model: Any,
        step: MemoryStep | None = None,
        *,
        hq_token_only: bool = False,
        **keywords: Any,
    ) -> None:
        self._hq_token_only = hq_token_only
        super().__init__(model, step, **keywords)

    def _encode(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        image, early = self.model.image_encoder(square)
        decoder = self.model.mask_decoder
        # `MaskDecoderHQ.forward` computes this for each prompt, from the picture alone.
        hq_features = decoder.embedding_encoder(image) + decoder.compress_vit_feat(
            early.permute(0, 3, 1, 2)
        )
        return image, (hq_features,)

    def _masks(
        self, features: Features, pe: Tensor, sparse: Tensor, dense: Tensor, many: bool
    ) -> tuple[Tensor, Tensor]:
        """Return one mask for each prompt, as `MaskDecoderHQ.forward` does, also if `many`.

        The mask of the HQ token is added to the best of SAM's three by predicted IoU, or to its
        single one.
        """
        logits, iou = self.model.mask_decoder.predict_masks(
            image_embeddings=features.image,
            image_pe=pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            hq_features=features.high_res[0],
        )
        rows = torch.arange(len(iou), device=iou.device)
        best = 1 + iou[:, 1:].argmax(dim=1) if many else torch.zeros_like(rows)
        masks = logits[:, -1]
        if not self._hq_token_only:
            masks = masks + logits[rows, best]
        return masks[:, None], iou[rows, best][:, None]
