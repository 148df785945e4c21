"""Redis publish/subscribe as a door, as Waikato's scripts speak it: lossy, because the channel itself is.

A message that nobody listens to is gone, and the server cannot be told to wait. So a thread takes everything in at
once, keeps a bounded part of it, and drops the oldest beyond that; what is dropped is counted and logged. What must not
get lost goes through streams (`redis_stream`).

What can still go wrong here: everything that was sent while Redis was away, or while this door was; and what it had not
answered when it ended. A message of more than 32 MB ends the connection of who listens, if Redis is set as it comes.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loguru import logger

from sam_poll.doors import redis_messages as messages
from sam_poll.doors.redis_link import MAX_BYTES, Link, Pauses
from sam_poll.errors import InputError, PoisonError, SamPollError
from sam_poll.stats import Pulse
from sam_poll.types import Document, Job

_TICK_S = 0.1
_LISTEN_S = 0.5
_TELL_S = 10.0  # at most one line about drops in so many seconds


@dataclass(eq=False)
class _Message:
    """A message that waits, or is at work."""

    number: int
    data: bytes
    attempt: int = 1
    asked: messages.Asked | None = None


class PubSubDoor:
    """`with PubSubDoor(…)` subscribes. `source` may be a pattern (`images.*`), as with Waikato's.

    `parse` reads prompts; `formats` are those of the answers; `segmenter` is what `meta.segmenter` of an answer says
    beside the model's name. At most `keep` messages and `keep_mib` of them wait here.
    """

    def __init__(
        self,
        link: Link,
        source: str,
        target: str,
        *,
        parse: messages.Parse,
        segmenter: Mapping[str, Any] | None = None,
        keep: int = 100,
        keep_mib: int = 512,
        attempts: int = 3,
        formats: Collection[str] = (),
        pulse: Pulse | None = None,
    ) -> None:
        self._link, self._source, self._target = link, source, target
        self._parse, self._segmenter, self._attempts = parse, dict(segmenter or {}), attempts
        self._keep, self._keep_bytes, self._pulse = keep, keep_mib << 20, pulse or Pulse()
        self._formats = formats
        self._waiting: deque[_Message] = deque()
        self._bytes = 0
        self._changed = threading.Condition()
        self._numbers = itertools.count(1)
        self._end = threading.Event()
        self._subscribed = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="subscriber", daemon=True)
        self.dropped = 0
        self._told, self._told_at = 0, 0.0
        self._unheard = False
        self.last_scan, self.orphans, self.recovered = 0.0, 0, 0

    # ── what those see who look on ──

    @property
    def waiting(self) -> int:
        """Messages that have come and are not at work yet."""
        return len(self._waiting)

    @property
    def oldest_s(self) -> float:
        """Nobody asks how old a message is."""
        return 0.0

    # ── taking in ──

    def __enter__(self) -> PubSubDoor:
        """Subscribes. ShareError, SettingsError: the server is not there, or does not let us in."""
        self._link.prove()
        self._listener.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._listener.join(2 * _LISTEN_S + _TICK_S)
        self._tell(last=True)
        if left := self.waiting:
            logger.warning("{} messages were not answered and are lost", left)

    def wait_subscribed(self, timeout: float) -> bool:
        """Whether the server has confirmed the subscription, waiting for it."""
        return self._subscribed.wait(timeout)

    def _listen(self) -> None:
        pauses = Pauses()
        while not self._end.is_set():
            try:
                with self._link.told():
                    self._subscribe(pauses)
            except OSError as error:
                self._subscribed.clear()
                self._link.away(error)
                pauses.wait(self._end)
            except Exception as error:  # noqa: BLE001  a thread that ends silently would be a deaf worker
                logger.opt(exception=True).error("the subscriber failed and begins anew: {}", type(error).__name__)
                pauses.wait(self._end)

    def _subscribe(self, pauses: Pauses) -> None:
        """Subscribe, and take in what comes until the connection breaks."""
        pubsub = self._link.client.pubsub()
        try:
            pubsub.psubscribe(self._source)
            while not self._end.is_set():
                message = pubsub.get_message(timeout=_LISTEN_S)
                self.last_scan = time.time()
                if message is None:
                    pass
                elif message["type"] == "psubscribe":
                    logger.info("listening to {} on {}", self._source, self._link.address.shown)
                    self._link.here()
                    pauses.over()
                    self._subscribed.set()
                elif message["type"] == "pmessage":
                    self._take(message["data"])
                self._tell()
        finally:
            pubsub.close()

    def _take(self, data: bytes) -> None:
        with self._changed:
            self._waiting.append(_Message(next(self._numbers), data))
            self._bytes += len(data)
            # The newest stays, however large: it is here already.
            while len(self._waiting) > self._keep or (self._bytes > self._keep_bytes and len(self._waiting) > 1):
                self._bytes -= len(self._waiting.popleft().data)
                self.dropped += 1
            self._changed.notify()

    def _tell(self, last: bool = False) -> None:
        now = time.monotonic()
        if self.dropped > self._told and (last or now - self._told_at > _TELL_S):
            logger.warning(
                "{} messages dropped, the oldest first ({} in all): they come faster than they are answered",
                self.dropped - self._told,
                self.dropped,
            )
            self._told, self._told_at = self.dropped, now

    # ── the door ──

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """What has come, one by one, until `stop` is set."""
        while not stop.is_set():
            self._pulse.beat()
            message = self._next()
            if message is None:
                continue
            asked = message.asked or messages.of_message(message.data, self._parse)
            if message.attempt > self._attempts:
                reason = f"the process that worked on it has ended {self._attempts} times"
                asked = messages.Asked(sender=asked.sender, prompt=asked.prompt, fault=PoisonError(reason))
            message.asked, message.data = asked, b""  # held once
            yield asked.job(f"message-{message.number}", message, message.attempt)

    def _next(self) -> _Message | None:
        with self._changed:
            if not self._waiting:
                self._changed.wait(_TICK_S)
            if not self._waiting:
                return None
            message = self._waiting.popleft()
            self._bytes -= len(message.data)
            return message

    def deliver(self, job: Job, documents: Sequence[Document]) -> None:
        """Publish the answer. Trouble (an OSError) while Redis does not take it."""
        asked: messages.Asked = job.origin.asked
        body = messages.prediction(asked, messages.wanted(asked, documents, self._formats), self._segmenter)
        if len(body) > MAX_BYTES:
            remedy = "fewer objects or formats in one message, or a smaller picture"
            raise InputError(f"the answer has {len(body) >> 20} MiB, too much for Redis", remedy=remedy)
        self._publish(body)

    def reject(self, job: Job, error: SamPollError) -> None:
        """Publish the reason."""
        self._publish(messages.refusal(job.origin.asked, error, self._segmenter))

    def release(self, job: Job, trouble: OSError | None = None) -> None:
        """It waits again, before the others. It is only in memory: when the door ends, it is gone."""
        with self._changed:
            self._waiting.appendleft(job.origin)
            self._bytes += len(job.origin.data)
            self._changed.notify()

    def defer(self, job: Job, error: SamPollError) -> None:
        """Nobody is going to change a picture that is in the message."""
        self.reject(job, error)

    def abandon(self, job: Job) -> None:
        """It waits again, and the run that has ended its process counts."""
        job.origin.attempt += 1
        self.release(job)

    def _publish(self, body: bytes) -> None:
        heard = self._link.ask(lambda client: client.publish(self._target, body))
        if not heard and not self._unheard:
            logger.warning("nobody listens to {}: answers are lost", self._target)
        self._unheard = not heard
