"""Jobs from Redis publish/subscribe, in the messages of Waikato's scripts.

Lossy, because publish/subscribe is.

Redis drops a message that no client listens for, and cannot be made to wait. So a thread receives
messages as fast as they come, a bounded part of them waits here, and beyond that the oldest are
dropped; their number is logged. Data that must not be lost goes through streams (`stream`).

Limitations: lost are messages sent while Redis was unreachable or this source was not running, and
those not answered when it ends. With its default settings Redis closes the connection of a listener
for a message of more than 32 MB.
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

from sam_poll.core.backoff import Backoff
from sam_poll.core.errors import InputError, PoisonError, SamPollError
from sam_poll.core.stats import LoopHeartbeat
from sam_poll.core.types import Job, OutputFile
from sam_poll.integrations.redis import messages
from sam_poll.integrations.redis.connection import MAX_BYTES, RedisConnection

_TAKE_S = 0.1  # how long a turn of `jobs` waits for a message
_LISTEN_S = 0.5
_DROP_LOG_S = 10.0  # shortest time between two log lines about dropped messages


@dataclass(eq=False)
class _Message:
    """A message that waits, or whose job is being worked on.

    `request` is set once the message is parsed.
    """

    number: int
    data: bytes
    attempt: int = 1
    request: messages.RedisRequest | None = None


class _MessageBuffer:
    """The messages that wait, bounded in number and bytes; the oldest are dropped. Thread-safe."""

    def __init__(self, max_count: int, max_bytes: int) -> None:
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._messages: deque[_Message] = deque()
        self._bytes = 0
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._messages)

    def receive(self, data: bytes) -> None:
        """Append a message; drop the oldest ones beyond the bounds."""
        with self._changed:
            self._messages.append(_Message(next(self._numbers), data))
            self._bytes += len(data)
            # The newest message stays, however large it is: it is in memory already.
            while len(self._messages) > self._max_count or (
                self._bytes > self._max_bytes and len(self._messages) > 1
            ):
                self._bytes -= len(self._messages.popleft().data)
                self.dropped += 1
            self._changed.notify()

    def put_back(self, message: _Message) -> None:
        """Insert a message before all others."""
        with self._changed:
            self._messages.appendleft(message)
            self._bytes += len(message.data)
            self._changed.notify()

    def take(self, timeout_s: float) -> _Message | None:
        """Remove and return the first message; None if there is none within `timeout_s`."""
        with self._changed:
            if not self._messages:
                self._changed.wait(timeout_s)
            if not self._messages:
                return None
            message = self._messages.popleft()
            self._bytes -= len(message.data)
            return message


class RedisPubSubSource:
    """A job source.

    As a context manager it subscribes to `source`, which may be a pattern (`images.*`). Messages on
    `target` are answers, and never taken, also where the pattern matches it.

    `target`: the channel of the answers. `parse` parses prompts. `segmenter` overrides the keys of
    `meta.segmenter` in answers. At most `keep` messages, and `keep_mib` MiB of them, wait.
    `attempts`: a message that ended this many processes is rejected. `formats`: the formats of the
    answers. `pulse` beats while messages are taken.

    A job's `source_ref` is its `_Message`.
    """

    def __init__(
        self,
        connection: RedisConnection,
        source: str,
        target: str,
        *,
        parse: messages.Parse,
        segmenter: Mapping[str, Any] | None = None,
        keep: int = 100,
        keep_mib: int = 512,
        attempts: int = 3,
        formats: Collection[str] = (),
        pulse: LoopHeartbeat | None = None,
    ) -> None:
        self._connection = connection
        self._source = source
        self._target = target
        self._parse = parse
        self._segmenter = dict(segmenter or {})
        self._attempts = attempts
        self._formats = formats
        self._pulse = pulse or LoopHeartbeat()
        self._buffer = _MessageBuffer(keep, keep_mib << 20)
        self._end = threading.Event()
        self._subscribed = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="subscriber", daemon=True)
        self._drops_logged = 0
        self._drops_logged_at = 0.0
        self._no_listeners = False
        self.last_scan = 0.0
        """Wall-clock time at which the subscription was last seen to work."""
        self.orphans = 0
        """Always 0: a channel has no files without a partner."""
        self.recovered = 0
        """Always 0: messages of a worker that died are lost."""

    # ── for metrics and status ──

    @property
    def waiting(self) -> int:
        """Number of messages received and not taken yet."""
        return len(self._buffer)

    @property
    def oldest_s(self) -> float:
        """Always 0: the age of waiting messages is not measured."""
        return 0.0

    @property
    def dropped(self) -> int:
        """Number of messages dropped since the start."""
        return self._buffer.dropped

    # ── receiving ──

    def __enter__(self) -> RedisPubSubSource:
        """Check the server and start to listen.

        Raises ShareError if the server is unreachable, SettingsError if it refuses access.
        """
        self._connection.prove()
        self._listener.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._listener.join(2 * _LISTEN_S + _TAKE_S)
        self._log_drops()
        if self.waiting:
            logger.warning("{} messages were not answered and are lost", self.waiting)
        self._connection.close()

    def wait_subscribed(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds for the subscription; return whether it is confirmed."""
        return self._subscribed.wait(timeout)

    def _listen(self) -> None:
        backoff = Backoff()
        pubsub = self._connection.client.pubsub()
        while not self._end.is_set():
            try:
                with self._connection.translated_errors():
                    self._receive(pubsub, backoff)
            except OSError as error:
                # Not closed: the library has subscribed again before it raises the error of a lost
                # connection, if it can, and messages may have arrived since.
                self._subscribed.clear()
                self._connection.report_unavailable(error)
                backoff.wait(self._end)
            except Exception as error:  # noqa: BLE001  without this thread no message arrives
                logger.opt(exception=True).error(
                    "the subscriber failed and subscribes again: {}", type(error).__name__
                )
                pubsub.close()
                backoff.wait(self._end)
        pubsub.close()

    def _receive(self, pubsub: Any, backoff: Backoff) -> None:
        """Receive messages until the connection breaks or this source ends."""
        if not pubsub.subscribed:
            pubsub.psubscribe(self._source)
        while not self._end.is_set():
            event = pubsub.get_message(timeout=_LISTEN_S)
            self.last_scan = time.time()
            kind = event["type"] if event else None
            if kind == "psubscribe":
                address = self._connection.address.shown
                logger.info("listening to {} on {}", self._source, address)
                self._connection.report_available()
                backoff.reset()
                self._subscribed.set()
            elif kind == "pmessage" and event["channel"] != self._target.encode():
                self._buffer.receive(event["data"])
            if time.monotonic() - self._drops_logged_at > _DROP_LOG_S:
                self._log_drops()

    def _log_drops(self) -> None:
        dropped = self.dropped
        if dropped > self._drops_logged:
            logger.warning(
                "{} messages dropped, the oldest first ({} in all): "
                "they arrive faster than they are answered",
                dropped - self._drops_logged,
                dropped,
            )
            self._drops_logged = dropped
            self._drops_logged_at = time.monotonic()

    # ── jobs ──

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Yield the jobs of the messages, in their order, until `stop` is set."""
        while not stop.is_set():
            self._pulse.beat()
            message = self._buffer.take(_TAKE_S)
            if message is not None:
                yield self._job(message)

    def _job(self, message: _Message) -> Job:
        request = message.request or messages.parse_message(message.data, self._parse)
        if message.attempt > self._attempts:
            error = PoisonError(
                f"the process that worked on it has ended {self._attempts} times",
                remedy="look at the worker's log; try another picture",
            )
            request = messages.RedisRequest(
                sender=request.sender, prompt=request.prompt, error=error
            )
        message.request = request
        message.data = b""  # its content is held once, in the request
        return request.job(f"message-{message.number}", message, message.attempt)

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        """Publish the answer. Raises RedisUnavailableError while Redis does not take it."""
        request: messages.RedisRequest = job.source_ref.request
        outputs = messages.select_outputs(request, documents, self._formats)
        body = messages.encode_prediction(request, outputs, self._segmenter)
        if len(body) > MAX_BYTES:
            raise InputError(
                f"the answer has {len(body) >> 20} MiB, too much for Redis",
                remedy="select fewer objects or formats, or send a smaller picture",
            )
        self._publish(body)

    def reject(self, job: Job, error: SamPollError) -> None:
        """Publish the reason. Raises RedisUnavailableError while Redis does not take it."""
        self._publish(messages.encode_refusal(job.source_ref.request, error, self._segmenter))

    def requeue(self, job: Job, trouble: OSError | None = None) -> None:
        """Put the message before all others.

        It is in memory only, and lost when this source ends.
        """
        self._buffer.put_back(job.source_ref)

    def defer(self, job: Job, error: SamPollError) -> None:
        """Reject the job: the picture in a message does not change any more."""
        self.reject(job, error)

    def fail_attempt(self, job: Job) -> None:
        """Put the message before all others, and count the attempt that ended its process."""
        job.source_ref.attempt += 1
        self.requeue(job)

    def _publish(self, body: bytes) -> None:
        listeners = self._connection.call(lambda client: client.publish(self._target, body))
        if not listeners and not self._no_listeners:
            logger.warning("no client listens to {}: answers are lost", self._target)
        self._no_listeners = not listeners
