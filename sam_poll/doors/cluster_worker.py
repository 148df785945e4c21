"""The worker's door: claims come from the line instead of a scan; all the rest is the folder door's.

A claim is taken over when it is its turn and there is room for it in the pipeline, by the rename to the next generation
with our name; from then on our sign of life stands for it, and the message has done its work. So a message is
acknowledged when the claim is ours, not when the job has ended: what a dead worker had is found on the share, by its
name, and sent anew by whoever watches. Nothing in `in/` is looked at here.

What can still go wrong here: what is given back at the end of a run settles anew before the watcher offers it again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from loguru import logger

from sam_poll.complaints import quoted
from sam_poll.doors.claims import Claim, Found, Hold, claims_in
from sam_poll.doors.cluster_line import Line, Word
from sam_poll.doors.desk import Ticket
from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.held import Held, note_of
from sam_poll.doors.layout import Layout
from sam_poll.doors.lease import is_dispatcher
from sam_poll.doors.redis_link import Pauses, Trouble
from sam_poll.doors.scan import Manners
from sam_poll.errors import SamPollError
from sam_poll.fs import shown
from sam_poll.types import Job

_FIRST_IDLE_S, _LONGEST_IDLE_S = 0.01, 0.25
_CHECK_S = 1.0  # how often it is proved that the share is there
_REMEMBER_S = 120.0  # how long a picture that could not be read here is remembered


class WorkerDoor(FolderDoor):
    """`with WorkerDoor(…) as door: pipeline.run(door, stop)`. ShareError, SettingsError on entering."""

    def __init__(
        self, layout: Layout, manners: Manners | None = None, *, line: Callable[[str], Line], **more: Any
    ) -> None:
        # No events, and nothing to drain: it does not look at `in/`.
        super().__init__(layout, replace(manners or Manners(), events=False, once=False), **more)
        self._make_line = line
        self._left = threading.Event()
        self._checked = self._swept = self._seen = 0.0
        self._held: dict[Claim, list[Held]] = {}
        self.dropped = 0
        """Messages that named a generation that is gone."""

    def __enter__(self) -> WorkerDoor:
        super().__enter__()
        try:
            self.line = self._make_line(self.share)
        except BaseException:
            super().__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            super().__exit__(*exc)
        finally:
            self.line.close()

    @property
    def last_scan(self) -> float:
        """Wall-clock time when the share was last seen to be there."""
        return self._seen

    def glance(self) -> None:
        """Nothing to look at before the model is loaded."""

    # ── taking ──

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Jobs of the claims that the line names, until `stop` is set."""
        away, sick, idle_s = Pauses(), Pauses(), _FIRST_IDLE_S
        while not stop.is_set():
            self._pulse.beat()
            try:
                self._prove()
                for found in self._own_left():
                    yield from self._handed_out(self._taken(partial(self._resume, found)), stop)
                word = self.line.take()
                self.line.link.here()
                away.over()
                jobs = self._begin(word) if word else self._lent()
                self._alarms.clear("share")
                sick.over()
            except Trouble as error:
                self.line.link.away(error)
                away.wait(stop)
                continue
            except OSError as error:
                self._alarms.raise_("share", f"the share cannot be used: {error.strerror or error}")
                self._left.set()  # a claim may bear our name already
                sick.wait(stop)
                continue
            yield from self._handed_out(jobs, stop)
            if word:
                idle_s = _FIRST_IDLE_S
            else:
                stop.wait(idle_s)
                idle_s = min(2 * idle_s, _LONGEST_IDLE_S)

    def _prove(self) -> None:
        now = time.monotonic()
        if now - self._checked >= _CHECK_S:
            self._sentinel.check()
            self._checked, self._seen = now, time.time()
            if self._holds.refresh(now):
                self._left.set()  # what could not be put away may be ours still
            self._note_holds(now)
        if now - self._swept >= _REMEMBER_S:
            self._forget_unread()
            for claim in [claim for claim in list(self._held) if claim.over]:
                self._held.pop(claim, None)
            self._swept = now

    def _begin(self, word: Word) -> list[Job]:
        """Take the claim over that a message names. OSError: it goes back into the line."""
        below = word.below(self.layout)
        try:
            found = self._of(below, word.generation) if below else None
            jobs = self._taken(partial(self._resume, found, handed=True)) if found else []
        except OSError:
            self._said(self.line.back, word)
            raise
        if below is None:
            logger.warning("a message names no claim, but {}; it is dropped", quoted(word.claim))
        elif found is None:
            logger.debug("{} does not wait in generation {}", shown(word.claim), word.generation)
        self.dropped += found is None
        self._said(self.line.taken, word)
        return jobs

    def _of(self, name: Found, generation: int) -> Found | None:
        """The claim of this name that waits in this generation; None: it was taken, or is over, or never was. OSError:
        the share is away."""
        try:
            found = [found for found in claims_in(name.folder, name.outer) if found.hold]
        except OSError as error:
            self._sentinel.check()
            # It is this name that the share does not take. Whoever waits for it will send it again.
            logger.warning("{} cannot be looked at: {}; its message is dropped", shown(name.label), error.strerror)
            return None
        return next((one for one in found if one.hold and _waits(one.hold) and one.hold.generation == generation), None)

    def _said(self, what: Callable[[Word], None], word: Word) -> None:
        try:
            what(word)
        except Trouble as error:  # it comes back after a lease, and is dropped then or begun
            self.line.link.away(error)

    def _own_left(self) -> Iterator[Found]:
        """Claims of ours that nobody works on: the share was sick when they were to be put away, or a process ended."""
        if not self._left.is_set():
            return
        self._left.clear()
        for found in self._claims.listing().claims:
            if self._is_left(found) and not self._holds.blocks_claim(found):
                yield found

    # ── giving back ──

    def abandon(self, job: Job) -> None:
        """The process that worked on it has ended: it is run again, which counts as an attempt."""
        super().abandon(job)
        self._left.set()

    @contextmanager
    def _given_up(self, ticket: Ticket) -> Iterator[None]:
        try:
            with super()._given_up(ticket):
                yield
        except OSError:
            self._left.set()
            raise

    def _wait_in_input(self, ticket: Ticket) -> None:
        """The watcher is told for how long: it knows nothing of what could not be put away here."""
        self._back(ticket, self._holds.pause(ticket.rel), None)

    def _back(self, ticket: Ticket, seconds: float, error: SamPollError | None) -> None:
        """What is to wait goes back by way of the watcher, which is told for how long before it finds it in `in/`."""
        claim = ticket.claim
        if not (seconds or error) or claim.giver in (None, self.worker):
            super()._back(ticket, seconds, error)
            return
        with self._ours(ticket), claim.lock:
            names = self._desk.leaving(ticket)
            suffix = self._claims.free(claim, "input", names)
            held = self._held.setdefault(claim, [])
            held.append(self._held_of(ticket, suffix, seconds, error))
            if claim.prompts - {ticket.prompt} or claim.answered:
                self._desk.end(ticket, "input", suffix)
            else:
                self._claims.hand_back(claim, suffix, note_of(held))
                self._desk.forget(claim)
            if claim.over:
                self._held.pop(claim, None)


def _waits(hold: Hold) -> bool:
    """Whether a claim waits for a worker. One that another daemon runs is not ours to take, whatever a message says:
    that it is dead, watchers find out."""
    return hold.place is None and (hold.attempt == 0 or is_dispatcher(hold.worker))
