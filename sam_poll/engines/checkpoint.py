"""Reads a checkpoint's weights, tells which network they belong to, and puts them into it; says what is wrong with it.

`weights_only` always: a checkpoint is data, and must not be able to run code. What can still go wrong here: weights
that fit in every key and shape and yet are another network's (a fine-tune with other colours' mean).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sam_poll.errors import ModelError

_NAMED = 4  # keys named in an error; one wrong config misses hundreds


def read(path: Path) -> dict[str, Any]:
    """The state dict in `path`, bare or below the key `model`, tensors on the CPU."""
    import torch

    place = str(path)
    if not path.is_file():
        raise ModelError(
            "the checkpoint does not exist", place=place, remedy="check the path, or `sam-poll models list`"
        )
    with path.open("rb") as file:
        head = file.read(512).lstrip().lower()
    if not head:
        raise ModelError("the checkpoint is empty", place=place, remedy="download it again")
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"{")):
        raise ModelError(
            "this is a web page, not a checkpoint", place=place, remedy="download it again, from its direct link"
        )
    if head.startswith(b"version https://git-lfs"):
        raise ModelError(
            "this is a Git LFS pointer, not the checkpoint itself", place=place, remedy="run `git lfs pull`"
        )
    try:
        # mmap reads only what is used and does not hold the file twice; only the zip format can.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # torch raises nearly anything on broken files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "weights_only" in reason or reason.startswith("Weights only"):
            # What torch advises here, to load it all the same, would run whatever code is in it.
            raise ModelError(
                "the checkpoint cannot be read: it holds more than weights, or is no PyTorch file at all",
                place=place,
                remedy="download it again; of a training of your own save the weights alone, "
                "`torch.save(model.state_dict(), PATH)`",
            ) from error
        raise ModelError(
            f"the checkpoint cannot be read: it is cut short or not a PyTorch file of weights ({reason})",
            place=place,
            remedy="download it again and compare its SHA-256 (`sam-poll models verify`, for those of the catalogue)",
        ) from error
    weights = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if (
        not isinstance(weights, dict)
        or not weights
        or not all(isinstance(value, torch.Tensor) for value in weights.values())
    ):
        raise ModelError("the file holds no state dict, neither bare nor below the key `model`", place=place)
    return weights


def reader(path: Path) -> Callable[[], dict[str, Any]]:
    """`read` for the same file again, later; ModelError where another one has taken its name, or it was changed."""

    def seen() -> tuple[int, int] | None:
        try:
            status = path.stat()
        except OSError:
            return None  # `read` says what is the matter
        return status.st_size, status.st_mtime_ns

    before = seen()

    def again() -> dict[str, Any]:
        if (now := seen()) and now != before:
            raise ModelError("the checkpoint has changed since it was loaded", place=str(path))
        return read(path)

    return again


def family_of(weights: Mapping[str, Any], place: str) -> str:
    """`sam1` or `sam2`, by the names of the weights."""
    if "image_encoder.trunk.patch_embed.proj.weight" in weights:
        return "sam2"
    if "image_encoder.patch_embed.proj.weight" in weights:
        return "sam1"
    named = ", ".join(list(weights)[:_NAMED])
    raise ModelError(f"these are not the weights of SAM1 or SAM2 (they begin with {named})", place=place)


# The sizes of sam2 by the trunk's first width and its number of blocks (sam2's own yaml files).
_SAM2_SIZES = {(96, 12): "t", (96, 16): "s", (112, 24): "b+", (144, 48): "l"}


def sam2_config_of(weights: Mapping[str, Any], place: str) -> str:
    """The packaged yaml that these SAM2 weights belong to."""
    width = weights["image_encoder.trunk.patch_embed.proj.weight"].shape[0]
    blocks = {key.split(".")[3] for key in weights if key.startswith("image_encoder.trunk.blocks.")}
    letter = _SAM2_SIZES.get((width, len(blocks)))
    if not letter:
        raise ModelError(
            f"this SAM2 is of no published size (width {width}, {len(blocks)} blocks)",
            place=place,
            remedy="name its yaml too (`model_cfg`, `--model-cfg`, or MODEL_CFG in the environment)",
        )
    version = "2.1" if "no_obj_embed_spatial" in weights else "2"
    return f"configs/sam{version}/sam{version}_hiera_{letter}.yaml"


def fill(model: Any, weights: Mapping[str, Any], *, place: str, config: str) -> None:
    """Loads `weights` into `model`; names some of the keys if they do not fit."""
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unknown = [key for key in weights if key not in own]
    other = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    parts = [
        f"{what} {_some(keys)}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", other))
        if keys
    ]
    if parts:
        raise ModelError(
            f"the weights do not fit the model {config}: {'; '.join(parts)}",
            place=place,
            remedy="name the config that belongs to this checkpoint",
        )
    model.load_state_dict(dict(weights))


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else ""
    return ", ".join(keys[:_NAMED]) + more
