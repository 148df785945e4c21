"""The folder door: pairs of picture and prompt go `in → work → done | failed`, answers appear in `out`.

The scan is the truth; events only wake it. A file has one owner, and changes owner by rename. A job always ends in one
of three places: answered, rejected with a reason beside the untouched input, or waiting. Several daemons may share it.
A path that cannot be used holds up what needs it, and nothing else (`path_holds`).

What can still go wrong here: a lone prompt is matched by name with a picture in `done/` after `LONE_S`; if a new
picture of that name was meant, it came too late. A share that hangs holds up the thread that looks at it, and no other.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from loguru import logger

from sam_poll.alarms import Alarms
from sam_poll.doors.claims import Claims, Found, claims_in
from sam_poll.doors.desk import Desk, Ticket
from sam_poll.doors.failures import report
from sam_poll.doors.held import Held
from sam_poll.doors.janitor import Janitor
from sam_poll.doors.layout import Layout
from sam_poll.doors.lease import Life, Watch
from sam_poll.doors.looks import NEVER, look
from sam_poll.doors.proof import Sentinel, open_to_all, prove, unusable
from sam_poll.doors.scan import Manners, Ready, Scanner, by_picture
from sam_poll.doors.scratch import Scratch
from sam_poll.errors import ChangedError, InputError, LostError, PutOffError, SamPollError
from sam_poll.fs import Whole, exists, shown, suffixed, sync_folder
from sam_poll.safe_path import SafePath
from sam_poll.stats import Pulse
from sam_poll.types import Document, Job

_STOP_S = 0.25  # how soon a set `stop` is noticed
_LONGEST_HOLD_S = 60.0
_LAST_GLANCE_S = 5.0
_ALONE_S = 1.0
_REFUSED = 5  # after so many files of a folder that could not be claimed, other folders come first
_LATER = 50


class FolderDoor:
    """The share as a door. `with FolderDoor(layout, manners) as door: pipeline.run(door, stop)`.

    Entering proves the folders and gives the first sign of life; ShareError says what is in the way. `pulse` beats
    while the scan moves; `state` is what other daemons and `status` may know about this one.
    """

    runs = True  # whether what it claims is at work here; or waits for somebody else

    def __init__(
        self,
        layout: Layout,
        manners: Manners | None = None,
        *,
        alarms: Alarms | None = None,
        pulse: Pulse | None = None,
        state: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self.layout, self.manners = layout, manners or Manners()
        self.orphans = 0
        """Things in `work/` that nobody works on, at the last look."""
        self._alarms, self._pulse, self._state = alarms or Alarms(), pulse or Pulse(), state
        self._wake = threading.Event()
        self._scanner = Scanner(layout, self.manners, self._wake)
        self._holds = self._scanner.path_holds
        self._scratch = Scratch(layout)
        self.hands = 0
        """How many devices may work on one mosaic; 0: none can."""
        self._refused: Counter[str] = Counter()
        self._unread: dict[str, tuple[float, str | None]] = {}
        self._due = NEVER
        self._stop: threading.Event | None = None
        self._glancer: threading.Thread | None = None

    def __enter__(self) -> FolderDoor:
        layout, manners = self.layout, self.manners
        prove(layout, manners.sentinel)
        said = open_to_all(layout)
        if said:
            logger.warning("{}: {}", *map(shown, said))
        with ExitStack() as stack:
            try:
                self._sentinel = Sentinel(layout, manners.sentinel)
                self._life = stack.enter_context(
                    Life(
                        layout.work,
                        manners.lease_s,
                        self._alarms,
                        dispatcher=not self.runs,
                        state=self._told,
                        still_there=self._sentinel.check,
                    )
                )
            except OSError as error:
                raise unusable("work", error.filename or layout.work, error) from error
            self._lives = Watch(layout.work, manners.lease_s)
            advanced = self._scratch.advanced
            self._claims = Claims(layout, self._life.worker, self._sentinel.check, runs=self.runs, advanced=advanced)
            self._desk = Desk(
                layout, manners, self._scanner, self._claims, self._scratch, self._going, most=lambda: self.hands + 1
            )
            self._janitor = Janitor(layout, self._claims, self._lives, manners.lease_s, self._holds)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._glancer:
            self._glancer.join(_LAST_GLANCE_S)  # it may hang in a share that does not answer
        self._scanner.close()
        self._open.close()
        with suppress(OSError):
            # Of what is still claimed others must be able to see whose it is, and that we are gone.
            if not any(found.hold and found.hold.worker == self.worker for found in self._claims.listing().claims):
                self._life.remove()

    @property
    def worker(self) -> str:
        """This daemon's name on the share."""
        return self._life.worker

    @property
    def share(self) -> str:
        """The number that tells this share from others."""
        return self._sentinel.number

    @property
    def waiting(self) -> int:
        """Pictures and prompts in `in/` at the last scan."""
        return self._scanner.waiting

    @property
    def oldest_s(self) -> float:
        """Seconds that the oldest of them has been seen."""
        return self._scanner.oldest_s

    @property
    def last_scan(self) -> float:
        """Wall-clock time of the last whole scan; 0.0 before."""
        return self._scanner.last

    @property
    def scans(self) -> int:
        """How often `in/` has been looked through."""
        return self._scanner.scans

    @property
    def held(self) -> int:
        """Paths that could not be used, and wait."""
        return len(self._holds)

    def _told(self) -> dict[str, Any]:
        """What others may know of this daemon, for its sign of life."""
        state = self._state() if self._state else {}
        return {**state, "held": self._holds.report()} if self.held else state

    @property
    def recovered(self) -> int:
        """Claims taken over from daemons that ended without putting them away."""
        return self._desk.recovered

    # ── looking ──

    def glance(self) -> None:
        """Look at `in/` in a thread, while the caller does something else that takes time before it asks for jobs: what
        lies there settles from now on. Once, and not after `jobs`."""

        def look_on() -> None:
            try:
                self._scanner.glance()
            except OSError:  # the first scan meets it again, and says so
                self._scanner.renew()

        self._glancer = threading.Thread(target=look_on, name="glance", daemon=True)
        self._glancer.start()
        # Alone at first: Python lets only one thread run, and beside the imports of a model this one takes four times
        # as long, so that the files' settling ends after the loading. A share that is slow it goes on waiting for.
        self._glancer.join(_ALONE_S)

    def _glanced(self, stop: threading.Event) -> None:
        """The scanner is for one thread: wait until the other one is through."""
        while self._glancer and self._glancer.is_alive() and not stop.is_set():
            self._glancer.join(_STOP_S)

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Claimed jobs, oldest first, until `stop` is set or (`once`) nothing is left that could become a job."""
        self._stop = stop
        pause = 1.0
        self._glanced(stop)
        while not stop.is_set():
            self._wake.clear()
            started = time.monotonic()
            try:
                self._sentinel.check()
                busy = self._desk.busy  # before looking: what is given up meanwhile may have been missed
                at_work = self._desk.pictures()
                ready = self._scanner.scan(started, at_work, partial(self._look_at_work, started))
                self._note_holds(started)
                self._forget_unread()
                took = time.monotonic() - started
                abandoned = self._abandoned
                for take in self._takes(abandoned, ready):
                    if stop.is_set() or time.monotonic() - started > max(self.manners.rescan_s, 10 * took):
                        self._wake.set()  # more is ready, but what has come meanwhile must not wait for all of it
                        break
                    yield from self._handed_out(self._taken(take), stop)
                if not (ready or abandoned):
                    yield from self._handed_out(self._lent(), stop)
                self._alarms.clear("share")
            except OSError as error:
                place = f": {shown(error.filename)}" if error.filename else ""
                self._alarms.raise_("share", f"the share cannot be used: {error.strerror or error}{place}")
                self._scanner.renew()
                self._wait(stop, pause)
                pause = min(pause * 2, 30.0)
                continue
            pause = 1.0
            due = min(self._scanner.due, self._due, self._holds.due)
            if (
                self.manners.once
                and due == NEVER
                and not (ready or abandoned or busy or self._desk.busy or self._wake.is_set())
            ):
                return
            stop.wait(min(took, 1.0))  # a burst of events must not turn into a scan for each
            self._wait(stop, min(due - time.monotonic(), self.manners.rescan_s))

    def _takes(self, abandoned: list[Found], ready: list[Ready]) -> Iterator[Callable[[], list[Job]]]:
        """What is to be claimed now, in this order; each is claimed before the next one is asked for."""
        yield from (partial(self._resume, found) for found in abandoned)
        yield from (partial(self._claim, group) for group in self._others_first(by_picture(ready)))

    def _others_first(self, groups: list[list[Ready]]) -> Iterator[list[Ready]]:
        """Yield what is to be claimed. Where several in a folder could not be, its others come last, and not all of
        them at once: thousands of files that may not be moved must not keep those of other folders waiting."""
        self._refused.clear()
        later: list[list[Ready]] = []
        for group in groups:
            if self._refused[_folder_of(group)] < _REFUSED:
                yield group
            else:
                later.append(group)
        yield from later[:_LATER]

    def _claim(self, group: list[Ready]) -> list[Job]:
        """Claim a picture with its prompts; what cannot be taken is held. OSError: the share cannot be used."""
        pairs = (one for ready in group for one in (ready.picture, ready.prompt) if one)
        files = list(dict.fromkeys(pairs))
        if self._holds.blocks(*files):  # since one before it has failed
            return []
        try:
            jobs = self._desk.claim(group)
        except OSError as error:
            if not self._holds.failed_to_take(error, files, time.monotonic()):
                raise
            self._refused[_folder_of(group)] += 1
            self._wake.set()
            return []
        if jobs:
            self._holds.worked(*files)
        return jobs

    def _resume(self, found: Found, *, handed: bool = False) -> list[Job]:
        """Take a claim over; one that cannot be taken, or ended, is held. OSError: the share cannot be used."""
        try:
            jobs = self._desk.resume(found, handed=handed)
            if not jobs and any(self._is_left(inner) for inner in claims_in(found.folder, found.outer)):
                raise OSError(errno.ENOTEMPTY, "a claim that is over cannot be removed", str(found.outer))
        except OSError as error:
            if not self._holds.failed_claim(error, found.outer, time.monotonic()):
                raise
            self._wake.set()
            return []
        if not jobs:
            self._holds.ended(found.outer)
        return jobs

    def _is_left(self, found: Found) -> bool:
        """Whether a claim bears our name, and nobody works on it."""
        return found.hold is not None and found.hold.worker == self.worker and not self._desk.has(found)

    def _note_holds(self, now: float) -> None:
        """Have all hear of the paths that cannot be used: of folders that may not be read, too."""
        for folder in self._scanner.closed:
            self._holds.closed(self.layout.input / folder, now, told=True)
        trouble = self._holds.undelivered
        if trouble:
            self._alarms.raise_("path", trouble)
        else:
            self._alarms.clear("path")

    def _going(self) -> bool:
        """Asked by what takes long on the scan's thread: it moves, and is to go on."""
        self._pulse.beat()
        return self._stop is None or not self._stop.is_set()

    def _wait(self, stop: threading.Event, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._pulse.beat()
        while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            if self._wake.wait(min(left, _STOP_S)):
                return
            self._pulse.beat()

    def _look_at_work(self, now: float) -> set[str]:
        """Look who works on what; returns the pictures that other daemons work on, and keeps what nobody does."""
        listing = self._claims.listing()
        found = listing.claims
        self._listed({f.path for f in found if f.hold and f.hold.worker == self.worker})
        left: list[Found] = []
        self._due = NEVER
        elsewhere: list[Found] = []
        holders = {f.hold.worker for f in found if f.hold}
        dead = {worker for worker in holders - {self.worker} if self._lives.dead(worker, now)}
        for claim in (f for f in found if f.hold):
            worker = claim.hold.worker if claim.hold else ""
            if worker == self.worker:
                if not self._desk.has(claim):
                    left.append(claim)
            elif worker in dead:
                left.append(claim)
            else:
                elsewhere.append(claim)
                if not self.manners.once or self._lives.unsure(worker):  # what others do, they may drain themselves
                    self._due = min(self._due, self._lives.expires(worker))
        self._abandoned = [claim for claim in left if not self._holds.blocks_claim(claim)]
        self.orphans = len(left) + len(listing.strays)
        for folder in listing.closed:
            self._holds.closed(self.layout.work / folder, now)
        if self._janitor.tidy(listing, now):
            self._wake.set()
        self._scratch.sweep(listing, now, self.manners.lease_s)
        self._scanner.spreading = any(self.layout.is_annotations(f.label) for f in (*elsewhere, *self._abandoned))
        # Abandoned ones are soon here, and their further prompts with them. A lone prompt's claim is of no picture.
        return {f.label for f in (*elsewhere, *left) if self.layout.is_picture(f.outer.name)}

    def _lent(self) -> list[Job]:
        """Parts of mosaics, for who has nothing else to do; of others' only for who stays."""
        return self._scratch.helps(self.hands, self._desk.holds, only_ours=self.manners.once)

    def _listed(self, own: set[SafePath]) -> None:
        """These claims bear our name, at this look at `work/`."""

    def _taken(self, take: Callable[[], list[Job]]) -> list[Job]:
        try:
            return take()
        except LostError as error:  # it took so long that others thought us dead
            logger.warning("a claim was not finished in time: {}", error)
            return []

    def _handed_out(self, jobs: list[Job], stop: threading.Event) -> Iterator[Job]:
        self._pulse.beat()
        try:
            while jobs and not stop.is_set():
                yield jobs.pop(0)
        finally:
            for job in jobs:  # claimed with its siblings and not handed out any more
                try:
                    self.release(job)
                except (OSError, LostError) as error:
                    logger.warning("job {} stays in work/: {}", shown(job.id), error)

    # ── answers ──

    def deliver(self, job: Job, documents: Sequence[Document]) -> None:
        """Write the outputs whole, then end the claim on the inputs. OSError: call again. LostError: it is not ours."""
        ticket: Ticket = job.origin
        base = self.layout.output / job.id
        # Written in the claim: from there nobody but its owner can rename them into `out`, and nothing is left behind.
        with self._put_off(job), self._ours(ticket), Whole(ticket.claim.path) as outputs:
            for document in documents:
                suffix = self.layout.suffixes.get(document.suffix, document.suffix)
                path = base.with_name(base.name + suffix)
                outputs.take(path, document.file) if document.file else outputs.write(path, document.body)
            with ticket.claim.lock:
                self._claims.alive(ticket.claim)
                if not base.parent.is_dir():
                    base.parent.mkdir(parents=True, exist_ok=True)
                outputs.show()
                sync_folder(base.parent)
                self._desk.end(ticket, "done")
        self._scratch.drop(job)
        self._over(ticket)

    def reject(self, job: Job, error: SamPollError) -> None:
        """Move the inputs untouched to `failed/`, with `<id>.error.json` beside them. As `deliver`."""
        ticket: Ticket = job.origin
        with self._put_off(job), self._ours(ticket), ticket.claim.lock:
            self._claims.alive(ticket.claim)
            if ticket.suffix is None:
                ticket.suffix = self._claims.free(ticket.claim, "failed", self._desk.leaving(ticket))
            # On a second call what has left already was told before: a further report would be one too many.
            left = [name for name in self._desk.leaving(ticket) if exists(ticket.claim.path / name)]
            names = [suffixed(name, ticket.suffix) for name in left]
            if names and ticket.claim.hold.place is None:
                self._claims.write_report(ticket.claim, report(names, job, error))
            self._desk.end(ticket, "failed", ticket.suffix)
        self._scratch.drop(job)
        self._over(ticket)

    def release(self, job: Job, trouble: OSError | None = None) -> None:
        """Put a claimed job back into `in/`; after `trouble` reading it, it is not offered again at once.

        OSError: it stays in `work/`, and whoever takes it over goes on with it.
        """
        if job.helps:
            self._scratch.over(job)
            return
        ticket: Ticket = job.origin
        with self._given_up(ticket):
            if trouble is None:
                self._back(ticket, 0.0, None)
            elif isinstance(trouble, FileNotFoundError):
                self.reject(job, InputError("its picture vanished while it was at work", remedy="drop it again"))
            else:
                self._back(ticket, self._note_unread(ticket, trouble), None)

    def _note_unread(self, ticket: Ticket, trouble: OSError) -> float:
        """Returns the seconds until the next try."""
        claim = ticket.claim
        before, _ = self._unread.get(ticket.rel, (1.0, None))
        seconds = min(2 * before, _LONGEST_HOLD_S)
        self._unread[ticket.rel] = seconds, claim.below(claim.picture) if claim.picture else None
        logger.warning("the picture of {} cannot be read: {}; next try in {:g} s", shown(ticket.rel), trouble, seconds)
        self._alarms.raise_("read", f"pictures cannot be read ({trouble.strerror}); they are tried again and again")
        return seconds

    def abandon(self, job: Job) -> None:
        """The process that worked on it has ended: it is run again, which counts as an attempt."""
        if job.helps:
            self._scratch.over(job)
            return
        ticket: Ticket = job.origin
        self._wake.set()  # before and after: a scan with `once` must not end between the two
        self._desk.abandon(ticket.claim)
        self._wake.set()

    def defer(self, job: Job, error: SamPollError) -> None:
        """Put a job back whose picture is not complete, or not the one meant. As `release`."""
        ticket: Ticket = job.origin
        with self._given_up(ticket):
            if ticket.claim.picture is None:  # it lies in done/: nobody is going to mend it
                self.reject(job, error)
            elif isinstance(error, ChangedError):  # what it is now, nobody has read yet
                self._back(ticket, 0.0, None)
            else:
                self._back(ticket, self.manners.patience, error)

    def _back(self, ticket: Ticket, seconds: float, error: SamPollError | None) -> None:
        with self._ours(ticket), ticket.claim.lock:
            names = self._desk.leaving(ticket)
            suffix = self._claims.free(ticket.claim, "input", names)
            if seconds or error:  # told before they can be seen in in/ again
                self._hold(ticket, suffix, seconds, error)
            self._desk.end(ticket, "input", suffix)
        if not error and not seconds:
            self._over(ticket)
        self._wake.set()

    def _hold(self, ticket: Ticket, suffix: str, seconds: float, error: SamPollError | None) -> None:
        held = self._held_of(ticket, suffix, seconds, error)
        self._scanner.hold(held.job, held.seen, held.seconds, held.error)

    @staticmethod
    def _held_of(ticket: Ticket, suffix: str, seconds: float, error: SamPollError | None) -> Held:
        claim = ticket.claim
        files = {claim.below(suffixed(n, suffix)): n for n in (claim.picture, ticket.prompt) if n}
        seen = {file: signature for file, n in files.items() if (signature := look(claim.path / n))}
        return Held(list(files)[-1], seen, seconds, error)

    @contextmanager
    def _put_off(self, job: Job) -> Iterator[None]:
        """What cannot be put away for one path's sake waits without keeping a place: PutOffError. A job that has ended
        already stays in `work/` until its files can be carried on, any other one goes back into `in/`."""
        ticket: Ticket = job.origin
        claim = ticket.claim
        try:
            yield
        except OSError as error:
            files = [ticket.rel, *(claim.below(name) for name in (claim.picture,) if name)]
            if not self._holds.failed_to_deliver(error, claim.outer, files, time.monotonic()):
                if error.errno in (errno.ENOTDIR, errno.EEXIST):  # a whole folder is not there: no fault of this name
                    raise OSError(errno.ESTALE, error.strerror, error.filename) from error
                raise
            self._put_back(ticket)
            place = shown(error.filename2 or error.filename or "")
            raise PutOffError(f"cannot be put away ({error.strerror}), and waits", place=place) from error

    def _put_back(self, ticket: Ticket) -> None:
        claim = ticket.claim
        try:
            with claim.lock:
                if claim.hold.place is None:
                    self._wait_in_input(ticket)
        except (OSError, LostError) as error:
            logger.debug("{} stays in work/: {}", shown(ticket.rel), error)
            self._desk.forget(claim)
        if claim.over:
            self._holds.ended(claim.outer)
        elif claim.hold.place is not None:
            self._desk.forget(claim)
        self._wake.set()

    def _wait_in_input(self, ticket: Ticket) -> None:
        """Put a job back that is not to be offered again before its hold is over."""
        self._desk.end(ticket, "input", self._claims.free(ticket.claim, "input", self._desk.leaving(ticket)))

    @contextmanager
    def _ours(self, ticket: Ticket) -> Iterator[None]:
        try:
            try:
                yield
            except FileNotFoundError:
                self._claims.alive(ticket.claim)
                raise
        except LostError:
            self._desk.forget(ticket.claim)
            self._wake.set()
            raise

    @contextmanager
    def _given_up(self, ticket: Ticket) -> Iterator[None]:
        """Nobody calls again: a claim that cannot be ended now is left for the next scan, which takes it over."""
        try:
            yield
        except OSError as error:
            self._wake.set()  # before and after: a scan with `once` must not end between the two
            self._holds.failed_claim(error, ticket.claim.outer, time.monotonic())
            self._desk.forget(ticket.claim)
            self._wake.set()
            raise

    def _over(self, ticket: Ticket) -> None:
        if self._unread.pop(ticket.rel, None) and not self._unread:
            self._alarms.clear("read")
        self._holds.ended(ticket.claim.outer, ticket.rel)
        self._wake.set()

    def _forget_unread(self) -> None:
        """Whoever takes a picture away that cannot be read has ended that trouble, too."""
        gone = [
            rel
            for rel, (_, picture) in list(self._unread.items())
            if any(look(self.layout.input / f) is None and not self._desk.works_on(f) for f in (rel, picture) if f)
        ]
        for rel in gone:
            self._unread.pop(rel, None)
        if gone and not self._unread:
            self._alarms.clear("read")


def _folder_of(group: list[Ready]) -> str:
    return os.path.dirname(group[0].picture or group[0].prompt or "")
