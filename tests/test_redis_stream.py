"""A stream's entries are answered once, in one step with their acknowledgement, whoever dies meanwhile."""

from __future__ import annotations

import base64
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

from sam_poll.doors.redis_stream import StreamDoor
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import LostError, SettingsError, ShareError
from sam_poll.fleet import Fleet, Post
from sam_poll.health import Signs
from sam_poll.types import Document, Job
from tests.conftest import picture_bytes, wait_until
from tests.door_contract import DOCUMENTS, DoorContract
from tests.redis_server import PROMPT, Server, stream_door, stream_worker
from tests.test_fleet import Trapped, equipped

ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as made:
        yield made


def labelled(label: str) -> dict[str, Any]:
    return {"objects": [{"label": label, **PROMPT}]}


def take(door: StreamDoor, count: int = 1) -> list[Job]:
    """So many jobs; the door is left open."""
    jobs: list[Job] = []
    stop = threading.Event()
    for job in door.jobs(stop):
        jobs.append(job)
        if len(jobs) == count:
            break
    return jobs


def process(server: Server, lease_s: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.redis_worker", server.url, str(lease_s)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


class TestStreamDoor(DoorContract):
    @pytest.fixture
    def door(self, server: Server) -> Iterator[StreamDoor]:
        self.server = server
        server.add("a", picture_bytes())
        server.add("b", picture_bytes())
        with stream_door(server) as door:
            yield door

    def answers(self, door: Any) -> dict[str, bytes]:
        good = [answer for answer in self.server.answers() if answer["status"] == "ok"]
        return {f"{a['id']}.{name}": a[name] for a in good for name in json.loads(a["documents"])}

    def refusals(self, door: Any) -> dict[str, str]:
        return {a["id"]: a["reason"] for a in self.server.answers() if a["status"] == "error"}

    def test_a_released_job_is_handed_out_again_at_once_and_its_run_does_not_count(self, door: Any) -> None:
        for job in self.take(door).values():
            door.release(job)
        again = self.take(door)
        assert sorted(again) == ["a", "b"]
        assert [job.attempt for job in again.values()] == [1, 1]

    def test_an_abandoned_job_is_handed_out_again_at_once_and_its_run_counts(self, door: Any) -> None:
        for job in self.take(door).values():
            door.abandon(job)
        assert [job.attempt for job in self.take(door).values()] == [2, 2]


# ── what is said ──


def test_an_entry_is_answered_with_its_senders_id_and_leaves_the_stream(server: Server) -> None:
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


def test_an_entry_may_be_a_pub_sub_message_and_without_an_id_is_called_by_its_own(server: Server) -> None:
    message = {"image": base64.encodebytes(picture_bytes()).decode(), "prompt": PROMPT}
    entry = server.client.xadd("sam:in", {"message": json.dumps(message)}).decode()
    with stream_worker(server):
        wait_until(server.ids)
    assert [(a["id"], a["status"]) for a in server.answers()] == [(entry, "ok")]


def test_only_the_formats_asked_for_come_back_and_one_that_is_not_made_is_refused(server: Server) -> None:
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
    "outside": ({"image": picture_bytes(), "prompt": json.dumps({"points": [{"x": 999, "y": 1}]})}, "prompt", ""),
}


def test_what_cannot_be_answered_is_told_with_its_id_and_the_worker_lives_on(server: Server) -> None:
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


def test_kept_entries_stay_in_the_stream_but_are_acknowledged(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_worker(server, keep=True):
        wait_until(server.ids)
        wait_until(lambda: server.pending() == 0)
    assert server.client.xlen("sam:in") == 1


def test_no_more_answers_are_kept_than_asked_for_give_or_take_a_node(server: Server) -> None:
    server.client.config_set("stream-node-max-entries", 4)
    for number in range(20):
        server.add(str(number), picture_bytes())
    with stream_worker(server, max_answers=4) as worker:
        wait_until(lambda: worker.answered == 20)
    assert 4 <= server.client.xlen("sam:out") <= 8


# ── whose it is ──


def test_nothing_is_acknowledged_before_its_answer_is_written(server: Server) -> None:
    server.add("a", picture_bytes())
    gate = threading.Event()
    with stream_worker(server, FakeEngine(gate=gate)) as worker:
        wait_until(server.pending)
        server.client.rpush("sam:out", "of somebody else")  # from here on no answer can be written
        gate.set()
        wait_until(lambda: "output" in worker.signs.alarms)
        assert (server.pending(), server.client.xlen("sam:in")) == (1, 1)
        server.client.delete("sam:out")
        wait_until(server.ids)
        wait_until(lambda: server.pending() == 0)
        wait_until(lambda: not worker.signs.alarms.active())
    assert server.ids() == ["a"]


def test_who_was_frozen_for_a_lease_loses_the_entry_and_writes_nothing(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_door(server, lease_s=0.2) as frozen:
        (job,) = take(frozen)
        frozen._end.set()  # it says no more that it lives
        with stream_door(server, lease_s=0.2) as other:
            (again,) = take(other)
            assert (again.id, again.attempt) == ("a", 2)
            with pytest.raises(LostError):
                frozen.deliver(job, DOCUMENTS)
            assert (server.ids(), server.pending()) == ([], 1)
            other.deliver(again, DOCUMENTS)
        with pytest.raises(LostError):
            frozen.release(job)
    assert server.ids() == ["a"]


def test_what_is_at_work_is_kept_fresh_and_offered_to_nobody(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_door(server, lease_s=0.4) as door, stream_door(server, lease_s=0.4) as other:
        (job,) = take(door)
        stop, seen = threading.Event(), []

        def look() -> None:
            seen.extend(other.jobs(stop))

        looker = threading.Thread(target=look)
        looker.start()
        idle, times = 0, 0
        while times < 12:  # three leases, four times each
            (entry,) = server.client.xpending_range("sam:in", "sam_poll", "-", "+", 1)
            assert entry["times_delivered"] == 1
            times += entry["time_since_delivered"] < idle
            idle = entry["time_since_delivered"]
        stop.set()
        looker.join()
        assert not seen
        door.deliver(job, DOCUMENTS)
    assert server.ids() == ["a"]


def test_an_answer_whose_confirmation_was_lost_is_written_once_and_counts(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_door(server) as door:
        (job,) = take(door)
        real, calls = door._finish_script, []

        def cut_off(**given: Any) -> Any:
            result = real(**given)
            calls.append(result)
            if len(calls) == 1:
                raise redis.ConnectionError("cut off")
            return result

        door._finish_script = cut_off  # type: ignore[method-assign,assignment]
        with pytest.raises(OSError, match="Redis is away"):
            door.deliver(job, DOCUMENTS)
        door.deliver(job, DOCUMENTS)
        assert calls == [1, 0]
    assert server.ids() == ["a"]


@pytest.mark.parametrize("number", ["*", "7-0", "7-3"])
def test_an_entry_that_was_given_to_us_by_a_reply_that_did_not_arrive_is_taken_up_at_once(
    server: Server, number: str
) -> None:
    fields = {"id": "a", "image": picture_bytes(), "prompt": json.dumps(PROMPT)}
    server.client.xadd("sam:in", fields, id=number)
    with stream_door(server, lease_s=3600) as door:
        real, calls = door._link.client.xreadgroup, []

        def cut_off(*given: Any, **more: Any) -> Any:
            calls.append(real(*given, **more))
            if len(calls) == 1:
                raise redis.ConnectionError("cut off")
            return calls[-1]

        door._link.client.xreadgroup = cut_off
        (job,) = take(door)
        assert (job.id, job.attempt) == ("a", 1)
        door.deliver(job, DOCUMENTS)
    assert server.ids() == ["a"]


def test_an_answer_with_too_many_documents_is_refused_with_the_remedy(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_door(server) as door:
        (job,) = take(door)
        with pytest.raises(Exception, match="too many for one entry"):
            door.deliver(job, [Document(f".mask.{n}.png", "image/png", b"") for n in range(3001)])
        door.deliver(job, [Document(f".mask.{n}.png", "image/png", b"") for n in range(3000)])
    assert len(json.loads(server.answers()[0]["documents"])) == 3000


def test_who_ends_in_peace_is_no_member_of_the_group_any_more(server: Server) -> None:
    with stream_door(server) as door:
        server.add("a", picture_bytes())
        (job,) = take(door)
        assert len(server.client.xinfo_consumers("sam:in", "sam_poll")) == 1
        door.deliver(job, DOCUMENTS)
    assert server.client.xinfo_consumers("sam:in", "sam_poll") == []


def test_who_ends_with_entries_stays_a_member_because_they_would_be_lost_with_it(server: Server) -> None:
    server.add("a", picture_bytes())
    with stream_door(server) as door:
        take(door)
    assert server.pending() == 1


def test_two_workers_share_the_work_and_each_entry_is_answered_once(server: Server) -> None:
    for number in range(40):
        server.add(f"{number:02}", picture_bytes(seed=number))
    with stream_worker(server) as one, stream_worker(server) as two:
        wait_until(lambda: len(server.ids()) >= 40)
        wait_until(lambda: one.answered + two.answered == 40)
        assert one.answered
        assert two.answered
    assert server.ids() == [f"{number:02}" for number in range(40)]


# ── deaths ──


def test_a_killed_workers_entries_are_answered_by_another_once(server: Server) -> None:
    for number in range(6):
        server.add(str(number), picture_bytes(seed=number), labelled("hold" if number == 0 else "dog"))
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
            assert worker.door.recovered == held
    finally:
        victim.kill()
        victim.wait()
    assert server.ids() == [str(number) for number in range(6)]


def test_what_ends_three_processes_becomes_a_dead_letter_with_its_fields(server: Server) -> None:
    picture = picture_bytes()
    entry = server.add("bad", picture, labelled("crash"), mark="kept")
    server.add("good", picture)
    ended = 0
    while server.ids() != ["bad", "good"]:
        assert ended < 4
        worker = process(server, 0.5)
        try:
            wait_until(lambda worker=worker: worker.poll() is not None or server.ids() == ["bad", "good"])
            if worker.poll() is not None:
                assert worker.returncode == -signal.SIGKILL
                ended += 1
        finally:
            worker.terminate()
            worker.wait()
    assert ended == 3
    by_id = {answer["id"]: answer for answer in server.answers()}
    assert (by_id["bad"]["status"], by_id["bad"]["code"], by_id["bad"]["entry"]) == ("error", "poison", entry)
    ((_, dead),) = server.client.xrange("sam:in:dead")
    assert (dead[b"id"], dead[b"image"], dead[b"mark"]) == (b"bad", picture, b"kept")
    assert (dead[b"entry"], dead[b"attempts"]) == (entry.encode(), b"3")
    assert b"has ended 3 times" in dead[b"reason"]
    assert server.client.xrange("sam:in", entry, entry) == []


def test_a_fleets_process_that_a_job_ends_costs_that_job_only(server: Server) -> None:
    server.add("bad", picture_bytes(seed=1), labelled("crash"))
    for number in range(4):
        server.add(f"good{number}", picture_bytes(seed=number))
    stop, signs = threading.Event(), Signs()
    posts = [Post("one", partial(equipped, Trapped), {**os.environ, "OMP_NUM_THREADS": "1"})]
    made = Fleet(posts, stop, stats=signs.stats, alarms=signs.alarms, pause_s=0.01, drain_s=5.0)
    with stream_door(server, signs, attempts=2) as door, made as fleet:
        runner = threading.Thread(target=fleet.run, args=(door, stop))
        runner.start()
        wait_until(lambda: len(server.ids()) == 5, 60)
        stop.set()
        runner.join(30)
    by_id = {answer["id"]: answer["status"] for answer in server.answers()}
    assert by_id == {"bad": "error", **{f"good{number}": "ok" for number in range(4)}}
    assert server.client.xlen("sam:in:dead") == 1


def test_a_server_killed_in_the_middle_costs_no_entry_and_doubles_none(server: Server) -> None:
    for number in range(30):
        server.add(f"{number:02}", picture_bytes(seed=number))
    with stream_worker(server) as worker:
        wait_until(lambda: worker.answered >= 3)
        server.kill()
        wait_until(lambda: "redis" in worker.signs.alarms)
        server.start()
        wait_until(lambda: len(server.ids()) >= 30)
        wait_until(lambda: server.pending() == 0)
        wait_until(lambda: not worker.signs.alarms.active())
    assert server.ids() == [f"{number:02}" for number in range(30)]


def test_a_server_that_comes_back_with_nothing_gets_its_group_again_and_the_answer_in_hand(server: Server) -> None:
    server.add("a", picture_bytes())
    gate = threading.Event()
    with stream_worker(server, FakeEngine(gate=gate)) as worker:
        wait_until(server.pending)
        server.kill()
        server.forget()
        wait_until(lambda: "redis" in worker.signs.alarms)
        server.start()
        gate.set()
        wait_until(lambda: server.ids() == ["a"])
        server.add("b", picture_bytes(seed=2))
        wait_until(lambda: server.ids() == ["a", "b"])
        wait_until(lambda: not worker.signs.alarms.active())


# ── the start ──


def test_entries_sent_before_the_first_worker_count(server: Server) -> None:
    server.add("early", picture_bytes())
    with stream_worker(server):
        wait_until(lambda: server.ids() == ["early"])


@pytest.mark.parametrize("name", ["sam:in", "sam:out", "sam:in:dead"])
def test_a_name_that_is_no_stream_is_refused_at_the_start(server: Server, name: str) -> None:
    server.client.set(name, "a text")
    with pytest.raises(SettingsError, match="WRONGTYPE") as caught, stream_door(server):
        pass
    assert name == "sam:in" or f"({name})" in caught.value.reason


def test_a_server_that_is_not_there_is_told_at_the_start(server: Server) -> None:
    server.kill()
    with pytest.raises(ShareError, match="Redis is away"), stream_door(server):
        pass


# ── a full server ──


def filled(server: Server, count: int) -> None:
    """So many entries, and no room for anything else."""
    server.client.xgroup_create("sam:in", "sam_poll", id="0", mkstream=True)
    for n in range(count):
        server.add(f"n{n}", picture_bytes(width=256, height=256, seed=n))
    server.client.config_set("maxmemory", 1_000_000)
    with pytest.raises(redis.OutOfMemoryError):
        server.add("more", b"")


def test_a_server_that_is_full_of_entries_is_emptied_by_answering_them(server: Server) -> None:
    filled(server, 5)
    with stream_worker(server):
        wait_until(lambda: len(server.ids()) == 5)
        wait_until(lambda: server.client.xlen("sam:in") == 0)
    assert {answer["status"] for answer in server.answers()} == {"ok"}


def test_what_takes_no_answer_keeps_its_entry_on_a_full_server_too(server: Server) -> None:
    filled(server, 1)
    with stream_door(server) as door:
        (job,) = take(door)
        server.client.config_set("maxmemory", 0)
        server.client.rpush("sam:out", "of somebody else")
        server.client.config_set("maxmemory", 1_000_000)
        with pytest.raises(OSError, match="WRONGTYPE"):
            door.deliver(job, DOCUMENTS)
        assert (server.client.xlen("sam:in"), server.pending()) == (1, 1)


def test_a_poison_entry_of_a_full_server_becomes_a_dead_letter(server: Server) -> None:
    filled(server, 1)
    with stream_door(server, attempts=1) as door:
        door.abandon(*take(door))
        (job,) = take(door)
        assert job.fault
        door.reject(job, job.fault)
    assert (server.client.xlen("sam:in"), server.client.xlen("sam:in:dead"), server.ids()) == (0, 1, ["n0"])


def test_entries_that_stay_for_other_groups_make_no_room(server: Server) -> None:
    filled(server, 1)
    with stream_door(server, keep=True) as door:
        (job,) = take(door)
        with pytest.raises(OSError, match="full"):
            door.deliver(job, DOCUMENTS)
    assert (server.client.xlen("sam:in"), server.client.xlen("sam:out")) == (1, 0)


def test_the_first_worker_of_a_full_server_is_told_to_make_room(server: Server) -> None:
    server.client.config_set("maxmemory", 1)
    with pytest.raises(ShareError) as caught, stream_door(server):
        pass
    assert "maxmemory" in caught.value.reason
    assert "maxmemory" in (caught.value.remedy or "")
