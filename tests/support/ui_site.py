"""The page of `sam-poll ui` on a free port of this machine, and clients that look at it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from sam_poll.config import settings as settings_
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.http.server import listening, serving_http, shown
from sam_poll.integrations.ui import server
from sam_poll.integrations.ui.names import encode
from sam_poll.integrations.ui.preview import ModelPreviewer
from sam_poll.pipeline.predictor import Predictor
from tests.conftest import Share, wait_until

TOKEN = "a-token-for-tests-only"


class Site:
    """A running page. `client` has a session; `csrf` is its token.

    `before_end` is called before the server ends: browsers complain of pages without one.
    """

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self.before_end: list[Callable[[], object]] = []
        self.client = httpx.Client(base_url=url, timeout=60, trust_env=False)
        if token:
            self.client.post("/ui/login", data={"token": token})

    @property
    def csrf(self) -> str:
        return re.search('name="csrf" content="([^"]*)"', self.page("/ui/settings"))[1]  # type: ignore[index]

    def page(self, path: str, **more: Any) -> str:
        """The text of a page that is there."""
        answer = self.client.get(path, headers={"Accept": "text/html"}, **more)
        assert answer.status_code == 200, answer.text
        return answer.text

    def post(self, path: str, **more: Any) -> httpx.Response:
        """Send a change as the page does."""
        return self.client.post(path, headers={"X-CSRF-Token": self.csrf}, **more)

    def wait_for(self, text: str, path: str = "/ui/") -> str:
        """Wait until a page says something."""
        wait_until(lambda: text in self.page(path))
        return self.page(path)

    def edit(self, place: str, key: str) -> str:
        """The address of an editor."""
        return f"/ui/edit/{place}/{encode(key)}"


@contextmanager
def running_ui(
    share: Share,
    *,
    engine: Any = None,
    token: str | None = None,
    read_only: bool = False,
    doctor: tuple[str, ...] = (),
    **flags: Any,
) -> Iterator[Site]:
    """Run the page as the command does, with an engine of the test's."""
    given = {key.replace("__", "."): value for key, value in flags.items()}
    given = {"input": share.input, "serve.listen": "127.0.0.1:0", **given}
    loaded = settings_.load(None, env={}, flags=given)
    options = server.UiOptions(
        read_only, settings_.in_force(loaded, None, env={}, flags=given), doctor
    )
    previewer = ModelPreviewer(lambda: Predictor(engine or FakeEngine()), loaded.contours)
    stop = threading.Event()
    with (
        listening(loaded.serve.listen, with_authentication=token is not None) as port,
        server.pages(loaded, options, port, token, previewer, stop.is_set) as pages,
        serving_http(server.Redirected(pages), port, stop),
    ):
        site = Site(shown(port), token)
        try:
            yield site
        finally:
            for end in site.before_end:
                end()
            site.client.close()
            stop.set()
