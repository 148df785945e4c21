"""`python -m tools.chaos_daemon watch …`: the daemon with a fault built in, for the chaos runs.

The environment says which:

- `CHAOS_LAG_MS`: every step on the share (rename, mkdir, unlink, listing, opening) may take up to
  so long.
- `CHAOS_STEP`, `CHAOS_BLOW`: before its n-th step that changes something, the process sends itself
  this signal; or
  (`EIO`, `ESTALE` …) its n-th step of any kind fails with this error, once. `CHAOS_MET` (a
  file) is created then.
- `CHAOS_POISON` (a file): a picture that is magenta all over aborts the process; each time a line
  goes into the file.
- `CHAOS_DEVICE` (a file): the device fails at the first job, unless the file is there; it is made
  then.
- `CHAOS_FORGET`: the fake network keeps no list of what it has seen, so that a long run's memory is
  the daemon's own.
- `CHAOS_GPU_MS`: the fake network takes so long for each picture, without using the processor.
- `CHAOS_SHARE`: only steps below this folder count.

Limitations: the steps are those that Python audits; fsync, and utime by a file's
number, are not."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam_poll.cli import main as cli
from sam_poll.core.errors import DeviceError
from sam_poll.core.protocols import Embedding
from sam_poll.core.types import ModelInput, Picture
from sam_poll.engines.fake import FakeEngine
from tools import audited

MAGENTA = (255, 0, 255)
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.utime", "os.truncate"}
_STEPS = {*_CHANGES, "os.listdir", "os.scandir", "open"}


class Steps:
    """An audit hook: waits up to `lag_s` before a step on the share; the `at`-th meets `blow`, a
    signal or an error.
    """

    def __init__(self, share: str, lag_s: float = 0.0, at: int = 0, blow: str = "SIGKILL") -> None:
        self._share = share
        self._lag_s = lag_s
        self._at = at
        self._signal = getattr(signal, blow, None)
        self._errno = 0 if self._signal else getattr(errno, blow)
        self._met = os.environ.get("CHAOS_MET")
        self._rng = random.Random(os.getpid())
        self._lock = threading.Lock()
        self.count = 0
        """Steps of the counted kind so far."""

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in _STEPS or not any(
            path.startswith(self._share) for path in audited.paths(event, args)
        ):
            return
        changes = event in _CHANGES or (event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR))
        if changes or self._errno:
            with self._lock:
                self.count += 1
                now = self.count == self._at
            if now:
                self._strike(f"{event} {args[0]!r}")
        if self._lag_s:
            time.sleep(self._rng.uniform(0, self._lag_s))

    def _strike(self, step: str) -> None:
        if self._met:
            Path(self._met).write_text(step)
        if self._signal:
            os.kill(os.getpid(), self._signal)
        else:
            raise OSError(self._errno, os.strerror(self._errno))


def poison(tally: Path) -> None:
    """Make magenta pictures end the process."""
    prepare = FakeEngine.prepare

    def abort(engine: FakeEngine, picture: Picture) -> ModelInput:
        if np.all(picture.pixels == MAGENTA):
            with tally.open("a") as file:
                file.write(f"{os.getpid()}\n")
            os.abort()
        return prepare(engine, picture)

    setattr(FakeEngine, "prepare", abort)  # noqa: B010  mypy takes the plain form for a mistake


def sick_device(once: Path) -> None:
    """Make the device fail from the first job on, in the first process that gets so far."""
    encode = FakeEngine.encode
    sick: list[bool] = []

    def fail(engine: FakeEngine, pictures: Sequence[ModelInput]) -> list[Embedding]:
        if sick or not once.exists():
            once.touch()
            sick.append(True)
            raise DeviceError("the device has fallen off the bus")
        return encode(engine, pictures)

    setattr(FakeEngine, "encode", fail)  # noqa: B010


def forgetful() -> None:
    """Let the fake network forget."""
    encode = FakeEngine.encode

    def forget(engine: FakeEngine, pictures: Sequence[ModelInput]) -> list[Embedding]:
        engine.encoded.clear()
        return encode(engine, pictures)

    setattr(FakeEngine, "encode", forget)  # noqa: B010


def slow_device(seconds: float) -> None:
    """Let the fake network take its time, as a card does."""
    encode = FakeEngine.encode

    def wait(engine: FakeEngine, pictures: Sequence[ModelInput]) -> list[Embedding]:
        time.sleep(seconds * len(pictures))
        return encode(engine, pictures)

    setattr(FakeEngine, "encode", wait)  # noqa: B010


def main() -> None:
    """Build the faults in, then be the daemon."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    given = os.environ
    if "CHAOS_SHARE" in given:
        lag_s, at = float(given.get("CHAOS_LAG_MS", "0")) / 1000, int(given.get("CHAOS_STEP", "0"))
        audited.begin()
        sys.addaudithook(Steps(given["CHAOS_SHARE"], lag_s, at, given.get("CHAOS_BLOW", "SIGKILL")))
    if "CHAOS_POISON" in given:
        poison(Path(given["CHAOS_POISON"]))
    if "CHAOS_DEVICE" in given:
        sick_device(Path(given["CHAOS_DEVICE"]))
    if "CHAOS_GPU_MS" in given:
        slow_device(float(given["CHAOS_GPU_MS"]) / 1000)
    if "CHAOS_FORGET" in given:
        forgetful()
    cli.main()


if __name__ == "__main__":
    main()
