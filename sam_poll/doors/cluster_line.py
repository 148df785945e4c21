"""The line on Redis, through Dramatiq, in which claims wait for a worker: `{claim, generation}` and nothing else.

The share says what is to be done and by whom; the line only says where to look next. A message that is lost is sent
again by who waits for it, one that comes twice or late names a generation that is gone, and is dropped. So it does not
matter what Redis forgets. A line is called after its share: workers of another share never see it.

What can still go wrong here: whether a message is still there is asked of Dramatiq's own hash of messages, which is no
part of what it promises (`tests/test_cluster_line.py` would tell). A worker's heartbeat is compared by the wall clocks
of the machines: one that is wrong by more than a lease has messages handed out twice, or late.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from loguru import logger

from sam_poll.doors.claims import Found
from sam_poll.doors.layout import Layout
from sam_poll.doors.redis_link import Link, Trouble
from sam_poll.errors import SettingsError
from sam_poll.fs import NAME_MAX

try:
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker
    from dramatiq.errors import DecodeError, DramatiqError
except ModuleNotFoundError as missing:
    raise SettingsError(
        f"many machines need the package dramatiq ({missing})",
        place="cluster",
        remedy="pip install 'sam_poll[cluster]'",
    ) from None

NAMESPACE = "sam_poll"
FIRST, REST = True, False
_ACTOR = "run"
_CONSUMER_MS = 1  # how long Dramatiq's consumer may sleep when there is nothing; the pauses are ours
_LONGEST = 4096  # characters of a path
_MAINTENANCE = 100_000  # of a million commands: so many look for consumers that are gone


@dataclass(frozen=True, slots=True)
class Word:
    """A message: which claim (its name's folder, relative to `work/`), and in which generation it waits."""

    claim: str
    generation: int
    raw: Any = None
    first: bool = REST

    def below(self, layout: Layout) -> Found | None:
        """The claim's name on this share; None where the name cannot be a claim's. Whoever reaches Redis
        may write into it, so nothing outside of `work/` is ever looked at."""
        parts = self.claim.split("/")
        if not all(map(_is_name, parts)) or len(self.claim) > _LONGEST:
            return None
        if not parts[-1].startswith(".") or any(part.startswith(".") for part in parts[:-1]):
            return None
        return Found("/".join(parts[:-1]), layout.work / self.claim)


def _word(message: Any, first: bool) -> Word | None:
    """What a message says; None where it is none of ours."""
    given, options = message.kwargs, message.options
    if not isinstance(given, dict) or not isinstance(options, dict):
        return None
    claim, generation, number = given.get("claim"), given.get("generation"), options.get("redis_message_id")
    if not isinstance(claim, str) or type(generation) is not int:
        return None
    if not isinstance(number, str) or not isinstance(message.message_id, str):  # Dramatiq knows it again by these
        return None
    return Word(claim, generation, message, first)


def _is_name(part: str) -> bool:
    """Whether a file may be called so."""
    try:
        length = len(os.fsencode(part))
    except UnicodeEncodeError:  # half a surrogate pair, which no file's name decodes to
        return False
    return 0 < length <= NAME_MAX and part not in (".", "..") and "\0" not in part


class Line:
    """The line of one share, for one thread that sends and one that takes. Trouble from all: Redis is away."""

    def __init__(self, link: Link, share: str, lease_s: float) -> None:
        self.link, self._lease_ms = link, int(lease_s * 1000)
        self._names = {FIRST: f"{share}-first", REST: f"{share}-rest"}
        self._sender = self._broker()
        self._taker: dict[bool, Any] = {}

    def _broker(self) -> RedisBroker:
        with self.link.told():
            return RedisBroker(
                client=self.link.client,
                middleware=[],
                namespace=NAMESPACE,
                heartbeat_timeout=self._lease_ms,
                maintenance_chance=_MAINTENANCE,
            )

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with self.link.told():
                yield
        except DramatiqError as error:
            said = error.args[0] if error.args else None  # it wraps what the client has said
            with self.link.told():
                raise said if isinstance(said, Exception) else ConnectionError(str(error)) from None

    # ── sending ──

    def send(self, word: Word) -> str:
        """Put it into the line; returns the number by which `known` knows it."""
        given = {"claim": word.claim, "generation": word.generation}
        message: Any = dramatiq.Message(
            queue_name=self._names[word.first], actor_name=_ACTOR, args=(), kwargs=given, options={}
        )
        with self._told():
            return str(self._sender.enqueue(message).options["redis_message_id"])

    def known(self, numbers: Sequence[tuple[bool, str]]) -> set[str]:
        """Those that are still in the line, or in the hands of somebody who has not taken the claim yet. Redis is asked
        in any case."""
        with self._told():
            pipe = self.link.client.pipeline(transaction=False)
            pipe.ping()  # also where there is nothing to ask, it is proved that somebody answers
            for first, number in numbers:
                pipe.hexists(f"{NAMESPACE}:{self._names[first]}.msgs", number)
            found = pipe.execute()[1:]
        return {number for (_, number), there in zip(numbers, found, strict=True) if there}

    # ── taking ──

    def take(self) -> Word | None:
        """The next one, `first` before the others; None: there is none now."""
        try:
            with self._told():
                for first, consumer in self._consumers().items():
                    word = self._next(consumer, first)
                    if word:
                        return word
                return None
        except Trouble:
            # What Redis has given and we have not got is ours by name: under another one it comes back after a lease.
            self._taker = {}
            raise

    def _consumers(self) -> dict[bool, Any]:
        if not self._taker:
            broker = self._broker()
            self._taker = {
                first: broker.consume(name, prefetch=1, timeout=_CONSUMER_MS) for first, name in self._names.items()
            }
        return self._taker

    def _next(self, consumer: Any, first: bool) -> Word | None:
        with suppress(DecodeError, AttributeError, TypeError, KeyError):
            message: Any = next(consumer)
            if message is None:
                return None
            if word := _word(message, first):
                return word
        logger.warning("a message that is none of ours was in the line; it is dropped")
        self._drop(consumer)
        return None

    def _drop(self, consumer: Any) -> None:
        """Take out of the line what was taken from it and cannot be read, so that nobody gets it again.

        Its own number cannot be believed. Nothing else is in our hands: one message at a time is.
        """
        client, queue = self.link.client, consumer.queue_name
        held = f"{NAMESPACE}:__acks__.{consumer.broker.broker_id}.{queue}"
        for number in client.smembers(held):
            client.hdel(f"{NAMESPACE}:{queue}.msgs", number)
            client.srem(held, number)
        self._taker = {}  # the consumer counts what it has given out

    def taken(self, word: Word) -> None:
        """The claim bears the worker's name now, or is no longer what the message says: nobody needs it any more."""
        with self._told():
            self._consumers()[word.first].ack(word.raw)

    def back(self, word: Word) -> None:
        """It could not be started here: anybody may have it."""
        with self._told():
            consumer = self._consumers()[word.first]
            consumer.requeue([word.raw])
        self._taker = {}  # as if the consumer had been closed: it counts what it has given out

    def close(self) -> None:
        """Close the connections; of what is gone already nobody need hear."""
        try:
            self.link.close()
        except OSError as error:
            logger.debug("the connection is not closed: {}", error)
