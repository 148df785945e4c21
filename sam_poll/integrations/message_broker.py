"""Dramatiq's broker on Redis or on RabbitMQ, with checked messages and alarms.

Consumers are wrapped: what no actor of this program can be called with goes to the dead letters
before Dramatiq acts on it, and the alarm is active while the server cannot be used.

Limitations: Dramatiq cannot delete a message on Redis whose id cannot be read. Such a message has
left the queue when it is fetched; its bytes are deleted, through `Broker.flush`, when a worker
finds that queue empty, and the dead letters with them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from loguru import logger

from sam_poll.core.alarms import Alarms
from sam_poll.core.errors import SettingsError
from sam_poll.core.text import shown
from sam_poll.integrations.redis import connection as redis_server
from sam_poll.integrations.server import (
    ServerConnection,
    ServerKind,
    ServerUnavailableError,
    ServerUrl,
)

try:
    from dramatiq import Broker, Consumer
    from dramatiq.brokers.rabbitmq import RabbitmqBroker
    from dramatiq.brokers.redis import RedisBroker
    from dramatiq.common import q_name
    from dramatiq.errors import BrokerConnectionError, ConnectionClosed, DecodeError
    from dramatiq.middleware import Middleware

    from sam_poll.integrations.rabbitmq.connection import RabbitConnection
except ModuleNotFoundError as missing:
    raise SettingsError(
        f"a cluster needs the packages dramatiq and pika ({missing})",
        place="cluster",
        remedy="pip install 'sam_poll[cluster]'",
    ) from None

URL = "SAM_POLL_BROKER_URL"
"""Environment variable with the broker's URL; without it that of Redis counts."""
_AMQP_PORTS = {"amqp": 5672, "amqps": 5671}
find_url = ServerKind(
    "a Redis or RabbitMQ server",
    f"{redis_server.URL_FORM}; for RabbitMQ amqp://, and a virtual host as number",
    {**redis_server.DEFAULT_PORTS, **_AMQP_PORTS},
    [URL, redis_server.URL],
    redis_server.DEFAULT,
).find
_NAMESPACE = "sam_poll"
_MAINTENANCE = 100_000  # of a million commands, so many make Dramatiq look for dead consumers
_MOST_WARNINGS = 100
_ID = "redis_message_id"  # on Redis, the option by which a message is acknowledged


FaultFinder: TypeAlias = Callable[[Any, str, Collection[str]], str | None]
"""Returns what is wrong with a message, from its queue, for a worker with these actors, if any."""


class CheckedBroker(Broker):
    """Dramatiq's broker on one server. Errors of the server are ConnectionClosed, with an alarm.

    - `server`: knows the errors of its client library, and holds the alarm.
    - `fault_of`: finds out which messages go to the dead letters.
    - `prefix`: begins the names of queues.
    """

    prefix = ""

    def __init__(self, server: Any, fault_of: FaultFinder, **options: Any) -> None:
        super().__init__(**options)
        self.server: ServerConnection = server
        self.fault_of = fault_of
        self._errors = (BrokerConnectionError, *self.server.errors)
        self._warned: set[str] = set()

    def name_on_server(self, queue: str) -> str:
        """Return the name by which the server's own tools know a queue."""
        return queue

    def length(self, queue: str) -> int:
        """Return the number of messages that no worker has fetched."""
        raise NotImplementedError

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Raise the alarm for an error of the server, and ConnectionClosed with its reason."""
        try:
            yield
        except self._errors as error:
            # Dramatiq's error holds that of the client library.
            found = next((one for one in error.args if isinstance(one, Exception)), error)
            if not isinstance(found, ServerUnavailableError):
                found = self.server.unavailable(found)
            self.server.report_unavailable(found)
            raise ConnectionClosed(found) from None

    def warn_once(self, text: str) -> None:
        """Log a warning that has not been logged before."""
        if text not in self._warned and len(self._warned) < _MOST_WARNINGS:
            self._warned.add(text)
            logger.warning("{}", shown(text))

    def enqueue(self, message: Any, *, delay: int | None = None) -> Any:
        """Send a message. Raises ConnectionClosed."""
        with self.reported():
            return super().enqueue(message, delay=delay)

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30000) -> Consumer:
        """Return a consumer that checks messages. Raises ConnectionClosed."""
        with self.reported():
            return CheckedConsumer(self, super().consume(queue_name, prefetch, timeout), queue_name)


class _CheckedRedis(CheckedBroker, RedisBroker):
    def __init__(
        self, address: ServerUrl, alarms: Alarms, lease_s: float, fault_of: FaultFinder, **more: Any
    ) -> None:
        redis = redis_server.RedisConnection(address, alarms)
        super().__init__(
            redis,
            fault_of,
            client=redis.client,
            namespace=_NAMESPACE,
            heartbeat_timeout=int(lease_s * 1000),
            maintenance_chance=_MAINTENANCE,
            **more,
        )

    def name_on_server(self, queue: str) -> str:
        return f"{_NAMESPACE}:{queue}"

    def length(self, queue: str) -> int:
        with self.reported():
            return int(self.client.llen(self.name_on_server(queue)))

    def close(self) -> None:
        with suppress(Exception):  # of a server that is unreachable
            self.client.close()


class _CheckedRabbit(CheckedBroker, RabbitmqBroker):
    prefix = f"{_NAMESPACE}."

    def __init__(
        self, address: ServerUrl, alarms: Alarms, lease_s: float, fault_of: FaultFinder, **more: Any
    ) -> None:
        rabbit = RabbitConnection(address, alarms, heartbeat_s=max(1, int(lease_s)))
        # Messages are not confirmed one by one: what is lost is sent again.
        super().__init__(rabbit, fault_of, **more)
        self.parameters = rabbit.parameters

    def length(self, queue: str) -> int:
        with self.reported():
            try:
                return int(self.get_queue_message_counts(queue)[0])
            except Exception:
                del self.connection  # Dramatiq then makes another one
                raise

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30000) -> Consumer:
        # The server may have lost the queue. Dramatiq finds out by an error, and pauses.
        self.queues_pending.add(q_name(queue_name))
        return super().consume(queue_name, prefetch, timeout)


def connect(
    address: ServerUrl,
    alarms: Alarms,
    lease_s: float,
    *,
    fault_of: FaultFinder,
    middleware: Iterable[Middleware] = (),
) -> CheckedBroker:
    """Return the broker on the server at an address, chosen by its scheme; nothing is connected.

    A client without a sign of life for `lease_s`, about, loses the messages that it has fetched.
    """
    is_rabbit = address.url.partition(":")[0] in _AMQP_PORTS
    make = _CheckedRabbit if is_rabbit else _CheckedRedis
    return make(address, alarms, lease_s, fault_of, middleware=list(middleware))


def counters() -> list[Any]:
    """Return Dramatiq's middleware that counts messages, without a server of its own.

    Empty without the package `prometheus_client`.
    """
    try:
        import prometheus_client  # noqa: F401  first, or Dramatiq has it count in files
        from dramatiq.middleware.prometheus import Prometheus
    except ModuleNotFoundError:
        return []

    class Counters(Prometheus):
        forks = ()  # functions that Dramatiq runs in further processes

        def after_process_boot(self, broker: Any) -> None:
            super().after_process_boot(broker)
            for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"):
                os.environ.pop(name, None)  # or further processes count in files

        @property
        def metrics(self) -> list[Any]:
            """The metrics, once a process has booted."""
            return [value for value in vars(self).values() if hasattr(value, "collect")]

    return [Counters()]


class CheckedConsumer(Consumer):
    """Another consumer of one queue; hands out the messages that an actor can be called with."""

    def __init__(self, broker: CheckedBroker, consumer: Any, queue: str) -> None:
        self._broker = broker
        self._consumer = consumer
        self._queue = queue
        self._unreadable = False

    def __next__(self) -> Any:
        begun = time.monotonic()  # the consumer pauses after an empty answer
        try:
            with self._broker.reported():
                message = next(self._consumer)
                # A consumer with enough messages in work does not ask the server.
                if not getattr(self._consumer, "outstanding_message_count", 0):
                    self._delete_unreadable()
                    self._broker.server.report_available(begun)
        except (DecodeError, AttributeError, KeyError, TypeError) as error:
            self._broker.warn_once(
                f"a message in {self._queue} is not one of Dramatiq's ({type(error).__name__}); it "
                "is dropped, and deleted with the queue's dead letters when the queue is next empty"
            )
            self._unreadable = True
            return None
        fault = message and self._broker.fault_of(message, self._queue, self._broker.actors)
        if not fault:
            return message
        self._broker.warn_once(f"a message goes to the dead letters of {self._queue}: {fault}")
        if isinstance(message.options, dict) and not isinstance(message.options.get(_ID, ""), str):
            message.options.pop(_ID)
        self.nack(message)
        return None

    def _delete_unreadable(self) -> None:
        """Delete messages without a readable id, when nothing else is in the queue.

        What other workers have fetched, they have.
        """
        if self._unreadable:
            self._broker.flush(self._queue)
            self._unreadable = False

    def ack(self, message: Any) -> None:
        """Acknowledge a message. One that cannot be comes again, and then does nothing."""
        self._tell(self._consumer.ack, message)

    def nack(self, message: Any) -> None:
        """Send a message to the dead letters."""
        self._tell(self._consumer.nack, message)

    def requeue(self, messages: Iterable[Any]) -> None:
        """Put messages back into the queue."""
        self._tell(self._consumer.requeue, messages)

    def _tell(self, tell: Callable[[Any], None], what: Any) -> None:
        try:
            with self._broker.reported():
                tell(what)
        except ConnectionClosed as error:
            # Dramatiq would hold up a thread, and the end of the process, until the server is back.
            logger.debug("{}: {}", self._queue, error)
        except (KeyError, TypeError):  # without an id on Redis
            self._unreadable = True

    def close(self) -> None:
        """Close the connection, if the consumer has one of its own. Raises ConnectionClosed."""
        try:
            self._consumer.close()
        finally:
            # Dramatiq leaves it open where RabbitMQ has closed the channel: for a missing queue.
            connection = getattr(self._consumer, "connection", None)
            if connection is not None and connection.is_open:
                with self._broker.reported():  # any other error ends Dramatiq's thread for good
                    connection.close()
