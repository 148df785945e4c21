"""The line on Redis keeps what Dramatiq does not promise: what is still in it can be asked; nobody stops it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.doors.cluster_line import FIRST, REST, Line, Word
from sam_poll.doors.layout import Layout
from sam_poll.doors.redis_link import Link, Trouble, of
from tests.conftest import wait_until
from tests.redis_server import Server

LAYOUT = Layout.below(Path("/share"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as made:
        yield made


def line(server: Server, share: str = "a1", lease_s: float = 30.0) -> Line:
    return Line(server.link(), share, lease_s)


def taken(made: Line) -> list[str]:
    """The claims of all that is in the line now, which is empty then."""
    found: list[str] = []
    while word := made.take():
        made.taken(word)
        found.append(word.claim)
    return found


def messages(server: Server) -> list[dict[str, Any]]:
    bodies = [body for key in server.client.keys("*.msgs") for body in server.client.hvals(key)]
    return [json.loads(body) for body in bodies]


def test_a_message_says_claim_and_generation_and_nothing_else(server: Server) -> None:
    line(server).send(Word("cam1/.dog.jpg", 3))
    (message,) = messages(server)
    assert message["kwargs"] == {"claim": "cam1/.dog.jpg", "generation": 3}
    assert message["args"] == []


def test_what_is_sent_is_taken_once_in_its_order_and_first_before_the_rest(server: Server) -> None:
    sender, one, other = line(server), line(server), line(server)
    for number in range(3):
        sender.send(Word(f".{number}.jpg", 1, first=REST))
    sender.send(Word(".urgent.jpg", 1, first=FIRST))
    word = one.take()
    assert word
    assert (word.claim, word.generation, word.first) == (".urgent.jpg", 1, FIRST)
    assert taken(other) == [".0.jpg", ".1.jpg", ".2.jpg"]


def test_a_name_that_is_no_text_arrives_as_it_was(server: Server) -> None:
    name = b"cam1/.stra\xdfe.jpg".decode("utf-8", "surrogateescape")
    line(server).send(Word(name, 1))
    assert taken(line(server)) == [name]


def test_shares_do_not_mix(server: Server) -> None:
    line(server, "one").send(Word(".dog.jpg", 1))
    assert line(server, "other").take() is None
    assert taken(line(server, "one")) == [".dog.jpg"]


def test_it_knows_a_message_until_it_is_taken(server: Server) -> None:
    made, worker = line(server), line(server)
    number = made.send(Word(".dog.jpg", 1))
    assert made.known([(REST, number), (REST, "nobody's"), (FIRST, number)]) == {number}
    word = worker.take()
    assert word
    assert made.known([(REST, number)]) == {number}  # in somebody's hands
    worker.taken(word)
    assert made.known([(REST, number)]) == set()


def test_a_wiped_server_knows_nothing_and_goes_on(server: Server) -> None:
    made, worker = line(server), line(server)
    number = made.send(Word(".dog.jpg", 1))
    assert worker.take()
    server.client.flushall()
    assert made.known([(REST, number)]) == set()
    made.send(Word(".dog.jpg", 1))
    # The one in its hands is not acknowledged: it takes no other, until it says what became of it.
    assert taken(line(server)) == [".dog.jpg"]


def test_what_a_dead_worker_had_in_its_hands_comes_back_after_a_lease(server: Server) -> None:
    line(server).send(Word(".dog.jpg", 1))
    assert line(server, lease_s=0.5).take()
    heir = line(server, lease_s=0.5)
    wait_until(lambda: (word := heir.take()) and word.claim == ".dog.jpg")


def test_what_goes_back_is_anybodys_and_its_giver_takes_again(server: Server) -> None:
    made = line(server)
    made.send(Word(".dog.jpg", 1))
    word = made.take()
    assert word
    assert line(server).take() is None
    made.back(word)
    assert taken(made) == [".dog.jpg"]


def message(**other: Any) -> bytes:
    """A message as Dramatiq writes it, of ours but for what is given."""
    ours = {
        "queue_name": "a1-rest",
        "actor_name": "run",
        "args": [],
        "kwargs": {"claim": ".dog.jpg", "generation": 1},
        "options": {"redis_message_id": "x1"},
        "message_id": "x2",
    }
    return json.dumps({**ours, **other}).encode()


STRANGE = [
    b"",
    b"nonsense",
    b"{}",
    b"[]",
    b"3",
    b"\xff",
    b"[" * 100_000,
    b"9" * 100_000,
    json.dumps({"queue_name": "q", "actor_name": "a", "args": [], "kwargs": {}, "options": {}}).encode(),
    message(kwargs={"claim": 3, "generation": "x"}),
    message(kwargs={"claim": ".dog.jpg", "generation": True}),
    message(kwargs={"claim": ".dog.jpg", "generation": 1.0}),
    message(kwargs={"claim": None, "generation": 1}),
    message(kwargs=[".dog.jpg", 1]),
    message(kwargs=None),
    message(args=3),
    message(options=None),
    message(options=[]),
    message(options={}),
    message(options={"redis_message_id": None}),
    message(options={"redis_message_id": {"a": 1}}),
    message(message_id=None),
    message(message_id=["x"]),
    message(message_id={"x": 1}),
    message(surplus=1),
]


@pytest.mark.parametrize("body", STRANGE, ids=range(len(STRANGE)))
def test_a_message_of_somebody_else_stops_nobody_and_is_dropped_for_good(
    server: Server, body: bytes, logged: list[str]
) -> None:
    server.client.hset("sam_poll:a1-rest.msgs", "x1", body)
    server.client.rpush("sam_poll:a1-rest", "x1")
    made = line(server, lease_s=0.5)
    made.send(Word(".cat.jpg", 1))
    found: list[str] = []
    wait_until(lambda: found.extend(taken(made)) or found)
    assert found == [".cat.jpg"]
    assert len([text for text in logged if "none of ours" in text]) == 1
    assert server.client.hkeys("sam_poll:a1-rest.msgs") == []
    assert server.client.keys("sam_poll:__acks__*") == []


def test_redis_away_is_trouble_and_back_is_not(server: Server) -> None:
    made = line(server)
    server.kill()
    for call in (made.take, lambda: made.send(Word(".dog.jpg", 1)), lambda: made.known([(REST, "1")])):
        with pytest.raises(Trouble):
            call()
    server.start()
    made.send(Word(".dog.jpg", 1))
    assert taken(made) == [".dog.jpg"]


def test_no_trouble_tells_the_password(tmp_path: Path) -> None:
    with Server(tmp_path / "redis", password="s3cret-word") as server:
        made = Line(Link(of(server.url, "test")), "a1", 30.0)
        made.send(Word(".dog.jpg", 1))
        server.kill()
        with pytest.raises(Trouble) as away:
            made.take()
        wrong = Line(Link(of(server.url.replace("s3cret", "wr0ng"), "test")), "a1", 30.0)
        server.start()
        with pytest.raises(Trouble) as denied:
            wrong.take()
    for error in (away, denied):
        assert "-word" not in str(error.value) + repr(error.value)
    assert denied.value.denied


def test_many_takers_get_each_message_once(server: Server) -> None:
    sender = line(server)
    for number in range(200):
        sender.send(Word(f".{number}.jpg", 1))
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.extend(taken(line(server)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(found) == sorted(f".{number}.jpg" for number in range(200))


# ── names ──


@given(
    st.text(st.characters(), max_size=30) | st.text("\ud800\udc80./a") | st.from_regex(r"[./\w]{0,20}", fullmatch=True)
)
def test_no_message_leads_out_of_the_work_folder(claim: str) -> None:
    below = Word(claim, 1).below(LAYOUT)
    if below is not None:
        inside = below.outer.below(LAYOUT.work)
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
    ],
)
def test_what_no_file_can_be_called_is_no_claim(claim: str) -> None:
    assert Word(claim, 1).below(LAYOUT) is None


@pytest.mark.parametrize(
    "claim", ["", "/etc/.passwd", "../.x", "a/../../.x", "a//.x", "dog.jpg", ".a/.b", ".", "..", ".x/", "./.x"]
)
def test_what_cannot_be_a_claim_is_none(claim: str) -> None:
    assert Word(claim, 1).below(LAYOUT) is None


@pytest.mark.parametrize(("claim", "folder"), [(".dog.jpg", ""), ("cam1/day 2/.dog.jpg", "cam1/day 2")])
def test_a_claims_name_is_found_again(claim: str, folder: str) -> None:
    found = Word(claim, 1).below(LAYOUT)
    assert found
    assert (found.folder, found.outer) == (folder, LAYOUT.work / claim)
