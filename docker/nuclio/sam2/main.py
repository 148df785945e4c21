"""Nuclio's entry points for SAM2: an interactor (`handler`), and a detector (`detector`)."""

from __future__ import annotations

from typing import Any

from sam_poll.integrations.nuclio.handler import Service


def init_context(context: Any) -> None:
    """Load the network, once for each worker."""
    context.user_data.service = Service.open(context.logger)


def handler(context: Any, event: Any) -> Any:
    """Return the mask of the object that points and a box mark; without any, all objects."""
    return context.user_data.service.interact(context, event)


def detector(context: Any, event: Any) -> Any:
    """Return the masks of all objects of a picture."""
    return context.user_data.service.detect(context, event)
