"""A Redis stream with a consumer group as a door: nothing is acknowledged before its answer is written.

An entry belongs to the worker that took it for as long as that worker says so at least once a lease; then another one
takes it over, and the number of its deliveries is the number of its attempts. Answer, acknowledgement and the entry's
end are one step (`redis_scripts`), made only by who owns the entry at that moment.

What can still go wrong here: a server that keeps nothing on disk, or the last second of what it was told, may lose
entries, or offer one again that was answered just then: its second answer has the same `id` and `entry`.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any, TypeAlias

from loguru import logger

from sam_poll.doors import redis_messages as messages
from sam_poll.doors import redis_scripts as scripts
from sam_poll.doors.redis_link import MAX_BYTES, Link, Pauses, Trouble
from sam_poll.errors import InputError, LostError, PoisonError, SamPollError
from sam_poll.stats import Pulse
from sam_poll.types import Document, Job

NOBODY = "released"  # whose what was given back is
_BLOCK_S = 0.5
_LOOK_S = 5.0
_AT_ONCE = 16  # entries of the dead seen in one look
_OURS = 1000  # more than one worker has at once
_MAX_DOCUMENTS = 3000  # Redis' scripts pass on some 8,000 words at once
_FORGOTTEN_S = 3600.0  # how long a consumer that holds nothing has not been heard of
Fields: TypeAlias = list[str | bytes]


@dataclass(frozen=True, slots=True)
class Names:
    """The streams and the group. Dead letters go to `<source>:dead`."""

    source: str = "sam:in"
    target: str = "sam:out"
    group: str = "sam_poll"

    @property
    def dead(self) -> str:
        return f"{self.source}:dead"


@dataclass(eq=False)
class _Entry:
    """An entry in our hands. `tried`: its end was sent once, and no word came back."""

    id: str
    attempt: int
    asked: messages.Asked
    tried: bool = False
    lost: bool = False


class StreamDoor:
    """`with StreamDoor(…)` makes the group where there is none, and keeps what is at work here fresh.

    `keep`: answered entries stay in the stream (for other groups on it). `max_answers`: beyond that the oldest answers
    are dropped, read or not; 0 keeps all. `lease_s` is the same for all workers of a group.
    `formats` are those of the answers.
    """

    def __init__(
        self,
        link: Link,
        names: Names,
        *,
        parse: messages.Parse,
        keep: bool = False,
        max_answers: int = 0,
        lease_s: float = 60.0,
        attempts: int = 3,
        formats: Collection[str] = (),
        pulse: Pulse | None = None,
    ) -> None:
        self._link, self._names, self._parse = link, names, parse
        self._keep, self._max_answers, self._attempts = keep, max_answers, attempts
        self._lease_ms, self._pulse = int(lease_s * 1000), pulse or Pulse()
        self._formats = formats
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        made = link.client.register_script
        self._finish_script, self._refresh_script = made(scripts.FINISH), made(scripts.REFRESH)
        self._release_script, self._forget_script = made(scripts.RELEASE), made(scripts.FORGET)
        self._held: dict[str, _Entry] = {}
        self._lock = threading.Lock()
        self._left: deque[tuple[str, int]] = deque()  # entries of the dead, and how often they were delivered
        self._look_at = 0.0
        self._suspect = False  # something may be ours that we have not heard of
        self._end = threading.Event()
        self._keeper = threading.Thread(target=self._keep_fresh, name="lease", daemon=True)
        self._waiting = 0
        self.last_scan, self.orphans, self.recovered = 0.0, 0, 0

    # ── what those see who look on ──

    @property
    def waiting(self) -> int:
        """Entries that nobody has taken yet, as of a moment ago."""
        return self._waiting

    @property
    def oldest_s(self) -> float:
        """Nobody asks how old an entry is."""
        return 0.0

    # ── start and end ──

    def __enter__(self) -> StreamDoor:
        """ShareError, SettingsError: the server is not there, or does not let us in; or the name is no stream's."""
        self._link.prove(self._begin)
        self._keeper.start()
        return self

    def _begin(self) -> None:
        for name in (self._names.target, self._names.dead):  # told now, and not when the first answer is made
            try:
                self._link.ask(methodcaller("xlen", name))
            except Trouble as error:
                error.strerror = f"{error.strerror} ({name})"
                raise
        self._make_group()

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._keeper.join(2.0)
        try:
            self._forget(self.consumer)
            self._link.close()
        except OSError as error:
            logger.debug("the group is not told of our end: {}", error)

    def _make_group(self) -> None:
        """From the stream's beginning: what was sent before the first worker came counts, too."""

        def make(client: Any) -> None:
            known = client.exists(self._names.source) and self._groups(client)
            if not known or self._names.group not in known:
                client.xgroup_create(self._names.source, self._names.group, id="0", mkstream=True)

        try:
            self._link.ask(make)
        except Trouble as error:
            if "BUSYGROUP" not in str(error.strerror):  # another worker was quicker
                raise

    def _groups(self, client: Any) -> dict[str, Any]:
        return {group["name"].decode(): group for group in client.xinfo_groups(self._names.source)}

    # ── taking ──

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """What is sent, and what dead workers have left, until `stop` is set."""
        pauses = Pauses()
        while not stop.is_set():
            self._pulse.beat()
            try:
                found = self._unheard() or self._of_the_dead() or self._fresh()
            except Trouble as error:
                self._link.away(error)
                if error.no_group:
                    self._make_again()
                pauses.wait(stop)
                # The living could not say that they are: they may do so first.
                self._left.clear()
                self._suspect = True
                self._look_at = time.monotonic() + self._lease_ms / 2000
                continue
            self._link.here()
            pauses.over()
            self.last_scan = time.time()
            if found:
                yield self._job(*found)

    def _make_again(self) -> None:
        """The server came back without what it knew."""
        try:
            self._make_group()
        except OSError as error:
            logger.debug("the group cannot be made: {}", error)
        else:
            logger.warning("Redis had lost the group {} of {}; it is made anew", self._names.group, self._names.source)

    def _fresh(self) -> tuple[str, int, dict[bytes, bytes]] | None:
        """The next entry that nobody has taken."""
        return self._read(">", int(_BLOCK_S * 1000))

    def _read(self, after: str, block_ms: int | None) -> tuple[str, int, dict[bytes, bytes]] | None:
        names = self._names
        answer = self._link.ask(
            lambda client: client.xreadgroup(names.group, self.consumer, {names.source: after}, count=1, block=block_ms)
        )
        for _, entries in answer or ():
            for number, fields in entries:
                if fields:  # else it was deleted
                    return number.decode(), 1, fields
        return None

    def _unheard(self) -> tuple[str, int, dict[bytes, bytes]] | None:
        """An entry that was given to us by an answer which did not arrive. It was delivered, but never run."""
        if not self._suspect:
            return None
        names = self._names
        ours = self._link.ask(
            lambda client: client.xpending_range(names.source, names.group, "-", "+", _OURS, consumername=self.consumer)
        )
        for entry in ours:
            number = entry["message_id"].decode()
            with self._lock:
                known = number in self._held
            # Asked so, the server gives only what is ours still.
            found = None if known else self._read(_before(number), None)
            if found and found[0] == number:
                return number, entry["times_delivered"], found[2]
        self._suspect = False
        return None

    def _of_the_dead(self) -> tuple[str, int, dict[bytes, bytes]] | None:
        """An entry whose worker has not been heard of for a lease, or has given it back."""
        if not self._left and time.monotonic() >= self._look_at:
            self._look()
        while self._left:
            number, delivered = self._left.popleft()
            with self._lock:
                if number in self._held:
                    continue
            for entry, fields in self._link.ask(partial(self._claim, number)):
                if entry is None or fields is None:
                    continue  # an older server names those that were deleted meanwhile
                self.recovered += delivered > 0
                return entry.decode(), delivered + 1, fields
        return None

    def _claim(self, number: str, client: Any) -> Any:
        """Only if it is idle still: another worker may have seen the same."""
        return client.xclaim(self._names.source, self._names.group, self.consumer, self._lease_ms, [number])

    def _look(self) -> None:
        names, idle = self._names, self._lease_ms
        pending = self._link.ask(
            lambda client: client.xpending_range(names.source, names.group, "-", "+", _AT_ONCE, idle=idle)
        )
        self._left.extend((entry["message_id"].decode(), entry["times_delivered"]) for entry in pending)
        if len(pending) < _AT_ONCE:
            self._look_at = time.monotonic() + min(_LOOK_S, self._lease_ms / 4000)

    def _job(self, number: str, attempt: int, fields: dict[bytes, bytes]) -> Job:
        if attempt > self._attempts:
            reason = f"the process that worked on it has ended {self._attempts} times"
            known = {b"id": fields[b"id"]} if b"id" in fields else {}
            sender = messages.of_fields(known, self._parse).sender
            asked = messages.Asked(sender=sender, fault=PoisonError(reason, remedy=f"it lies in {self._names.dead}"))
        else:
            asked = messages.of_fields(fields, self._parse)
        entry = _Entry(number, attempt, asked)
        with self._lock:
            self._held[number] = entry
        return asked.job(number, entry, attempt)

    # ── ending ──

    def deliver(self, job: Job, documents: Sequence[Document]) -> None:
        """Write the answer and acknowledge the entry, in one step."""
        entry: _Entry = job.origin
        chosen = messages.wanted(entry.asked, documents, self._formats)
        if (size := sum(len(document.body) for document in chosen)) > MAX_BYTES:
            remedy = "fewer objects or formats at once, or a smaller picture"
            raise InputError(f"the answer has {size >> 20} MiB, too much for Redis", remedy=remedy)
        if len(chosen) > _MAX_DOCUMENTS:
            remedy = "`mask: instances` makes one mask of all objects"
            raise InputError(f"the answer has {len(chosen):,} documents, too many for one entry", remedy=remedy)
        names = [messages.name_of(document) for document in chosen]
        answer: Fields = [*self._head(entry), "status", "ok", "documents", json.dumps(names)]
        for name, document in zip(names, chosen, strict=True):
            answer += [name, document.body]
        self._finish(entry, answer)

    def reject(self, job: Job, error: SamPollError) -> None:
        """Write the reason and acknowledge the entry; what has ended too many processes is kept as a dead letter."""
        entry: _Entry = job.origin
        told: Fields = []
        for key, value in messages.error_fields(error).items():
            told += [key, value or ""]
        dead: Fields = []
        if isinstance(error, PoisonError):
            dead = ["entry", entry.id, "attempts", str(entry.attempt - 1), "reason", error.reason]
        self._finish(entry, [*self._head(entry), "status", "error", *told], dead)

    def release(self, job: Job, trouble: OSError | None = None) -> None:
        """It is anybody's at once, and this run does not count."""
        self._give_back(job.origin, job.origin.attempt - 1)

    def abandon(self, job: Job) -> None:
        """It is anybody's at once, and this run counts."""
        self._give_back(job.origin, job.origin.attempt)

    def defer(self, job: Job, error: SamPollError) -> None:
        """Nobody is going to change a picture that is in the entry."""
        self.reject(job, error)

    def _head(self, entry: _Entry) -> Fields:
        sender = entry.id if entry.asked.sender is None else entry.asked.sender
        return ["id", sender.encode("utf-8", "replace"), "entry", entry.id]

    def _finish(self, entry: _Entry, answer: Fields, dead: Sequence[str | bytes] = ()) -> None:
        if entry.lost:
            self._gone(entry)
        names = self._names
        arguments = [entry.id, "keep" if self._keep else "", str(self._max_answers), str(len(dead)), *dead, *answer]
        try:
            ended = self._run(self._finish_script, arguments, [names.target, names.dead])
        except Trouble as error:
            entry.tried = entry.tried or error.errno == errno.ENOTCONN
            raise
        # Nobody has it, and our first try may have got through: it is answered, by us or by who had it then.
        if ended < 0 or (ended == 0 and not entry.tried):
            self._gone(entry)
        self._drop(entry)

    def _gone(self, entry: _Entry) -> None:
        self._drop(entry)
        raise LostError("another worker has taken it over; the work done here is dropped", place=entry.id)

    def _give_back(self, entry: _Entry, delivered: int) -> None:
        try:
            ours = self._run(self._release_script, [entry.id, NOBODY, str(self._lease_ms + 1000), str(delivered)])
        finally:
            self._drop(entry)  # where Redis is away, its lease runs out
        self._look_at = 0.0
        if not ours:
            raise LostError("another worker has taken it over", place=entry.id)

    def _drop(self, entry: _Entry) -> None:
        with self._lock:
            self._held.pop(entry.id, None)

    def _run(self, script: Any, arguments: Sequence[str | bytes], keys: Sequence[str] = ()) -> Any:
        given = [self._names.group, self.consumer, *arguments]
        return self._link.ask(lambda _: script(keys=[self._names.source, *keys], args=given))

    # ── the lease ──

    def _keep_fresh(self) -> None:
        """Says four times a lease that what is at work here is; and looks at what waits."""
        forget_at = time.monotonic()
        while not self._end.wait(self._lease_ms / 4000):
            try:
                self._refresh()
                self._waiting = self._link.ask(self._count)
                if time.monotonic() >= forget_at:
                    forget_at = time.monotonic() + _FORGOTTEN_S
                    self._forget_the_dead()
            except Trouble as error:
                if not error.no_group:  # who takes entries makes it anew
                    self._link.away(error)
            except Exception as error:  # noqa: BLE001  without this thread the lease runs out
                logger.opt(exception=True).error("the lease is not renewed: {}", type(error).__name__)

    def _refresh(self) -> None:
        with self._lock:
            ids = list(self._held)
        if not ids:
            return
        for number in self._run(self._refresh_script, ids):
            with self._lock:
                entry = self._held.get(number.decode())
            if entry:
                entry.lost = True

    def _count(self, client: Any) -> int:
        group = self._groups(client).get(self._names.group, {})
        lag = group.get("lag")
        return int(lag if lag is not None else client.xlen(self._names.source) - group.get("pending", 0))

    def _forget_the_dead(self) -> None:
        names = self._names
        for consumer in self._link.ask(lambda client: client.xinfo_consumers(names.source, names.group)):
            if consumer["idle"] > _FORGOTTEN_S * 1000 and not consumer["pending"]:
                self._forget(consumer["name"])

    def _forget(self, consumer: str | bytes) -> None:
        arguments = [self._names.group, consumer]
        self._link.ask(lambda _: self._forget_script(keys=[self._names.source], args=arguments))


def _before(number: str) -> str:
    """The greatest entry's number below this one."""
    when, _, serial = number.partition("-")
    return f"{when}-{int(serial) - 1}" if int(serial) else f"{int(when) - 1}-{(1 << 64) - 1}"
