"""The EdgeTAM engine, built on the modules of `transformers` without its processor.

EdgeTAM is SAM2 with another image encoder (RepViT of `timm`) and without its video memory here. It
is loaded from a folder in the form of the Hugging Face hub: `config.json` and weights in the
safetensors format.

Published conversions are of the video model; its modules for videos are left out.

Limitations: checkpoints of Meta's own repository (`edgetam.pt`) have other names of weights; use a
conversion of the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import timm  # noqa: F401  of the extra, too: here a missing one is noticed
import torch
from torch import Tensor, nn
from transformers import EdgeTamConfig, EdgeTamModel, TimmWrapperConfig

from sam_poll.engines import pretrained, prompts_as_objects
from sam_poll.engines.base import Features, PromptBatch, Weights
from sam_poll.engines.memory.plan import MemoryStep, cpu_step
from sam_poll.engines.stretched import StretchingEngine


def read(folder: Path) -> Any:
    """Return the `EdgeTamModel` in `folder`, in float32, on the CPU.

    Nothing is downloaded and no code of the folder is run. Raises ModelError where the folder holds
    no EdgeTAM, or where weights of the network are missing, unknown, or of another shape: the
    library would leave random values in their place.
    """
    return prepared(pretrained.load(EdgeTamModel, folder))


def reader(folder: Path) -> Weights:
    """Return a function that reads the state dict of the model in `folder` again."""
    return lambda: read(folder).state_dict()


def published_config(side: int = 1024) -> Any:
    """Return the configuration of the published EdgeTAM, for inputs of `side` pixels.

    The library's default names the backbone's architecture by a misspelt key, so that it is given
    here.
    """
    backbone = TimmWrapperConfig(
        architecture="repvit_m1.dist_in1k",
        do_pooling=False,
        model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    )
    sizes = [[side // stride] * 2 for stride in (4, 8, 16)]
    return EdgeTamConfig(
        vision_config={"backbone_config": backbone, "backbone_feature_sizes": sizes},
        prompt_encoder_config={"image_size": side},
    )


def build(config: Any) -> Any:
    """Return the `EdgeTamModel` of this `EdgeTamConfig` with random weights, on the CPU."""
    with pretrained.quiet():
        return prepared(EdgeTamModel(config))


def prepared(model: Any) -> Any:
    """Return `model`, set up for predictions, with its side as `image_size`."""
    model.image_size = int(model.config.prompt_encoder_config.image_size)
    return model.eval()


def install(encoder: Any) -> None:
    """Leave out what an image encoder of the library computes for videos only."""
    encoder.neck.position_encoding = _NoPositions()


class _NoPositions(nn.Module):
    """Stands for the positions of the neck's maps, which only the video memory takes.

    The library computes them for each picture: 22 million sines and cosines at 1024 pixels.
    """

    def forward(
        self, shape: torch.Size, device: Any, dtype: torch.dtype, mask: Tensor | None = None
    ) -> Tensor:
        return torch.zeros((1, 1, 1, 1), device=device, dtype=dtype)


class EdgeTamEngine(StretchingEngine):
    """An engine (`core.protocols.Engine`) that runs a `transformers.EdgeTamModel`."""

    family: ClassVar[str] = "edgetam"

    def __init__(
        self, model: Any, step: MemoryStep | None = None, *, name: str = "edgetam", **keywords: Any
    ) -> None:
        self.native_side = int(model.image_size)
        install(model.vision_encoder)
        super().__init__(model, step or cpu_step(self.native_side), name=name, **keywords)

    def _image_encoder(self) -> Any:
        return self.model.vision_encoder

    def _encode(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        model, decoder = self.model, self.model.mask_decoder
        fine, middle, coarse = self._image_encoder()(square).fpn_hidden_states
        # As EdgeTamModel.get_image_embeddings does: a picture is a video frame without memory.
        image = coarse + model.no_memory_embedding.view(1, -1, 1, 1)
        return image, (decoder.conv_s0(fine), decoder.conv_s1(middle))

    def _prompt_encoder(self) -> Any:
        return self.model.prompt_encoder

    def _set_prompt_side(self, grid: tuple[int, int], side: int) -> None:
        encoder = self.model.prompt_encoder
        encoder.image_embedding_size = grid
        encoder.input_image_size = side

    def _new_positions(self) -> Tensor:
        return self.model.get_image_wide_positional_embeddings()

    def _sparse(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        return prompts_as_objects.sparse(self.model.prompt_encoder, prompts)

    def _masks(
        self, features: Features, pe: Tensor, sparse: Tensor, dense: Tensor, many: bool
    ) -> tuple[Tensor, Tensor]:
        decoder = self.model.mask_decoder
        return prompts_as_objects.masks(
            decoder, features.image, features.high_res, pe, sparse, dense, many
        )
