"""The SAM2 and SAM2.1 engine, built on the modules of the `sam2` package without its predictor.

The predictor of the package fixes its feature sizes to 1024 pixels, resizes in float32 at full
size, enlarges three masks to the full picture on the device, and logs each picture on the root
logger. This engine does none of that and returns the same logits.

Limitations: sam2 refuses to be imported next to a checkout of its own repository. Importing it
initialises Hydra for its own configs; this module builds models without Hydra's global state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import sam2 as sam2_package
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from sam_poll.core.errors import ModelError
from sam_poll.engines import model_config
from sam_poll.engines.base import Features, PromptBatch
from sam_poll.engines.kernels import attention
from sam_poll.engines.memory.plan import MemoryStep, cpu_step
from sam_poll.engines.stretched import StretchingEngine

# The overrides that sam2.build_sam.build_sam2(apply_postprocessing=True) adds to every config.
POSTPROCESSING = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}


def find_config(name: str) -> Path:
    """Return the path of a yaml.

    `name` is a path, or a yaml packaged with sam2: `configs/sam2.1/sam2.1_hiera_t.yaml` or its bare
    name `sam2.1_hiera_t`. Raises ModelError where there is none.
    """
    given = Path(name).expanduser()
    if given.is_file():
        return given
    package = Path(sam2_package.__path__[0])
    for candidate in (package / name, package / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    packaged = {
        path.stem: path
        for path in sorted(package.glob("configs/sam2*/*.yaml"))
        if "training" not in str(path)
    }
    if path := packaged.get(name.removesuffix(".yaml")):
        return path
    raise ModelError(
        "there is no such config",
        place=name,
        remedy=f"give a path, or one of {', '.join(packaged)}",
    )


def read_config(path: Path) -> DictConfig:
    """Return the `model` part of the yaml, resolved, with the official build's post-processing.

    Raises ModelError where the yaml cannot be read, or where it builds anything but networks
    (`model_config`).
    """
    try:
        config = OmegaConf.load(path)
        model = config.get("model") if isinstance(config, DictConfig) else None
        if not isinstance(model, DictConfig) or "_target_" not in model:
            raise ModelError("the config has no `model` with a `_target_`", place=str(path))
        OmegaConf.update(model, "sam_mask_decoder_extra_args", POSTPROCESSING, force_add=True)
        plain = OmegaConf.to_container(config, resolve=True)
        assert isinstance(plain, dict)
        model_config.check(plain, str(path))
        return OmegaConf.create(plain["model"])
    except ModelError:
        raise
    except Exception as error:  # errors of yaml, OmegaConf and the file system share no base class
        raise ModelError(f"the config cannot be read: {error}", place=str(path)) from error


def build(config: DictConfig, place: str) -> Any:
    """Return the `SAM2Base` that the config describes, with random weights, on the CPU.

    Raises ModelError where the config does not build a model.
    """
    try:
        return instantiate(config, _recursive_=True)
    except Exception as error:  # Hydra wraps the errors of the classes that it builds
        raise ModelError(f"the config does not build a model: {error}", place=place) from error


def install(encoder: Any) -> None:
    """Leave out what the package's image encoder computes for videos only; change its attention."""
    encoder.neck.position_encoding = _NoPositions()
    attention.install_hiera(encoder.trunk)


class _NoPositions(nn.Module):
    """Stands for the positions of the neck's maps, which only the video memory takes.

    The package computes them at the first call for each side, for all pictures of the batch, and
    copies them for each picture: 85 MiB at 1024 pixels in float32.
    """

    def forward(self, maps: Tensor) -> Tensor:
        return maps.new_zeros(1)


class Sam2Engine(StretchingEngine):
    """An engine (`core.protocols.Engine`) that runs a `sam2.modeling.sam2_base.SAM2Base`."""

    family: ClassVar[str] = "sam2"

    def __init__(
        self, model: Any, step: MemoryStep | None = None, *, name: str = "sam2", **keywords: Any
    ) -> None:
        self.native_side = int(model.image_size)
        # These modules serve videos only and are up to a fifth of a small model's weights.
        model.memory_attention = None
        model.memory_encoder = None
        install(model.image_encoder)
        super().__init__(model, step or cpu_step(self.native_side), name=name, **keywords)

    def _set_side(self, side: int) -> None:
        self.model.image_size = side
        super()._set_side(side)

    def _encode(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        model = self.model
        maps = model.forward_image(square)["backbone_fpn"][-model.num_feature_levels :]
        image = maps[-1]
        # As SAM2ImagePredictor does: a picture is a video frame without memory.
        if model.directly_add_no_mem_embed:
            image = image + model.no_mem_embed.view(1, -1, 1, 1)
        return image, tuple(maps[:-1])

    def _prompt_encoder(self) -> Any:
        return self.model.sam_prompt_encoder

    def _sparse(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        points, labels = prompts.points, prompts.labels
        # SAM2 takes a box as two more points, labelled 2 and 3, before the others
        # (SAM2ImagePredictor._predict).
        if prompts.boxes is not None:
            corners = prompts.boxes.reshape(-1, 2, 2)
            corner_labels = torch.tensor([[2, 3]], dtype=labels.dtype, device=labels.device).expand(
                len(prompts), 2
            )
            points = torch.cat([corners, points], dim=1)
            labels = torch.cat([corner_labels, labels], dim=1)
        return self.model.sam_prompt_encoder(
            points=(points, labels), boxes=None, masks=prompts.masks
        )

    def _masks(
        self, features: Features, pe: Tensor, sparse: Tensor, dense: Tensor, many: bool
    ) -> tuple[Tensor, Tensor]:
        logits, iou, _, _ = self.model.sam_mask_decoder(
            image_embeddings=features.image,
            image_pe=pe,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=many,
            repeat_image=len(sparse) > 1,
            high_res_features=list(features.high_res),
        )
        return logits, iou
