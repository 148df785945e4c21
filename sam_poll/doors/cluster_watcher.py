"""The watcher: looks at the share for all workers, claims what is ready, and puts it into the line.

It runs nothing. Its claims are the ledger: what bears its name waits, and is in the line; what the line has lost is put
into it again. A worker takes a claim over by the rename that any daemon takes over with; a watcher that dies is a dead
daemon, and whoever finds its claims, another watcher or a plain `sam-poll watch`, goes on with them.

What can still go wrong here: while Redis is away nothing moves, unless plain daemons work on the share, too; and these
leave alone what a living watcher has claimed already.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

from loguru import logger

from sam_poll.doors.claims import Claim, Found, claims_in
from sam_poll.doors.cluster_line import FIRST, REST, Line, Word
from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.layout import Layout
from sam_poll.doors.redis_link import Pauses, Trouble
from sam_poll.doors.scan import Manners, Ready, by_picture
from sam_poll.errors import LostError
from sam_poll.fs import shown
from sam_poll.safe_path import SafePath
from sam_poll.stats import Pulse
from sam_poll.types import Job

_CHECK_S = 2.0  # how often the line is asked whether it still knows what it was given
_ROOM_S = 0.1  # … while there is no room in it for more
_ROOMY = 0.75  # a full line is filled again when it is down to so much


@dataclass(slots=True, eq=False)
class _Waiting:
    """A claim that waits for a worker. `number` None: it is to be sent. `sent` counts how often it was."""

    found: Found
    word: Word
    number: str | None = None
    sent: int = 0
    not_before: float = 0.0


class Sender:
    """Keeps in the line what waits for a worker. `with Sender(…)` runs its thread; the other calls are from any."""

    def __init__(
        self, line: Line, ahead: int, pulse: Pulse | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._line, self._ahead, self._pulse, self._clock = line, ahead, pulse or Pulse(), clock
        self._waiting: dict[SafePath, _Waiting] = {}
        self._lock = threading.Lock()
        self._wake, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._hasty = False
        self.away = False
        """Whether Redis is."""
        self.sent = self.again = 0
        """Messages sent; and those of them that the line had lost."""

    def __enter__(self) -> Sender:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._wake.set()
        self._thread.join(2.0)
        if not self.away:
            with suppress(OSError):  # for the last line in the log
                self._check()

    def add(self, claim: Claim, first: bool) -> None:
        """A claim of ours is to be run by whoever comes."""
        below = f"{claim.folder}/{claim.outer.name}" if claim.folder else claim.outer.name
        with self._lock:
            if claim.path not in self._waiting:
                found = Found(claim.folder, claim.outer, claim.hold)
                self._waiting[claim.path] = _Waiting(found, Word(below, claim.hold.generation, first=first))
                self._wake.set()

    def forget_all_but(self, own: set[SafePath]) -> None:
        """Only these claims still bear our name."""
        with self._lock:
            self._waiting = {path: one for path, one in self._waiting.items() if path in own}

    def count(self, first: bool | None = None) -> int:
        """How many wait; `first` or not."""
        with self._lock:
            return sum(first is None or one.word.first == first for one in self._waiting.values())

    def full(self, first: bool) -> bool:
        """Whether no more may be claimed now."""
        return self.away or self.count(first) >= self._ahead

    def roomy(self, first: bool) -> bool:
        """Whether enough of a full line has been taken."""
        return not self.away and self.count(first) <= self._ahead * _ROOMY

    def hasten(self, hasty: bool) -> None:
        """Somebody waits for room in the line."""
        if hasty and not self._hasty:
            self._wake.set()
        self._hasty = hasty

    # ── the thread ──

    def _run(self) -> None:
        pauses, check_at = Pauses(), 0.0
        while not self._end.is_set():
            self._wake.clear()
            self._pulse.beat()
            try:
                self._send()
                if self._clock() >= check_at - (_CHECK_S if self._hasty else 0.0):
                    self._check()
                    check_at = self._clock() + _CHECK_S
                self._line.link.here()
                self.away = False
                pauses.over()
                self._wake.wait(_ROOM_S if self._hasty else _CHECK_S)
            except Trouble as error:
                self.away = True
                self._line.link.away(error)
                pauses.wait(self._end)
            except OSError as error:  # the share; whoever scans it tells
                logger.debug("what waits cannot be looked at: {}", error)
                self._end.wait(_CHECK_S)
            except Exception as error:  # noqa: BLE001  without this thread nothing is handed out
                logger.opt(exception=True).error("handing out has failed: {}", error)
                self._end.wait(_CHECK_S)

    def _send(self) -> None:
        now = self._clock()
        with self._lock:
            unsent = [one for one in self._waiting.values() if one.number is None and one.not_before <= now]
        for one in unsent:
            one.number = self._line.send(one.word)
            self.sent += 1
            self.again += one.sent > 0
            one.sent += 1
            if self._end.is_set():
                return

    def _check(self) -> None:
        """What the line does not know any more is either taken, or lost."""
        with self._lock:
            sent = [(path, one) for path, one in self._waiting.items() if one.number is not None]
        known = self._line.known([(one.word.first, one.number or "") for _, one in sent])
        lost = 0
        for path, one in sent:
            if one.number in known:
                continue
            # Opening the folder makes a network file system ask its server; a look at the claim alone may be answered
            # by what was known of it before.
            if any(found.path == path for found in claims_in(one.found.folder, one.found.outer)):
                one.number, lost = None, lost + 1
                one.not_before = self._clock() + (0.0 if one.sent < 2 else min(_CHECK_S * 2**one.sent, 60.0))
            else:
                with self._lock:
                    self._waiting.pop(path, None)
        if lost:
            logger.warning("the line has lost {} of the claims that wait in it; they are sent again", lost)
            self._wake.set()


class WatcherDoor(FolderDoor):
    """`with WatcherDoor(…) as door: door.run(stop)`. `ahead`: so many claims wait in the line at most, of each kind;
    `first`: folders below `in/` (or patterns) whose jobs go before all others; `sending` beats as long as what waits is
    looked after. ShareError, SettingsError on entering.
    """

    runs = False

    def __init__(
        self,
        layout: Layout,
        manners: Manners,
        line: Callable[[str], Line],
        ahead: int,
        first: Sequence[str],
        *,
        sending: Pulse | None = None,
        **more: Any,
    ) -> None:
        super().__init__(layout, manners, **more)
        self._make_line, self._ahead, self._first = line, ahead, tuple(first)
        self._full: set[bool] = set()
        self._sending = sending

    def __enter__(self) -> WatcherDoor:
        super().__enter__()
        try:
            self.line = self._make_line(self.share)
            self.sender = Sender(self.line, self._ahead, self._sending)
        except BaseException:
            super().__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            super().__exit__(*exc)
        finally:
            self.line.close()

    def run(self, stop: threading.Event) -> None:
        """Hand out until `stop` is set. What waits then goes on waiting: the workers do not need us to take it."""
        with self.sender:
            for job in self.jobs(stop):
                if job.fault:
                    self._refuse(job, stop)
                else:
                    claim = job.origin.claim
                    self.sender.add(claim, self._is_first(claim.folder))

    def _refuse(self, job: Job, stop: threading.Event) -> None:
        """It needs no network to know that this one cannot be answered."""
        assert job.fault is not None
        pauses = Pauses()
        try:
            while True:
                try:
                    self.reject(job, job.fault)
                    logger.warning("job {} rejected: {}", shown(job.id), shown(job.fault))
                    self._alarms.clear("output")
                    return
                except OSError as error:
                    if stop.is_set():
                        raise
                    self._alarms.raise_("output", f"refusals cannot be put away ({error.strerror or error})")
                self._pulse.beat()
                pauses.wait(stop)
        except LostError as error:
            logger.warning("job {}: {}", shown(job.id), error)
        except OSError as error:
            logger.warning("job {} stays in work/, to be taken over: {}", shown(job.id), error)

    def _is_first(self, folder: str) -> bool:
        parts = folder.split("/")
        above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
        return any(fnmatch(name, pattern) for name in above for pattern in self._first)

    # ── what the folder door asks ──

    def _takes(self, abandoned: list[Found], ready: list[Ready]) -> Iterator[Callable[[], list[Job]]]:
        groups = by_picture(ready)
        for first in (FIRST, REST):
            for found in abandoned:
                if self._is_first(found.folder) is first and self._has_room(first):
                    yield partial(self._resume, found)
            for group in self._others_first(groups):
                folder = (group[0].picture or group[0].prompt or "").rpartition("/")[0]
                if self._is_first(folder) is first and self._has_room(first):
                    yield partial(self._claim, group)

    def _handed_out(self, jobs: list[Job], stop: threading.Event) -> Iterator[Job]:
        """All of them, after `stop` too: to wait for a worker they need nobody here."""
        self._pulse.beat()
        yield from jobs

    def _has_room(self, first: bool) -> bool:
        if first not in self._full and self.sender.full(first):
            self._full.add(first)
        return first not in self._full

    def _wait(self, stop: threading.Event, seconds: float) -> None:
        full, self._full = self._full, set()
        if not full:
            super()._wait(stop, seconds)
            return
        # What is ready waits for room, and nothing that happens in `in/` changes that; but the dead must be seen.
        deadline = time.monotonic() + max(_ROOM_S, min(self.manners.rescan_s, self._due - time.monotonic()))
        self.sender.hasten(True)
        while not stop.is_set() and time.monotonic() < deadline:
            self._pulse.beat()
            if any(self.sender.roomy(first) for first in full):
                break
            stop.wait(_ROOM_S)
        self.sender.hasten(False)

    def _listed(self, own: set[SafePath]) -> None:
        self._desk.forget_all_but(own)
        self.sender.forget_all_but(own)
