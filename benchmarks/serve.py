"""`python -m benchmarks.serve`: `sam-poll serve` beside the naive handler, under 1, 8 and 32
callers at once.

The naive handler is what a function does that calls the official predictor: Pillow opens the
picture, `set_image`, `predict`, the mask as lists, one request after the other; here with the
bundled network (or `--model`), behind the same HTTP server in a process like ours. Both are asked
what CVAT asks its interactors, side by side in one run, in turns. Two kinds of callers: those with
a new picture each time, and those who click ten times on a picture, as people do.

Limitations: the callers share the machine with the servers; what they cost, both
pay."""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sam_poll import engines
from sam_poll.core.types import Box, Size
from sam_poll.diagnostics.bench import dataset

_CLICKS = 10  # on one picture
_WARM = 3
_PATIENCE_S = 120.0
_AT = re.compile(r"serving at http://127\.0\.0\.1:(\d+)")


# ── the naive handler, in a process of its own ──


def naive(model: str, device: str) -> None:
    """Serves POST /interact until it is ended."""
    import torch
    import uvicorn
    from PIL import Image
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from sam_poll.diagnostics.bench.naive_loop import NaiveLoop
    from sam_poll.integrations.http.server import listening, shown

    spec = engines.resolve(model)
    assert spec.checkpoint
    predictor = NaiveLoop(spec.checkpoint, spec.config, device)._official.predictor
    lock = threading.Lock()

    def answer(asked: dict[str, Any]) -> bytes:
        picture = np.array(Image.open(io.BytesIO(base64.b64decode(asked["image"]))).convert("RGB"))
        (x0, y0), (x1, y1) = asked["obj_bbox"]
        with lock, torch.inference_mode():
            predictor.set_image(picture)
            masks, scores, _ = predictor.predict(
                box=np.array([x0, y0, x1, y1]), multimask_output=False
            )
        return json.dumps(
            {"mask": ((masks[int(np.argmax(scores))] > 0) * 255).astype(int).tolist()}
        ).encode()

    async def interact(request: Request) -> Response:
        return Response(
            await run_in_threadpool(answer, await request.json()), media_type="application/json"
        )

    app = Starlette(routes=[Route("/interact", interact, methods=["POST"])])
    with listening("127.0.0.1:0", with_authentication=False) as opened:
        print(f"serving at {shown(opened)}", file=sys.stderr, flush=True)
        config = uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="off", log_level="warning"
        )
        uvicorn.Server(config).run([opened])


# ── servers ──


@contextmanager
def served(command: Sequence[str], env: dict[str, str]) -> Iterator[int]:
    """The port of a server that is ready."""
    with subprocess.Popen(
        command, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True
    ) as made:
        try:
            assert made.stderr
            for line in made.stderr:
                if found := _AT.search(line):
                    threading.Thread(target=made.stderr.read, daemon=True).start()
                    yield int(found[1])
                    return
            raise RuntimeError(f"{' '.join(command)} ended with {made.wait()}")
        finally:
            made.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                made.wait(30)
            made.kill()


# ── callers ──


class Supply:
    """Requests as bytes; each picture has its own, `clicks` times."""

    def __init__(self, size: Size, clicks: int, serial: str) -> None:
        self._subject = dataset.draw_pictures(size, 1)
        self._clicks, self._serial = clicks, serial
        self._given = 0
        self._lock = threading.Lock()

    def next(self) -> bytes:
        with self._lock:
            number = self._given // self._clicks
            self._given += 1
        which = number % len(self._subject.jpegs)
        jpeg = dataset.with_comment(self._subject.jpegs[which], f"{self._serial}-{number}")
        box: Box = self._subject.boxes[which][0]
        image = base64.b64encode(jpeg).decode("ascii")
        return json.dumps(
            {"image": image, "obj_bbox": [[box.x0, box.y0], [box.x1, box.y1]]}
        ).encode()


@dataclass
class Round:
    """What callers have seen."""

    took_ms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, other: Round) -> None:
        self.took_ms += other.took_ms
        self.seconds += other.seconds

    @property
    def rate(self) -> float:
        return len(self.took_ms) / self.seconds

    def __str__(self) -> str:
        p50, p99 = np.percentile(self.took_ms, [50, 99])
        return (
            f"{self.rate:>7.1f} /s   p50 {p50:>7.0f} ms   p99 {p99:>7.0f} ms   "
            f"{len(self.took_ms)} requests"
        )


def asked(port: int, supply: Supply, callers: int, requests: int, seconds: float) -> Round:
    """So many callers ask one request after the other, until `requests` are answered or the time is
    over.
    """
    left = iter(range(requests))
    done, lock = Round(), threading.Lock()
    end = time.monotonic() + seconds

    def call() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
        while time.monotonic() < end:
            with lock:
                if next(left, None) is None:
                    break
            body = supply.next()
            started = time.monotonic()
            connection.request("POST", "/interact", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {body[:500]!r}")
            took = (time.monotonic() - started) * 1000
            with lock:
                done.took_ms.append(took)
        connection.close()

    threads = [threading.Thread(target=call) for _ in range(callers)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.seconds = time.monotonic() - started
    if len(done.took_ms) < requests and done.seconds < seconds:
        raise RuntimeError("a caller was refused")
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--naive", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", default="1024x768")
    parser.add_argument("--requests", type=int, default=64, help="a round, at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="a round, at most")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    if options.naive:
        naive(options.model, options.device)
        return
    ours = [sys.executable, "-m", "sam_poll", "serve", "--listen", "0", "--log", "text"]
    ours += ["-m", options.model, "--device", options.device]
    theirs = [
        sys.executable,
        "-m",
        "benchmarks.serve",
        "--naive",
        "--model",
        options.model,
        "--device",
        options.device,
    ]
    width, height = map(int, options.size.split("x"))
    with served(ours, {}) as our_port, served(theirs, {}) as their_port:
        ports = {"sam-poll serve": our_port, "naive": their_port}
        for kind, clicks in (
            ("each request a new picture", 1),
            (f"{_CLICKS} clicks on a picture", _CLICKS),
        ):
            print(f"{kind}, {options.size}, {options.model} on {options.device}")
            for callers in options.callers:
                seen = {name: Round() for name in ports}
                for number in range(options.rounds):
                    for name, port in ports.items():
                        serial = f"{clicks}-{callers}-{number}"
                        supply = Supply(Size(width, height), clicks, serial)
                        asked(
                            port,
                            Supply(Size(width, height), 1, f"warm-{serial}"),
                            1,
                            _WARM,
                            _PATIENCE_S,
                        )
                        seen[name].add(
                            asked(port, supply, callers, options.requests, options.seconds)
                        )
                for name, found in seen.items():
                    print(f"  {callers:>3} callers  {name:<15} {found}", flush=True)
                print(
                    f"  {callers:>3} callers  "
                    f"{seen['sam-poll serve'].rate / seen['naive'].rate:.2f} times as many"
                )


if __name__ == "__main__":
    main()
