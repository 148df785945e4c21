"""Models of `transformers` from a folder, loaded without the network, and only if all weights fit.

The library leaves weights that it does not find, maybe under a name of another version, at random
values, and says so in a table on stderr. Here they refuse the model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as library_log

from sam_poll.core.errors import ModelError
from sam_poll.engines.checkpoint import first_of


def load(model_class: Any, folder: Path) -> Any:
    """Return a model of the library's class `model_class` from `folder`, in float32, on the CPU.

    Nothing is downloaded and no code of the folder is run. Raises ModelError where the folder holds
    no such model, or where weights are missing, unknown, or of another shape.
    """
    place = str(folder)
    try:
        with quiet():
            model, report = model_class.from_pretrained(
                folder,
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,
                dtype=torch.float32,
            )
    except Exception as error:  # of transformers, timm and safetensors, without a common base
        raise unreadable(error, place) from error
    mismatches = {
        "missing": report["missing_keys"],
        "unknown": report["unexpected_keys"],
        "of another shape": report["mismatched_keys"],
    }
    problems = [
        f"{problem} {first_of(sorted(map(str, keys)))}"
        for problem, keys in mismatches.items()
        if keys
    ]
    if problems or report["error_msgs"]:
        raise ModelError(
            f"the weights do not fit the model: {'; '.join(problems or report['error_msgs'])}",
            place=place,
            remedy="the version of transformers may have other names for them: "
            "try the version that config.json names",
        )
    return model


def unreadable(error: Exception, place: str) -> ModelError:
    """Return the error to raise for an error of the library while it reads a folder."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(f"the model cannot be read: {reason}", place=place)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the library: its progress bars, and its notes about the video model's config."""
    level = library_log.get_verbosity()
    had_bars = library_log.is_progress_bar_enabled()
    library_log.set_verbosity_error()
    library_log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        library_log.set_verbosity(level)
        if had_bars:
            library_log.enable_progress_bar()
