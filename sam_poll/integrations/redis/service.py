"""`sam-poll redis` and `sam_predict_redis`: answer a Redis stream or channel."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from loguru import logger

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ExitCode
from sam_poll.integrations.redis.connection import (
    RedisConnection,
    find_url,
    password_from_env,
)
from sam_poll.integrations.redis.pubsub import RedisPubSubSource
from sam_poll.integrations.redis.stream import RedisStreamSource, StreamNames
from sam_poll.integrations.server import ServerUrl
from sam_poll.prompts import parser
from sam_poll.runtime.service import Service

REQUIRED_FORMATS = ("mask", "opex")
"""The formats that a pub/sub answer is made of."""


def streams(
    settings: Settings,
    address: ServerUrl,
    names: StreamNames,
    *,
    keep: bool = False,
    max_answers: int = 0,
) -> ExitCode:
    """Answer a stream's entries until a signal comes."""
    service = Service(settings, unit="message")
    source = RedisStreamSource(
        RedisConnection(address, service.telemetry.alarms),
        names,
        parse=_parser(settings),
        keep=keep,
        max_answers=max_answers,
        lease_s=settings.lease_s,
        attempts=settings.attempts,
        formats=settings.formats,
        pulse=service.telemetry.intake,
    )
    description = (
        f"group {names.group} of the stream {names.source} on {address.shown}, "
        f"answers in {names.target}"
    )
    return _serve(service, source, description)


def pubsub(
    settings: Settings,
    address: ServerUrl,
    source: str,
    target: str,
    *,
    segmenter: Mapping[str, Any] | None = None,
    model_type: str | None = None,
) -> ExitCode:
    """Answer a channel's messages until a signal comes.

    The settings' formats must include `REQUIRED_FORMATS`.
    """
    service = Service(settings, unit="message")
    job_source = RedisPubSubSource(
        RedisConnection(address, service.telemetry.alarms),
        source,
        target,
        parse=_parser(settings),
        segmenter=segmenter,
        attempts=settings.attempts,
        formats=settings.formats,
        pulse=service.telemetry.intake,
    )
    description = f"the channel {source} on {address.shown}, answers on {target}"
    return _serve(service, job_source, description, model_type)


def _parser(settings: Settings) -> Any:
    limits = settings.limits
    return partial(parser.parse, max_bytes=limits.prompt_bytes, max_prompts=limits.prompts)


def _serve(
    service: Service,
    source: RedisStreamSource | RedisPubSubSource,
    description: str,
    model_type: str | None = None,
) -> ExitCode:
    # Entering the source connects to Redis: that, and the metrics port, is checked before the model
    # is loaded.
    with service.lifetime(), source, service.metrics(source):
        service.notify_loading()
        service.answer(
            source,
            on_ready=lambda _: logger.info("answering {}", description),
            model_type=model_type,
        )
        service.log_end()
    return ExitCode.OK


def address_of(url: str | None, file: Path | None, password_env: str | None) -> ServerUrl:
    """Return the server's address, from `--url`, `--url-file` or the environment.

    The password is that of the environment variable `password_env`, where it is given.
    """
    address = find_url(os.environ, url, file)
    if password_env:
        return replace(address, password=password_from_env(os.environ, password_env))
    return address
