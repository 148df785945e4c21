"""Nuclio's entry points: an interactor (`handler`) and a detector that finds everything (`detector`)."""

from __future__ import annotations

from typing import Any

from sam_poll.cvat.nuclio import Service


def init_context(context: Any) -> None:
    """Loads the network, once for each worker."""
    context.user_data.service = Service.open(context.logger)


def handler(context: Any, event: Any) -> Any:
    """Points and a box in, one object's mask out; nothing in, everything out."""
    return context.user_data.service.interact(context, event)


def detector(context: Any, event: Any) -> Any:
    """A picture in, the masks of all there is out."""
    return context.user_data.service.detect(context, event)
