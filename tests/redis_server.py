"""A Redis server of a test's own, and workers on it.

`python -m tests.redis_worker URL LEASE_S` is a worker in a process that can be killed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
from functools import partial
from pathlib import Path
from typing import Any

import redis

from sam_poll import formats, prompts
from sam_poll.doors.redis_link import Link, of
from sam_poll.doors.redis_pubsub import PubSubDoor
from sam_poll.doors.redis_stream import Names, StreamDoor
from sam_poll.engines.fake import FakeEngine
from sam_poll.health import Signs
from sam_poll.pipeline import Pipeline, Sizes
from tests import optional
from tests.conftest import wait_until

BINARY = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PROMPT = {"box": {"x0": 10, "y0": 10, "x1": 50, "y1": 40}}
parse = partial(prompts.parse, max_bytes=1 << 20)


class Server:
    """A server on a free port of this machine, which keeps each write at once, so that `kill` loses nothing."""

    def __init__(self, folder: Path, *more: str, password: str = "") -> None:
        if BINARY is None:
            optional.lacking("redis-server", "redis-server")
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
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
        """As `kill -9`."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """What it has kept on disk is gone."""
        shutil.rmtree(self.folder / "appendonlydir", ignore_errors=True)

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()
        self.kill()

    def link(self, alarms: Any = None) -> Link:
        return Link(of(self.url, "test"), alarms)

    # ── streams ──

    def add(self, name: str, picture: bytes, prompt: Any = PROMPT, **more: Any) -> str:
        """Put an entry into `sam:in`."""
        fields = {"id": name, "image": picture, "prompt": json.dumps(prompt), **more}
        return self.client.xadd("sam:in", fields).decode()

    def answers(self) -> list[dict[str, Any]]:
        """What is in `sam:out`, in order; texts as texts, documents as bytes."""
        made = []
        for _, fields in self.client.xrange("sam:out"):
            made.append({k.decode(): v if b"." in k else v.decode() for k, v in fields.items()})
        return made

    def ids(self) -> list[str]:
        """The ids that were answered, sorted."""
        return sorted(answer["id"] for answer in self.answers())

    def pending(self) -> int:
        try:
            return int(self.client.xpending("sam:in", "sam_poll")["pending"])
        except redis.ResponseError:  # there is no group yet
            return 0


def stream_door(server: Server, signs: Signs | None = None, **more: Any) -> StreamDoor:
    return StreamDoor(server.link(signs.alarms if signs else None), Names(), parse=parse, **more)


def pubsub_door(server: Server, signs: Signs | None = None, source: str = "in", **more: Any) -> PubSubDoor:
    return PubSubDoor(server.link(signs.alarms if signs else None), source, "out", parse=parse, **more)


class Worker:
    """A door and a pipeline with a network of no weights, in a thread of this process."""

    def __init__(self, door: Any, signs: Signs, engine: Any = None, names: tuple[str, ...] = ("mask", "opex")) -> None:
        self.door, self.signs, self.stop = door, signs, threading.Event()
        made = formats.load(names, formats.FormatOptions())
        self.pipeline = Pipeline(
            engine or FakeEngine(),
            made,
            sizes=Sizes(),
            stats=signs.stats,
            alarms=signs.alarms,
            intake=signs.intake,
            device=signs.device,
        )
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="worker")

    def _run(self) -> None:
        try:
            with self.door:
                self.pipeline.run(self.door, self.stop)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    @property
    def answered(self) -> int:
        return self.signs.stats.now().answered

    def __enter__(self) -> Worker:
        self._thread.start()
        if isinstance(self.door, PubSubDoor):
            wait_until(lambda: self.door.wait_subscribed(0.0) or self.error)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the worker did not stop"
        if self.error:
            raise self.error


def stream_worker(server: Server, engine: Any = None, **more: Any) -> Worker:
    signs = Signs()
    return Worker(stream_door(server, signs, pulse=signs.intake, **more), signs, engine)


def pubsub_worker(server: Server, engine: Any = None, names: tuple[str, ...] = ("mask", "opex"), **more: Any) -> Worker:
    signs = Signs()
    return Worker(pubsub_door(server, signs, pulse=signs.intake, **more), signs, engine, names)
