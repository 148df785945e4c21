"""What our functions for CVAT's SDK have in common: parameters, errors, PIL's pictures, masks as its shapes.

They run where `cvat-cli` runs: in its own process (`task auto-annotate`), or in an agent's worker (`function
run-agent`). What can still go wrong here: a device failure ends an agent's worker, which the agent starts anew; on the
command line it ends the command, and the answers so far are lost, because the SDK uploads them at the end.
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

from sam_poll import images, prompts
from sam_poll.errors import DeviceError, ExitCode, PictureError, PromptError, SamPollError, UsageError
from sam_poll.predictor import Predictor
from sam_poll.types import Everything, Pixels, Size

try:  # the errors that cvat-cli tells in one line; where the SDK is used without it, there is nobody to tell
    from cvat_cli._internal.common import CriticalError  # type: ignore[import-untyped]
except ImportError:

    class CriticalError(Exception):  # type: ignore[no-redef]
        """In its place."""


P = TypeVar("P")

_KINDS: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}


class FunctionError(BadFunctionError, CriticalError):
    """An error of ours as the SDK wants it: an agent hands its words to the server, `cvat-cli` prints them and ends."""


@contextmanager
def told() -> Iterator[None]:
    """Our errors become the SDK's. A worker whose device has failed ends: only a new process gets it back."""
    try:
        yield
    except DeviceError as error:
        if multiprocessing.parent_process() is not None:
            logger.critical("{}; this worker ends, to be started anew", error)
            os._exit(ExitCode.DEVICE)
        raise FunctionError(str(error)) from None
    except SamPollError as error:
        raise FunctionError(str(error)) from None


def read(kind: type[P], given: Mapping[str, Any]) -> P:
    """Parameters (`-p NAME=TYPE:VALUE`) as a dataclass of `kind`. UsageError for unknown names and other types."""
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in known:
            raise UsageError("there is no such parameter", place=f"-p {name}", remedy=f"there are {', '.join(known)}")
        wanted = str(known[name].type).partition(" ")[0]
        if not isinstance(value, _KINDS[wanted]) or (isinstance(value, bool) and wanted != "bool"):
            raise UsageError(f"not of type {wanted}", place=f"-p {name}", remedy=f"-p {name}={wanted}:…")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
    assert not missing  # all have defaults
    return kind(**given)


def predictor(*, config: str, model: str, model_cfg: str, device: str, precision: str) -> Predictor:
    """The network, loaded, by config.yaml, environment and parameters as everywhere; '' is not given. SamPollError."""
    from sam_poll import app, settings

    flags = {"model": model, "model_cfg": model_cfg, "device": device, "precision": precision}
    given = {name: value for name, value in flags.items() if value}
    return app.predictor_of(settings.load(Path(config) if config else None, flags=given))


def everything(**numbers: Any) -> Everything:
    """Everything mode with these parameters, held to what a prompt file may say. UsageError."""
    try:
        read = prompts.parse(json.dumps({"everything": numbers}).encode()).prompts
    except PromptError as error:
        place = (error.place or "").removeprefix("everything.")
        raise UsageError(error.reason, place=f"-p {place}", remedy=error.remedy) from None
    assert isinstance(read, Everything)
    return read


def content(image: Any) -> bytes | Pixels:
    """A PIL picture, upright as CVAT shows it, for `Predictor.embed`. PictureError.

    A picture with an EXIF orientation is turned, as CVAT turns it; where CVAT has done so already there is none left.
    """
    from PIL import Image, ImageOps

    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16-bit grey, which `images` shows as CVAT does
            buffer = io.BytesIO()
            upright.save(buffer, "png")
            return buffer.getvalue()
        if upright.mode == "F":
            raise PictureError("floating-point pictures cannot be shown", remedy="save it with 8 or 16 bits")
        return np.asarray(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"the picture cannot be decoded: {error}") from error


def size_of(made: bytes | Pixels) -> Size:
    """The full size of what `content` has made. PictureError."""
    if isinstance(made, bytes):
        return images.read_header(made).size
    height, width, _ = made.shape
    return Size(width, height)
