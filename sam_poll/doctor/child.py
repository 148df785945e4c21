"""The trial's process, seen from outside: what it told, where it was when it hung or died, and its last words.

What can still go wrong here: a process that sleeps in the kernel (a dead card, a dead mount) is not ended by a kill
before it wakes; it is left behind. When this process is killed the trial ends by itself, unless it hangs in code that
holds the interpreter's lock: then its load's own limit ends it.
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

from sam_poll.engines.loader import BACKSTOP_S, COMPILE_PATIENCE
from sam_poll.settings import Settings

# The import path of this process is the child's, too: with `-m` or `-c` alone its first entry would be the current
# directory, where a checkout of sam2 would be found that the daemon does not see.
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from sam_poll.doctor.trial import main; main()"
_MARGIN_S = 10.0
_END_S = 5.0
_WORDS = 4  # lines of its stderr that are told
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@dataclass
class Told:
    """What the trial told. `ms` by stage; `stage` is what was begun last; `trouble`: why there is no more."""

    facts: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    trial: dict[str, Any] | None = None
    compare: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    ms: dict[str, float] = field(default_factory=dict)
    stage: str = "start"
    trouble: str | None = None
    remedy: str | None = None
    died: bool = False

    def hear(self, event: Mapping[str, Any]) -> None:
        """Takes in one line."""
        if "stage" in event:
            self.stage = event["stage"]
        if "took" in event:
            self.ms[event["took"]] = self.ms.get(event["took"], 0.0) + event["ms"]
        for name in ("facts", "plan", "trial", "compare", "error"):
            if name in event:
                setattr(self, name, event[name])


def silence_s(settings: Settings) -> float:
    """How long the trial may say nothing: the loader's own limit, which ends it, and some seconds."""
    return settings.load_timeout_s * (COMPILE_PATIENCE if settings.compile else 1) + BACKSTOP_S + _MARGIN_S


def order_of(settings: Settings, *, load: bool, compare: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the trial is to do. Settings as a pickle: JSON has no words for a path that is not UTF-8."""
    pickled = base64.b64encode(pickle.dumps(settings)).decode("ascii")
    return {"settings": pickled, "load": load, "compare": dict(compare) if compare else None}


def run(
    settings: Settings,
    *,
    load: bool = True,
    compare: Mapping[str, Any] | None = None,
    limit_s: float | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
    code: str = _CODE,
) -> Told:
    """Runs the trial to its end, or until it has said nothing for `limit_s` (None: `silence_s`)."""
    order = order_of(settings, load=load, compare=compare)
    limit_s = silence_s(settings) if limit_s is None else limit_s
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(  # noqa: S603  ourselves
            [sys.executable, "-c", code, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            text=True,
            encoding="utf-8",
        )
        told = Told(trouble="broken off")
        try:
            told = _listen(process, json.dumps(order), limit_s, on_stage)
        finally:
            _end(process, patiently=not told.trouble)
        if told.trouble:
            told.trouble += _last(words)
    return told


def _listen(process: subprocess.Popen[str], order: str, limit_s: float, on_stage: Callable[[str], None]) -> Told:
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
        process.stdin.flush()  # and it stays open: its end tells the trial that nobody listens any more
    told, begun = Told(), time.monotonic()
    while True:
        try:
            line = lines.get(timeout=limit_s)
        except queue.Empty:
            told.trouble = f"hangs in stage `{told.stage}`: nothing for {limit_s:g} s"
            return told
        event = _event(line)
        if event is None:
            told.died = True
            told.trouble = f"ended in stage `{told.stage}` after {time.monotonic() - begun:.0f} s: {_how(process)}"
            told.remedy = _remedy(process.returncode, told.stage)
            return told
        if event.get("end"):
            return told
        told.hear(event)
        if "stage" in event:
            on_stage(event["stage"])


def _event(line: str | None) -> dict[str, Any] | None:
    """A line of the trial; None at its end, which may cut a line short."""
    with contextlib.suppress(ValueError):
        event = json.loads(line or "")
        return event if isinstance(event, dict) else None
    return None


def _remedy(code: int | None, stage: str) -> str | None:
    """What helps against this end; None: nothing special."""
    allocator = [name for name in ALLOCATOR if os.environ.get(name)]
    if code == -signal.SIGKILL:
        return "give it more memory (end other programs, raise the container's limit), or choose a smaller model"
    if code == -signal.SIGILL:
        return "install builds of torch, numpy and OpenCV for this processor"
    if code == -signal.SIGBUS:
        return "the disk or share that the checkpoint is read from failed: look at dmesg, copy it to a local disk"
    if stage in ("start", "torch", "device") and allocator and code:
        return f"unset {' and '.join(allocator)}, or mend it: torch reads it at its import"
    if code is not None and code < 0:
        return "look at dmesg; install torch and torchvision anew, both from one place, as the README says"
    return None


def _how(process: subprocess.Popen[str]) -> str:
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


def _last(words: IO[bytes]) -> str:
    """What went to stderr: the loader's word on where it hangs, or what a library or the interpreter says first of its
    own end (stacks follow); else the end."""
    words.seek(0)
    lines = [line.strip() for line in words.read().decode("utf-8", "replace").splitlines() if line.strip()]
    said = [line for line in lines if " hangs in stage " in line or line.startswith("what():")][:1]
    if not said:
        begins = (n for n, line in enumerate(lines) if line.startswith("Fatal Python error"))
        first = next(begins, max(0, len(lines) - _WORDS))
        said = lines[first : first + _WORDS]
    return f" ({' / '.join(said)})" if said else ""
