"""Nuclio's entry point for SAM1: a picture's embedding, which CVAT decodes in the browser."""

from __future__ import annotations

from typing import Any

from sam_poll.integrations.nuclio.handler import Service


def init_context(context: Any) -> None:
    """Load the network, once for each worker."""
    context.user_data.service = Service.open(context.logger)


def handler(context: Any, event: Any) -> Any:
    """Return a picture's embedding."""
    return context.user_data.service.embed(context, event)
