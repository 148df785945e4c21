"""The weights to measure with: the user's own where they are, else random ones of the published size, saved as a file
that the loop, the daemon and the bare network all load.

Random weights make random masks: thousands of specks, whose contours would take longer than everything else and tell
nothing about a trained network. So two things are set, neither of which changes what is computed or how long it takes:
positions get large smooth values, which makes the features smooth; and the bias of the last layer is fitted (least
squares on one grey picture) so that the mask is a blob in the middle of the picture. Such a mask covers about a fifth
of it and has a ragged edge, a few parts and holes.

What can still go wrong here: a model too large for the temporary folder (sam_vit_h takes 2.5 GB there).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_poll.engines import catalog
from sam_poll.engines.base import TorchEngine
from sam_poll.errors import ModelError
from sam_poll.types import Box, Picture, Prompt, Size

SEED = 0
_POSITIONS = 3.0  # standard deviation of the positions; a network's other features have about 1
_RADIUS = 0.28  # of the blob, in parts of the picture's sides: it covers a quarter
_HEIGHT = 10.0  # logits in the blob's middle, as trained networks give them
_OTHERS = 0.1  # how much of the last layer's random weights is left: the blob's edge stays a little uneven


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint, its config (None: told by the weights), and whether the weights are random."""

    name: str
    path: Path
    config: str | None
    random: bool


def weights_for(model: str, folder: Path, tell: Callable[[str], None] = lambda _: None) -> Weights:
    """The weights that `model` means; made and saved in `folder` where a catalogue model has not been downloaded.
    ModelError."""
    spec = catalog.resolve(model)
    if spec.checkpoint is None:
        raise ModelError("this model has no weights that could be measured", place=model)
    if spec.checkpoint.is_file() or spec.name not in catalog.MODELS:
        return Weights(spec.name, spec.checkpoint, spec.config, random=False)
    tell(f"{model} is not downloaded: making random weights of its size")
    path = folder / f"{spec.name}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        save(make(spec.name, spec.family or "", spec.config), path)
    return Weights(spec.name, path, spec.config, random=True)


def make(name: str, family: str, config: str | None) -> Any:
    """A model of the published size, random but for the two things above, on the CPU."""
    return _made_sam1(name) if family == "sam1" else made_sam2(config or name)


def made_sam2(config: str) -> Any:
    """A SAM2 of this yaml."""
    from sam_poll.engines import sam2

    path = sam2.find_config(config)
    model = sam2.build(sam2.read_config(path), str(path))
    torch.nn.init.normal_(model.image_encoder.trunk.pos_embed, std=_POSITIONS)
    video = model.memory_attention, model.memory_encoder
    _fit(sam2.Sam2Engine(model, name=config), model.sam_mask_decoder)
    model.memory_attention, model.memory_encoder = video  # the engine does without, but they belong into the file
    return model


def _made_sam1(name: str) -> Any:
    from segment_anything import sam_model_registry

    from sam_poll.engines import sam1

    with torch.device("meta"):  # only the shapes count
        parameters = sam1.architecture(sam_model_registry[name.removeprefix("sam_")]().state_dict())
    return made_sam1(parameters)


def made_sam1(parameters: dict[str, Any]) -> Any:
    """A SAM1 of these parameters."""
    from sam_poll.engines import sam1

    model = sam1.build(parameters)
    positions = model.image_encoder.pos_embed
    coarse = torch.randn(1, positions.shape[3], 7, 7) * _POSITIONS
    smooth = F.interpolate(coarse, positions.shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
    positions.data.copy_(smooth)
    _fit(sam1.Sam1Engine(model), model.mask_decoder)
    return model


@torch.no_grad()
def _fit(engine: TorchEngine, decoder: Any) -> None:
    for layer in (decoder.output_upscaling[0], decoder.output_upscaling[3]):  # no chequered pattern
        layer.weight.copy_(layer.weight.mean((2, 3), keepdim=True).expand_as(layer.weight))
    features = _last_features(engine, decoder)
    height, width = features.shape[1:]
    y, x = ((torch.arange(length) + 0.5) / length - 0.5 for length in (height, width))
    blob = (_HEIGHT * (1 - torch.hypot(x, y[:, None]) / _RADIUS)).clamp(min=-_HEIGHT)
    bias = torch.linalg.lstsq(features.flatten(1).T, blob.reshape(-1, 1)).solution[:, 0]
    for network in decoder.output_hypernetworks_mlps:
        network.layers[-1].weight.mul_(_OTHERS)
        network.layers[-1].bias.copy_(bias)


def _last_features(engine: TorchEngine, decoder: Any) -> Tensor:
    """What the mask is a weighted sum of: C×h×w, for a grey picture."""
    side = engine.native_side
    seen: list[Tensor] = []
    hook = decoder.output_upscaling[4].register_forward_hook(lambda *call: seen.append(call[2].detach()))
    try:
        picture = Picture(np.full((side, side, 3), 128, np.uint8), Size(side, side), "grey")
        (embedding,) = engine.encode([engine.prepare(picture)])
        engine.decode(embedding, [Prompt(box=Box(0.2 * side, 0.2 * side, 0.8 * side, 0.8 * side))])
    finally:
        hook.remove()
    return seen[0][0].float()


def save(model: Any, path: Path) -> None:
    """As the published files are: a state dict below the key `model`."""
    torch.save({"model": model.state_dict()}, path)
