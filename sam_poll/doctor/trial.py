"""The trial, in a process of its own: torch, the device, the model's load, one prediction, and the official predictor.

It reads an order from stdin and tells each step on stdout as a line of JSON, so that whoever reads knows what it was at
when it hangs or dies. What can still go wrong here: whatever a driver or a library does to its process.
"""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import json
import os
import pickle
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from loguru import logger

from sam_poll.console import set_up_log
from sam_poll.doctor import facts
from sam_poll.doctor.findings import error_told
from sam_poll.doctor.machine import THREADS
from sam_poll.engines import devices
from sam_poll.errors import ExitCode, ModelError, SamPollError
from sam_poll.fs import remedy_of
from sam_poll.settings import Settings
from sam_poll.types import Engine

Tell = Callable[..., None]
_LOADER = "sam_poll.engines.loader"  # whose log says the stages of a load


def main() -> None:
    """The process: one order, then lines until it is done."""
    words = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not ours
    faulthandler.enable()  # where it was when a library crashes
    set_up_log("text", "WARNING")

    def tell(**event: Any) -> None:
        words.write(json.dumps(event) + "\n")
        words.flush()

    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_alone, name="end-alone", daemon=True).start()
    run(order, tell)
    tell(end=True)


def _end_alone() -> None:
    """Ends this process when the one that started it has ended, however that was: its end of our stdin is closed."""
    while os.read(0, 1):
        pass
    os._exit(ExitCode.OK)


def run(order: dict[str, Any], tell: Tell) -> None:
    """`order`: `settings` (`child.order_of`), `load`, and `compare` (`picture`, `box`, `out`) or None."""
    stages = Stages(tell)
    try:
        settings: Settings = pickle.loads(base64.b64decode(order["settings"]))  # noqa: S301  from `child`
        _meet(stages, tell)
        if order["load"]:
            _work(settings, order.get("compare"), stages, tell)
    except SamPollError as error:
        tell(error=error_told(error))
    except Exception as error:  # noqa: BLE001  the last place where it can be told
        reason = (str(error).strip().splitlines() or [""])[0]
        place, remedy = None, None
        if isinstance(error, OSError):
            reason, remedy = error.strerror or reason, remedy_of(error)
            place = str(error.filename) if error.filename else None
        told = {"reason": f"{type(error).__name__}: {reason}", "place": place, "remedy": remedy}
        tell(error={**told, "exit_code": int(ExitCode.MODEL)})


class Stages:
    """Tells what is begun, and how long it took."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    @contextlib.contextmanager
    def stage(self, name: str, then: Callable[[], object] = lambda: None) -> Iterator[None]:
        """`then` waits for what the stage has only started (a card's kernels)."""
        self._tell(stage=name)
        start = time.perf_counter()
        yield
        then()
        self._tell(took=name, ms=(time.perf_counter() - start) * 1000)

    @contextlib.contextmanager
    def of_the_loader(self, at_read: Callable[[], None]) -> Iterator[None]:
        """Passes on what the loader's log says of its stages. `at_read`: torch is there, the weights are not yet."""

        def heard(message: Any) -> None:
            record = message.record
            if record["name"] != _LOADER:
                return
            if took := re.fullmatch(r".*: (.+) took (\d+) ms", record["message"]):
                self._tell(took=took[1], ms=float(took[2]))
            elif begun := re.fullmatch(r".*: (.+) …", record["message"]):
                if begun[1] == "read":
                    at_read()
                self._tell(stage=begun[1])

        handle = logger.add(heard, level="DEBUG", format="{message}")
        try:
            yield
        finally:
            logger.remove(handle)


def _meet(stages: Stages, tell: Tell) -> None:
    """Imports torch and asks it about the device."""
    before = {name: os.environ.get(name) for name in THREADS}
    try:
        with stages.stage("torch"):
            if "torch" not in sys.modules:
                devices.allocator_settings(os.environ)
            import torch  # noqa: F401
        with stages.stage("torchvision"):
            import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        remedy = "install torch and torchvision from one place and for this machine, as the README says"
        raise ModelError(f"torch cannot be imported: {reason}", remedy=remedy) from error
    with stages.stage("device"):
        found = facts.gather(before, {name: os.environ.get(name) for name in THREADS})
    tell(facts=found)


def _work(settings: Settings, compare: dict[str, Any] | None, stages: Stages, tell: Tell) -> None:
    from sam_poll import app
    from sam_poll.doctor import attempt

    readings: list[Any] = []

    def at_read() -> None:
        with contextlib.suppress(Exception):  # a card that cannot be read is what the load is about to tell
            readings.append(attempt.reading(settings))

    with stages.of_the_loader(at_read):
        engine: Engine = app.engine_of(settings)
    if plan := attempt.plan(engine, settings, readings[0] if readings else None):
        tell(plan=plan)
    tell(trial=attempt.predict(engine, stages.stage))
    if compare:
        from sam_poll.doctor import compare as beside

        box = compare.get("box")
        out = Path(compare["out"]) if compare.get("out") else None
        picture = Path(compare["picture"])
        engines = [engine]
        del engine  # a card may not hold both networks
        tell(compare=beside.run(settings, engines, picture, tuple(box) if box else None, out, stages.stage))
