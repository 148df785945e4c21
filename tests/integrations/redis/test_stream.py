"""A stream's entries are answered once, in one step with their acknowledgement."""

from __future__ import annotations

import base64
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from sam_poll.core.errors import ClaimLostError, InputError, SettingsError, ShareError
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Job, OutputFile
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.redis.connection import RedisConnection, RedisUnavailableError
from sam_poll.integrations.redis.consumer_group import StreamNames
from sam_poll.integrations.redis.stream import RedisStreamSource
from sam_poll.pipeline.worker_pool import WorkerPool, WorkerSpec
from tests.conftest import picture_bytes, wait_until
from tests.support.paths import ROOT
from tests.support.redis_server import PROMPT, Server, parse, stream_source, stream_worker
from tests.support.source_contract import DOCUMENTS, SourceContract
from tests.support.worker_pools import Trapped, equipped


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as made:
        yield made


def labelled(label: str) -> dict[str, Any]:
    return {"objects": [{"label": label, **PROMPT}]}


def take(source: RedisStreamSource, count: int = 1) -> list[Job]:
    """Return the next `count` jobs."""
    jobs: list[Job] = []
    stop = threading.Event()
    for job in source.jobs(stop):
        jobs.append(job)
        if len(jobs) == count:
            break
    return jobs


def lose_first_reply(connection: RedisConnection, command: str) -> list[Any]:
    """Break the connection before the first reply to a command. Returns the list of replies."""
    really, replies = getattr(connection.client, command), []

    def cut_off(*arguments: Any, **options: Any) -> Any:
        replies.append(really(*arguments, **options))
        if len(replies) == 1:
            raise redis.ConnectionError("cut off")
        return replies[-1]

    setattr(connection.client, command, cut_off)
    return replies


def process(server: Server, lease_s: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.support.redis_worker", server.url, str(lease_s)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


class TestRedisStreamSource(SourceContract):
    @pytest.fixture
    def source(self, server: Server) -> Iterator[RedisStreamSource]:
        self.server = server
        server.add("a", picture_bytes())
        server.add("b", picture_bytes())
        with stream_source(server) as source:
            yield source

    def answers(self, source: Any) -> dict[str, bytes]:
        good = [answer for answer in self.server.answers() if answer["status"] == "ok"]
        return {f"{a['id']}.{name}": a[name] for a in good for name in json.loads(a["documents"])}

    def refusals(self, source: Any) -> dict[str, str]:
        return {a["id"]: a["reason"] for a in self.server.answers() if a["status"] == "error"}

    def test_requeued_job_is_delivered_again_at_once_without_counting_the_attempt(
        self, source: Any
    ) -> None:
        for job in self.take(source).values():
            source.requeue(job)
        again = self.take(source)
        assert sorted(again) == ["a", "b"]
        assert [job.attempt for job in again.values()] == [1, 1]

    def test_failed_attempt_is_delivered_again_at_once_and_counted(self, source: Any) -> None:
        for job in self.take(source).values():
            source.fail_attempt(job)
        assert [job.attempt for job in self.take(source).values()] == [2, 2]


# ── entries and answers ──


def test_entry_is_answered_with_its_senders_id_and_deleted(server: Server) -> None:
    entry = server.add("mine", picture_bytes())
    with stream_worker(server):
        wait_until(server.ids)
        wait_until(lambda: server.pending() == 0)
    (answer,) = server.answers()
    assert (answer["id"], answer["entry"], answer["status"]) == ("mine", entry, "ok")
    assert json.loads(answer["documents"]) == ["mask.png", "opex.json"]
    assert answer["mask.png"].startswith(b"\x89PNG")
    assert json.loads(answer["opex.json"])["id"] == "mine"
    assert server.client.xlen("sam:in") == 0


def test_entry_may_be_a_pub_sub_message_and_its_number_is_the_default_id(
    server: Server,
) -> None:
    message = {"image": base64.encodebytes(picture_bytes()).decode(), "prompt": PROMPT}
    entry = server.client.xadd("sam:in", {"message": json.dumps(message)}).decode()
    with stream_worker(server):
        wait_until(server.ids)
    assert [(a["id"], a["status"]) for a in server.answers()] == [(entry, "ok")]


def test_texts_are_answered_and_unusable_ones_refused_with_their_place(server: Server) -> None:
    server.add("one", picture_bytes(), {"text": ["a b", "c"]}, formats="opex")
    server.add("two", picture_bytes(), {"text": ["a", "very " * 40]})
    with stream_worker(server):
        wait_until(lambda: len(server.ids()) == 2)
    by_id = {answer["id"]: answer for answer in server.answers()}
    labels = [entry["label"] for entry in json.loads(by_id["one"]["opex.json"])["objects"]]
    assert labels == ["a b", "c", "a b"]
    assert (by_id["two"]["status"], by_id["two"]["place"]) == ("error", "text[1]")


def test_answer_has_the_selected_formats_and_unknown_ones_are_refused(
    server: Server,
) -> None:
    server.add("one", picture_bytes(), formats="opex")
    server.add("two", picture_bytes(), formats='["mask", "opex"]')
    server.add("three", picture_bytes(), formats="cvat")
    with stream_worker(server):
        wait_until(lambda: len(server.ids()) == 3)
    by_id = {answer["id"]: answer for answer in server.answers()}
    assert json.loads(by_id["one"]["documents"]) == ["opex.json"]
    assert json.loads(by_id["two"]["documents"]) == ["mask.png", "opex.json"]
    assert (by_id["three"]["status"], by_id["three"]["place"]) == ("error", "formats")
    assert "mask, opex" in by_id["three"]["remedy"]


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no-picture": ({"prompt": json.dumps(PROMPT)}, "picture", "image"),
    "no-prompt": ({"image": b"x"}, "prompt", "prompt"),
    "prompt-no-json": ({"image": b"x", "prompt": "{"}, "prompt", "prompt, line 1, column 2"),
    "odd-prompt": ({"image": b"x", "prompt": '{"bbox": 1}'}, "prompt", "prompt, bbox"),
    "no-image": ({"image": b"no picture at all", "prompt": json.dumps(PROMPT)}, "picture", ""),
    "message-no-json": ({"message": "{"}, "input", "message"),
    "outside": (
        {"image": picture_bytes(), "prompt": json.dumps({"points": [{"x": 999, "y": 1}]})},
        "prompt",
        "",
    ),
}


def test_bad_entries_get_an_error_and_the_worker_goes_on(
    server: Server,
) -> None:
    for name, (fields, _, _) in BAD.items():
        server.client.xadd("sam:in", {"id": name, **fields})
    server.add("good", picture_bytes())
    with stream_worker(server):
        wait_until(lambda: len(server.ids()) == len(BAD) + 1)
        wait_until(lambda: server.pending() == 0)
    by_id = {answer["id"]: answer for answer in server.answers()}
    assert by_id["good"]["status"] == "ok"
    for name, (_, code, place) in BAD.items():
        assert (by_id[name]["status"], by_id[name]["code"]) == ("error", code), name
        assert by_id[name]["reason"], name
        assert place in by_id[name]["place"], name
    assert server.client.xlen("sam:in") == 0
    assert server.client.exists("sam:in:dead") == 0


def test_keep_leaves_acknowledged_entries_in_the_stream(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_worker(server, keep=True):
        wait_until(server.ids)
        wait_until(lambda: server.pending() == 0)
    assert server.client.xlen("sam:in") == 1


def test_max_answers_deletes_the_oldest_answers(server: Server) -> None:
    server.client.config_set("stream-node-max-entries", 4)
    for number in range(20):
        server.add(str(number), picture_bytes())
    with stream_worker(server, max_answers=4) as worker:
        wait_until(lambda: worker.answered == 20)
    assert 4 <= server.client.xlen("sam:out") <= 8


# ── ownership ──


def test_entry_is_not_acknowledged_before_its_answer_is_written(server: Server) -> None:
    server.add("a", picture_bytes())
    gate = threading.Event()
    with stream_worker(server, FakeEngine(gate=gate)) as worker:
        wait_until(server.pending)
        server.client.rpush("sam:out", "of somebody else")  # from here on no answer can be written
        gate.set()
        wait_until(lambda: "output" in worker.telemetry.alarms)
        assert (server.pending(), server.client.xlen("sam:in")) == (1, 1)
        server.client.delete("sam:out")
        wait_until(server.ids)
        wait_until(lambda: server.pending() == 0)
        wait_until(lambda: not worker.telemetry.alarms.active())
    assert server.ids() == ["a"]


def test_worker_frozen_for_a_lease_loses_its_entry_and_writes_nothing(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_source(server, lease_s=0.2) as frozen:
        (job,) = take(frozen)
        frozen._keeper.stop()
        with stream_source(server, lease_s=0.2) as other:
            (again,) = take(other)
            assert (again.id, again.attempt) == ("a", 2)
            with pytest.raises(ClaimLostError):
                frozen.deliver(job, DOCUMENTS)
            assert (server.ids(), server.pending()) == ([], 1)
            other.deliver(again, DOCUMENTS)
        with pytest.raises(ClaimLostError):
            frozen.requeue(job)
    assert server.ids() == ["a"]


def test_held_entry_is_refreshed_and_not_taken_over(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_source(server, lease_s=0.4) as source, stream_source(server, lease_s=0.4) as other:
        (job,) = take(source)
        stop, seen = threading.Event(), []

        def collect() -> None:
            seen.extend(other.jobs(stop))

        collector = threading.Thread(target=collect)
        collector.start()
        idle, times = 0, 0
        while times < 12:  # three leases, four times each
            (entry,) = server.client.xpending_range("sam:in", "sam_poll", "-", "+", 1)
            assert entry["times_delivered"] == 1
            times += entry["time_since_delivered"] < idle
            idle = entry["time_since_delivered"]
        stop.set()
        collector.join()
        assert not seen
        source.deliver(job, DOCUMENTS)
    assert server.ids() == ["a"]


def test_answer_is_written_once_when_its_confirmation_is_lost(server: Server) -> None:
    server.add("a", picture_bytes())
    connection = server.connection()
    with RedisStreamSource(connection, StreamNames(), parse=parse, lease_s=3600) as source:
        (job,) = take(source)
        results = lose_first_reply(connection, "evalsha")
        with pytest.raises(RedisUnavailableError) as caught:
            source.deliver(job, DOCUMENTS)
        assert caught.value.errno == errno.ENOTCONN
        source.deliver(job, DOCUMENTS)
        assert results[:2] == [1, 0]
    assert server.ids() == ["a"]


@pytest.mark.parametrize("number", ["*", "7-0", "7-3"])
def test_entry_of_a_lost_reply_is_taken_at_once_as_its_first_attempt(
    server: Server, number: str
) -> None:
    fields = {"id": "a", "image": picture_bytes(), "prompt": json.dumps(PROMPT)}
    server.client.xadd("sam:in", fields, id=number)
    connection = server.connection()
    with RedisStreamSource(connection, StreamNames(), parse=parse, lease_s=3600) as source:
        lose_first_reply(connection, "xreadgroup")
        (job,) = take(source)
        assert (job.id, job.attempt) == ("a", 1)
        source.deliver(job, DOCUMENTS)
    assert server.ids() == ["a"]


def test_answer_of_too_many_files_is_refused(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_source(server) as source:
        (job,) = take(source)
        with pytest.raises(InputError, match="3,001 files"):
            source.deliver(
                job, [OutputFile(f".mask.{n}.png", "image/png", b"") for n in range(3001)]
            )
        source.deliver(job, [OutputFile(f".mask.{n}.png", "image/png", b"") for n in range(3000)])
    assert len(json.loads(server.answers()[0]["documents"])) == 3000


def test_consumer_leaves_the_group_at_its_end(server: Server) -> None:
    with stream_source(server) as source:
        server.add("a", picture_bytes())
        (job,) = take(source)
        assert len(server.client.xinfo_consumers("sam:in", "sam_poll")) == 1
        source.deliver(job, DOCUMENTS)
    assert server.client.xinfo_consumers("sam:in", "sam_poll") == []


def test_consumer_with_entries_stays_in_the_group_at_its_end(
    server: Server,
) -> None:
    server.add("a", picture_bytes())
    with stream_source(server) as source:
        take(source)
    assert server.pending() == 1


def test_two_workers_answer_each_entry_once(server: Server) -> None:
    for number in range(40):
        server.add(f"{number:02}", picture_bytes(seed=number))
    with stream_worker(server) as one, stream_worker(server) as two:
        wait_until(lambda: len(server.ids()) >= 40)
        wait_until(lambda: one.answered + two.answered == 40)
        assert one.answered
        assert two.answered
    assert server.ids() == [f"{number:02}" for number in range(40)]


# ── workers and servers that die ──


def test_killed_workers_entries_are_answered_once_by_another(server: Server) -> None:
    for number in range(6):
        server.add(
            str(number), picture_bytes(seed=number), labelled("hold" if number == 0 else "dog")
        )
    victim = process(server, 2.0)
    try:
        wait_until(lambda: server.client.exists("sam:in") and server.pending() >= 2)
        victim.kill()
        victim.wait()
        held = server.pending()
        assert held >= 2
        with stream_worker(server, lease_s=2.0) as worker:
            wait_until(lambda: len(server.ids()) == 6)
            wait_until(lambda: server.pending() == 0)
            assert worker.source.recovered == held
    finally:
        victim.kill()
        victim.wait()
    assert server.ids() == [str(number) for number in range(6)]


@pytest.mark.slow
def test_entry_that_ended_three_processes_becomes_a_dead_letter_with_its_fields(
    server: Server,
) -> None:
    picture = picture_bytes()
    entry = server.add("bad", picture, labelled("crash"), mark="kept")
    server.add("good", picture)
    ended = 0
    while server.ids() != ["bad", "good"]:
        assert ended < 4
        worker = process(server, 0.5)
        try:
            wait_until(
                lambda worker=worker: worker.poll() is not None or server.ids() == ["bad", "good"]
            )
            if worker.poll() is not None:
                assert worker.returncode == -signal.SIGKILL
                ended += 1
        finally:
            worker.terminate()
            worker.wait()
    assert ended == 3
    by_id = {answer["id"]: answer for answer in server.answers()}
    assert (by_id["bad"]["status"], by_id["bad"]["code"], by_id["bad"]["entry"]) == (
        "error",
        "poison",
        entry,
    )
    ((_, dead),) = server.client.xrange("sam:in:dead")
    assert (dead[b"id"], dead[b"image"], dead[b"mark"]) == (b"bad", picture, b"kept")
    assert (dead[b"entry"], dead[b"attempts"]) == (entry.encode(), b"3")
    assert b"has ended 3 times" in dead[b"reason"]
    assert server.client.xrange("sam:in", entry, entry) == []


@pytest.mark.slow
def test_worker_pool_loses_only_the_job_that_ends_its_process(server: Server) -> None:
    server.add("bad", picture_bytes(seed=1), labelled("crash"))
    for number in range(4):
        server.add(f"good{number}", picture_bytes(seed=number))
    stop, telemetry = threading.Event(), Telemetry()
    specs = [WorkerSpec("one", partial(equipped, Trapped), {**os.environ, "OMP_NUM_THREADS": "1"})]
    made = WorkerPool(
        specs,
        stop,
        telemetry=Telemetry(stats=telemetry.stats, alarms=telemetry.alarms),
        pause_s=0.01,
        drain_s=5.0,
    )
    with stream_source(server, telemetry, attempts=2) as source, made as pool:
        runner = threading.Thread(target=pool.run, args=(source, stop))
        runner.start()
        wait_until(lambda: len(server.ids()) == 5, 60)
        stop.set()
        runner.join(30)
    by_id = {answer["id"]: answer["status"] for answer in server.answers()}
    assert by_id == {"bad": "error", **{f"good{number}": "ok" for number in range(4)}}
    assert server.client.xlen("sam:in:dead") == 1


def test_restart_of_the_server_loses_no_entry_and_doubles_none(server: Server) -> None:
    for number in range(30):
        server.add(f"{number:02}", picture_bytes(seed=number))
    with stream_worker(server) as worker:
        wait_until(lambda: worker.answered >= 3)
        server.kill()
        wait_until(lambda: "redis" in worker.telemetry.alarms)
        server.start()
        wait_until(lambda: len(server.ids()) >= 30)
        wait_until(lambda: server.pending() == 0)
        wait_until(lambda: not worker.telemetry.alarms.active())
    assert server.ids() == [f"{number:02}" for number in range(30)]


def test_server_that_lost_its_data_gets_the_group_again_and_the_ready_answer(
    server: Server,
) -> None:
    server.add("a", picture_bytes())
    gate = threading.Event()
    with stream_worker(server, FakeEngine(gate=gate)) as worker:
        wait_until(server.pending)
        server.kill()
        server.forget()
        wait_until(lambda: "redis" in worker.telemetry.alarms)
        server.start()
        gate.set()
        wait_until(lambda: server.ids() == ["a"])
        server.add("b", picture_bytes(seed=2))
        wait_until(lambda: server.ids() == ["a", "b"])
        wait_until(lambda: not worker.telemetry.alarms.active())


# ── the start ──


def test_entries_sent_before_the_first_worker_are_answered(server: Server) -> None:
    server.add("early", picture_bytes())
    with stream_worker(server):
        wait_until(lambda: server.ids() == ["early"])


@pytest.mark.parametrize("name", ["sam:in", "sam:out", "sam:in:dead"])
def test_name_of_another_type_of_value_is_refused_at_the_start(server: Server, name: str) -> None:
    server.client.set(name, "a text")
    with pytest.raises(SettingsError, match="WRONGTYPE") as caught, stream_source(server):
        pass
    assert name == "sam:in" or f"({name})" in caught.value.reason


def test_a_refused_start_leaves_no_connection_open(server: Server) -> None:
    server.client.set("sam:in", "text")
    before = len(server.client.client_list())
    with pytest.raises(SettingsError), stream_source(server):
        pass
    wait_until(lambda: len(server.client.client_list()) == before)


def test_unreachable_server_is_reported_at_the_start(server: Server) -> None:
    server.kill()
    with pytest.raises(ShareError) as caught, stream_source(server):
        pass
    assert caught.value.place == f"redis://127.0.0.1:{server.port}/0"


# ── a full server ──


def filled(server: Server, count: int) -> None:
    """Add `count` entries, and leave no room for anything else."""
    server.client.xgroup_create("sam:in", "sam_poll", id="0", mkstream=True)
    for n in range(count):
        server.add(f"n{n}", picture_bytes(width=256, height=256, seed=n))
    server.client.config_set("maxmemory", 1_000_000)
    with pytest.raises(redis.OutOfMemoryError):
        server.add("more", b"")


def test_full_server_is_emptied_by_answering_its_entries(server: Server) -> None:
    filled(server, 5)
    with stream_worker(server):
        wait_until(lambda: len(server.ids()) == 5)
        wait_until(lambda: server.client.xlen("sam:in") == 0)
    assert {answer["status"] for answer in server.answers()} == {"ok"}


def test_full_server_keeps_an_entry_whose_answer_cannot_be_written(server: Server) -> None:
    filled(server, 1)
    with stream_source(server) as source:
        (job,) = take(source)
        server.client.config_set("maxmemory", 0)
        server.client.rpush("sam:out", "of somebody else")
        server.client.config_set("maxmemory", 1_000_000)
        with pytest.raises(OSError, match="WRONGTYPE"):
            source.deliver(job, DOCUMENTS)
        assert (server.client.xlen("sam:in"), server.pending()) == (1, 1)


def test_full_server_gets_the_dead_letter_of_a_poison_entry(server: Server) -> None:
    filled(server, 1)
    with stream_source(server, attempts=1) as source:
        source.fail_attempt(*take(source))
        (job,) = take(source)
        assert job.error
        source.reject(job, job.error)
    assert (server.client.xlen("sam:in"), server.client.xlen("sam:in:dead"), server.ids()) == (
        0,
        1,
        ["n0"],
    )


def test_full_server_has_no_room_for_answers_with_keep(server: Server) -> None:
    filled(server, 1)
    with stream_source(server, keep=True) as source:
        (job,) = take(source)
        with pytest.raises(OSError, match="full"):
            source.deliver(job, DOCUMENTS)
    assert (server.client.xlen("sam:in"), server.client.xlen("sam:out")) == (1, 0)


def test_full_server_is_reported_at_the_start(server: Server) -> None:
    server.client.config_set("maxmemory", 1)
    with pytest.raises(ShareError) as caught, stream_source(server):
        pass
    assert "maxmemory" in caught.value.reason
    assert "maxmemory" in (caught.value.remedy or "")
