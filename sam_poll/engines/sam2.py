"""SAM2 and SAM2.1 through the `sam2` package: its modules, but not its predictor.

The predictor fixes its feature sizes to 1024 pixels, resizes in float32 at full size, enlarges three masks to the full
picture on the device, and logs each picture on the root logger; this does none of that and gives the same logits.

What can still go wrong here: sam2 refuses to be imported next to a checkout of itself; importing it sets Hydra up for
its own configs (its doing; we build from the yaml without Hydra's global state).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sam2 as sam2_package
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sam_poll.engines import attention, model_config
from sam_poll.engines.base import Features, PromptBatch, TorchEngine
from sam_poll.engines.memory import Step, cpu_step
from sam_poll.errors import ModelError
from sam_poll.types import Frame, Prepared, Size

# The mean and deviation of ImageNet's colours, as in sam2.utils.transforms.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)

# What sam2.build_sam.build_sam2(apply_postprocessing=True) adds to every config.
POSTPROCESSING = {
    "dynamic_multimask_via_stability": True,
    "dynamic_multimask_stability_delta": 0.05,
    "dynamic_multimask_stability_thresh": 0.98,
}


def find_config(name: str) -> Path:
    """A yaml by path, or one packaged with sam2: `configs/sam2.1/sam2.1_hiera_t.yaml`, or its bare name."""
    own = Path(name).expanduser()
    if own.is_file():
        return own
    package = Path(sam2_package.__path__[0])
    for candidate in (package / name, package / f"{name}.yaml"):
        if candidate.is_file():
            return candidate
    packaged = {path.stem: path for path in sorted(package.glob("configs/sam2*/*.yaml")) if "training" not in str(path)}
    if found := packaged.get(name.removesuffix(".yaml")):
        return found
    raise ModelError("there is no such config", place=name, remedy=f"give a path, or one of {', '.join(packaged)}")


def read_config(path: Path) -> DictConfig:
    """Return the yaml's `model` part, resolved, with the official build's post-processing.

    Raises ModelError where it cannot be read, or names anything to build but networks (`model_config`).
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
    except Exception as error:  # yaml, OmegaConf and the file system have no class in common
        raise ModelError(f"the config cannot be read: {error}", place=str(path)) from error


def build(config: DictConfig, place: str) -> Any:
    """The SAM2Base that the config describes, with random weights, on the CPU."""
    try:
        return instantiate(config, _recursive_=True)
    except Exception as error:  # Hydra wraps whatever the classes raise
        raise ModelError(f"the config does not build a model: {error}", place=place) from error


class Sam2Engine(TorchEngine):
    """`types.Engine` on a `sam2.modeling.sam2_base.SAM2Base`."""

    family: ClassVar[str] = "sam2"

    def __init__(self, model: Any, step: Step | None = None, *, name: str = "sam2", **keywords: Any) -> None:
        self.native_side = int(model.image_size)
        # Video's parts, up to a fifth of a small model's weights, have nothing to do on single pictures.
        model.memory_attention = model.memory_encoder = None
        attention.install_hiera(model.image_encoder.trunk)
        super().__init__(model, step or cpu_step(self.native_side), name=name, **keywords)

    def frame_for(self, size: Size, side: int) -> Frame:
        return Frame(size=size, side=side, region=Size(side, side), two_step=False)

    def _set_side(self, side: int) -> None:
        self.model.image_size = side
        mean, deviation = (torch.tensor(values, device=self.device) * 255 for values in (MEAN, DEVIATION))
        self._mean, self._deviation = mean.view(1, 3, 1, 1), deviation.view(1, 3, 1, 1)

    def _square(self, pictures: Sequence[Prepared]) -> Tensor:
        pixels = self._upload(np.stack([picture.pixels for picture in pictures]))  # n×side×side×3
        return (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._deviation

    def _encode(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        model = self.model
        maps = model.forward_image(square)["backbone_fpn"][-model.num_feature_levels :]
        image = maps[-1]
        if model.directly_add_no_mem_embed:  # as SAM2ImagePredictor does: a picture is a video without memory
            image = image + model.no_mem_embed.view(1, -1, 1, 1)
        return image, tuple(maps[:-1])

    def _prompt_encoder(self) -> Any:
        return self.model.sam_prompt_encoder

    def _sparse(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        points, labels = prompts.points, prompts.labels
        if prompts.boxes is not None:  # SAM2 takes a box as two more points, labelled 2 and 3, before the others
            corners = prompts.boxes.reshape(-1, 2, 2)
            corner_labels = torch.tensor([[2, 3]], dtype=labels.dtype, device=labels.device).expand(len(prompts), 2)
            points = torch.cat([corners, points], dim=1)
            labels = torch.cat([corner_labels, labels], dim=1)
        return self.model.sam_prompt_encoder(points=(points, labels), boxes=None, masks=None)

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
