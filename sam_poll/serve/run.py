"""`sam-poll serve`: settings become a server; its signs of life, and the order of start and stop, as the daemon's.

The port is opened before the model is loaded, so that the cheap mistakes are told first and /health answers at once.
At the end what is at work is finished and told, then the connections are closed.

What can still go wrong here: as with the folder, a thread that hangs in a driver; the process ends without it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import uvicorn
from loguru import logger
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from sam_poll import app, prompts
from sam_poll import console as screen
from sam_poll.errors import ExitCode, SamPollError, SettingsError
from sam_poll.health import Monitor, Notifier, Signs
from sam_poll.serve import answers, gate, web
from sam_poll.serve.callers import Callers
from sam_poll.serve.connections import MOST, Connection
from sam_poll.serve.door import HttpDoor, stopping
from sam_poll.settings import Serve, Settings, absolute

_CLOSE_S = 5.0  # for answers that are being read
_BACKLOG = 128


def serve(settings: Settings, *, env: Mapping[str, str] = os.environ) -> ExitCode:
    """Answer requests until a signal comes. DeviceError after the device has failed."""
    screen.set_up_log(settings.log, settings.log_level)
    _hear_uvicorn()
    wishes = settings.serve
    token = gate.token_of(wishes.token_file and absolute(wishes.token_file), env)
    signs, notify = Signs(), Notifier()
    door = HttpDoor(places=wishes.queue, attempts=settings.attempts, pulse=signs.intake)
    with app.stop_on_signals() as stop, app.bounded_stop(stop, app.LAST_RESORT_S):
        made = web.application(door, signs, terms_of(settings), stop.is_set)
        with (
            listening(wishes.listen, guarded=token is not None) as opened,
            answering(guarded(made, door, wishes, opened, token), opened, stop, max(MOST, 2 * wishes.queue)),
            app.metrics_of(settings, signs, door),
        ):
            notify(f"STATUS=loading {settings.model}")
            try:
                _work(settings, signs, door, stop, notify, shown(opened))
            except SamPollError as error:
                door.close(error)
                raise
            finally:
                door.close(stopping())
    logger.info("stopped: {}", screen.summary(signs.stats.now()))
    return ExitCode.OK


def terms_of(settings: Settings) -> web.Terms:
    """What the settings say of requests."""
    limits = settings.limits
    return web.Terms(
        parse=partial(prompts.parse, max_bytes=limits.prompt_bytes, max_prompts=limits.prompts),
        formats=settings.formats,
        bundles=answers.bundles_of(settings),
        cover=app.cover_of(settings),
        timeout_s=settings.serve.timeout_s,
    )


def guarded(made: ASGIApp, door: HttpDoor, wishes: Serve, opened: socket.socket, token: str | None) -> ASGIApp:
    """Put the gate before the application; and before that, where pages of other origins may ask, what browsers ask
    first."""
    callers = Callers.of(wishes.listen, opened.getsockname()[0], wishes.hosts, wishes.origins)
    gated = gate.Gate(made, door, callers, token=token, body_bytes=wishes.body_mib << 20)
    if not wishes.origins:
        return gated
    return CORSMiddleware(
        gated,
        allow_origins=wishes.origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("Authorization", "Content-Type"),
        expose_headers=("Retry-After",),
    )


def _work(
    settings: Settings, signs: Signs, door: HttpDoor, stop: threading.Event, notify: Notifier, address: str
) -> None:
    """Load the model, and answer."""
    now, alarms, health = signs.stats.now, signs.alarms.active, settings.health

    def waiting() -> int:
        return door.waiting

    def line() -> str:
        return screen.status_line(now(), waiting(), alarms(), "request")

    with (
        app.workforce(settings, signs, stop, model_type=None, on_result=None, menu=answers.menu_of) as work,
        Monitor(signs, stop, stuck_s=health.stuck_s, file=health.file, notify=notify, summary=line),
        screen.Heartbeat(now, waiting, alarms, what="request"),
    ):
        logger.info("serving at {}", address)
        work.run(door, stop)


# ── the network's side ──


@contextmanager
def listening(address: str, *, guarded: bool) -> Iterator[socket.socket]:
    """The open port. SettingsError where it cannot be had, and where others reach it without a token."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, place = found[0]
        if not guarded and not ipaddress.ip_address(place[0]).is_loopback:
            raise SettingsError(
                f"{address} is reached by other machines, and there is no token",
                place="serve.listen",
                remedy=f"set serve.token_file or {gate.TOKEN} (`openssl rand -hex 32` makes one), "
                "or listen on 127.0.0.1",
            )
        opened = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _no_port(address, error) from error
    with opened:
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(place)
            opened.listen(_BACKLOG)
        except OSError as error:
            raise _no_port(address, error) from error
        yield opened


def _no_port(address: str, error: Exception) -> SettingsError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SettingsError(
        f"no port can be opened at {address}: {reason}",
        place="serve.listen",
        remedy="take another one; `ss -ltnp` names who has it",
    )


def shown(opened: socket.socket) -> str:
    """The address as a browser takes it."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@contextmanager
def answering(application: ASGIApp, opened: socket.socket, stop: threading.Event, most: int = MOST) -> Iterator[None]:
    """HTTP on the open port, by a thread of its own. SamPollError at the end if that has ended by itself, which sets
    `stop`."""
    config = uvicorn.Config(
        application,  # type: ignore[arg-type]
        # Not what happens to be installed, but what is tested.
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
            asyncio.run(server.serve([opened]))
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
        raise SamPollError(f"the HTTP server has failed: {failures[0]}", remedy="please report this with the log")


def _hear_uvicorn() -> None:
    """Its words go where ours go; those of every start and stop are ours to say."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found = record.exc_info and record.exc_info[1]
            if isinstance(found, asyncio.CancelledError):
                logger.warning("a caller has not taken its answer in time and is left")
                return
            logger.opt(exception=found or None).log(record.levelname, "{}", record.getMessage())

    for name in ("uvicorn", "asyncio"):
        theirs = logging.getLogger(name)
        theirs.handlers, theirs.propagate = [Ear()], False
        theirs.setLevel(logging.WARNING)
