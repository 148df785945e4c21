"""`sam-poll redis` and `sam_predict_redis`: a Redis door, the usual pipeline, and the signs of life of a daemon.

What can still go wrong here: as with the folder, a thread that hangs in a driver; the process ends without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from sam_poll import app, prompts
from sam_poll import console as screen
from sam_poll.doors.redis_link import Address, Link, find, secret
from sam_poll.doors.redis_pubsub import PubSubDoor
from sam_poll.doors.redis_stream import Names, StreamDoor
from sam_poll.errors import ExitCode
from sam_poll.health import Monitor, Notifier, Signs
from sam_poll.settings import Settings

NEEDED = ("mask", "opex")
"""The formats that a pub/sub answer is made of."""


def streams(
    settings: Settings, address: Address, names: Names, *, keep: bool = False, max_answers: int = 0
) -> ExitCode:
    """Answer a stream's entries until a signal comes."""
    signs = _begin(settings)
    door = StreamDoor(
        Link(address, signs.alarms),
        names,
        parse=_parse(settings),
        keep=keep,
        max_answers=max_answers,
        lease_s=settings.lease_s,
        attempts=settings.attempts,
        formats=settings.formats,
        pulse=signs.intake,
    )
    told = f"group {names.group} of the stream {names.source} on {address.shown}, answers in {names.target}"
    return _serve(settings, signs, door, told)


def pubsub(
    settings: Settings,
    address: Address,
    source: str,
    target: str,
    *,
    segmenter: Mapping[str, Any] | None = None,
    model_type: str | None = None,
) -> ExitCode:
    """Answer a channel's messages until a signal comes. The settings' formats must hold `NEEDED`."""
    signs = _begin(settings)
    door = PubSubDoor(
        Link(address, signs.alarms),
        source,
        target,
        parse=_parse(settings),
        segmenter=segmenter,
        attempts=settings.attempts,
        formats=settings.formats,
        pulse=signs.intake,
    )
    told = f"the channel {source} on {address.shown}, answers on {target}"
    return _serve(settings, signs, door, told, model_type)


def _begin(settings: Settings) -> Signs:
    screen.set_up_log("text" if settings.log == "auto" else settings.log, settings.log_level)
    return Signs()


def _parse(settings: Settings) -> Any:
    limits = settings.limits
    return partial(prompts.parse, max_bytes=limits.prompt_bytes, max_prompts=limits.prompts)


def _serve(
    settings: Settings, signs: Signs, door: StreamDoor | PubSubDoor, told: str, model_type: str | None = None
) -> ExitCode:
    """As `app.watch`: Redis is asked and the port opened before the model is loaded."""
    notify, now, alarms = Notifier(), signs.stats.now, signs.alarms.active

    def waiting() -> int:
        return door.waiting

    def line() -> str:
        return screen.status_line(now(), waiting(), alarms(), "message")

    health = settings.health
    with (
        app.stop_on_signals() as stop,
        app.bounded_stop(stop, app.LAST_RESORT_S),
        door,
        app.metrics_of(settings, signs, door),
    ):
        notify(f"STATUS=loading {settings.model}")
        with app.workforce(settings, signs, stop, model_type=model_type, on_result=None) as work:
            logger.info("answering {}", told)
            with (
                Monitor(signs, stop, stuck_s=health.stuck_s, file=health.file, notify=notify, summary=line),
                screen.Heartbeat(now, waiting, alarms, what="message"),
            ):
                work.run(door, stop)
        logger.info("stopped: {}", screen.summary(now()))
    return ExitCode.OK


def address_of(url: str | None, file: Path | None, password_env: str | None) -> Address:
    """The server, by `--url`, `--url-file`, the environment; the password of the variable where one is named."""
    found = find(os.environ, url, file)
    return replace(found, password=secret(os.environ, password_env)) if password_env else found
