"""What is not to be offered again at once, and why: kept by the scan, or as a note in a claim that is given back.

A worker that finds a picture cut off does not look at `in/` itself: whoever does must hear of it, before the files are
back there. The note travels with the claim, so it is lost with nobody.

What can still go wrong here: a note that cannot be read counts as none: the job is offered again at once.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from loguru import logger

from sam_poll.doors.settle import Signature
from sam_poll.errors import SamPollError, UnfinishedError

_FORGET_S = 60.0


@dataclass(frozen=True, slots=True)
class Held:
    """A job (its prompt, or a picture without one, as they are called in `in/`) that is not to be offered for some
    seconds, unless one of these files changes. With `error` it is then rejected. See `Scanner.hold`."""

    job: str
    seen: dict[str, Signature]
    seconds: float
    error: SamPollError | None


@dataclass(frozen=True, slots=True)
class _Hold:
    """A job that is not offered before `until`, unless one of these files changes. With `error` it is then rejected."""

    signatures: dict[str, Signature]
    until: float
    error: SamPollError | None


class Holds:
    """The jobs that are held, by the monotonic clock. Used by one thread, but for `add`.

    `known` tells what was last seen of a file.
    """

    def __init__(self, known: Callable[[str], Signature | None]) -> None:
        self._known = known
        self._held: dict[str, _Hold] = {}
        self._new: deque[tuple[str, _Hold]] = deque()

    def __bool__(self) -> bool:
        return bool(self._held)

    def add(self, held: Held) -> None:
        """Hold a job from the next `take` on. From any thread."""
        self._new.append((held.job, _Hold(held.seen, time.monotonic() + held.seconds, held.error)))

    def take(self) -> bool:
        """Whether there were any new ones."""
        new = dict(self._new.popleft() for _ in range(len(self._new)))
        self._held.update(new)
        return bool(new)

    def forget_all_but(self, jobs: Collection[str], now: float) -> None:
        """Drop those of jobs that are gone; not at once, because a file that is held comes back a little later."""
        self._held = {job: held for job, held in self._held.items() if job in jobs or now < held.until + _FORGET_S}

    def files(self) -> Iterator[str]:
        """The files that would end a hold by changing."""
        for held in self._held.values():
            yield from held.signatures

    def until(self, job: str, now: float) -> float | None:
        """When a job may be offered again; None: it may be now, or one of its files has changed."""
        held = self._held.get(job)
        if held is None:
            return None
        if any(self._known(file) not in (seen, None) for file, seen in held.signatures.items()):
            del self._held[job]
            return None
        return held.until if now < held.until else None

    def error(self, job: str) -> SamPollError | None:
        """What a job is to be rejected with when its time is over; None: nothing is wrong with it."""
        held = self._held.get(job)
        return held.error if held else None


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
