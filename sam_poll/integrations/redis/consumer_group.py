"""The commands of one consumer of a Redis stream's consumer group, as methods.

Steps that must happen whole or not at all are scripts, which the server runs (`scripts`). All
methods raise RedisUnavailableError when the server does not do what it is sent.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from operator import methodcaller
from typing import Any, NamedTuple, TypeAlias

from sam_poll.integrations.redis import scripts
from sam_poll.integrations.redis.connection import RedisConnection, RedisUnavailableError

RELEASED = "released"
"""Name of the consumer that requeued entries are assigned to. No process has this name."""
_OWN_PENDING = 1000  # more entries than one worker holds at once
Fields: TypeAlias = dict[bytes, bytes]
Words: TypeAlias = list[str | bytes]


@dataclass(frozen=True, slots=True)
class StreamNames:
    """The names of the streams, and of the consumer group on `source`."""

    source: str = "sam:in"
    target: str = "sam:out"
    group: str = "sam_poll"

    @property
    def dead(self) -> str:
        """The stream of the dead letters: entries that ended too many processes."""
        return f"{self.source}:dead"


class Delivery(NamedTuple):
    """An entry that was delivered to this consumer. `attempt` is the number of its deliveries."""

    entry_id: str
    attempt: int
    fields: Fields


class PendingEntry(NamedTuple):
    """An entry that was delivered to some consumer, `deliveries` times, and is not acknowledged."""

    entry_id: str
    deliveries: int


class ConsumerGroup:
    """The consumer group `names.group` on the stream `names.source`, for one consumer of it.

    Thread-safe.
    """

    def __init__(self, connection: RedisConnection, names: StreamNames) -> None:
        self.connection = connection
        self.names = names
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        register = connection.client.register_script
        self._finish = register(scripts.FINISH)
        self._refresh = register(scripts.REFRESH)
        self._release = register(scripts.RELEASE)
        self._forget = register(scripts.FORGET)

    # ── the group ──

    def check_streams(self) -> None:
        """Check that the names for answers and dead letters are free, or those of streams."""
        for name in (self.names.target, self.names.dead):
            try:
                self.connection.call(methodcaller("xlen", name))
            except RedisUnavailableError as error:
                error.strerror = f"{error.strerror} ({name})"
                raise

    def create(self) -> None:
        """Create stream and group where they are missing.

        The group starts at the stream's beginning: entries sent before the first worker started
        count, too.
        """
        try:
            self.connection.call(self._create)
        except RedisUnavailableError as error:
            if "BUSYGROUP" not in str(error.strerror):  # created by another worker meanwhile
                raise

    def _create(self, client: Any) -> None:
        names = self.names
        if client.exists(names.source) and names.group in self._groups(client):
            return
        client.xgroup_create(names.source, names.group, id="0", mkstream=True)

    def _groups(self, client: Any) -> dict[str, Any]:
        return {group["name"].decode(): group for group in client.xinfo_groups(self.names.source)}

    def backlog(self) -> int:
        """Return the number of entries that were not delivered to any consumer yet."""
        return self.connection.call(self._backlog)

    def _backlog(self, client: Any) -> int:
        group = self._groups(client).get(self.names.group, {})
        lag = group.get("lag")
        if lag is None:  # unknown to older servers, and after entries were deleted
            lag = client.xlen(self.names.source) - group.get("pending", 0)
        return int(lag)

    # ── taking entries ──

    def read_new(self, block_s: float) -> Delivery | None:
        """Return the next entry that was never delivered; wait up to `block_s` for one."""
        return self._read(">", int(block_s * 1000))

    def read_own(self, entry_id: str) -> Delivery | None:
        """Return an entry that was delivered to this consumer before, with attempt 1.

        Returns None if the entry is another consumer's now, or was deleted.
        """
        delivery = self._read(_id_before(entry_id), None)
        return delivery if delivery and delivery.entry_id == entry_id else None

    def _read(self, after: str, block_ms: int | None) -> Delivery | None:
        names = self.names
        reply = self.connection.call(
            lambda client: client.xreadgroup(
                names.group, self.consumer, {names.source: after}, count=1, block=block_ms
            )
        )
        for _, entries in reply or ():
            for entry_id, fields in entries:
                if fields:  # else the entry was deleted
                    return Delivery(entry_id.decode(), 1, fields)
        return None

    def own_pending(self) -> list[PendingEntry]:
        """Return the entries that were delivered to this consumer and are not acknowledged."""
        return self._pending(_OWN_PENDING, consumername=self.consumer)

    def idle_pending(self, count: int, idle_ms: int) -> list[PendingEntry]:
        """Return up to `count` entries, of any consumer, that were not refreshed for `idle_ms`."""
        return self._pending(count, idle=idle_ms)

    def _pending(self, count: int, **conditions: Any) -> list[PendingEntry]:
        names = self.names
        reply = self.connection.call(
            lambda client: client.xpending_range(
                names.source, names.group, "-", "+", count, **conditions
            )
        )
        return [
            PendingEntry(entry["message_id"].decode(), entry["times_delivered"]) for entry in reply
        ]

    def claim(self, entry: PendingEntry, idle_ms: int) -> Delivery | None:
        """Take an entry over, unless another worker was faster. Returns None then."""
        names = self.names
        reply = self.connection.call(
            lambda client: client.xclaim(
                names.source, names.group, self.consumer, idle_ms, [entry.entry_id]
            )
        )
        for entry_id, fields in reply:
            if (
                entry_id is not None and fields is not None
            ):  # else deleted; older servers list these
                return Delivery(entry_id.decode(), entry.deliveries + 1, fields)
        return None

    # ── ending entries ──

    def finish(
        self,
        entry_id: str,
        answer: Words,
        dead: Sequence[str | bytes],
        *,
        keep: bool,
        max_answers: int,
    ) -> int:
        """Write answer and dead letter, acknowledge and (unless `keep`) delete the entry: one step.

        Returns 1 if that was done, 0 if no consumer has the entry any more, -1 if another one has
        it, 2 if the group is lost and only the answer was written.
        """
        arguments = [
            entry_id,
            "keep" if keep else "",
            str(max_answers),
            str(len(dead)),
            *dead,
            *answer,
        ]
        return int(self._run(self._finish, arguments, [self.names.target, self.names.dead]))

    def refresh(self, entry_ids: Sequence[str]) -> list[str]:
        """Reset the idle time of entries. Returns those that are not this consumer's any more."""
        return [entry_id.decode() for entry_id in self._run(self._refresh, entry_ids)]

    def release(self, entry_id: str, deliveries: int, idle_ms: int) -> bool:
        """Assign an entry to `RELEASED`, as idle for `idle_ms`: any worker may claim it then.

        `deliveries` is the number of deliveries that it then has. Returns False if the entry was
        not this consumer's.
        """
        return bool(self._run(self._release, [entry_id, RELEASED, str(idle_ms), str(deliveries)]))

    def _run(self, script: Any, arguments: Sequence[str | bytes], keys: Sequence[str] = ()) -> Any:
        args = [self.names.group, self.consumer, *arguments]
        return self.connection.call(lambda _: script(keys=[self.names.source, *keys], args=args))

    # ── consumers ──

    def forget(self, consumer: str | bytes) -> None:
        """Remove a consumer from the group, unless it has pending entries: these would be lost."""
        args = [self.names.group, consumer]
        self.connection.call(lambda _: self._forget(keys=[self.names.source], args=args))

    def forget_idle_consumers(self, idle_s: float) -> None:
        """Remove the consumers without pending entries that were idle for `idle_s`."""
        names = self.names
        consumers = self.connection.call(
            lambda client: client.xinfo_consumers(names.source, names.group)
        )
        for consumer in consumers:
            if consumer["idle"] > idle_s * 1000 and not consumer["pending"]:
                self.forget(consumer["name"])


def _id_before(entry_id: str) -> str:
    """Return the greatest possible entry id below this one. Ids are `<milliseconds>-<serial>`."""
    milliseconds, _, serial = entry_id.partition("-")
    if int(serial):
        return f"{milliseconds}-{int(serial) - 1}"
    return f"{int(milliseconds) - 1}-{(1 << 64) - 1}"
