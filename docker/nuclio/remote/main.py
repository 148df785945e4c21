"""Nuclio's entry point for a network elsewhere: requests go to the SAM server at `SAM_URI`, its answers back."""

from __future__ import annotations

from typing import Any

from sam_poll.cvat.remote import Remote


def init_context(context: Any) -> None:
    """Reads the server's address."""
    context.user_data.remote = Remote.open(context.logger)


def handler(context: Any, event: Any) -> Any:
    """A request in, the server's answer out."""
    return context.user_data.remote.forward(context, event)
