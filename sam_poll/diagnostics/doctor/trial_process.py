"""The trial process from outside: its results, the stage in which it hung or died, its last output.

Limitations: a process that sleeps in the kernel (a dead GPU, a dead mount) is not ended by a kill
before it wakes; it is left behind. When this process is killed, the trial ends by itself, unless it
hangs in code that holds the interpreter's lock: then the time limit of its load ends it.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from sam_poll.config.settings import Settings
from sam_poll.core import child_process
from sam_poll.engines.loader import BACKSTOP_S, COMPILE_PATIENCE

_MARGIN_S = 10.0
_END_S = 5.0
_STDERR_LINES = 4  # lines of its stderr that are shown
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass
class TrialResult:
    """The results of the trial.

    `ms` by stage; `stage` is the last one begun; `trouble`: why there are no further results.
    """

    facts: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    trial: dict[str, Any] | None = None
    compare: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    ms: dict[str, float] = field(default_factory=dict)
    stage: str = "start"
    trouble: str | None = None
    remedy: str | None = None

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take in one line of the trial."""
        if "stage" in event:
            self.stage = event["stage"]
        if "took" in event:
            self.ms[event["took"]] = self.ms.get(event["took"], 0.0) + event["ms"]
        for name in ("facts", "plan", "trial", "compare", "error"):
            if name in event:
                setattr(self, name, event[name])


def silence_s(settings: Settings) -> float:
    """Return how long the trial may be silent: the loader's own time limit and some seconds."""
    return (
        settings.load_timeout_s * (COMPILE_PATIENCE if settings.compile else 1)
        + BACKSTOP_S
        + _MARGIN_S
    )


def order_of(
    settings: Settings, *, load: bool, compare: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the order for the trial process.

    Settings are pickled, because JSON cannot hold a path that is not UTF-8.
    """
    pickled = base64.b64encode(pickle.dumps(settings)).decode("ascii")
    return {"settings": pickled, "load": load, "compare": dict(compare) if compare else None}


def run(
    settings: Settings,
    *,
    load: bool = True,
    compare: Mapping[str, Any] | None = None,
    limit_s: float | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    code: str | None = None,
) -> TrialResult:
    """Run the trial to its end, or until it is silent for `limit_s` (None: `silence_s`).

    `code`: run instead of the trial, in tests.
    """
    order = order_of(settings, load=load, compare=compare)
    limit_s = silence_s(settings) if limit_s is None else limit_s
    command = child_process.command("sam_poll.diagnostics.doctor.trial")
    if code is not None:
        command = [sys.executable, "-c", code, json.dumps(sys.path)]
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(  # noqa: S603  ourselves
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
        )
        result = TrialResult(trouble="broken off")
        try:
            result = _listen(process, json.dumps(order), limit_s, on_stage)
        finally:
            _end(process, patiently=not result.trouble)
        if result.trouble:
            result.trouble += _last(stderr)
    return result


def _listen(
    process: subprocess.Popen[str], order: str, limit_s: float, on_stage: Callable[[str], None]
) -> TrialResult:
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, name="trial", daemon=True).start()
    assert process.stdin
    with contextlib.suppress(OSError):  # it has died already
        process.stdin.write(order + "\n")
        # It stays open: the trial ends when it is closed.
        process.stdin.flush()
    result, started = TrialResult(), time.monotonic()
    while True:
        try:
            line = lines.get(timeout=limit_s)
        except queue.Empty:
            result.trouble = f"hangs in stage `{result.stage}`: nothing for {limit_s:g} s"
            return result
        event = _event(line)
        if event is None:
            result.trouble = (
                f"ended in stage `{result.stage}` after {time.monotonic() - started:.0f} s: "
                f"{_exit_reason(process)}"
            )
            result.remedy = _remedy(process.returncode, result.stage)
            return result
        if event.get("end"):
            return result
        result.hear(event)
        if "stage" in event:
            on_stage(event["stage"])


def _event(line: str | None) -> dict[str, Any] | None:
    """Parse a line of the trial; None at the end of the output, which may cut a line short."""
    with contextlib.suppress(ValueError):
        event = json.loads(line or "")
        return event if isinstance(event, dict) else None
    return None


def _remedy(code: int | None, stage: str) -> str | None:
    """Return the remedy for this end of the process; None: nothing special."""
    allocator = [name for name in ALLOCATOR if os.environ.get(name)]
    if code == -signal.SIGKILL:
        return (
            "give it more memory (end other programs, raise the container's limit), or "
            "choose a smaller model"
        )
    if code == -signal.SIGILL:
        return "install builds of torch, numpy and OpenCV for this processor"
    if code == -signal.SIGBUS:
        return (
            "the disk or share that the checkpoint is read from failed: check dmesg, "
            "copy it to a local disk"
        )
    if stage in ("start", "torch", "device") and allocator and code:
        return f"unset {' and '.join(allocator)}, or correct it: torch reads it when it is imported"
    if code is not None and code < 0:
        return (
            "check dmesg; reinstall torch and torchvision, both from one place, as the README says"
        )
    return None


def _exit_reason(process: subprocess.Popen[str]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    code = process.returncode
    if code is None:
        return "it closed its output"
    if code >= 0:
        return f"exit code {code}"
    names: dict[int, str] = {
        signal.SIGKILL: "killed, by the kernel if memory ran out (dmesg)",
        signal.SIGILL: "this build of a library does not suit the processor",
        signal.SIGSEGV: "a library or a driver crashed",
    }
    return f"signal {-code}, {names.get(-code) or signal.strsignal(-code)}"


def _end(process: subprocess.Popen[str], *, patiently: bool) -> None:
    if patiently:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_END_S)
    with contextlib.suppress(OSError):
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    for pipe in (process.stdin, process.stdout):
        if pipe and process.poll() is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _last(stderr: IO[bytes]) -> str:
    """Return the most telling lines of stderr.

    These are the loader's line on where it hangs, or the first lines of a crash of a library or the
    interpreter (stacks follow); otherwise the last lines.
    """
    stderr.seek(0)
    lines = [
        line.strip()
        for line in stderr.read().decode("utf-8", "replace").splitlines()
        if line.strip()
    ]
    telling = [line for line in lines if " hangs in stage " in line or line.startswith("what():")][
        :1
    ]
    if not telling:
        begins = (n for n, line in enumerate(lines) if line.startswith("Fatal Python error"))
        first = next(begins, max(0, len(lines) - _STDERR_LINES))
        telling = lines[first : first + _STDERR_LINES]
    return f" ({' / '.join(telling)})" if telling else ""
