"""SAM1 through the `segment-anything` package: its modules, but not its predictor.

The architecture is read from the weights themselves, so any checkpoint of the SAM family of shapes loads, not only the
three published ones. What can still go wrong here: a variant with other modules (adapters, a distilled encoder) has
other keys, and is refused by name of the key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import Tensor

from sam_poll.engines import attention
from sam_poll.engines.base import Features, PromptBatch, TorchEngine
from sam_poll.engines.memory import Step, cpu_step
from sam_poll.errors import ModelError
from sam_poll.types import Frame, Prepared, Size

# Colours' mean and deviation as in segment_anything.build_sam.
MEAN = (123.675, 116.28, 103.53)
DEVIATION = (58.395, 57.12, 57.375)


def architecture(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The image encoder's parameters as the shapes of its weights tell them."""
    try:
        rows, _, embed_dim = weights["image_encoder.pos_embed"].shape[1:]
        patch = weights["image_encoder.patch_embed.proj.weight"].shape[-1]
        out_chans = weights["image_encoder.neck.0.weight"].shape[0]
        depth = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("image_encoder.blocks."))
        reach = [weights[f"image_encoder.blocks.{block}.attn.rel_pos_h"].shape for block in range(depth)]
        mlp = weights["image_encoder.blocks.0.mlp.lin1.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as error:
        raise ModelError(f"not a SAM checkpoint: {error} is missing") from error
    everywhere = 2 * rows - 1  # the relative positions of global attention; windows know fewer
    windows = [(length + 1) // 2 for length, _ in reach if length != everywhere]
    return {
        "depth": depth,
        "embed_dim": embed_dim,
        "img_size": rows * patch,
        "mlp_ratio": mlp / embed_dim,
        "num_heads": embed_dim // reach[0][1],
        "patch_size": patch,
        "global_attn_indexes": [block for block, (length, _) in enumerate(reach) if length == everywhere],
        "window_size": windows[0] if windows else 14,
        "out_chans": out_chans,
    }


# The published sizes by their encoder's width; segment_anything's `default` is vit_h.
WIDTHS = {"vit_b": 768, "vit_l": 1024, "vit_h": 1280, "default": 1280}


def check_type(parameters: Mapping[str, Any], model_type: str | None, place: str) -> None:
    """A named `model_type` must be the one the weights are of; None trusts the weights."""
    if model_type is None:
        return
    if model_type not in WIDTHS:
        raise ModelError(f"there is no model type `{model_type}`", remedy=f"use one of {', '.join(WIDTHS)}, or none")
    if WIDTHS[model_type] != parameters["embed_dim"]:
        own = {width: name for name, width in reversed(WIDTHS.items())}.get(
            parameters["embed_dim"], "none of the published"
        )
        raise ModelError(f"model type {model_type} was asked for, but the weights are {own}", place=place)


def build(parameters: Mapping[str, Any]) -> Sam:
    """A Sam of `architecture`'s parameters, random weights, on the CPU; the rest as in segment_anything.build_sam."""
    side, width = parameters["img_size"], parameters["out_chans"]
    grid = side // parameters["patch_size"]
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    return Sam(
        image_encoder=ImageEncoderViT(**parameters, qkv_bias=True, use_rel_pos=True, norm_layer=norm),
        prompt_encoder=PromptEncoder(
            embed_dim=width, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=16
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=2048, num_heads=8),
            transformer_dim=width,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=MEAN,
        pixel_std=DEVIATION,
    )


class Sam1Engine(TorchEngine):
    """`types.Engine` on a `segment_anything.modeling.Sam`."""

    family: ClassVar[str] = "sam1"

    def __init__(self, model: Any, step: Step | None = None, *, name: str = "sam1", **keywords: Any) -> None:
        encoder = model.image_encoder
        attention.install(encoder)
        self.native_side = int(encoder.img_size)
        self._pos_embed = encoder.pos_embed.detach().float().cpu().clone()  # 1×grid×grid×C, at the native side
        super().__init__(model, step or cpu_step(self.native_side), name=name, **keywords)

    def frame_for(self, size: Size, side: int) -> Frame:
        """The longest side scaled to `side`, rounded as ResizeLongestSide does; the rest is padding."""
        scale = side / max(size)
        width, height = (max(1, int(length * scale + 0.5)) for length in size)
        return Frame(size=size, side=side, region=Size(width, height), two_step=True)

    def _set_side(self, side: int) -> None:
        """Positions are interpolated as DINO and ViTDet do; relative ones interpolate themselves."""
        encoder = self.model.image_encoder
        grid = self._pos_embed.shape[1] * side // self.native_side
        positions = self._pos_embed
        if grid != positions.shape[1]:
            planes = positions.permute(0, 3, 1, 2)
            planes = F.interpolate(planes, (grid, grid), mode="bicubic", align_corners=False, antialias=True)
            positions = planes.permute(0, 2, 3, 1)
        kind = encoder.patch_embed.proj.weight
        encoder.pos_embed = torch.nn.Parameter(positions.to(kind.device, kind.dtype), requires_grad=False)

    def _square(self, pictures: Sequence[Prepared]) -> Tensor:
        side = self.step.side
        square = torch.zeros((len(pictures), 3, side, side), device=self.device)
        for plane, picture in zip(square, pictures, strict=True):  # padded after normalising: with the mean colour
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
        return self.model.prompt_encoder(points=points, boxes=prompts.boxes, masks=None)

    def _masks(
        self, features: Features, pe: Tensor, sparse: Tensor, dense: Tensor, many: bool
    ) -> tuple[Tensor, Tensor]:
        return self.model.mask_decoder(
            image_embeddings=features.image,
            image_pe=pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=many,
        )
