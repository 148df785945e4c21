"""Consumers of a RabbitMQ server that has lost its queues, or breaks off."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import dramatiq
import pika
import pytest
from dramatiq.errors import ConnectionClosed

from sam_poll.core.alarms import Alarms
from sam_poll.integrations import message_broker
from sam_poll.integrations.server import ServerUrl
from tests.conftest import wait_until
from tests.support.cluster_sources import connect
from tests.support.rabbit_server import RabbitServer

QUEUE = "sam_poll.lost-rest"


@pytest.fixture
def broker(rabbit: RabbitServer) -> Iterator[Any]:
    with closing(connect(rabbit)) as broker:
        broker.declare_queue(QUEUE)
        yield broker


def lose_the_queue(rabbit: RabbitServer) -> None:
    with pika.BlockingConnection(pika.URLParameters(rabbit.url)) as connection:
        connection.channel().queue_delete(QUEUE)


def message() -> dramatiq.Message[Any]:
    return dramatiq.Message(queue_name=QUEUE, actor_name="run", args=(), kwargs={}, options={})


def test_queue_that_the_server_has_lost_is_there_for_the_next_consumer(
    rabbit: RabbitServer, broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.consume(QUEUE, 4, 50).close()
    lose_the_queue(rabbit)
    consumer = broker.consume(QUEUE, 4, 50)
    assert next(consumer) is None
    broker.enqueue(message())
    monkeypatch.setattr(broker, "fault_of", lambda *message: None)
    wait_until(lambda: next(consumer))
    consumer.close()


def test_consumer_whose_channel_the_server_has_closed_leaves_no_connection_open(
    rabbit: RabbitServer, broker: Any
) -> None:
    consumer = broker.consume(QUEUE, 4, 50)
    lose_the_queue(rabbit)  # before it subscribes to the queue
    with pytest.raises(ConnectionClosed, match="no queue"):
        next(consumer)
    with suppress(ConnectionClosed):
        consumer.close()
    del consumer
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        gc.collect()
    assert [str(one.message) for one in warned if one.category is ResourceWarning] == []


def test_connection_that_breaks_while_it_is_closed_does_not_end_dramatiqs_thread() -> None:
    class Closing:
        is_open = True

        def close(self) -> None:
            raise pika.exceptions.StreamLostError("reset by peer")

    class Consumer(dramatiq.Consumer):
        connection = Closing()

        def close(self) -> None:
            raise ConnectionClosed(pika.exceptions.ChannelClosedByBroker(404, "no queue"))

    address = ServerUrl("amqp://localhost:1", "amqp://localhost:1/")
    broker = message_broker.connect(address, Alarms(), 30.0, fault_of=lambda *message: None)
    consumer = message_broker.CheckedConsumer(broker, Consumer(), QUEUE)
    with pytest.raises(ConnectionClosed, match="reset by peer"):
        consumer.close()


def test_consumer_that_paused_while_the_server_went_away_does_not_end_the_alarm() -> None:
    address = ServerUrl("amqp://localhost:1", "amqp://localhost:1/")
    alarms = Alarms()
    broker = message_broker.connect(address, alarms, 30.0, fault_of=lambda *message: None)

    class Consumer(dramatiq.Consumer):
        """Its server answers that there is nothing, and is then found dead by another consumer."""

        def __next__(self) -> None:
            if broker.server.alarm not in alarms:
                broker.server.report_unavailable(OSError("gone"))

    consumer = message_broker.CheckedConsumer(broker, Consumer(), QUEUE)
    assert next(consumer) is None
    assert broker.server.alarm in alarms
    assert next(consumer) is None
    assert broker.server.alarm not in alarms
