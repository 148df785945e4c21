"""An HTTP server with the fake engine on a free port of this machine, and a client for it."""

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

from sam_poll.config import settings as settings_
from sam_poll.config.settings import Settings
from sam_poll.core.errors import SamPollError
from sam_poll.core.telemetry import Telemetry
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.http import app, responses, server
from sam_poll.integrations.http.source import HttpSource, stopping_error
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.runtime import builders
from tests.conftest import BOX, picture_bytes, wait_until

TOKEN = "a-token-for-tests-only"


def settings(**flags: Any) -> Settings:
    return settings_.load(
        None, env={}, flags={key.replace("__", "."): value for key, value in flags.items()}
    )


def json_body(seed: int = 0, prompt: Any = BOX, **more: Any) -> dict[str, Any]:
    """Return a body for /predict."""
    return {"picture": in_base64(picture_bytes(seed=seed)), "prompt": prompt, **more}


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


class Site:
    """The parts of `sam-poll serve`, joined as the command does, with an engine of the test's."""

    def __init__(self, engine: Any, loaded: Settings, token: str | None, drain_s: float) -> None:
        self.engine, self.settings = engine, loaded
        self.telemetry, self.stop = Telemetry(), threading.Event()
        self.source = HttpSource(places=loaded.serve.queue, pulse=self.telemetry.intake)
        self._app = app.create_app(
            self.source, self.telemetry, server.server_options_of(loaded), self.stop.is_set
        )
        self._token = token
        self.pipeline = Pipeline(
            engine,
            responses.formats_by_name(loaded),
            options=replace(builders.pipeline_options_of(loaded, 2), drain_s=drain_s),
            telemetry=Telemetry(stats=self.telemetry.stats),
            disk_cache=builders.disk_cache_of(loaded),
        )
        self.error: SamPollError | None = None
        self._thread = threading.Thread(target=self._run, name="pipeline")
        self.url = ""

    def guarded(self, opened: socket.socket) -> Any:
        """Return the application with the middleware that the command puts before it."""
        return server.with_authentication(
            self._app, self.source, self.settings.serve, opened, self._token
        )

    def _run(self) -> None:
        try:
            self.pipeline.run(self.source, self.stop)
        except SamPollError as error:
            self.error = error
            self.source.close(error)
        finally:
            self.source.close(stopping_error())

    def work(self) -> None:
        """Start to answer requests, as after the model was loaded."""
        self.telemetry.engine = self.engine
        self._thread.start()
        wait_until(lambda: self.source.serving)

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

    def start_post(self, path: str, body: Any) -> BackgroundRequest:
        """Send a request by a thread of its own."""
        return BackgroundRequest(self, path, body)

    def send_without_reading(
        self, path: str, body: Any, length: int | None = None
    ) -> socket.socket:
        """Send a request, and read no answer. `length`: the Content-Length, if not the real one."""
        data = json.dumps(body).encode()
        host, port = self.url.removeprefix("http://").split(":")
        opened = socket.create_connection((host, int(port)), timeout=60)
        head = f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        opened.sendall(f"{head}Content-Length: {length or len(data)}\r\n\r\n".encode() + data)
        return opened


class BackgroundRequest:
    """A request that a thread sends."""

    def __init__(self, site: Site, path: str, body: Any) -> None:
        self.answer: httpx.Response | None = None
        self._thread = threading.Thread(target=self._send, args=(site, path, body))
        self._thread.start()

    def _send(self, site: Site, path: str, body: Any) -> None:
        self.answer = site.post(path, body)

    def result(self) -> httpx.Response:
        """Wait for the answer."""
        self._thread.join(60)
        assert self.answer is not None
        return self.answer


@contextmanager
def running_site(
    engine: Any = None,
    *,
    token: str | None = None,
    work: bool = True,
    drain_s: float = 30.0,
    **flags: Any,
) -> Iterator[Site]:
    """Run a server; its URL is `url`. `work` False: as while the model is loaded."""
    site = Site(engine or FakeEngine(), settings(**flags), token, drain_s)
    with ExitStack() as stack:
        opened = stack.enter_context(
            server.listening("127.0.0.1:0", with_authentication=token is not None)
        )
        site.url = server.shown(opened)
        stack.enter_context(server.serving_http(site.guarded(opened), opened, site.stop))
        stack.callback(site.end)
        if work:
            site.work()
        yield site
