"""Reading of checkpoints: load the weights, identify their network, and fill a model with them.

Checkpoints are always read with `weights_only`: a checkpoint is data and must not run code.

Limitations: weights that fit in every key and shape but were trained for another preprocessing
(for example a fine-tuned model with another mean colour) are not detected.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sam_poll.core.errors import ModelError
from sam_poll.core.validation import quoted

_MAX_NAMED_KEYS = 4  # named in an error message; with a wrong config hundreds are missing


def read(path: Path) -> dict[str, Any]:
    """Return the state dict in `path`, bare or below the key `model`, with tensors on the CPU.

    Raises ModelError where the file is missing or holds no state dict.
    """
    import torch

    place = str(path)
    _check_is_binary(path)
    try:
        # mmap loads only the pages that are used and avoids a second copy of the file in memory.
        # torch supports it for the zip format only.
        loaded = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # torch raises errors of many classes for broken files
        raise _unreadable(error, place) from error
    weights = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, torch.Tensor) for value in weights.values())
    ):
        raise ModelError(
            "the file holds no state dict, neither bare nor below the key `model`", place=place
        )
    return weights


def _check_is_binary(path: Path) -> None:
    """Raise ModelError for a missing or empty file, and for the texts of failed downloads."""
    place = str(path)
    if not path.is_file():
        raise ModelError(
            "the checkpoint does not exist",
            place=place,
            remedy="check the path, or `sam-poll models list`",
        )
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if not head:
        raise ModelError("the checkpoint is empty", place=place, remedy="download it again")
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
        raise ModelError(
            "this is a web page, not a checkpoint",
            place=place,
            remedy="download it again, from its direct link",
        )
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(
            "this is a Git LFS pointer, not the checkpoint itself",
            place=place,
            remedy="run `git lfs pull`",
        )


def _unreadable(error: Exception, place: str) -> ModelError:
    """Return the error to raise for an error of `torch.load`."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "weights_only" in reason or reason.startswith("Weights only"):
        # torch's own advice, weights_only=False, is left out: it would run code from the file.
        return ModelError(
            "the checkpoint cannot be read: it holds more than weights, or is not a PyTorch file",
            place=place,
            remedy="download it again; of a training of your own save the weights alone, "
            "`torch.save(model.state_dict(), PATH)`",
        )
    return ModelError(
        "the checkpoint cannot be read: "
        f"it is truncated or not a PyTorch file of weights ({reason})",
        place=place,
        remedy="download it again and compare its SHA-256 "
        "(`sam-poll models verify`, for those of the catalogue)",
    )


def reader(path: Path) -> Callable[[], dict[str, Any]]:
    """Return a function that reads the same file again later.

    The function raises ModelError where the file has been changed or replaced in the meantime.
    """

    def version() -> tuple[int, int] | None:
        try:
            status = path.stat()
        except OSError:
            return None  # `read` reports the reason
        return status.st_size, status.st_mtime_ns

    before = version()

    def read_again() -> dict[str, Any]:
        if (now := version()) and now != before:
            raise ModelError("the checkpoint has changed since it was loaded", place=str(path))
        return read(path)

    return read_again


# A weight that only networks of the family have.
_VIT = "image_encoder.patch_embed.proj.weight"
_TINY_VIT = "image_encoder.patch_embed.seq.0.c.weight"
_HIERA = "image_encoder.trunk.patch_embed.proj.weight"
_HQ_TOKEN = "mask_decoder.hf_token.weight"  # noqa: S105 - the name of a weight


def family_of(weights: Mapping[str, Any], place: str) -> str:
    """Return `sam1`, `sam2`, `sam-hq` or `mobile-sam`, by the names of the weights.

    Raises ModelError for others.
    """
    if _HIERA in weights:
        return "sam2"
    if _HQ_TOKEN in weights and (_VIT in weights or _TINY_VIT in weights):
        return "sam-hq"
    if _VIT in weights:
        return "sam1"
    if _TINY_VIT in weights:
        return "mobile-sam"
    first_keys = ", ".join(list(weights)[:_MAX_NAMED_KEYS])
    raise ModelError(
        "these are not the weights of SAM1, SAM2, SAM-HQ or MobileSAM "
        f"(they begin with {first_keys})",
        place=place,
    )


# `model_type` in the config.json of a folder → family.
_MODEL_TYPES = {
    "edgetam": "edgetam",
    "edgetam_video": "edgetam",
    "sam3": "sam3",
    "sam3_video": "sam3",
}


def family_of_folder(folder: Path) -> str:
    """Return the family of a model in the form of the Hugging Face hub: `edgetam`, `sam3`.

    Raises ModelError where the folder holds no such model, or one of another family.
    """
    place = str(folder)
    try:
        config = json.loads((folder / "config.json").read_bytes())
        model_type = config.get("model_type") if isinstance(config, dict) else None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the folder holds no model: config.json cannot be read ({error})",
            place=place,
            remedy="name a checkpoint's file, or a folder with config.json and model.safetensors",
        ) from error
    family = _MODEL_TYPES.get(str(model_type))
    if not family:
        raise ModelError(
            f"config.json names the model type {quoted(str(model_type))}, which is not supported",
            place=place,
            remedy=f"use one of {', '.join(_MODEL_TYPES)}",
        )
    return family


# The letter of sam2's yaml by the trunk's first width and number of blocks: `embed_dim` and the
# sum of `stages` in configs/sam2/*.yaml of the sam2 package.
_SAM2_SIZES = {(96, 12): "t", (96, 16): "s", (112, 24): "b+", (144, 48): "l"}


def sam2_config_of(weights: Mapping[str, Any], place: str) -> str:
    """Return the name of the yaml packaged with sam2 that these SAM2 weights belong to.

    Raises ModelError where they are of none of the published sizes.
    """
    width = weights["image_encoder.trunk.patch_embed.proj.weight"].shape[0]
    blocks = {key.split(".")[3] for key in weights if key.startswith("image_encoder.trunk.blocks.")}
    letter = _SAM2_SIZES.get((width, len(blocks)))
    if not letter:
        raise ModelError(
            f"this SAM2 model has none of the published sizes "
            f"(width {width}, {len(blocks)} blocks)",
            place=place,
            remedy="name its yaml, too "
            "(`model_cfg`, `--model-cfg`, or MODEL_CFG in the environment)",
        )
    version = "2.1" if "no_obj_embed_spatial" in weights else "2"
    return f"configs/sam{version}/sam{version}_hiera_{letter}.yaml"


def fill(model: Any, weights: Mapping[str, Any], *, place: str, config: str | None = None) -> None:
    """Load `weights` into `model`, which was built from `config`, or (None) from the weights.

    Raises ModelError, which names some of the keys, where weights and model do not fit.
    """
    expected = model.state_dict()
    mismatches = {
        "missing": [key for key in expected if key not in weights],
        "unknown": [key for key in weights if key not in expected],
        "of another shape": [
            f"{key} {tuple(weights[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in expected
            if key in weights and weights[key].shape != expected[key].shape
        ],
    }
    parts = [f"{problem} {first_of(keys)}" for problem, keys in mismatches.items() if keys]
    if parts:
        remedy = "name the config that belongs to this checkpoint"
        if config is None:
            remedy = "take the published checkpoint; the keys of this one differ from its"
        raise ModelError(
            f"the weights do not fit the model {config or 'read from them'}: {'; '.join(parts)}",
            place=place,
            remedy=remedy,
        )
    model.load_state_dict(dict(weights))


def first_of(keys: list[str]) -> str:
    """Return the first of `keys` for an error message, and how many more there are."""
    left_out = len(keys) - _MAX_NAMED_KEYS
    more = f" and {left_out} more" if left_out > 0 else ""
    return ", ".join(keys[:_MAX_NAMED_KEYS]) + more
