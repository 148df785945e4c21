"""A measured process: it reports when it is ready, then runs orders, one JSON line each way.

A process of its own for each contestant keeps threads, memory and kernels of one out of the figures
of another. It ends when its standard input is closed, so nothing is left when the benchmark is
gone. Libraries may write to standard output, so their output is redirected to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam_poll.core import child_process

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def main(text: str) -> None:
    """Run the worker process; `text` is the first order, `{"kind": …}`."""
    answers = child_process.reserve_stdout()
    warnings.simplefilter("ignore")
    order = json.loads(text)
    handler: Handler | None = None
    answer: dict[str, Any]
    while True:
        try:
            if handler is None:
                handler, answer = _KINDS[order["kind"]](order), {"ready": True}
            else:
                answer = handler(order)
        except Exception as error:  # noqa: BLE001  it is reported to the parent
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # threads of watchers and drivers are not waited for
        order = json.loads(line)


def _loop(order: dict[str, Any]) -> Handler:
    from sam_poll.diagnostics.bench.naive_loop import NaiveLoop

    loop = NaiveLoop(Path(order["checkpoint"]), order["config"], order["device"])

    def run(given: dict[str, Any]) -> dict[str, Any]:
        started, cpu = time.perf_counter(), time.process_time()
        for picture, prompt in given["pairs"]:
            flush = given.get("flush", False)
            loop(Path(picture), Path(prompt), Path(given["out"]), flush=flush)
        count = len(given["pairs"])
        return {
            "seconds": (time.perf_counter() - started) / count,
            "cpu_s": (time.process_time() - cpu) / count,
        }

    return run


def _limit(order: dict[str, Any]) -> Handler:
    from sam_poll.config import settings
    from sam_poll.diagnostics.bench.bare_network import BareNetwork

    flags = {"model": order["checkpoint"], "model_cfg": order["config"], "device": order["device"]}
    limit = BareNetwork(settings.load(None, flags=flags))

    def run(given: dict[str, Any]) -> dict[str, Any]:
        if "pairs" in given:
            limit.ready([(Path(picture), Path(prompt)) for picture, prompt in given["pairs"]])
            return {"batch": limit.batch, "step": limit.info.step}
        cpu, single = time.process_time(), given.get("single", False)
        seconds = limit.run(given["batches"], single=single)
        count = given["batches"] * (1 if single else limit.batch)
        return {"seconds": seconds, "cpu_s": (time.process_time() - cpu) / count}

    return run


def _outside(order: dict[str, Any]) -> Handler:
    if hasattr(os, "sched_setaffinity"):  # before torch counts the cores
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import cv2
    import torch

    from sam_poll.diagnostics.bench import cpu_stages

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    side: Any = (
        cpu_stages.LoopSide()
        if order["side"] == "loop"
        else cpu_stages.OurSide(Path(order["root"]))
    )

    def run(given: dict[str, Any]) -> dict[str, Any]:
        clock = side.run(*(Path(given[key]) for key in ("picture", "prompt", "out")))
        return {"cpu": clock.cpu, "wall": clock.wall}

    return run


_KINDS: dict[str, Callable[[dict[str, Any]], Handler]] = {
    "loop": _loop,
    "limit": _limit,
    "outside": _outside,
}

if __name__ == "__main__":
    main(sys.argv[1])
