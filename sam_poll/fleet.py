"""Several devices of one machine: a process each, all fed by the one door.

Seen from the door a fleet is a pipeline: it takes jobs, and every job is answered, rejected or given back. The
processes (`member`) decode, run their network and make the documents; what touches the share is done here.

A process that ends before its time takes nothing with it: its jobs are offered again, each as a further attempt (so
that one which ends every process is found out), and a new process takes its place. A device that cannot be revived
ends the run with DeviceError.

What can still go wrong here: prompts of one picture that come one by one may reach two devices, and each encodes it.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from loguru import logger

from sam_poll import images
from sam_poll.alarms import Alarms
from sam_poll.errors import DeviceError, LostError, SamPollError
from sam_poll.fs import shown
from sam_poll.member import Equip
from sam_poll.pipeline import Sizes
from sam_poll.safe_path import SafePath
from sam_poll.stats import Pulse, Stats
from sam_poll.tasks import Either
from sam_poll.types import Door, Job, ModelInfo
from sam_poll.wire import Wire, portable

COMMAND = (sys.executable, "-m", "sam_poll.member")
_POLL_S = 0.1
_GRACE_S = 5.0  # beyond the jobs' own time to finish
_SAME_S = 0.05  # how long a picture's further prompts wait for the process that has its embedding
_SAME_PICTURES = 64
_TRIES = 5  # processes of one device that end in a row, without an answer between them
_LONG_S = 600.0  # a process that has lived so long has not ended in a row with the one before
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True)
class Post:
    """A device's place in the fleet: its name for people, how its process gets what it needs, and its environment."""

    name: str
    equip: Equip
    env: Mapping[str, str]
    log_level: str = "INFO"


@dataclass(eq=False)
class _Member:
    """A process as it is seen from here. `jobs` are those it has, `begun` those of them it has taken up."""

    post: Post
    wire: Wire | None = None
    process: subprocess.Popen[bytes] | None = None
    wants: bool = False
    jobs: dict[int, Job] = field(default_factory=dict)
    begun: set[int] = field(default_factory=set)
    calls: dict[int, Future[None]] = field(default_factory=dict)
    pictures: OrderedDict[str, None] = field(default_factory=OrderedDict)
    troubles: set[str] = field(default_factory=set)
    uncounted: int = 0  # jobs handed out whose end it has not told
    ended: dict[str, tuple[str, tuple[Any, ...]]] = field(
        default_factory=dict
    )  # those of them that have ended all the same
    answered: int = 0
    moved: float = 0.0
    info: ModelInfo | None = None
    ooms: int = 0
    error: Exception | None = None
    over: bool = False
    killed: bool = False


class Fleet:
    """`with Fleet(…) as fleet: fleet.run(door, stop)`. Entering starts the processes and waits until all are ready.

    `ModelError` and the like from entering: one of them cannot be made ready. `device` beats as the slowest of them.
    `pieces`: they can do jobs in pieces.
    """

    def __init__(
        self,
        posts: Sequence[Post],
        stop: threading.Event,
        *,
        stats: Stats | None = None,
        alarms: Alarms | None = None,
        intake: Pulse | None = None,
        device: Pulse | None = None,
        writers: int = 4,
        command: Sequence[str] = COMMAND,
        drain_s: float = Sizes.drain_s,
        pause_s: float = 1.0,
        pieces: bool = False,
    ) -> None:
        self._members = [_Member(post) for post in posts]
        self._info: ModelInfo | None = None
        self._pieces = pieces
        self._stop, self._command, self._drain_s, self._pause_s = stop, list(command), drain_s, pause_s
        self.stats, self._alarms = stats or Stats(), alarms or Alarms()
        self._intake, self._device = intake or Pulse(), device or Pulse()
        self._changed = threading.Condition()
        self._door: Door | None = None
        self._numbers = self._ooms = 0  # jobs handed out; out of memory in processes that have ended
        self._ready = self._ending = False
        self._fatal: Exception | None = None
        self._writers = ThreadPoolExecutor(writers, "answers")
        self._keepers = [threading.Thread(target=self._keep, args=(m,), daemon=True) for m in self._members]

    # ── what those see who look on ──

    @property
    def info(self) -> ModelInfo:
        """As one of them said last; `device` names all."""
        assert self._info is not None, "not entered"
        return replace(self._info, device=", ".join(m.post.name for m in self._members))

    @property
    def ooms(self) -> int:
        """How often the devices' memory has not been enough."""
        return self._ooms + sum(m.ooms for m in self._members)

    @property
    def hands(self) -> int:
        """As `Pipeline.hands`."""
        return len(self._members) if self._pieces else 0

    # ── start and end ──

    def __enter__(self) -> Fleet:
        for keeper in self._keepers:
            keeper.start()
        with self._changed:
            while not (all(m.info for m in self._members) or self._fatal or self._stop.is_set()):
                self._changed.wait(_POLL_S)
            self._ready = self._fatal is None
        if self._fatal:
            self.__exit__()
            raise self._fatal
        return self

    def __exit__(self, *exc: object) -> None:
        self._end("stop")
        self._kill_after(0.0 if self._fatal or not self._ready else self._drain_s + _GRACE_S)
        self._writers.shutdown(wait=False)

    def run(self, door: Door, stop: threading.Event) -> None:
        """As `Pipeline.run`."""
        self._door = door
        ending = Either(stop, lambda: self._fatal is not None)
        with contextlib.closing(door.jobs(ending)) as jobs:  # type: ignore[arg-type]
            while not ending.is_set():
                self._intake.beat()
                if not self._somebody_wants():
                    continue
                job = next(jobs, None)
                if job is None:
                    break
                self._hand_out(job, ending)
        self._end("stop" if ending.is_set() else "end")
        while any(keeper.is_alive() for keeper in self._keepers):
            self._intake.beat()
            if ending.wait(_POLL_S):
                self._end("stop")
                self._kill_after(self._drain_s + _GRACE_S)
        if self._fatal:
            raise self._fatal

    def _end(self, word: str) -> None:
        """`end`: finish what you have. `stop`: and be quick."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        for member in self._members:
            if member.info and member.wire:
                member.wire.send(word)
            elif member.process:  # it is still loading, and has no job
                member.process.kill()

    def _kill_after(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for member, keeper in zip(self._members, self._keepers, strict=True):
            keeper.join(max(0.0, deadline - time.monotonic()))
            if keeper.is_alive() and member.process:
                member.killed = True
                member.process.kill()
                keeper.join(_GRACE_S)

    # ── handing out ──

    def _somebody_wants(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: any(m.wants for m in self._members), _POLL_S)

    def _hand_out(self, job: Job, ending: Either) -> None:
        self.stats.took()
        while not ending.is_set():
            self._intake.beat()
            if self._placed(job):
                return
        self._give_back(job, blame=False)
        self.stats.released()

    def _placed(self, job: Job) -> bool:
        """Give it to who wants work and has the picture's embedding, or else has least to do. False: nobody wants any
        just now."""
        # One that comes as bytes may have a name that many have.
        picture = job.name if isinstance(job.picture, SafePath) else images.digest_of(job.picture)
        with self._changed:  # to the end: a process may be buried at any moment, and must then have it or not
            if not job.helps and any(picture in m.pictures for m in self._members):
                self._changed.wait_for(lambda: any(m.wants and picture in m.pictures for m in self._members), _SAME_S)
            else:
                self._changed.wait_for(lambda: any(m.wants for m in self._members), _POLL_S)
            wanting = [m for m in self._members if m.wants]
            if not wanting:
                return False
            # A part of a picture that another one works on is for those that do not.
            member = min(wanting, key=lambda m: ((picture in m.pictures) == job.helps, len(m.jobs)))
            self._numbers += 1
            member.jobs[self._numbers] = job
            member.wants = False
            member.uncounted += 1
            _remember(member, picture)
            assert member.wire is not None
            member.wire.send("job", replace(job, origin=self._numbers, gone=None))  # who is gone is seen here only
        return True

    def _give_back(self, job: Job, *, blame: bool) -> None:
        assert self._door is not None
        try:
            (self._door.abandon if blame else self._door.release)(job)
        except (OSError, LostError) as error:
            logger.warning("job {} stays in work/, to be taken over: {}", shown(job.id), error)

    # ── a device's processes, one after the other ──

    def _keep(self, member: _Member) -> None:
        failures = 0
        while not self._ending:
            started = time.monotonic()
            try:
                if not self._start(member):
                    return
                try:
                    self._listen(member)
                finally:
                    ending = self._bury(member)
            except Exception as error:  # noqa: BLE001  the others must not lose their keeper's word
                logger.opt(exception=True).critical("{}: {}", member.post.name, error)
                ending = str(error)
            if member.over or self._ending:
                return
            failures = 1 if member.answered or time.monotonic() - started > _LONG_S else failures + 1
            member.answered = 0  # the next one may not even start
            if not self._ready or failures >= _TRIES:
                self._give_up(member, ending, failures)
                return
            pause = min(self._pause_s * 2 ** (failures - 1), _LONGEST_PAUSE_S)
            logger.error("{}: its process {}; the next one starts in {:g} s", member.post.name, ending, pause)
            with self._changed:
                self._changed.wait_for(lambda: self._ending, pause)

    def _give_up(self, member: _Member, ending: str, failures: int) -> None:
        reason = f"the process of {member.post.name} {ending}"
        if self._ready:
            reason = f"{member.post.name} has ended {failures} processes in a row; the last {ending}"
        remedy = "look at the log, at the driver (dmesg) and the card; or leave it out of `devices`"
        error = DeviceError(reason, remedy=remedy) if self._ready or not member.error else member.error
        with self._changed:
            self._fatal = self._fatal or error
            self._changed.notify_all()

    def _start(self, member: _Member) -> bool:
        """False: it is too late for that."""
        ours, theirs = socket.socketpair()
        with theirs, self._changed:  # who ends the fleet sees it, or it sees that the fleet ends
            if self._ending:
                ours.close()
                return False
            number = theirs.fileno()
            try:
                member.process = subprocess.Popen(  # noqa: S603  our own module
                    [*self._command, str(number)],
                    pass_fds=[number],
                    env=dict(member.post.env),
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C is ours to hear
                )
            except OSError:
                ours.close()
                raise
        member.error, member.over = None, False
        member.wire = Wire(Connection(ours.detach()))
        member.wire.send(member.post.equip, member.post.log_level)
        return True

    def _listen(self, member: _Member) -> None:
        assert member.wire is not None
        with contextlib.suppress(EOFError):
            while True:
                kind, *rest = member.wire.receive()
                getattr(self, f"_on_{kind}")(member, *rest)

    def _bury(self, member: _Member) -> str:
        """What it had is offered again, or goes back if it had not been begun. Returns how it ended."""
        assert member.process is not None
        assert member.wire is not None
        try:
            code = member.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:  # it has closed its wire: whatever it still does is of no use
            member.process.kill()
            code = member.process.wait()
        wait(list(member.calls.values()))  # an answer may be on its way into the share just now
        member.wire.close()
        with self._changed:
            left, member.jobs = member.jobs, {}
            begun, member.begun = member.begun, set()
            member.wants, member.info, member.calls = False, None, {}
            member.pictures.clear()
            ended, member.ended = member.ended, {}
            uncounted, member.uncounted = member.uncounted - len(ended), 0
            self._ooms, member.ooms = self._ooms + member.ooms, 0
        for number, job in left.items():
            self._give_back(job, blame=number in begun and not member.killed)
        for what, arguments in ended.values():
            getattr(self.stats, what)(*arguments)
        for _ in range(uncounted):
            self.stats.released(getattr(member.error, "code", "device"))
        for kind in list(member.troubles):
            self._on_alarm(member, kind, None)
        return _epitaph(code, member.error)

    # ── what they say ──

    def _on_ready(self, member: _Member, info: ModelInfo) -> None:
        with self._changed:
            self._info = member.info = info
            member.moved = time.monotonic()
            self._changed.notify_all()

    def _on_want(self, member: _Member) -> None:
        with self._changed:
            member.wants = True
            self._changed.notify_all()

    def _on_begun(self, member: _Member, number: int) -> None:
        member.begun.add(number)

    def _on_call(self, member: _Member, number: int, what: str, arguments: tuple[Any, ...]) -> None:
        with self._changed:  # or it may be over, and struck off, before it is written down
            member.calls[number] = self._writers.submit(self._call, member, number, what, arguments)

    def _call(self, member: _Member, number: int, what: str, arguments: tuple[Any, ...]) -> None:
        """Ask the door what a process wants of it, and tell that what came of it."""
        reply: Exception | None = None
        job, wire = member.jobs[number], member.wire
        assert wire is not None
        try:
            getattr(self._door, what)(job, *arguments)
        except Exception as error:  # noqa: BLE001  it is the pipeline over there that knows what to do
            reply = portable(error)
        if reply is None or isinstance(reply, LostError) or what in ("release", "defer"):  # nobody calls again
            with self._changed:
                member.jobs.pop(number, None)
                member.begun.discard(number)
                member.calls.pop(number, None)
                if reply is None and what == "deliver":  # to be counted, even if that process does not live to do it
                    member.ended[job.id] = "answered", (job.id, 0, {})
                elif reply is None and what == "reject":
                    member.ended[job.id] = "rejected", (job.id, arguments[0].code)
        wire.send("reply", number, reply)

    def _on_count(self, member: _Member, what: str, arguments: tuple[Any, ...]) -> None:
        with self._changed:
            member.uncounted -= 1
            member.ended.pop(arguments[0], None)
        member.answered += what == "answered"
        getattr(self.stats, what)(*arguments)

    def _on_advance(self, member: _Member) -> None:
        self.stats.advanced()

    def _on_alarm(self, member: _Member, kind: str, message: str | None) -> None:
        if message is not None:
            member.troubles.add(kind)
            self._alarms.raise_(kind, message)
            return
        member.troubles.discard(kind)
        if not any(kind in m.troubles for m in self._members):
            self._alarms.clear(kind)

    def _on_beat(self, member: _Member, age: float, info: ModelInfo, ooms: int) -> None:
        now = time.monotonic()
        self._info = member.info = info
        member.moved, member.ooms = now - age, ooms
        self._device.beat(now - min(m.moved for m in self._members if m.info))

    def _on_log(self, member: _Member, level: str, text: str, extra: dict[str, str]) -> None:
        logger.bind(**extra, device=member.post.name).log(level, "{}", text)

    def _on_over(self, member: _Member, error: SamPollError | None) -> None:
        member.error, member.over = error, error is None


def _remember(member: _Member, picture: str) -> None:
    member.pictures[picture] = None
    member.pictures.move_to_end(picture)
    if len(member.pictures) > _SAME_PICTURES:
        member.pictures.popitem(last=False)


def _epitaph(code: int, error: Exception | None) -> str:
    if error:
        return f"ended: {error}"
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            return f"was ended by {name}" + (" (out of main memory?)" if name == "SIGKILL" else "")
    return f"ended with {code}"
