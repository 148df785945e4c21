"""Jobs that were put back and wait: what is not to be offered again for a while, and why.

A worker of a cluster that finds an incomplete picture does not scan `in/` itself. The daemon that
does must know before the files are in `in/` again. So the worker writes a note into the claim that
it gives back (`ClaimStore.hand_back`), and the daemon reads it (`ClaimStore.note`): the holder of
the claim has the note, too. `intake.deferred_jobs` keeps the deferrals of one scanner.

Limitations: a note that cannot be read counts as none, so that the job is offered again at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from loguru import logger

from sam_poll.core.errors import IncompleteFileError, SamPollError
from sam_poll.share.intake.stability import Signature

_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


@dataclass(frozen=True, slots=True)
class Deferral:
    """A job that is not to be offered for some seconds, unless one of its files changes.

    `job` is its prompt, or a picture without one, by its path in `in/`. `seen` gives the files'
    signatures by their paths in `in/`. With `error` the job is rejected when the time has passed.
    """

    job: str
    seen: dict[str, Signature]
    seconds: float
    error: SamPollError | None


def encode_note(held: Sequence[Deferral]) -> bytes:
    """Return the note that `decode_note` reads."""
    return json.dumps(
        [
            {
                "job": one.job,
                "seen": one.seen,
                "seconds": one.seconds,
                "error": one.error
                and {key: getattr(one.error, key) for key in ("reason", "place", "remedy")},
            }
            for one in held
        ]
    ).encode()


def decode_note(note: bytes) -> Iterator[Deferral]:
    """Yield the deferrals in a note; of an empty or unreadable note none.

    The note is on the share, where anybody may write.
    """
    try:
        entries = json.loads(note) if note else []
        yield from [_parsed(entry) for entry in entries]
    except _UNREADABLE as error:
        logger.warning("the note on deferred jobs in a claim cannot be read: {}", error)


def _parsed(entry: dict[str, object]) -> Deferral:
    written, seen = entry["error"], entry["seen"]
    if not isinstance(seen, dict):
        raise TypeError("`seen` is not an object")
    error = None
    if isinstance(written, dict):
        error = IncompleteFileError(
            str(written["reason"]),
            place=_text(written["place"]),
            remedy=_text(written["remedy"]),
        )
    signatures = {
        str(name): Signature(*(int(number) for number in numbers)) for name, numbers in seen.items()
    }
    return Deferral(str(entry["job"]), signatures, float(str(entry["seconds"])), error)


def _text(value: object) -> str | None:
    return None if value is None else str(value)
