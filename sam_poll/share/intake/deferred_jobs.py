"""The jobs that a scanner does not offer for a while: not readable, not complete, or put back."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from loguru import logger

from sam_poll.core.errors import IncompletePromptError, PromptError, SamPollError
from sam_poll.core.text import shown
from sam_poll.share.claims.deferrals import Deferral
from sam_poll.share.intake.next_scan import NextScan
from sam_poll.share.intake.stability import Signature
from sam_poll.share.intake.stat_cache import StatCache

_UNREAD_S = 10.0
_FORGET_S = 60.0  # a deferred file that is missing has this long to come back to `in/`


@dataclass(frozen=True, slots=True)
class _Entry:
    """A job that is not offered before `until`, unless one of these files changes.

    `awaited`: files that end the deferral as soon as all of them have settled, each by the names
    that it may have.
    """

    signatures: dict[str, Signature]
    until: float
    error: SamPollError | None
    awaited: tuple[tuple[str, ...], ...] = ()


class DeferredJobs:
    """Deferrals of one scanner, by the monotonic clock. Used by one thread, except `add`.

    A deferral is in force from the next `take_in` on. `patience_s`: how long a prompt that is not
    complete may stay as it is before it is rejected.
    """

    def __init__(self, files: StatCache, next_scan: NextScan, patience_s: float) -> None:
        self._files = files
        self._next_scan = next_scan
        self._patience_s = patience_s
        self._entries: dict[str, _Entry] = {}
        self._new: deque[tuple[str, _Entry]] = deque()

    def __bool__(self) -> bool:
        return bool(self._entries)

    # ── adding ──

    def add(self, deferral: Deferral) -> None:
        """Defer a job. Other prompts of its picture are not deferred. From any thread."""
        until = time.monotonic() + deferral.seconds
        self._new.append((deferral.job, _Entry(deferral.seen, until, deferral.error)))

    def add_unread(self, prompt: str, signatures: dict[str, Signature], error: OSError) -> None:
        """Defer a prompt that could not be read, so that a bad sector does not stop the others.

        A prompt that has gone is not deferred.
        """
        if isinstance(error, FileNotFoundError):
            return
        logger.warning(
            "prompt {} cannot be read: {}; next try in {:g} s", shown(prompt), error, _UNREAD_S
        )
        self.add(Deferral(prompt, signatures, _UNREAD_S, None))
        self._next_scan.at_once()  # it takes the deferral in, and says when to scan again

    def add_if_incomplete(
        self, prompt: str, signatures: dict[str, Signature], error: PromptError
    ) -> bool:
        """Defer an invalid prompt or annotation file that may still be being written.

        That is one that ends too early, or that its writer has not closed. It is deferred until it
        changes, and rejected with `error` after the patience, like a picture that is cut off.
        Returns whether it was deferred.
        """
        if self.error(prompt):
            return False  # it was deferred before, and its time has passed
        if not (isinstance(error, IncompletePromptError) or self._files.being_written(prompt)):
            return False
        logger.debug("{} is not complete yet: {}", shown(prompt), error.reason)
        self.add(Deferral(prompt, signatures, self._patience_s, error))
        self._next_scan.at_once()  # it takes the deferral in, and says when to scan again
        return True

    def add_awaiting(
        self,
        prompt: str,
        signatures: dict[str, Signature],
        awaited: Collection[Collection[str]],
        error: SamPollError,
    ) -> None:
        """Defer a prompt until files that it names, each by one of its names, have settled.

        It is rejected with `error` if one has not come within the patience.
        """
        until = time.monotonic() + self._patience_s
        self._new.append((prompt, _Entry(signatures, until, error, tuple(map(tuple, awaited)))))
        self._next_scan.at_once()  # it takes the deferral in, and says when to scan again

    def take_in(self) -> bool:
        """Put the new deferrals into force, and return whether there were any."""
        new = dict(self._new.popleft() for _ in range(len(self._new)))
        self._entries.update(new)
        return bool(new)

    def forget_all_but(self, jobs: Collection[str], now: float) -> None:
        """Drop the deferrals of jobs that are gone.

        They are kept for a while, because the files of a deferred job come back to `in/` later.
        """
        self._entries = {
            job: entry
            for job, entry in self._entries.items()
            if job in jobs or now < entry.until + _FORGET_S
        }

    # ── asking ──

    def files(self) -> Iterator[str]:
        """Yield the files that end a deferral by changing or coming."""
        for entry in self._entries.values():
            yield from entry.signatures
            yield from itertools.chain.from_iterable(entry.awaited)

    def defers(self, job: str, now: float) -> bool:
        """Return whether a job may not be offered yet; the next scan is then due at its time.

        A deferral whose files have changed is dropped.
        """
        entry = self._entries.get(job)
        if entry is None:
            return False
        if self._has_changed(entry) or self._has_come(entry):
            del self._entries[job]
            return False
        if now >= entry.until:
            # A file that has come and is still being written is not one that has not come.
            return bool(entry.awaited) and all(
                any(map(self._files.known, names)) for names in entry.awaited
            )
        self._next_scan.no_later_than(entry.until)
        return True

    def _has_changed(self, entry: _Entry) -> bool:
        for file in entry.signatures:
            self._files.settled(file)  # nothing else looks at a file that goes with a picture
        known = self._files.known
        return any(known(file) not in (seen, None) for file, seen in entry.signatures.items())

    def _has_come(self, entry: _Entry) -> bool:
        # All are looked at, so that those that are missing at the end are known to be.
        settled = [[self._files.settled(name) for name in names] for names in entry.awaited]
        return bool(settled) and all(map(any, settled))

    def error(self, job: str) -> SamPollError | None:
        """Return the error to reject a job with, now that its time has passed; None: none."""
        entry = self._entries.get(job)
        return entry.error if entry else None
