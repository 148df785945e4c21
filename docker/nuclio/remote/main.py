"""Nuclio's entry point that forwards requests to the SAM server at `SAM_URI`."""

from __future__ import annotations

from typing import Any

from sam_poll.integrations.nuclio.proxy import Remote


def init_context(context: Any) -> None:
    """Read the server's address."""
    context.user_data.remote = Remote.open(context.logger)


def handler(context: Any, event: Any) -> Any:
    """Return the server's answer to a request."""
    return context.user_data.remote.forward(context, event)
