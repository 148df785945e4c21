"""The trial process: torch, the device, loading the model, one prediction, the official predictor.

It reads an order from stdin and writes one line of JSON to stdout for each step, so that its parent
knows the step in which it hangs or dies.
"""

from __future__ import annotations

import base64
import contextlib
import faulthandler
import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sam_poll.config.settings import Settings
from sam_poll.core import child_process
from sam_poll.core.errors import ExitCode, ModelError, SamPollError
from sam_poll.core.files import remedy_of
from sam_poll.core.protocols import Engine
from sam_poll.diagnostics.doctor import torch_info as facts
from sam_poll.diagnostics.doctor.findings import error_as_json
from sam_poll.diagnostics.doctor.machine import THREADS
from sam_poll.engines import devices
from sam_poll.engines.memory.meter import Reading
from sam_poll.runtime.console import set_up_log

Tell = Callable[..., None]


def main() -> None:
    """Run the trial process: read one order, then write one line for each step."""
    out = child_process.reserve_stdout()
    faulthandler.enable()  # where it was when a library crashes
    set_up_log("text", "WARNING")

    def tell(**event: Any) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    order = json.loads(sys.stdin.readline())
    child_process.end_with_parent()
    run(order, tell)
    tell(end=True)


def run(order: dict[str, Any], tell: Tell) -> None:
    """Run the trial of `order`.

    `order` has `settings` (`trial_process.order_of`), `load`, and `compare` (`picture`, `box`,
    `out`) or None.
    """
    stages = Stages(tell)
    try:
        settings: Settings = pickle.loads(base64.b64decode(order["settings"]))  # noqa: S301  from `child`
        _meet(stages, tell)
        if order["load"]:
            _work(settings, order.get("compare"), stages, tell)
    except SamPollError as error:
        tell(error=error_as_json(error))
    except Exception as error:  # noqa: BLE001  the outermost frame
        reason = (str(error).strip().splitlines() or [""])[0]
        place, remedy = None, None
        if isinstance(error, OSError):
            reason, remedy = error.strerror or reason, remedy_of(error)
            place = str(error.filename) if error.filename else None
        error_fields = {
            "reason": f"{type(error).__name__}: {reason}",
            "place": place,
            "remedy": remedy,
        }
        tell(error={**error_fields, "exit_code": int(ExitCode.MODEL)})


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


def _meet(stages: Stages, tell: Tell) -> None:
    """Import torch and read what it reports of the device."""
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
        remedy = (
            "install torch and torchvision from one place and for this machine, as the README says"
        )
        raise ModelError(f"torch cannot be imported: {reason}", remedy=remedy) from error
    with stages.stage("device"):
        found = facts.gather(before, {name: os.environ.get(name) for name in THREADS})
    tell(facts=found)


def _work(settings: Settings, compare: dict[str, Any] | None, stages: Stages, tell: Tell) -> None:
    from sam_poll.diagnostics.doctor import test_prediction
    from sam_poll.runtime import builders

    before: Reading | None = None

    def stage_of_load(name: str) -> contextlib.AbstractContextManager[None]:
        nonlocal before
        if name == "read":  # torch is imported, and the weights are not there yet
            # A card that cannot be read is what the load is about to tell.
            with contextlib.suppress(Exception):
                before = test_prediction.reading(settings)
        return stages.stage(name)

    engine: Engine = builders.engine_of(settings, on_stage=stage_of_load)
    if plan := test_prediction.plan(engine, settings, before):
        tell(plan=plan)
    tell(trial=test_prediction.predict(engine, stages.stage))
    if compare:
        from sam_poll.diagnostics.doctor import compare as beside

        box = compare.get("box")
        out = Path(compare["out"]) if compare.get("out") else None
        picture = Path(compare["picture"])
        engines = [engine]
        del engine  # a card may not hold both networks
        tell(
            compare=beside.run(
                settings, engines, picture, tuple(box) if box else None, out, stages.stage
            )
        )


if __name__ == "__main__":
    main()
