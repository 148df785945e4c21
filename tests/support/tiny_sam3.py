"""SAM 3 with few weights, all of them random, in a folder in the form of `facebook/sam3`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTokenizerFast,
    Sam3ImageProcessor,
    Sam3Model,
    Sam3Processor,
    Sam3TrackerModel,
    Sam3VideoConfig,
)

SIDE = 224
QUERIES = 10
_GRID = SIDE // 14
_WIDTH = 32
_VIT = {
    "model_type": "sam3_vit_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
    "window_size": 8,
    "global_attn_indexes": [1],
    "pretrain_image_size": 112,
}
_VISION = {
    "model_type": "sam3_vision_model",
    "backbone_config": _VIT,
    "fpn_hidden_size": _WIDTH,
    "backbone_feature_sizes": [[_GRID * 4] * 2, [_GRID * 2] * 2, [_GRID] * 2],
}
_LAYERS = {
    "hidden_size": _WIDTH,
    "num_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def config(queries: int = QUERIES) -> Sam3VideoConfig:
    """The configuration of the published checkpoint, with few and narrow layers."""
    detector = {
        "model_type": "sam3",
        "vision_config": _VISION,
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": 514,
            "hidden_size": 32,
            "intermediate_size": 64,
            "projection_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
            "hidden_act": "gelu",
            "bos_token_id": 512,
            "eos_token_id": 513,
        },
        "geometry_encoder_config": dict(_LAYERS),
        "detr_encoder_config": dict(_LAYERS),
        "detr_decoder_config": {**_LAYERS, "num_queries": queries},
        "mask_decoder_config": {"hidden_size": _WIDTH, "num_attention_heads": 2},
    }
    tracker = {
        "model_type": "sam3_tracker_video",
        "image_size": SIDE,
        "vision_config": _VISION,
        "prompt_encoder_config": {"hidden_size": _WIDTH, "image_size": SIDE, "patch_size": 14},
        "mask_decoder_config": {
            "hidden_size": _WIDTH,
            "mlp_dim": 64,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 32,
        },
    }
    return Sam3VideoConfig(detector_config=detector, tracker_config=tracker)


def tokenizer() -> CLIPTokenizerFast:
    """A tokenizer with a token for each byte, and one for each byte that ends a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    return CLIPTokenizerFast(vocab=vocabulary, merges=[])


def save(folder: Path, *, seed: int = 0, queries: int = QUERIES, scale: float = 1.0) -> Path:
    """Write a network and its processor into `folder`, and return it.

    `scale` multiplies the weights that make masks of queries: with random weights their logits are
    close to zero otherwise.
    """
    torch.manual_seed(seed)
    whole = config(queries)
    detector, tracker = (kind(whole).eval() for kind in (Sam3Model, Sam3TrackerModel))
    with torch.no_grad():
        for name, weights in (*detector.named_parameters(), *tracker.named_parameters()):
            if "position" in name or "no_memory" in name:
                weights.normal_(std=0.5)
        detector.mask_decoder.instance_projection.weight *= scale
        detector.detr_decoder.presence_head.layer3.bias += 3
    folder.mkdir(parents=True, exist_ok=True)
    whole.save_pretrained(folder)
    save_file(published_names(detector, tracker), folder / "model.safetensors", {"format": "pt"})
    pictures = Sam3ImageProcessor(size={"height": SIDE, "width": SIDE})
    Sam3Processor(pictures, tokenizer()).save_pretrained(folder)
    return folder


def published_names(detector: Any, tracker: Any) -> dict[str, torch.Tensor]:
    """Return the weights of both heads under the names that the published checkpoint has."""
    found = {f"detector_model.{name}": tensor for name, tensor in detector.state_dict().items()}
    for name, tensor in tracker.state_dict().items():
        if name.startswith("vision_encoder.neck."):
            found[f"tracker_neck.{name.removeprefix('vision_encoder.neck.')}"] = tensor
        elif not name.startswith("vision_encoder."):
            found[f"tracker_model.{name}"] = tensor
    # The published checkpoint is one for videos, too.
    found["tracker_model.memory_encoder.projection.weight"] = torch.zeros(1)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def rename(folder: Path, old: str, new: str) -> None:
    """Rename weights in a folder, as another version of the library may name them."""
    path = folder / "model.safetensors"
    renamed = {name.replace(old, new): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, {"format": "pt"})


def configuration(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())
