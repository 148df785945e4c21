"""Jobs from a Redis stream: no entry is acknowledged before its answer is written.

An entry belongs to the worker that took it for as long as that worker refreshes it at least once a
lease; after that another worker takes it over, and the number of its deliveries is the number of
its attempts. Answer, acknowledgement and deletion of an entry are one step (`scripts`), which the
server does only for the entry's present owner.

Limitations: a server that keeps nothing on disk, or loses the last second of its writes, may lose
entries, or deliver one again that was just answered; the second answer then has the same `id` and
`entry`.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Collection, Generator, Sequence

from loguru import logger

from sam_poll.core.backoff import Backoff
from sam_poll.core.errors import ClaimLostError, InputError, PoisonError, SamPollError
from sam_poll.core.stats import LoopHeartbeat
from sam_poll.core.types import Job, OutputFile
from sam_poll.integrations.redis import messages
from sam_poll.integrations.redis.connection import (
    MAX_BYTES,
    RedisConnection,
    RedisUnavailableError,
)
from sam_poll.integrations.redis.consumer_group import ConsumerGroup, Delivery, StreamNames, Words
from sam_poll.integrations.redis.entry_reader import EntryReader
from sam_poll.integrations.redis.held_entries import HeldEntries, HeldEntry
from sam_poll.integrations.redis.lease_keeper import LeaseKeeper

_MAX_FILES = 3000  # two arguments each; a script's `unpack` passes on some 8,000
_RELEASED_MS = 1000  # requeued entries are idle for this much longer than a lease


class RedisStreamSource:
    """A job source.

    As a context manager it creates the consumer group, and keeps the entries of its jobs fresh.

    `keep`: answered entries stay in the stream, for other groups on it. `max_answers`: beyond this
    number the oldest answers are deleted, read or not; 0 keeps all. `lease_s` must be the same for
    all workers of a group. `attempts`: an entry that ended this many processes is rejected and
    becomes a dead letter. `formats`: the formats of the answers. `pulse` beats while entries are
    taken.

    A job's `source_ref` is its `HeldEntry`.
    """

    def __init__(
        self,
        connection: RedisConnection,
        names: StreamNames,
        *,
        parse: messages.Parse,
        keep: bool = False,
        max_answers: int = 0,
        lease_s: float = 60.0,
        attempts: int = 3,
        formats: Collection[str] = (),
        pulse: LoopHeartbeat | None = None,
    ) -> None:
        self._connection = connection
        self._names = names
        self._parse = parse
        self._keep = keep
        self._max_answers = max_answers
        self._lease_ms = int(lease_s * 1000)
        self._attempts = attempts
        self._formats = formats
        self._pulse = pulse or LoopHeartbeat()
        self._group = ConsumerGroup(connection, names)
        self._held = HeldEntries()
        self._reader = EntryReader(self._group, self._held, self._lease_ms)
        self._keeper = LeaseKeeper(self._group, self._held, self._lease_ms)
        self.last_scan = 0.0
        """Wall-clock time of the last successful look at the stream."""
        self.orphans = 0
        """Always 0: a stream has no files without a partner."""

    # ── for metrics and status ──

    @property
    def waiting(self) -> int:
        """Number of entries delivered to no worker, as of a moment ago."""
        return self._keeper.backlog

    @property
    def oldest_s(self) -> float:
        """Always 0: the age of waiting entries is not measured."""
        return 0.0

    @property
    def recovered(self) -> int:
        """Number of entries taken over from workers that ended while they worked on them."""
        return self._reader.recovered

    # ── start and end ──

    def __enter__(self) -> RedisStreamSource:
        """Check the server, create the group, start to keep entries fresh.

        Raises ShareError if the server is unreachable, SettingsError if it refuses access, or if
        one of the names is not that of a stream.
        """
        self._connection.prove(self._prepare)
        self._keeper.start()
        return self

    def _prepare(self) -> None:
        # A wrong name is reported now, and not with the first answer.
        self._group.check_streams()
        self._group.create()

    def __exit__(self, *exc: object) -> None:
        self._keeper.stop()
        try:
            self._group.forget(self._group.consumer)
        except OSError as error:
            logger.debug("the consumer was not removed from its group: {}", error)
        finally:
            self._connection.close()

    # ── taking ──

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Yield the jobs of new entries, and of dead workers' entries, until `stop` is set."""
        backoff = Backoff()
        while not stop.is_set():
            self._pulse.beat()
            try:
                delivery = self._reader.next()
            except RedisUnavailableError as error:
                self._connection.report_unavailable(error)
                if error.no_group:
                    self._create_group_again()
                backoff.wait(stop)
                self._reader.connection_failed()
                continue
            self._connection.report_available()
            backoff.reset()
            self.last_scan = time.time()
            if delivery:
                yield self._job(delivery)

    def _create_group_again(self) -> None:
        """Create the group again: the server has lost its data and is running again."""
        try:
            self._group.create()
        except OSError as error:
            logger.debug("the group cannot be created: {}", error)
        else:
            logger.warning(
                "Redis had lost the group {} of {}; it was created again",
                self._names.group,
                self._names.source,
            )

    def _job(self, delivery: Delivery) -> Job:
        if delivery.attempt > self._attempts:
            request = self._poison_request(delivery)
        else:
            request = messages.parse_fields(delivery.fields, self._parse)
        entry = HeldEntry(delivery.entry_id, delivery.attempt, request)
        self._held.add(entry)
        return request.job(delivery.entry_id, entry, delivery.attempt)

    def _poison_request(self, delivery: Delivery) -> messages.RedisRequest:
        """Return a request that is rejected. Nothing but the sender's id is parsed of the entry."""
        known = {b"id": delivery.fields[b"id"]} if b"id" in delivery.fields else {}
        error = PoisonError(
            f"the process that worked on it has ended {self._attempts} times",
            remedy=f"look at the entry in {self._names.dead}",
        )
        return messages.RedisRequest(
            sender=messages.parse_fields(known, self._parse).sender, error=error
        )

    # ── ending ──

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        """Write the answer and acknowledge the entry, in one step."""
        entry: HeldEntry = job.source_ref
        outputs = messages.select_outputs(entry.request, documents, self._formats)
        size = sum(len(output.body) for output in outputs)
        if size > MAX_BYTES:
            raise InputError(
                f"the answer has {size >> 20} MiB, too much for Redis",
                remedy="select fewer objects or formats, or send a smaller picture",
            )
        if len(outputs) > _MAX_FILES:
            raise InputError(
                f"the answer has {len(outputs):,} files, too many for one entry",
                remedy="`mask: instances` makes one mask of all objects",
            )
        names = [messages.file_name(output) for output in outputs]
        answer: Words = [*_answer_head(entry), "status", "ok", "documents", json.dumps(names)]
        for name, output in zip(names, outputs, strict=True):
            answer += [name, output.body]
        self._finish(entry, answer)

    def reject(self, job: Job, error: SamPollError) -> None:
        """Write the reason and acknowledge the entry; a poison entry becomes a dead letter."""
        entry: HeldEntry = job.source_ref
        answer: Words = [*_answer_head(entry), "status", "error"]
        for key, value in messages.error_fields(error).items():
            answer += [key, value or ""]
        dead: Words = []
        if isinstance(error, PoisonError):
            dead = [
                *("entry", entry.entry_id),
                *("attempts", str(entry.attempt - 1)),
                *("reason", error.reason),
            ]
        self._finish(entry, answer, dead)

    def requeue(self, job: Job, trouble: OSError | None = None) -> None:
        """Offer the entry to all workers at once; this attempt does not count."""
        self._release(job.source_ref, job.source_ref.attempt - 1)

    def fail_attempt(self, job: Job) -> None:
        """Offer the entry to all workers at once; this attempt counts."""
        self._release(job.source_ref, job.source_ref.attempt)

    def defer(self, job: Job, error: SamPollError) -> None:
        """Reject the job: the picture in an entry does not change any more."""
        self.reject(job, error)

    def _finish(self, entry: HeldEntry, answer: Words, dead: Sequence[str | bytes] = ()) -> None:
        if entry.lost:
            self._raise_lost(entry)
        try:
            result = self._group.finish(
                entry.entry_id, answer, dead, keep=self._keep, max_answers=self._max_answers
            )
        except RedisUnavailableError as error:
            entry.tried = entry.tried or error.errno == errno.ENOTCONN
            raise
        # 0 after a broken connection: the first attempt was done on the server, or the worker that
        # took the entry over meanwhile has answered it.
        if result < 0 or (result == 0 and not entry.tried):
            self._raise_lost(entry)
        self._held.remove(entry)

    def _raise_lost(self, entry: HeldEntry) -> None:
        self._held.remove(entry)
        raise ClaimLostError(
            "another worker has taken the entry over; the result computed here is dropped",
            place=entry.entry_id,
        )

    def _release(self, entry: HeldEntry, deliveries: int) -> None:
        try:
            released = self._group.release(
                entry.entry_id, deliveries, self._lease_ms + _RELEASED_MS
            )
        finally:
            self._held.remove(entry)  # where Redis is unreachable, the entry's lease expires
        self._reader.check_soon()
        if not released:
            raise ClaimLostError("another worker has taken the entry over", place=entry.entry_id)


def _answer_head(entry: HeldEntry) -> Words:
    sender = entry.entry_id if entry.request.sender is None else entry.request.sender
    return ["id", sender.encode("utf-8", "replace"), "entry", entry.entry_id]
