"""The messages on both brokers: what they hold, and what is done with those of others."""

from __future__ import annotations

import json
import os
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pika
import pytest
from dramatiq.errors import ConnectionClosed
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.integrations import message_broker
from sam_poll.integrations.cluster.messages import queue_names
from sam_poll.share.claims.model import is_claim_path
from sam_poll.share.layout import Layout
from tests.conftest import Share, picture_bytes, wait_until
from tests.support import redis_server
from tests.support.cluster_sources import Door, connect, holds, watcher, worker

WORK = Layout.below(Path("/share")).work


class Raw:
    """A queue of a share as another program sees it: bytes in, bytes out."""

    def __init__(self, server: Any, share: str, first: bool = False) -> None:
        self._server = server
        self._is_redis = isinstance(server, redis_server.Server)
        self.queue = queue_names("" if self._is_redis else "sam_poll.", share)[first]

    def put(self, body: bytes, queue: str = "") -> None:
        queue = queue or self.queue
        if self._is_redis:
            number = f"x{time.monotonic_ns()}"
            body = body.replace(b"NUMBER", number.encode())
            both = self._server.client.pipeline(transaction=True)  # as Dramatiq writes them
            both.hset(f"sam_poll:{queue}.msgs", number, body)
            both.rpush(f"sam_poll:{queue}", number)
            both.execute()
            return
        with self._channel() as connection:
            connection.channel().basic_publish("", queue, body)

    def _channel(self) -> pika.BlockingConnection:
        return pika.BlockingConnection(pika.URLParameters(self._server.url))

    def bodies(self, queue: str = "") -> list[bytes]:
        """What is in a queue, or in work; on RabbitMQ it is taken out."""
        queue = queue or self.queue
        if self._is_redis:
            return list(self._server.client.hvals(f"sam_poll:{queue}.msgs"))
        found: list[bytes] = []
        with suppress(pika.exceptions.ChannelClosedByBroker), self._channel() as connection:
            channel = connection.channel()
            while (got := channel.basic_get(queue, auto_ack=True))[0]:
                found.append(got[2])
        return found

    def dead_ids(self, known: list[str]) -> list[str]:
        """The ids of the dead letters; as `bodies`, without the known ones."""
        found = [json.loads(one)["message_id"] for one in self.bodies(f"{self.queue}.XQ")]
        return [one for one in found if one not in known]


def body(queue: str, **other: Any) -> bytes:
    """A valid message as Dramatiq writes it, with some parts replaced."""
    ours = {
        "queue_name": queue,
        "actor_name": "run",
        "args": [],
        "kwargs": {"claim": ".gone.jpg", "generation": 1},
        "options": {"redis_message_id": "NUMBER", **other.pop("options_", {})},
        "message_id": "x2",
        "message_timestamp": int(time.time() * 1000),
    }
    return json.dumps({**ours, **other}).encode()


def test_message_holds_claim_and_generation_only(share: Share, server: Any) -> None:
    with watcher(share, server) as one:
        share.pair("cam1/dog")
        wait_until(lambda: holds(share))
        found: list[bytes] = []
        wait_until(lambda: found.extend(Raw(server, one.source.share).bodies()) or found)
    (message,) = map(json.loads, found)
    assert message["kwargs"] == {"claim": "cam1/.dog.jpg", "generation": 1}
    assert message["args"] == []
    assert message["actor_name"] == "run"


def test_name_that_is_not_utf8_reaches_the_worker(share: Share, server: Any) -> None:
    name = b"stra\xdfe".decode("utf-8", "surrogateescape")
    share.move_in(f"{name}.jpg", picture_bytes())
    share.move_in(f"{name}.json", '{"box": {"x0": 10, "y0": 10, "x1": 50, "y1": 40}}')
    with watcher(share, server), worker(share, server):
        wait_until(lambda: share.tree("output"))


def test_queues_of_two_shares_do_not_mix(tmp_path: Any, server: Any) -> None:
    one, other = Share(tmp_path / "one"), Share(tmp_path / "other")
    one.pair("dog")
    with watcher(one, server), worker(other, server), watcher(other, server):
        wait_until(lambda: holds(one))
        other.move_in("cat.jpg", picture_bytes())
        other.move_in("cat.json", '{"box": {"x0": 10, "y0": 10, "x1": 50, "y1": 40}}')
        wait_until(lambda: other.tree("output"))
        assert one.tree("output") == []


# ── hostile and broken messages ──

DEAD: dict[str, Any] = {
    "actor": {"actor_name": "delete_everything"},
    "actor-list": {"actor_name": ["run"]},
    "queue": {"queue_name": "another"},
    "queue-null": {"queue_name": None},
    "kwargs-types": {"kwargs": {"claim": 3, "generation": "x"}},
    "generation-bool": {"kwargs": {"claim": ".dog.jpg", "generation": True}},
    "generation-float": {"kwargs": {"claim": ".dog.jpg", "generation": 1.0}},
    "claim-null": {"kwargs": {"claim": None, "generation": 1}},
    "kwargs-more": {"kwargs": {"claim": ".dog.jpg", "generation": 1, "more": 1}},
    "kwargs-list": {"kwargs": [".dog.jpg", 1]},
    "kwargs-null": {"kwargs": None},
    "args": {"args": [".dog.jpg", 1]},
    "timestamp": {"message_timestamp": "now"},
    "eta-far": {"options_": {"eta": 1e18}},
    "eta-text": {"options_": {"eta": "x"}},
    "throws": {"options_": {"throws": "x"}},
    "on-success": {"options_": {"on_success": "run"}},
    "pipe": {"options_": {"pipe_target": {}}},
    "limit": {"options_": {"time_limit": "x"}},
    "retries": {"options_": {"retries": "x"}},
    "outside": {"kwargs": {"claim": "../../etc/.passwd", "generation": 1}},
    "no-claim": {"kwargs": {"claim": "dog.jpg", "generation": 1}},
}
UNREADABLE: dict[str, bytes] = {
    "empty": b"",
    "text": b"nonsense",
    "object": b"{}",
    "list": b"[]",
    "not-utf8": b"\xff",
    "deep": b"[" * 100_000,
    "number": b"9" * 100_000,
    "options-null": body("q", options=None),
    "options-list": body("q", options=[]),
    "number-missing": body("q", options={}),
    "number-object": body("q", options={"redis_message_id": {"a": 1}}),
    "id-null": body("q", message_id=None),
    "id-list": body("q", message_id=["x"]),
    "surplus": body("q", surplus=1),
}


def number_of(share: Share, server: Any) -> str:
    """The share's number; its queues exist from then on."""
    with worker(share, server) as one:
        return str(one.source.share)


def test_messages_that_no_actor_can_be_called_with_are_dead_letters(
    share: Share, server: Any, logged: list[str]
) -> None:
    raw = Raw(server, number_of(share, server))
    with watcher(share, server) as one, worker(share, server, threads=2) as other:
        for kind, parts in DEAD.items():
            for number in range(3):
                raw.put(
                    body(raw.queue, message_id=f"{kind} {number}", **json.loads(json.dumps(parts)))
                )
        share.pair("dog")
        wait_until(lambda: share.tree("output") == ["dog.mask.png"])
        found: list[str] = []
        wait_until(lambda: len(found) >= 3 * len(DEAD) or found.extend(raw.dead_ids(found)))
        assert sorted(found) == sorted(f"{kind} {number}" for kind in DEAD for number in range(3))
        assert all(thread.is_alive() for thread in other.worker.workers)
        assert not one.alarms
        assert not other.alarms
    said = [line for line in logged if line.startswith("WARNING a message goes to the dead")]
    assert len(said) == len(set(said)) <= len(DEAD)
    assert all(len(line) < 1000 for line in logged)


def test_bytes_that_are_no_message_do_not_stay(
    share: Share, server: Any, logged: list[str]
) -> None:
    raw = Raw(server, number_of(share, server))
    with watcher(share, server), worker(share, server, threads=2) as other:
        for bytes_ in [*UNREADABLE.values()] * 2:
            raw.put(bytes_.replace(b'"q"', json.dumps(raw.queue).encode()))
        share.pair("dog")
        wait_until(lambda: share.tree("output") == ["dog.mask.png"])
        wait_until(lambda: raw.bodies() == [])
        assert all(thread.is_alive() for thread in other.worker.workers)
        assert not other.alarms
        if isinstance(server, redis_server.Server):
            keys = server.client.keys
            wait_until(lambda: not [key for key in keys("*") if b"acks" in key])
    said = [line for line in logged if line.startswith("WARNING a message")]
    assert len(said) == len(set(said))


def test_unknown_actor_and_other_settings_are_said_once_with_both_values(
    share: Share, server: Any, logged: list[str]
) -> None:
    raw = Raw(server, number_of(share, server))
    with worker(share, server, settings={"lease_s": 2.0, "attempts": 3}):
        for _ in range(3):
            raw.put(body(raw.queue, actor_name="sweep"))
            raw.put(body(raw.queue, options_={"settings": {"lease_s": 60.0, "attempts": 3}}))
        wait_until(lambda: any("lease_s" in line for line in logged))
        wait_until(lambda: any("sweep" in line for line in logged))
    warned = [line for line in logged if line.startswith("WARNING")]
    assert len(warned) == 2, warned
    assert any("60 for the dispatcher and 2 for this worker" in line for line in warned)
    assert any('"sweep"' in line and "run_first, run" in line for line in warned)


def test_dramatiqs_counters_are_for_our_own_port_of_metrics(share: Share, redis_only: Any) -> None:
    pytest.importorskip("prometheus_client")
    (counters,) = message_broker.counters()
    share.pair("dog")
    with watcher(share, redis_only), worker(share, redis_only, middleware=[counters]):
        wait_until(lambda: share.tree("output") == ["dog.mask.png"])
        wait_until(lambda: not holds(share))
    families = [family for metric in counters.metrics for family in metric.collect()]
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert values["dramatiq_messages_total"] == 1
    assert values["dramatiq_messages_inprogress"] == 0
    assert {family.name for family in families} >= {"dramatiq_message_retries"}
    assert not counters.forks
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ


def test_share_error_is_retried_with_a_pause_and_then_answered(
    share: Share, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watcher(share, server) as one, Door(share, server) as source:
        failed: list[float] = []
        real = source._factory.resume

        def sick(*given: Any, **more: Any) -> Any:
            if not failed:
                failed.append(time.monotonic())
                raise OSError(5, "Input/output error")
            return real(*given, **more)

        monkeypatch.setattr(source._factory, "resume", sick)
        share.pair("dog")
        (job,) = source.take()
        assert time.monotonic() - failed[0] >= 0.9
        assert job.attempt == 1
        source.requeue(job)
        assert not one.alarms


def test_length_of_a_queue_is_that_of_the_public_key(share: Share, server: Any) -> None:
    for number in range(3):
        share.pair(f"dog{number}", seed=number)
    with watcher(share, server) as one:
        wait_until(lambda: one.sent == 3)
        queue = Raw(server, one.source.share).queue
        if isinstance(server, redis_server.Server):
            assert server.client.llen(f"sam_poll:{queue}") == 3
        else:
            with pika.BlockingConnection(pika.URLParameters(server.url)) as connection:
                declared = connection.channel().queue_declare(queue, passive=True)
                assert declared.method.message_count == 3


def test_errors_do_not_hold_the_password(tmp_path: Any) -> None:
    with (
        redis_server.Server(tmp_path / "redis", password="s3cret-word") as made,
        closing(connect(made)) as broker,
    ):
        assert broker.length("x") == 0
        made.kill()
        with pytest.raises(ConnectionClosed) as away:
            broker.length("x")
    assert "-word" not in str(away.value) + repr(away.value)


# ── names ──


@given(
    st.text(st.characters(), max_size=30)
    | st.text("\ud800\udc80./a")
    | st.from_regex(r"[./\w]{0,20}", fullmatch=True)
)
def test_claim_of_a_message_is_never_outside_the_work_folder(claim: str) -> None:
    if is_claim_path(claim):
        inside = (WORK / claim).below(WORK)
        assert ".." not in inside.split("/")
        assert inside == claim


@pytest.mark.parametrize(
    "claim",
    [
        "\ud800/.dog.jpg",
        ".\udfff",
        "." + "x" * 255,
        "." + "x" * 3000,
        "x" * 3000 + "/.dog.jpg",
        "a/" * 3000 + ".dog.jpg",
        "." + "é" * 128,
        ".dog\0.jpg",
        "",
        "/etc/.passwd",
        "../.x",
        "a/../../.x",
        "a//.x",
        "dog.jpg",
        ".a/.b",
        ".",
        "..",
        ".x/",
        "./.x",
    ],
)
def test_name_that_no_claim_can_have_is_not_a_claim(claim: str) -> None:
    assert not is_claim_path(claim)


@pytest.mark.parametrize("claim", [".dog.jpg", "cam1/day 2/.dog.jpg", ".stra\udcdfe.jpg"])
def test_name_of_a_claim_is_one(claim: str) -> None:
    assert is_claim_path(claim)
