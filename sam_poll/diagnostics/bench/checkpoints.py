"""Weights to measure with: the user's own, or random ones of the published size.

Random weights are saved as a file that the loop, the daemon and the bare network load. They make
random masks: thousands of specks, whose contours would take longer than all else and say nothing
about a trained network. So two things are set, neither of which changes what is computed or how
long it takes: positions get large smooth values, which makes the features smooth; and the bias of
the last layer is fitted (least squares on one grey picture) so that the mask is a blob in the
middle of the picture. Such a mask covers about a fifth of it and has a ragged edge, a few parts and
holes.

Limitations: a large model needs room in the temporary folder (sam_vit_h 2.5 GB). Networks without
positions (TinyViT, EdgeTAM) make small or empty masks.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sam_poll.core.errors import ModelError
from sam_poll.core.types import Box, Picture, Prompt, Size
from sam_poll.engines import catalog
from sam_poll.engines.base import TorchEngine

SEED = 0
_POSITIONS = 3.0  # standard deviation of the positions; a network's other features have about 1
_RADIUS = 0.28  # of the blob, in parts of the picture's sides: it covers a quarter
_HEIGHT = 10.0  # logits in the blob's middle, as trained networks give them
# how much of the last layer's random weights is left: the blob's edge stays a little uneven
_OTHERS = 0.1


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint and its config; `config` None: known from the weights."""

    name: str
    path: Path
    config: str | None
    random: bool

    def remove_random(self) -> None:
        """Remove weights that were made for a benchmark: a file, or a folder as of the hub."""
        if not self.random:
            return
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink()


def weights_for(model: str, folder: Path, tell: Callable[[str], None] = lambda _: None) -> Weights:
    """Return the weights that `model` means.

    A catalogue model that is not downloaded gets random weights, saved in `folder`. Raises
    ModelError.
    """
    spec = catalog.resolve(model)
    found = catalog.folder_or_file(spec)
    if found and (found.exists() or not spec.download):
        return Weights(spec.name, found, spec.config, random=False)
    if spec.family == "sam3":
        raise ModelError(
            "SAM 3 is measured with its own weights only",
            place=model,
            remedy=f"run `sam-poll models download {spec.download}`",
        )
    if not spec.family or not spec.download:
        raise ModelError("this model has no weights that could be measured", place=model)
    tell(f"{model} is not downloaded: making random weights of its size")
    path = folder / f"{spec.name.replace('/', '_')}.pt"
    if spec.family == "edgetam":
        path = path.with_suffix("")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        save(make(spec.name, spec.family or "", spec.config), path)
    return Weights(spec.name, path, spec.config, random=True)


def make(name: str, family: str, config: str | None) -> Any:
    """Build a model of the published size on the CPU, random except for the two things above."""
    if family == "sam1":
        return _made_sam1(name)
    if family in ("sam-hq", "mobile-sam"):
        from sam_poll.engines import sam_hq

        return build_sam_hq(sam_hq.published(name))
    if family == "edgetam":
        from sam_poll.engines import edgetam

        return build_edgetam(edgetam.published_config())
    return build_sam2(config or name)


def build_sam2(config: str) -> Any:
    """Build the SAM 2 of this yaml."""
    from sam_poll.engines import sam2

    path = sam2.find_config(config)
    model = sam2.build(sam2.read_config(path), str(path))
    torch.nn.init.normal_(model.image_encoder.trunk.pos_embed, std=_POSITIONS)
    video = model.memory_attention, model.memory_encoder
    _fit(sam2.Sam2Engine(model, name=config), model.sam_mask_decoder)
    model.memory_attention, model.memory_encoder = (
        video  # the engine does without, but they belong into the file
    )
    return model


def _made_sam1(name: str) -> Any:
    from segment_anything import sam_model_registry

    from sam_poll.engines import sam1

    with torch.device("meta"):  # only the shapes count
        parameters = sam1.architecture(sam_model_registry[name.removeprefix("sam_")]().state_dict())
    return build_sam1(parameters)


def build_sam1(parameters: dict[str, Any]) -> Any:
    """Build the SAM of these parameters."""
    from sam_poll.engines import sam1

    model = sam1.build(parameters)
    _smooth_positions(model.image_encoder)
    _fit(sam1.Sam1Engine(model), model.mask_decoder)
    return model


def build_sam_hq(architecture: Any) -> Any:
    """Build the SAM-HQ or MobileSAM of this `sam_hq.Architecture`."""
    from sam_poll.engines import sam_hq

    model = sam_hq.build(architecture)
    if not architecture.tiny:  # TinyViT has no positions
        _smooth_positions(model.image_encoder)
    if not architecture.early_width:
        _fit(sam_hq.MobileSamEngine(model), model.mask_decoder)
        return model
    # The mask is the sum of SAM's and that of the HQ token: the latter is made zero.
    for weights in model.mask_decoder.hf_mlp.layers[-1].parameters():
        torch.nn.init.zeros_(weights)
    _fit(sam_hq.SamHqEngine(model), model.mask_decoder)
    return model


def build_edgetam(config: Any) -> Any:
    """Build the EdgeTAM of this `transformers.EdgeTamConfig`. It has no positions."""
    from sam_poll.engines import edgetam

    model = edgetam.build(config)
    _fit(edgetam.EdgeTamEngine(model), model.mask_decoder)
    return model


def _smooth_positions(encoder: Any) -> None:
    """Give SAM's vision transformer large smooth positions."""
    positions = encoder.pos_embed
    coarse = torch.randn(1, positions.shape[3], 7, 7) * _POSITIONS
    smooth = F.interpolate(coarse, positions.shape[1:3], mode="bicubic").permute(0, 2, 3, 1)
    positions.data.copy_(smooth)


@torch.no_grad()
def _fit(engine: TorchEngine, decoder: Any) -> None:
    parts = _last_parts(decoder)
    for layer in parts.upscaling:  # no chequered pattern
        layer.weight.copy_(layer.weight.mean((2, 3), keepdim=True).expand_as(layer.weight))
    features = _last_features(engine, parts.activation)
    height, width = features.shape[1:]
    y, x = ((torch.arange(length) + 0.5) / length - 0.5 for length in (height, width))
    blob = (_HEIGHT * (1 - torch.hypot(x, y[:, None]) / _RADIUS)).clamp(min=-_HEIGHT)
    bias = torch.linalg.lstsq(features.flatten(1).T, blob.reshape(-1, 1)).solution[:, 0]
    for layer in parts.weights:
        layer.weight.mul_(_OTHERS)
        layer.bias.copy_(bias)


@dataclass(frozen=True, slots=True)
class _LastParts:
    """The end of a mask decoder: what enlarges the features, and what makes the sum's weights.

    The output of `activation`, at its last call, is what the mask is a weighted sum of.
    """

    upscaling: tuple[Any, Any]
    activation: Any
    weights: list[Any]


def _last_parts(decoder: Any) -> _LastParts:
    networks = decoder.output_hypernetworks_mlps
    if hasattr(decoder, "upscale_conv1"):  # of transformers
        upscaling = (decoder.upscale_conv1, decoder.upscale_conv2)
        return _LastParts(upscaling, decoder.activation, [each.proj_out for each in networks])
    layers = decoder.output_upscaling
    return _LastParts((layers[0], layers[3]), layers[4], [each.layers[-1] for each in networks])


def _last_features(engine: TorchEngine, activation: Any) -> Tensor:
    """Return what the mask is a weighted sum of: C×h×w, for a grey picture."""
    side = engine.native_side
    seen: list[Tensor] = []
    hook = activation.register_forward_hook(lambda *call: seen.append(call[2].detach()))
    try:
        picture = Picture(np.full((side, side, 3), 128, np.uint8), Size(side, side), "grey")
        (embedding,) = engine.encode([engine.prepare(picture)])
        engine.decode(embedding, [Prompt(box=Box(0.2 * side, 0.2 * side, 0.8 * side, 0.8 * side))])
    finally:
        hook.remove()
    return seen[-1][0].float()


def save(model: Any, path: Path) -> None:
    """As the published ones are: a state dict below the key `model`, or a folder of the hub."""
    if hasattr(model, "save_pretrained"):
        from sam_poll.engines import pretrained

        with pretrained.quiet():
            model.save_pretrained(path)
    else:
        torch.save({"model": model.state_dict()}, path)
