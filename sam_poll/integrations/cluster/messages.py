"""The messages of a cluster: `{claim, generation}`, as Dramatiq messages for its two actors.

The share records which jobs there are and who owns them; a message only tells workers where to look
next. One that comes twice, or late, names a generation that is gone, and does nothing. So no data
of a queue is worth keeping. Anyone who reaches the broker can write messages: `fault_of` finds out
what is wrong with one before Dramatiq acts on it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import dramatiq

from sam_poll.core.validation import describe_value, quoted
from sam_poll.share.claims.model import ClaimEntry, is_claim_path

FIRST, REST = True, False
"""The two queues of a share: that of the urgent folders, and the other."""
ACTORS = {FIRST: "run_first", REST: "run"}
"""The actors of the two. Both do the same; Dramatiq's priorities are those of actors."""
LONGEST_PAUSE_MS = 60_000
"""Longest pause before a message is tried again because the share cannot be used."""

_OPTIONS: dict[str, tuple[type, ...]] = {
    "settings": (dict,),
    # set by Dramatiq: on Redis, for a delayed message, and by its middleware for retries
    "redis_message_id": (str,),
    "eta": (int, float),
    "retries": (int,),
    "traceback": (str,),
    "requeue_timestamp": (int,),
}


def queue_names(prefix: str, share: str) -> dict[bool, str]:
    """Return the names of the two queues of the share with this number."""
    return {FIRST: f"{prefix}{share}-first", REST: f"{prefix}{share}-rest"}


def message_of(queue: str, actor: str, settings: Mapping[str, Any], entry: ClaimEntry) -> Any:
    """Return the message for a claim that waits.

    `settings`: those that must be the same for all; workers compare them with their own.
    """
    assert entry.hold is not None
    claim = f"{entry.folder}/{entry.outer.name}" if entry.folder else entry.outer.name
    return dramatiq.Message(
        queue_name=queue,
        actor_name=actor,
        args=(),
        kwargs={"claim": claim, "generation": entry.hold.generation},
        options={"settings": dict(settings)},
    )


def fault_of(message: Any, queue: str, actors: Collection[str]) -> str | None:
    """Return what is wrong with a message that came from `queue`; None: nothing.

    Options that this program does not set are faults: some of them make Dramatiq keep a message in
    memory for ever, call other actors, or end its threads.
    """
    arguments, options = message.kwargs, message.options
    if message.queue_name != queue:
        return f"its queue is {describe_value(message.queue_name)}, and it was in {queue}"
    if message.actor_name not in list(actors):
        known = ", ".join(actors)
        return f"its actor is {describe_value(message.actor_name)}, and this worker has {known}"
    if message.args or not isinstance(arguments, dict) or set(arguments) != {"claim", "generation"}:
        return "its arguments are not claim and generation"
    claim = arguments["claim"]
    if not isinstance(claim, str) or not is_claim_path(claim):
        return f"its claim is {describe_value(claim)}, which names nothing"
    if type(arguments["generation"]) is not int:  # bool is an int, too
        return f"its generation is {describe_value(arguments['generation'])}, not a whole number"
    if not isinstance(options, dict) or type(message.message_timestamp) is not int:
        return "its options or its time are not what Dramatiq writes"
    for name, value in options.items():
        if type(value) not in _OPTIONS.get(name, ()):
            return f"its option {quoted(name)} is {describe_value(value)}"
    latest_ms = time.time() * 1000 + 2 * LONGEST_PAUSE_MS
    if ("eta" in options) != queue.endswith(".DQ") or options.get("eta", 0) > latest_ms:
        return "it is to be delivered at another time than retries are"
    return None
