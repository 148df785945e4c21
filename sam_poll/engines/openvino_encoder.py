"""The image encoder in OpenVINO, on a CPU: converted once, kept beside the models, loaded again.

A child process (`openvino_convert`) reads the checkpoint once more and converts the encoder, so
that neither a crash nor the memory of a conversion affects this process. A conversion is a file
`openvino/NAME.blob` beside the downloaded models, renamed into place when it is complete: a
checksum, then the encoder as OpenVINO compiled it for this CPU and precision. Its name has a
fingerprint of all that decides what the encoder computes. Where anything fails, the encoder runs in
torch, and one line of the log says why.

Limitations: a conversion is for the network's native side. On the lower sides of the memory plan
the encoder runs in torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from loguru import logger
from torch import Tensor

from sam_poll import __version__
from sam_poll.core import child_process
from sam_poll.core.errors import ModelError
from sam_poll.engines.catalog import ModelSpec, cache_dir

FOLDER = "openvino"
# A conversion begins with this and the SHA-256 of the rest, which begins at `START`.
MAGIC = b"sam_poll encoder in OpenVINO 1\n\0"
START = 64
# torch's name of a precision → OpenVINO's.
PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
# Smallest native side, in pixels, that `auto` converts.
AUTO_SIDE = 1024
# Conversions and remains of killed converters that nothing has used for so long are removed.
UNUSED_S = 30 * 24 * 3600.0
_LOOK_S = 0.2  # between two looks whether another process has finished its conversion


class ConversionError(Exception):
    """The encoder cannot be converted; the text says why."""


def is_installed() -> bool:
    """Return whether OpenVINO is installed, without importing it."""
    return importlib.util.find_spec("openvino") is not None


def import_openvino() -> Any:
    """Return the module `openvino`, imported without its telemetry.

    OpenVINO has a substitute for the package `openvino_telemetry`, which it uses where that cannot
    be imported.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def check(runtime: str, device: str) -> None:
    """Raise ModelError where `runtime` is `openvino` and cannot be had on this device."""
    if runtime != "openvino":
        return
    if not is_installed():
        raise ModelError(
            "OpenVINO is not installed",
            place="runtime openvino",
            remedy="pip install 'sam_poll[openvino]'",
        )
    if device != "cpu":
        raise ModelError(
            f"OpenVINO runs on the CPU, not on {device}",
            place="runtime openvino",
            remedy="set `device: cpu`, or `runtime: auto`",
        )


def chosen(runtime: str, *, device: str, side: int, compiled: bool) -> bool:
    """Return whether the encoder of a network of native side `side` is to run in OpenVINO.

    `auto` means that on a CPU, where it is installed and the network is not `compiled`.
    """
    if runtime != "auto":
        return runtime == "openvino"
    return device == "cpu" and side >= AUTO_SIDE and not compiled and is_installed()


def encoder_of(
    model: Any, spec: ModelSpec, side: int, precision: str, *, limit_s: float
) -> OpenVinoEncoder | None:
    """Return the converted encoder of `model`, converting it first where that was never done.

    `model` is the network of `spec` in float32, as `loader.network_of` returns it. Returns None,
    after logging the reason, where it cannot be converted within `limit_s`, kept or loaded.
    """
    try:
        if precision not in PRECISIONS:
            raise ConversionError(f"OpenVINO does not compute in {precision} on a CPU")
        fingerprint = fingerprint_of(model)
        file = cache_dir() / FOLDER / _name(spec.name, fingerprint, side, precision)
        if file.is_file():
            try:
                return OpenVinoEncoder(file, side, precision)
            except Exception as error:  # noqa: BLE001 - OpenVINO has several classes for damaged files
                logger.info("{}: {} cannot be used: {}; converting again", spec.name, file, error)
            file.unlink()
        _convert(spec, fingerprint, precision, file, limit_s)
        return OpenVinoEncoder(file, side, precision)
    except Exception as error:  # noqa: BLE001 - whatever fails, torch can do the same work
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning(
            "{}: the image encoder runs in torch, not in OpenVINO: {}", spec.name, reason
        )
        return None


class OpenVinoEncoder:
    """A converted encoder (`base.ConvertedEncoder`), read from a file.

    It uses as many threads as torch. Use it from one thread at a time. Raises ConversionError for a
    damaged file, and errors of OpenVINO.
    """

    runtime = "OpenVINO"

    def __init__(self, file: Path, side: int, precision: str) -> None:
        openvino = import_openvino()
        self.side, self.precision = side, precision
        self._dtype = getattr(torch, precision)
        # Mapped, so that the weights are shared with other processes and are no memory of this one
        # alone. "c": OpenVINO refuses memory that cannot be written; nothing is written.
        with _opened_own(file) as stream:
            self._blob = np.memmap(stream, np.uint8, mode="c")
        header = self._blob[:START].tobytes()
        if header != MAGIC + hashlib.sha256(self._blob[START:].data).digest():
            raise ConversionError("the file is damaged")
        compiled = openvino.Core().import_model(
            openvino.Tensor(self._blob[START:], shared_memory=True), "CPU", options(precision)
        )
        self._request = compiled.create_infer_request()
        self._outputs = len(compiled.outputs)
        with contextlib.suppress(OSError):  # a file system that is read-only
            os.utime(file)

    def __call__(self, square: Tensor) -> tuple[Tensor, ...]:
        """Encode float32 n×3×side×side, picture by picture, which is as fast on a CPU."""
        rows = [self._encode(row) for row in square.split(1)]
        return rows[0] if len(rows) == 1 else tuple(map(torch.cat, zip(*rows, strict=True)))

    def _encode(self, square: Tensor) -> tuple[Tensor, ...]:
        self._request.infer([square.contiguous().numpy()], share_inputs=True)
        outputs = (self._request.get_output_tensor(index).data for index in range(self._outputs))
        # Copied: the next call writes into the same memory.
        return tuple(torch.from_numpy(data).to(self._dtype, copy=True) for data in outputs)


def _opened_own(file: Path) -> BinaryIO:
    """Open a file of this user, following no link: the folder of models may be shared with others.

    Raises ConversionError for anything else, OSError.
    """
    stream = os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        stream.close()
        raise ConversionError("it is not a file of this user")
    return stream


def abilities() -> list[str]:
    """Return what OpenVINO says that this CPU can do, `BF16` for instance."""
    core = import_openvino().Core()
    return sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def options(precision: str) -> dict[str, Any]:
    """Return the options to compile an encoder with."""
    return {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # Several processes on one machine would pin their threads to the same cores.
        "ENABLE_CPU_PINNING": False,
    }


def fingerprint_of(model: torch.nn.Module) -> str:
    """Return a SHA-256 over all that decides what a network computes.

    That is the names, shapes and values of weights and buffers, and each module's class and plain
    attributes (sizes of windows, numbers of heads), some of which a config file decides.
    """
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        plain = {key: value for key, value in sorted(vars(module).items()) if _is_plain(value)}
        config: Any = getattr(module, "config", None)  # transformers' models
        described = config.to_dict() if hasattr(config, "to_dict") else None
        digest.update(f"{name} {type(module).__qualname__} {plain} {described}\n".encode())
        tensors = {**module._parameters, **module._buffers}
        for key, tensor in tensors.items():
            if tensor is not None:
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().contiguous().numpy())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _name(name: str, fingerprint: str, side: int, precision: str) -> str:
    """Return the name of a conversion's file, with all that it depends on.

    Raises ConversionError where the CPU does not compute in `precision`.
    """
    if precision == "bfloat16" and "BF16" not in abilities():
        raise ConversionError("this CPU does not compute in bfloat16")
    cpu = f"{import_openvino().Core().get_property('CPU', 'FULL_DEVICE_NAME')} {abilities()}"
    # Each user has conversions of their own: no user loads what another has compiled.
    others = f"{fingerprint} {cpu} {version('openvino')} {__version__} {os.geteuid()}"
    readable = re.sub(r"[^\w.+-]", "_", name)[:64]
    key = hashlib.sha256(others.encode()).hexdigest()[:32]
    return f"{readable}-{side}-{precision}-{key}.blob"


# ── conversion ──


def _convert(spec: ModelSpec, fingerprint: str, precision: str, file: Path, limit_s: float) -> None:
    """Convert the encoder of `spec` into `file`. Raises ConversionError, OSError."""
    deadline = time.monotonic() + limit_s
    file.parent.mkdir(parents=True, exist_ok=True)
    with _alone(file.parent / ".lock", spec.name, deadline):
        if file.is_file():  # by another process, in the meantime
            return
        _remove_unused(file.parent)
        # A warning, so that commands that log nothing else explain their wait.
        logger.warning(
            "{}: the image encoder is being converted for OpenVINO, once for these weights; "
            "this takes 20 to 60 s for small models",
            spec.name,
        )
        started = time.monotonic()
        handle, part = tempfile.mkstemp(prefix=".converting-", dir=file.parent)
        os.close(handle)
        try:
            _run_child(spec, fingerprint, precision, Path(part), deadline)
            Path(part).rename(file)
        finally:
            Path(part).unlink(missing_ok=True)
        logger.info(
            "{}: converted in {:.0f} s and kept in {}",
            spec.name,
            time.monotonic() - started,
            file,
        )


@contextlib.contextmanager
def _alone(lock: Path, name: str, deadline: float) -> Iterator[None]:
    """Let one process of the machine convert at a time: each takes all cores and much memory.

    Raises ConversionError where the others have not finished by `deadline`.
    """
    handle = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        waiting = False
        while not _locked(handle):
            if not waiting:
                logger.info("{}: waiting for another process that converts a model …", name)
            waiting = True
            if time.monotonic() > deadline:
                raise ConversionError("another process has been converting all the time")
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(handle)  # which unlocks


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # no locks on this file system: two processes may convert the same model
    return True


def _remove_unused(parent: Path) -> None:
    for entry in parent.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - entry.lstat().st_mtime > UNUSED_S:
                entry.unlink()


def _run_child(
    spec: ModelSpec, fingerprint: str, precision: str, file: Path, deadline: float
) -> None:
    """Run the converter and log its steps. Raises ConversionError."""
    order = {
        "spec": {**asdict(spec), "checkpoint": str(spec.checkpoint)},
        "fingerprint": fingerprint,
        "precision": precision,
        "file": str(file),
    }
    command = child_process.command("sam_poll.engines.openvino_convert", json.dumps(order))
    with (
        tempfile.TemporaryFile() as words,
        # A session of its own: it ends with this process, not by the terminal's Ctrl-C.
        subprocess.Popen(  # noqa: S603  ourselves
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout
        timer = threading.Timer(max(0.0, deadline - time.monotonic()), process.kill)
        timer.start()
        message: dict[str, str] = {}
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "step" in message:
                    logger.info("{}: {} …", spec.name, message["step"])
        finally:
            timer.cancel()
            process.kill()
        status = process.wait()
        words.seek(0)
        last_words = (words.read().decode("utf-8", "replace").strip().splitlines() or [""])[-1]
    if "done" in message:
        return
    if "error" in message:
        raise ConversionError(message["error"])
    if time.monotonic() >= deadline:
        raise ConversionError(
            "its conversion did not end within four fifths of load_timeout_s; "
            "raise that, or set `runtime: torch`"
        )
    raise ConversionError(
        f"the converter ended with status {status} "
        f"({'out of memory?' if status == -9 else last_words})"
    )
