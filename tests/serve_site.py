"""A server on a free port of this machine, with the fake network behind it, and ways to ask it."""

from __future__ import annotations

import base64
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import httpx

from sam_poll import app
from sam_poll import settings as settings_
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import SamPollError
from sam_poll.health import Signs
from sam_poll.pipeline import Pipeline
from sam_poll.serve import answers, run, web
from sam_poll.serve.door import HttpDoor, stopping
from sam_poll.settings import Settings
from tests.conftest import BOX, picture_bytes, wait_until

TOKEN = "a-token-for-tests-only"


def settings(**flags: Any) -> Settings:
    return settings_.load(None, env={}, flags={key.replace("__", "."): value for key, value in flags.items()})


def json_body(seed: int = 0, prompt: Any = BOX, **more: Any) -> dict[str, Any]:
    """A body for /predict."""
    return {"picture": in_base64(picture_bytes(seed=seed)), "prompt": prompt, **more}


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


class Site:
    """As `run.serve` joins the parts, but with an engine of the test's."""

    def __init__(self, engine: Any, wishes: Settings, token: str | None, drain_s: float) -> None:
        self.engine, self.settings = engine, wishes
        self.signs, self.stop = Signs(), threading.Event()
        self.door = HttpDoor(places=wishes.serve.queue, pulse=self.signs.intake)
        made = web.application(self.door, self.signs, run.terms_of(wishes), self.stop.is_set)
        self._made, self._token = made, token
        sizes = replace(app.sizes_of(wishes, 2), drain_s=drain_s)
        self.pipeline = Pipeline(engine, answers.menu_of(wishes), sizes=sizes, stats=self.signs.stats)
        self.error: SamPollError | None = None
        self._thread = threading.Thread(target=self._run, name="pipeline")
        self.url = ""

    def guarded(self, opened: socket.socket) -> Any:
        """The application behind what `run.serve` puts before it."""
        return run.guarded(self._made, self.door, self.settings.serve, opened, self._token)

    def _run(self) -> None:
        try:
            self.pipeline.run(self.door, self.stop)
        except SamPollError as error:
            self.error = error
            self.door.close(error)
        finally:
            self.door.close(stopping())

    def work(self) -> None:
        """The network is loaded; requests are answered from now on."""
        self.signs.engine = self.engine
        self._thread.start()
        wait_until(lambda: self.door.serving)

    def end(self) -> None:
        self.stop.set()
        if self._thread.ident:
            self._thread.join(60)
            assert not self._thread.is_alive()

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **more)

    def later(self, path: str, body: Any) -> Later:
        return Later(self, path, body)

    def begin(self, path: str, body: Any, length: int | None = None) -> socket.socket:
        """A request whose answer nobody reads yet. `length`: what is promised of the body."""
        data = json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        opened = socket.create_connection((host, int(port)), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        opened.sendall(f"{head}Content-Length: {length or len(data)}\r\n\r\n".encode() + data)
        return opened


class Later:
    """A request that is asked by a thread of its own."""

    def __init__(self, site: Site, path: str, body: Any) -> None:
        self.answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._ask, args=(site, path, body))
        self._thread.start()

    def _ask(self, site: Site, path: str, body: Any) -> None:
        self.answer = site.post(path, body)

    def done(self) -> httpx.Response:
        self._thread.join(60)
        assert self.answer is not None
        return self.answer


@contextmanager
def site(
    engine: Any = None, *, token: str | None = None, work: bool = True, drain_s: float = 30.0, **flags: Any
) -> Iterator[Site]:
    made = Site(engine or FakeEngine(), settings(**flags), token, drain_s)
    with ExitStack() as stack:
        opened = stack.enter_context(run.listening("127.0.0.1:0", guarded=token is not None))
        made.url = run.shown(opened)
        stack.enter_context(run.answering(made.guarded(opened), opened, made.stop))
        stack.callback(made.end)
        if work:
            made.work()
        yield made
