"""Security check of a SAM2 yaml, before a model is built from it.

Hydra calls any function that a `_target_` names, so a yaml from an untrusted source is a program.
Only networks of sam2 and a few layers of torch may be named here, whatever Hydra itself would
allow. Checking a prefix is not enough: `sam2.build_sam.torch.hub.load` begins with `sam2`. So the
name must be that of a class, in the module that defines it.

Limitations: a class of sam2 that reads a file named by its arguments is refused only where the
argument is listed in `_FILE_ARGUMENTS`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from sam_poll.core.errors import ModelError
from sam_poll.core.text import shown
from sam_poll.core.validation import quoted

# The yaml files of sam2 name classes of `sam2.modeling` only; its video predictor is an override of
# the same model (sam2.build_sam.build_sam2_video_predictor).
_MODULE = re.compile(r"sam2\.(modeling(\.\w+)+|sam2_video_predictor)", re.ASCII)
# Types that constructors of sam2 accept as arguments.
_LAYERS = frozenset(
    f"torch.nn.{name}" for name in ("GELU", "Identity", "LayerNorm", "ReLU", "SiLU")
)
# Hiera reads this file with torch.load, which may run code. The weights come from the checkpoint.
_FILE_ARGUMENTS = ("weights_path",)
_POSITIONAL = "_args_"


def check(config: Mapping[Any, Any], place: str) -> None:
    """Raise ModelError for a config that builds anything but a network of sam2.

    `config` consists of plain containers with all interpolations resolved. The error names the key.
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
            remedy = (
                "only the classes of sam2.modeling and a few of torch.nn may be built; "
                "use a config like those of sam2"
            )
            raise ModelError(f"the config's `{shown(key)}` {reason}", place=place, remedy=remedy)


def _nodes(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield all keys with their values, at any depth: `model.layers[2]._target_`."""
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
    """Return why a key with this value is refused; None where it is accepted."""
    if name == "_target_" and not _is_layer(value):
        return f"names {quoted(str(value))}, which is not a class of sam2"
    if name == _POSITIONAL:
        return "passes arguments without their names"
    if name in _FILE_ARGUMENTS and value is not None:
        return "names a file to load"
    # Hydra would resolve it once more, after this check.
    if isinstance(value, str) and "${" in value:
        return "holds an interpolation in the result of an interpolation"
    return None


def _is_layer(target: Any) -> bool:
    """Return whether this is the full name of a class of sam2 or of an accepted torch layer."""
    if not isinstance(target, str):
        return False
    if target in _LAYERS:
        return True
    module, _, name = target.rpartition(".")
    if _MODULE.fullmatch(module) is None:
        return False
    try:
        layer = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return False
    return isinstance(layer, type) and issubclass(layer, nn.Module) and layer.__module__ == module
