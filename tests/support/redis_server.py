"""A Redis server for one test, and workers that use it.

`python -m tests.support.redis_worker URL LEASE_S` is a worker in a process that can be killed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

import redis

from sam_poll.core.telemetry import Telemetry
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.integrations.redis.connection import RedisConnection, parse_url
from sam_poll.integrations.redis.pubsub import RedisPubSubSource
from sam_poll.integrations.redis.stream import RedisStreamSource, StreamNames
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.prompts import parser
from tests.conftest import wait_until
from tests.support import optional
from tests.support.ports import free_port

BINARY = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PROMPT = {"box": {"x0": 10, "y0": 10, "x1": 50, "y1": 40}}
parse = partial(parser.parse, max_bytes=1 << 20)


class Server:
    """A server on a free port of this machine. `kill` loses nothing: each write is flushed."""

    def __init__(self, folder: Path, *more: str, password: str = "") -> None:
        if BINARY is None:
            optional.lacking("redis-server", "redis-server")
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {folder}",
            'save ""',
            "appendonly yes",
            "appendfsync always",
            f"logfile {folder / 'log'}",
            *more,
            *([f"requirepass {password}"] if password else []),
        ]
        self.folder, self.password = folder, password
        self._file = folder / "redis.conf"
        self._file.write_text("\n".join(lines))
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://{':' + password + '@' if password else ''}127.0.0.1:{self.port}/0"
        self.client: Any = redis.Redis(port=self.port, password=password or None, protocol=2)

    def start(self) -> None:
        self._process = subprocess.Popen([str(BINARY), str(self._file)], stdout=subprocess.DEVNULL)
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        """End the server as `kill -9` does."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Delete the server's data on the disk."""
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self.kill()

    def connection(self, alarms: Any = None) -> RedisConnection:
        return RedisConnection(parse_url(self.url, "test"), alarms)

    # ── streams ──

    def add(self, name: str, picture: bytes, prompt: Any = PROMPT, **more: Any) -> str:
        """Add an entry to `sam:in`; return its number."""
        fields = {"id": name, "image": picture, "prompt": json.dumps(prompt), **more}
        return self.client.xadd("sam:in", fields).decode()

    def answers(self) -> list[dict[str, Any]]:
        """Return the answers in `sam:out`, in order; texts as str, files as bytes."""
        made = []
        for _, fields in self.client.xrange("sam:out"):
            made.append({k.decode(): v if b"." in k else v.decode() for k, v in fields.items()})
        return made

    def ids(self) -> list[str]:
        """Return the ids that were answered, sorted."""
        return sorted(answer["id"] for answer in self.answers())

    def pending(self) -> int:
        try:
            return int(self.client.xpending("sam:in", "sam_poll")["pending"])
        except redis.ResponseError:  # there is no group yet
            return 0


def stream_source(
    server: Server, telemetry: Telemetry | None = None, **more: Any
) -> RedisStreamSource:
    return RedisStreamSource(
        server.connection(telemetry.alarms if telemetry else None),
        StreamNames(),
        parse=parse,
        **more,
    )


def pubsub_source(
    server: Server, telemetry: Telemetry | None = None, source: str = "in", **more: Any
) -> RedisPubSubSource:
    return RedisPubSubSource(
        server.connection(telemetry.alarms if telemetry else None),
        source,
        "out",
        parse=parse,
        **more,
    )


class Worker:
    """A source and a pipeline with the fake engine, in a thread of this process."""

    def __init__(
        self,
        job_source: Any,
        telemetry: Telemetry,
        engine: Any = None,
        names: tuple[str, ...] = ("mask", "opex"),
    ) -> None:
        self.source = job_source
        self.telemetry = telemetry
        self.stop = threading.Event()
        made = registry.load(names, registry.FormatOptions())
        self.pipeline = Pipeline(
            engine or FakeEngine(),
            made,
            options=PipelineOptions(),
            telemetry=telemetry,
        )
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="worker")

    def _run(self) -> None:
        try:
            with self.source:
                self.pipeline.run(self.source, self.stop)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    @property
    def answered(self) -> int:
        return self.telemetry.stats.now().answered

    def __enter__(self) -> Worker:
        self._thread.start()
        if isinstance(self.source, RedisPubSubSource):
            wait_until(lambda: self.source.wait_subscribed(0.0) or self.error)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the worker did not stop"
        if self.error:
            raise self.error


def stream_worker(server: Server, engine: Any = None, **more: Any) -> Worker:
    telemetry = Telemetry()
    return Worker(
        stream_source(server, telemetry, pulse=telemetry.intake, **more), telemetry, engine
    )


def pubsub_worker(
    server: Server, engine: Any = None, names: tuple[str, ...] = ("mask", "opex"), **more: Any
) -> Worker:
    telemetry = Telemetry()
    return Worker(
        pubsub_source(server, telemetry, pulse=telemetry.intake, **more), telemetry, engine, names
    )
