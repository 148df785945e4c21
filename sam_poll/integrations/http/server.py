"""`sam-poll serve`: the HTTP server around the pipeline, its port, and the order of start and stop.

The port is opened before the model is loaded, so that simple mistakes are reported at once and
/health answers from the start. At the end the requests in progress are finished and answered, then
the connections are closed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TypeAlias

import uvicorn
from loguru import logger
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from sam_poll.config.fields import port_error
from sam_poll.config.settings import Serve, Settings, absolute
from sam_poll.core.errors import ExitCode, SamPollError, SettingsError
from sam_poll.integrations.http import app, auth, responses
from sam_poll.integrations.http.connections import MAX_CONNECTIONS, Connection
from sam_poll.integrations.http.origin_check import Callers
from sam_poll.integrations.http.source import HttpSource, stopping_error
from sam_poll.prompts import parser
from sam_poll.runtime import builders, console
from sam_poll.runtime.service import Service

_CLOSE_S = 5.0  # for answers that are being read
_BACKLOG = 128


Beside: TypeAlias = Callable[
    [ASGIApp, HttpSource, socket.socket, "str | None", Callable[[], bool]],
    AbstractContextManager[ASGIApp],
]
"""Puts another application beside the server's: gets it, the source, the port, the token, and
whether the server is stopping; returns a context with the joined application."""


def serve(
    settings: Settings, *, env: Mapping[str, str] = os.environ, beside: Beside | None = None
) -> ExitCode:
    """Answer requests until a signal comes. Raises DeviceError after the device has failed."""
    service = Service(settings, unit="request")
    forward_uvicorn_log()
    options = settings.serve
    token = auth.read_token(options.token_file and absolute(options.token_file), env)
    telemetry = service.telemetry
    source = HttpSource(places=options.queue, attempts=settings.attempts, pulse=telemetry.intake)
    with service.lifetime() as stop:
        application = app.create_app(source, telemetry, server_options_of(settings), stop.is_set)
        with (
            listening(options.listen, with_authentication=token is not None) as port,
            _joined(
                beside,
                with_authentication(application, source, options, port, token),
                source,
                port,
                token,
                stop.is_set,
            ) as joined,
            serving_http(
                joined,
                port,
                stop,
                max(MAX_CONNECTIONS, 2 * options.queue),
            ),
            service.metrics(source),
        ):
            address = shown(port)
            service.notify_loading()
            try:
                service.answer(
                    source,
                    on_ready=lambda _: logger.info("serving at {}", address),
                    make_formats=responses.formats_by_name,
                )
            except SamPollError as error:
                source.close(error)
                raise
            finally:
                source.close(stopping_error())
    service.log_end()
    return ExitCode.OK


def _joined(
    beside: Beside | None,
    application: ASGIApp,
    source: HttpSource,
    port: socket.socket,
    token: str | None,
    is_stopping: Callable[[], bool],
) -> AbstractContextManager[ASGIApp]:
    if beside is None:
        return nullcontext(application)
    return beside(application, source, port, token, is_stopping)


def server_options_of(settings: Settings) -> app.ServerOptions:
    """Return what the settings say about requests."""
    limits = settings.limits
    return app.ServerOptions(
        parse=partial(parser.parse, max_bytes=limits.prompt_bytes, max_prompts=limits.prompts),
        formats=settings.formats,
        bundles=responses.multi_file_formats(settings),
        min_decode_side=builders.min_decode_side_of(settings),
        timeout_s=settings.serve.timeout_s,
        keeps_embeddings=bool(settings.cache.disk_mib),
    )


def with_authentication(
    application: ASGIApp,
    source: HttpSource,
    options: Serve,
    port: socket.socket,
    token: str | None,
) -> ASGIApp:
    """Return the application behind authentication and, if other origins are allowed, CORS."""
    callers = Callers.of(options.listen, port.getsockname()[0], options.hosts, options.origins)
    authenticated = auth.AuthMiddleware(
        application, source, callers, token=token, body_bytes=options.body_mib << 20
    )
    if not options.origins:
        return authenticated
    return CORSMiddleware(
        authenticated,
        allow_origins=options.origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("Authorization", "Content-Type"),
        expose_headers=("Retry-After",),
    )


# ── port and connections ──


@contextmanager
def listening(
    address: str, *, with_authentication: bool, place: str = "serve.listen"
) -> Iterator[socket.socket]:
    """Open the port `address` (host:port) while entered. `place` names the setting in errors.

    Raises SettingsError if it cannot be opened, or if other machines reach it and no token is set
    (`with_authentication` is False).
    """
    host, _, number = address.rpartition(":")
    try:
        entries = socket.getaddrinfo(
            host.strip("[]"), int(number), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, socket_address = entries[0]
        if not with_authentication and not ipaddress.ip_address(socket_address[0]).is_loopback:
            raise SettingsError(
                f"other machines can reach {address}, and there is no token",
                place=place,
                remedy=f"set serve.token_file or {auth.TOKEN} (`openssl rand -hex 32` makes one), "
                "or listen on 127.0.0.1",
            )
        port = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise port_error(address, error, place) from error
    with port:
        try:
            port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            port.bind(socket_address)
            port.listen(_BACKLOG)
        except OSError as error:
            raise port_error(address, error, place) from error
        yield port


def shown(port: socket.socket) -> str:
    """Return the URL of an open port."""
    host, number = port.getsockname()[:2]
    return f"http://[{host}]:{number}" if ":" in host else f"http://{host}:{number}"


@contextmanager
def serving_http(
    application: ASGIApp, port: socket.socket, stop: threading.Event, most: int = MAX_CONNECTIONS
) -> Iterator[None]:
    """Serve HTTP on an open port, on a thread of its own, while entered.

    `most`: maximum number of connections. If the server ends by itself, `stop` is set and leaving
    raises SamPollError.
    """
    config = uvicorn.Config(
        application,  # type: ignore[arg-type]
        # What is tested, not what uvicorn would pick of the installed libraries.
        loop="asyncio",
        http=partial(Connection, most=most),  # type: ignore[arg-type]
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(_CLOSE_S),
    )
    server = uvicorn.Server(config)
    failures: list[str] = []

    def run() -> None:
        try:
            asyncio.run(server.serve([port]))
        except BaseException as error:  # noqa: BLE001  without this thread there is no server
            failures.append(f"{type(error).__name__}: {error}")
        if not server.should_exit:
            failures.append("it ended by itself")
            stop.set()

    thread = threading.Thread(target=run, name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(_CLOSE_S * 2)
    if failures:
        raise SamPollError(
            f"the HTTP server has failed: {failures[0]}", remedy="please report this with the log"
        )


def forward_uvicorn_log() -> None:
    """Forward uvicorn's and asyncio's warnings and errors to loguru.

    Their messages on each start and stop are left out: this program logs its own, and what is wrong
    with a form.
    """
    console.forward_log("python_multipart")

    class LogForwarder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info and record.exc_info[1]
            if isinstance(error, asyncio.CancelledError):
                logger.warning("a client did not read its answer in time; its connection is closed")
                return
            logger.opt(exception=error or None).log(record.levelname, "{}", record.getMessage())

    for name in ("uvicorn", "asyncio"):
        library_logger = logging.getLogger(name)
        library_logger.handlers = [LogForwarder()]
        library_logger.propagate = False
        library_logger.setLevel(logging.WARNING)
