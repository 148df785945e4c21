"""The SAM1 engine, built on the modules of the `segment-anything` package without its predictor.

It is the base of the engines of SAM-HQ and MobileSAM (`sam_hq`), which differ from SAM1 in the
image encoder and the mask decoder only.

The architecture is derived from the weights, so that any checkpoint of SAM's structure loads, not
only the three published ones.

Limitations: a variant with other modules (adapters, a distilled encoder) has other keys. It is
refused with an error that names such a key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from segment_anything import modeling
from torch import Tensor

from sam_poll.core.errors import ModelError
from sam_poll.core.types import InputTransform, ModelInput, Size
from sam_poll.engines.base import Features, PromptBatch, TorchEngine
from sam_poll.engines.kernels import attention
from sam_poll.engines.memory.plan import MemoryStep, cpu_step

# Mean and standard deviation of the colours (RGB, 0 to 255), from segment_anything.build_sam.
MEAN = (123.675, 116.28, 103.53)
DEVIATION = (58.395, 57.12, 57.375)


def architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `ImageEncoderViT` that the shapes of `weights` imply.

    Raises ModelError where weights are missing.
    """
    try:
        rows, _, embed_dim = weights["image_encoder.pos_embed"].shape[1:]
        patch = weights["image_encoder.patch_embed.proj.weight"].shape[-1]
        out_chans = weights["image_encoder.neck.0.weight"].shape[0]
        depth = 1 + max(
            int(key.split(".")[2]) for key in weights if key.startswith("image_encoder.blocks.")
        )
        rel_pos_shapes = [
            weights[f"image_encoder.blocks.{block}.attn.rel_pos_h"].shape for block in range(depth)
        ]
        mlp = weights["image_encoder.blocks.0.mlp.lin1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"not a SAM checkpoint: {error} is missing") from error
    # Global attention has 2·rows - 1 relative positions, windowed attention 2·window - 1.
    global_length = 2 * rows - 1
    windows = [(length + 1) // 2 for length, _ in rel_pos_shapes if length != global_length]
    return {
        "depth": depth,
        "embed_dim": embed_dim,
        "img_size": rows * patch,
        "mlp_ratio": mlp / embed_dim,
        "num_heads": embed_dim // rel_pos_shapes[0][1],
        "patch_size": patch,
        "global_attn_indexes": [
            block for block, (length, _) in enumerate(rel_pos_shapes) if length == global_length
        ],
        "window_size": windows[0] if windows else 14,  # 14 as in segment_anything.build_sam
        "out_chans": out_chans,
    }


# Model type → `encoder_embed_dim` in segment_anything.build_sam.
WIDTHS = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280}
# In front of the model types of SAM-HQ; alone it stands for any of them.
HQ = "sam_hq"
TYPES = (*WIDTHS, HQ, *(f"{HQ}_{size}" for size in (*WIDTHS, "vit_tiny")))


def type_of(parameters: Mapping[str, Any]) -> str | None:
    """Return the model type of these parameters of `architecture`; None for another size."""
    return next((name for name, width in WIDTHS.items() if width == parameters["embed_dim"]), None)


def check_type(actual: str | None, model_type: str | None, place: str) -> None:
    """Check that the weights, of the type `actual`, are of the type `model_type`.

    `actual` None: none of the published types. `model_type` None accepts any, and `HQ` any SAM-HQ.
    Raises ModelError where there is no such type, or the weights are of another.
    """
    if model_type is None:
        return
    if model_type not in TYPES:
        raise ModelError(
            f"there is no model type `{model_type}`",
            remedy=f"use one of {', '.join(TYPES)}, or none",
        )
    if model_type != actual and not (model_type == HQ and actual and actual.startswith(HQ)):
        raise ModelError(
            f"model type {model_type} was requested, "
            f"but the weights are {actual or 'none of the published types'}",
            place=place,
        )


def build(parameters: Mapping[str, Any]) -> Any:
    """Return a `segment_anything.modeling.Sam` with random weights, on the CPU.

    `parameters` are those of `architecture`; all other arguments are those of
    segment_anything.build_sam.
    """
    width = parameters["out_chans"]
    return assemble(
        modeling,
        vit(modeling, parameters),
        modeling.MaskDecoder(**decoder_arguments(modeling, width)),
        side=parameters["img_size"],
        patch=parameters["patch_size"],
        width=width,
    )


def vit(library: Any, parameters: Mapping[str, Any]) -> Any:
    """Return the `ImageEncoderViT` of `library` for these parameters of `architecture`.

    `library` is `segment_anything.modeling`, or `segment_anything_hq.modeling`, which has modules
    of the same names.
    """
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    return library.ImageEncoderViT(**parameters, qkv_bias=True, use_rel_pos=True, norm_layer=norm)


def decoder_arguments(library: Any, width: int) -> dict[str, Any]:
    """Return the arguments of SAM's mask decoder for embeddings of `width` channels."""
    return {
        "num_multimask_outputs": 3,
        "transformer": library.TwoWayTransformer(
            depth=2, embedding_dim=width, mlp_dim=2048, num_heads=8
        ),
        "transformer_dim": width,
        "iou_head_depth": 3,
        "iou_head_hidden_dim": 256,
    }


def assemble(
    library: Any, image_encoder: Any, mask_decoder: Any, *, side: int, patch: int, width: int
) -> Any:
    """Return the `Sam` of `library` with these parts.

    `side` is the encoder's input in pixels, `patch` the pixels of a token's side, `width` the
    channels of the embedding.
    """
    grid = side // patch
    return library.Sam(
        image_encoder=image_encoder,
        prompt_encoder=library.PromptEncoder(
            embed_dim=width,
            image_embedding_size=(grid, grid),
            input_image_size=(side, side),
            mask_in_chans=16,
        ),
        mask_decoder=mask_decoder,
        pixel_mean=MEAN,
        pixel_std=DEVIATION,
    )


class ViTSides:
    """Sets SAM's vision transformer up for other sides than the one that it was trained at."""

    def __init__(self, encoder: Any) -> None:
        attention.install(encoder)
        self._encoder = encoder
        self._native_side = int(encoder.img_size)
        # 1×grid×grid×C, for the native side.
        self._pos_embed = encoder.pos_embed.detach().float().cpu().clone()

    def set(self, side: int) -> None:
        """Interpolate the absolute position embeddings for `side`, as DINO and ViTDet do.

        segment_anything interpolates the relative ones itself.
        """
        grid = self._pos_embed.shape[1] * side // self._native_side
        positions = self._pos_embed
        if grid != positions.shape[1]:
            planes = positions.permute(0, 3, 1, 2)
            planes = F.interpolate(
                planes, (grid, grid), mode="bicubic", align_corners=False, antialias=True
            )
            positions = planes.permute(0, 2, 3, 1)
        weight = self._encoder.patch_embed.proj.weight
        self._encoder.pos_embed = torch.nn.Parameter(
            positions.to(weight.device, weight.dtype), requires_grad=False
        )


class Sam1Engine(TorchEngine):
    """An engine (`core.protocols.Engine`) that runs a `segment_anything.modeling.Sam`."""

    family: ClassVar[str] = "sam1"
    _decoder_options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        model: Any,
        step: MemoryStep | None = None,
        *,
        name: str | None = None,
        **keywords: Any,
    ) -> None:
        self.native_side = int(model.image_encoder.img_size)
        self._sides = self._sides_of(model.image_encoder)
        super().__init__(
            model, step or cpu_step(self.native_side), name=name or self.family, **keywords
        )

    def _sides_of(self, encoder: Any) -> Any:
        """Return what sets the encoder up for a side; it has a method `set`."""
        return ViTSides(encoder)

    def frame_for(self, size: Size, side: int) -> InputTransform:
        """Scale the longer side to `side`, rounding as segment_anything's ResizeLongestSide does.

        The rest of the square is padding.
        """
        scale = side / max(size)
        width, height = (max(1, int(length * scale + 0.5)) for length in size)
        return InputTransform(size=size, side=side, region=Size(width, height), two_step=True)

    def _set_side(self, side: int) -> None:
        self._sides.set(side)

    def _square(self, pictures: Sequence[ModelInput]) -> Tensor:
        side = self.step.side
        square = torch.zeros((len(pictures), 3, side, side), device=self.device)
        # The padding is zero after normalising, which means the mean colour.
        for plane, picture in zip(square, pictures, strict=True):
            pixels = self._upload(picture.pixels).permute(2, 0, 1)
            width, height = picture.frame.region
            plane[:, :height, :width] = (pixels - self.model.pixel_mean) / self.model.pixel_std
        return square

    def _encode(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self.model.image_encoder(square), ()

    def _prompt_encoder(self) -> Any:
        return self.model.prompt_encoder

    def _sparse(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        points = (prompts.points, prompts.labels) if prompts.points.shape[1] else None
        return self.model.prompt_encoder(points=points, boxes=prompts.boxes, masks=prompts.masks)

    def _masks(
        self, features: Features, pe: Tensor, sparse: Tensor, dense: Tensor, many: bool
    ) -> tuple[Tensor, Tensor]:
        return self.model.mask_decoder(
            image_embeddings=features.image,
            image_pe=pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=many,
            **self._decoder_options,
        )
