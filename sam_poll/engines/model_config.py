"""Check what a SAM 2 yaml asks to be built, before anything of it is built.

Hydra calls whatever a `_target_` names, so that a yaml from elsewhere is a program. Here it may name networks of sam2
and a few layers of torch, whatever Hydra itself would allow. A prefix is not enough: `sam2.build_sam.torch.hub.load`
begins with `sam2`. So the name must be that of a class, in the module that defines it.

Limitations: a class of sam2 that reads a file named by its arguments is found only by the list `_FILES`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sam_poll.complaints import quoted
from sam_poll.errors import ModelError
from sam_poll.fs import shown

# sam2's own yaml files name classes of `sam2.modeling` alone; its video predictor is an override of the same model.
_MODULE = re.compile(r"sam2\.(modeling(\.\w+)+|sam2_video_predictor)", re.ASCII)
# Types that constructors of sam2 take as an argument.
_LAYERS = frozenset(f"torch.nn.{name}" for name in ("GELU", "Identity", "LayerNorm", "ReLU", "SiLU"))
# Hiera reads this file with torch.load, which may run code; the weights come from the checkpoint anyway.
_FILES = ("weights_path",)
_POSITIONAL = "_args_"


def check(config: Mapping[Any, Any], place: str) -> None:
    """Refuse a config (plain containers, all interpolations resolved) that builds anything but a network of sam2.

    Raises ModelError, which names the key.
    """
    defaults = config.get("defaults")
    if defaults not in (None, [], ["_self_"]):
        raise ModelError(
            "the config's `defaults` name other files, which are not read",
            place=place,
            remedy="write the whole model into this one",
        )
    for key, value in _nodes(config, ""):
        reason = _reason(key.rpartition(".")[2], value)
        if reason:
            remedy = "only the classes of sam2.modeling and a few of torch.nn may be built; use a config of sam2's form"
            raise ModelError(f"the config's `{shown(key)}` {reason}", place=place, remedy=remedy)


def _nodes(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All keys with their values, at any depth: `model.layers[2]._target_`."""
    if isinstance(node, Mapping):
        children = [(f"{path}.{key}" if path else str(key), value) for key, value in node.items()]
    elif isinstance(node, (list, tuple)):
        children = [(f"{path}[{index}]", value) for index, value in enumerate(node)]
    else:
        return
    for key, value in children:
        yield key, value
        yield from _nodes(value, key)


def _reason(name: str, value: Any) -> str | None:
    """What is wrong with one key and its value; None: nothing."""
    if name == "_target_" and not _is_layer(value):
        return f"names {quoted(str(value))}, which is no class of sam2"
    if name == _POSITIONAL:
        return "gives arguments without their names"
    if name in _FILES and value is not None:
        return "names a file to load"
    if isinstance(value, str) and "${" in value:  # Hydra would resolve it once more, after this check
        return "holds an interpolation in what an interpolation gave"
    return None


def _is_layer(target: Any) -> bool:
    """Whether this is the full name of a class of sam2, or of one of the few of torch."""
    if not isinstance(target, str):
        return False
    if target in _LAYERS:
        return True
    module, _, name = target.rpartition(".")
    if _MODULE.fullmatch(module) is None:
        return False
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, nn.Module) and found.__module__ == module
