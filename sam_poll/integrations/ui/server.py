"""`sam-poll ui`: the page on a port of its own, or beside the endpoints of `sam-poll serve`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from loguru import logger
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sam_poll.config.settings import SettingInForce, Settings, absolute
from sam_poll.core.errors import ExitCode, ShareError
from sam_poll.integrations.http import auth
from sam_poll.integrations.http.connections import MAX_CONNECTIONS
from sam_poll.integrations.http.origin_check import Callers
from sam_poll.integrations.http.server import (
    Beside,
    forward_uvicorn_log,
    listening,
    serving_http,
    shown,
)
from sam_poll.integrations.http.source import HttpSource
from sam_poll.integrations.ui.access import PREFIX, Sessions, UiAccess, cookie_name
from sam_poll.integrations.ui.answers import AnswerFacts
from sam_poll.integrations.ui.app import Ui, create_app
from sam_poll.integrations.ui.doctor import Doctor
from sam_poll.integrations.ui.editor import Editor
from sam_poll.integrations.ui.pictures import Pictures
from sam_poll.integrations.ui.preview import ModelPreviewer, Previewer, SourcePreviewer
from sam_poll.integrations.ui.share_index import ShareIndex
from sam_poll.prompts import parser
from sam_poll.runtime import builders, console, signals


@dataclass(frozen=True)
class UiOptions:
    """What the command line adds to the settings.

    `in_force`: the settings with their places, for the page that shows them. `doctor`: arguments of
    `sam-poll doctor` for this share.
    """

    read_only: bool = False
    in_force: Sequence[SettingInForce] = ()
    doctor: Sequence[str] = ()


def run(settings: Settings, options: UiOptions, *, env: Mapping[str, str] = os.environ) -> ExitCode:
    """Serve the page until a signal comes. The port is that of `serve.listen`."""
    console.set_up_log(settings.log, settings.log_level)
    forward_uvicorn_log()
    token = read_token(settings, env)
    if not settings.folders.input.is_dir():
        raise ShareError(
            "the share does not exist",
            place=str(settings.folders.input),
            remedy="mount it, or name another folder",
        )
    previewer = ModelPreviewer(partial(builders.predictor_of, settings), settings.contours)
    with (
        signals.stop_on_signals() as stop,
        signals.bounded_stop(stop, signals.LAST_RESORT_S),
        listening(
            settings.serve.listen, with_authentication=token is not None, place="--listen"
        ) as port,
        pages(settings, options, port, token, previewer, stop.is_set) as site,
        serving_http(Redirected(site), port, stop, MAX_CONNECTIONS),
    ):
        logger.info("the page is at {}{}/", shown(port), PREFIX)
        stop.wait()
    return ExitCode.OK


def read_token(settings: Settings, env: Mapping[str, str]) -> str | None:
    """Return the token that users log in with; None if there is none."""
    file = settings.serve.token_file
    return auth.read_token(file and absolute(file), env)


@contextmanager
def pages(
    settings: Settings,
    options: UiOptions,
    port: socket.socket,
    token: str | None,
    previewer: Previewer,
    is_stopping: Callable[[], bool],
) -> Iterator[ASGIApp]:
    """Yield the page's application, behind its access checks; the share is read while entered."""
    layout = builders.layout_of(settings)
    limits = settings.limits
    max_pixels = int(limits.picture_mpx * 1_000_000)
    parse = partial(
        parser.parse,
        max_bytes=limits.prompt_bytes,
        max_prompts=limits.prompts,
        mask_files=True,
    )
    sessions = Sessions(token)
    address, number = port.getsockname()[:2]
    keep = builders.folder_options_of(settings, once=False).mode == "events"
    with ShareIndex(layout, keep=keep) as index:
        facts = AnswerFacts(index)
        ui = Ui(
            index=index,
            facts=facts,
            pictures=Pictures(max_pixels=max_pixels),
            editor=Editor(layout, parse, max_pixels),
            previewer=previewer,
            doctor=Doctor(options.doctor),
            in_force=options.in_force,
            read_only=options.read_only,
            sessions=sessions,
            cookie_name=cookie_name(number),
            is_stopping=is_stopping,
        )
        try:
            yield UiAccess(
                create_app(ui),
                Callers.of(settings.serve.listen, address, settings.serve.hosts, ()),
                sessions,
                body_bytes=settings.serve.body_mib << 20,
                cookie_name=cookie_name(number),
                read_only=options.read_only,
            )
        finally:
            facts.close()


def beside(settings: Settings, options: UiOptions) -> Beside:
    """Return what puts the page beside the endpoints of `sam-poll serve`."""

    @contextmanager
    def joined(
        application: ASGIApp,
        source: HttpSource,
        port: socket.socket,
        token: str | None,
        is_stopping: Callable[[], bool],
    ) -> Iterator[ASGIApp]:
        previewer = SourcePreviewer(source, settings.serve.timeout_s)
        with pages(settings, options, port, token, previewer, is_stopping) as site:
            yield _Beside(application, site)

    return joined


class Redirected:
    """The page alone: `/` leads to it."""

    def __init__(self, site: ASGIApp) -> None:
        self._site = site

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/":
            await RedirectResponse(f"{PREFIX}/", 307)(scope, receive, send)
            return
        await self._site(scope, receive, send)


class _Beside:
    """The page and another application: the page gets `/` and what is below `/ui`."""

    def __init__(self, application: ASGIApp, site: ASGIApp) -> None:
        self._application = application
        self._site = Redirected(site)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        is_page = path in ("/", PREFIX) or path.startswith(f"{PREFIX}/")
        application = self._site if is_page else self._application
        await application(scope, receive, send)
