"""What the functions for CVAT's SDK share: parameters, errors, and pictures from PIL.

They run where `cvat-cli` runs: in its own process (`task auto-annotate`), or in an agent's worker
(`function run-agent`).

Limitations: after a device failure an agent's worker exits and the agent starts a new one; on the
command line the command ends, and the answers so far are lost, because the SDK uploads them at
the end.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cvat_sdk.auto_annotation import BadFunctionError
from loguru import logger

from sam_poll.core.errors import (
    DeviceError,
    ExitCode,
    PictureError,
    PromptError,
    SamPollError,
    UsageError,
)
from sam_poll.core.types import AutomaticMaskRequest, RgbArray, Size
from sam_poll.imaging import decode
from sam_poll.pipeline.predictor import Predictor
from sam_poll.prompts import parser

try:  # cvat-cli prints errors of this class in one line
    from cvat_cli._internal.common import CriticalError  # type: ignore[import-untyped]
except ImportError:  # the SDK is used without cvat-cli

    class CriticalError(Exception):  # type: ignore[no-redef]
        """A stand-in for the class of cvat-cli."""


P = TypeVar("P")


class FunctionError(BadFunctionError, CriticalError):
    """An error as the SDK expects it: an agent sends its text to the server, cvat-cli prints it."""


@contextmanager
def sdk_errors() -> Iterator[None]:
    """Convert the errors of this program to the SDK's.

    An agent's worker exits after a device failure: only a new process can use the device again.
    """
    try:
        yield
    except DeviceError as error:
        if multiprocessing.parent_process() is not None:
            logger.critical("{}; this worker exits, and the agent starts a new one", error)
            os._exit(ExitCode.DEVICE)
        raise FunctionError(str(error)) from None
    except SamPollError as error:
        raise FunctionError(str(error)) from None


def read_parameters(kind: type[P], given: Mapping[str, Any]) -> P:
    """Return parameters (`-p NAME=TYPE:VALUE`) as an instance of the dataclass `kind`.

    The fields of `kind` are str, int, float or bool, and have defaults. Raises UsageError for
    unknown names and wrong types.
    """
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in known:
            raise UsageError(
                "there is no such parameter",
                place=f"-p {name}",
                remedy=f"there are {', '.join(known)}",
            )
        expected: Any = known[name].type
        accepted = (int, float) if expected is float else expected
        # bool is a subclass of int
        is_wrong_bool = isinstance(value, bool) and expected is not bool
        if not isinstance(value, accepted) or is_wrong_bool:
            word = expected.__name__
            raise UsageError(
                f"not of type {word}", place=f"-p {name}", remedy=f"-p {name}={word}:…"
            )
    missing = [
        name for name, field in known.items() if field.default is MISSING and name not in given
    ]
    assert not missing  # all have defaults
    return kind(**given)


def load_predictor(
    *, config: str, model: str, model_cfg: str, device: str, precision: str
) -> Predictor:
    """Return the loaded network of config.yaml, environment and parameters; '' is "not given".

    Raises SamPollError.
    """
    from sam_poll.config import settings
    from sam_poll.runtime import builders

    flags = {"model": model, "model_cfg": model_cfg, "device": device, "precision": precision}
    given = {name: value for name, value in flags.items() if value}
    return builders.predictor_of(settings.load(Path(config) if config else None, flags=given))


def automatic_mask_request(**numbers: Any) -> AutomaticMaskRequest:
    """Return the request of everything mode with these numbers, checked as in a prompt file.

    Raises UsageError.
    """
    try:
        request = parser.parse(json.dumps({"everything": numbers}).encode()).prompts
    except PromptError as error:
        place = (error.place or "").removeprefix("everything.")
        raise UsageError(error.reason, place=f"-p {place}", remedy=error.remedy) from None
    assert isinstance(request, AutomaticMaskRequest)
    return request


def picture_of(image: Any) -> bytes | RgbArray:
    """Return a PIL picture for `Predictor.embed`, upright as CVAT shows it. Raises PictureError.

    A picture with an EXIF orientation is rotated as CVAT does it; where CVAT has done so already,
    there is no orientation left.
    """
    from PIL import Image, ImageOps

    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey: `imaging` converts it as CVAT does
            buffer = io.BytesIO()
            upright.save(buffer, "png")
            return buffer.getvalue()
        if upright.mode == "F":
            raise PictureError(
                "floating-point pictures are not supported", remedy="save it with 8 or 16 bits"
            )
        return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"the picture cannot be decoded: {error}") from error


def size_of(picture: bytes | RgbArray) -> Size:
    """Return the full size of a picture from `picture_of`. Raises PictureError."""
    if isinstance(picture, bytes):
        return decode.read_header(picture).size
    height, width, _ = picture.shape
    return Size(width, height)
