"""What is not to be offered again at once, and why, as a note in a claim that is given back.

A worker that finds a picture cut off does not look at `in/` itself: whoever does must hear of it, before the files are
back there. The note travels with the claim, so it is lost with nobody.

What can still go wrong here: a note that cannot be read counts as none: the job is offered again at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loguru import logger

from sam_poll.doors.settle import Signature
from sam_poll.errors import SamPollError, UnfinishedError


@dataclass(frozen=True, slots=True)
class Held:
    """A job (its prompt, or a picture without one, as they are called in `in/`) that is not to be offered for some
    seconds, unless one of these files changes. With `error` it is then rejected. See `Scanner.hold`."""

    job: str
    seen: dict[str, Signature]
    seconds: float
    error: SamPollError | None


def note_of(held: Sequence[Held]) -> bytes:
    """A note to be read by `noted`."""
    return json.dumps(
        [
            {
                "job": one.job,
                "seen": one.seen,
                "seconds": one.seconds,
                "error": one.error and {key: getattr(one.error, key) for key in ("reason", "place", "remedy")},
            }
            for one in held
        ]
    ).encode()


def noted(note: bytes) -> Iterator[Held]:
    """What a note says. It lies on the share, where anybody may write: one that makes no sense is nobody's."""
    try:
        found = json.loads(note) if note else []
        yield from [_held(entry) for entry in found]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        logger.warning("a note on what is to wait cannot be read: {}", error)


def _held(entry: dict[str, object]) -> Held:
    said, seen = entry["error"], entry["seen"]
    if not isinstance(seen, dict):
        raise TypeError("`seen` is not an object")
    error = None
    if isinstance(said, dict):
        place, remedy = (None if said[key] is None else str(said[key]) for key in ("place", "remedy"))
        error = UnfinishedError(str(said["reason"]), place=place, remedy=remedy)
    signatures = {str(name): Signature(*(int(number) for number in numbers)) for name, numbers in seen.items()}
    return Held(str(entry["job"]), signatures, float(str(entry["seconds"])), error)
