"""Pub/sub channels: Waikato's senders and receivers work with this worker, and the other way."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import opex
import pytest
from PIL import Image

from sam_poll.cli import waikato_redis
from sam_poll.core.backoff import Backoff
from sam_poll.core.errors import ExitCode, PoisonError
from sam_poll.core.types import Job
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.redis.pubsub import RedisPubSubSource
from tests.conftest import picture_bytes, wait_until
from tests.support.redis_server import PROMPT, Server, pubsub_source, pubsub_worker
from tests.support.source_contract import DOCUMENTS, SourceContract

POINTS = {"points": [{"x": 30, "y": 20, "label": 1}, {"x": 2, "y": 2, "label": 0}]}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as made:
        yield made


def message(picture: bytes, prompt: Any = PROMPT, **more: Any) -> dict[str, Any]:
    """Return a message as Waikato's sender makes it: base64 with line breaks."""
    return {"image": base64.encodebytes(picture).decode("ascii"), "prompt": prompt, **more}


def send(server: Server, content: Any, channel: str = "in") -> None:
    body = content if isinstance(content, bytes | str) else json.dumps(content)
    assert server.client.publish(channel, body) == 1


class Listener:
    """Listens as Waikato's receivers: a thread calls a handler, and ends with its first error."""

    def __init__(
        self, server: Server, channel: str, handler: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self.heard: list[Any] = []
        self._pubsub = server.client.pubsub()
        self._handler = handler
        self._pubsub.psubscribe(**{channel: self._hear})
        assert self._pubsub.get_message(timeout=10)["type"] == "psubscribe"

    def _hear(self, received: dict[str, Any]) -> None:
        self.heard.append(json.loads(received["data"]))
        if self._handler:
            self._handler(received)

    def __enter__(self) -> Listener:
        self.thread = self._pubsub.run_in_thread(sleep_time=0.01, daemon=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self.thread.stop()
        self.thread.join(10)


class TestRedisPubSubSource(SourceContract):
    @pytest.fixture
    def source(self, server: Server) -> Iterator[RedisPubSubSource]:
        with Listener(server, "out") as self.listener, pubsub_source(server) as source:
            assert source.wait_subscribed(30)
            send(server, message(picture_bytes(), id="a"))
            send(server, message(picture_bytes(), id="b"))
            yield source

    def _heard(self, count: int) -> list[dict[str, Any]]:
        wait_until(lambda: len(self.listener.heard) >= count)
        return self.listener.heard

    def answers(self, source: Any) -> dict[str, bytes]:
        """Return mask and objects of each answer under the names of two output files."""
        heard = self._heard(1)
        if "error" in heard[0]:
            return {}
        made = {}
        for one in self._heard(2):
            name = one["meta"]["id"]
            made[f"{name}.mask.png"] = base64.b64decode(one["mask"])
            made[f"{name}.opex.json"] = b"{}" if not one["objects"] else b"?"
        return made

    def refusals(self, source: Any) -> dict[str, str]:
        return {one["meta"]["id"]: one["error"]["reason"] for one in self._heard(1)}

    def test_a_released_job_is_handed_out_again(self, source: Any) -> None:
        for job in self.take(source).values():
            source.requeue(job)
        assert sorted(self.take(source)) == ["a", "b"]

    def test_fail_attempt_makes_the_job_poison_after_three_attempts(self, source: Any) -> None:
        job = self.take(source)["a"]
        for attempt in (2, 3, 4):
            source.fail_attempt(job)
            job = next(j for j in source.jobs(threading.Event()) if j.id == "a")
            assert job.attempt == attempt
        assert isinstance(job.error, PoisonError)


# ── this worker with Waikato's sender and receiver ──


def test_worker_answers_in_waikatos_form(server: Server) -> None:
    with pubsub_worker(server), Listener(server, "out") as listener:
        send(server, message(picture_bytes(), POINTS))
        send(server, message(picture_bytes(".png"), PROMPT))
        wait_until(lambda: len(listener.heard) == 2)
    heard = sorted(
        listener.heard, key=lambda answer: "box" in answer["meta"]["prompt"]
    )  # any order may be
    for answer, prompt in zip(heard, (POINTS, PROMPT), strict=True):
        with Image.open(io.BytesIO(base64.decodebytes(answer["mask"].encode()))) as mask:
            assert mask.size == (64, 48)
            pixels = np.asarray(mask)
        assert set(pixels.flat) == {0, 255}
        assert answer["contours"]
        for contour in answer["contours"]:
            assert len(contour) >= 3
            assert all(type(x) is int and type(y) is int for x, y in contour)
            assert all(0 <= x < 64 and 0 <= y < 48 for x, y in contour)
        assert answer["meta"]["prompt"] == prompt
        assert {"type", "model_type", "model_file"} <= set(answer["meta"]["segmenter"])
    box = np.array(heard[1]["contours"][0])
    assert np.abs(box.min(axis=0) - (10, 10)).max() <= 2
    assert np.abs(box.max(axis=0) - (49, 39)).max() <= 2


def test_answer_has_labels_and_scores_of_several_objects(server: Server) -> None:
    prompt = {
        "objects": [{"label": "cat", **PROMPT}, {"label": "dog", "points": [{"x": 55, "y": 44}]}]
    }
    with pubsub_worker(server, names=("mask", "opex", "cvat")), Listener(server, "out") as listener:
        send(server, message(picture_bytes(), prompt, id=7))
        wait_until(lambda: listener.heard)
    (answer,) = listener.heard
    assert [entry["label"] for entry in answer["objects"]] == ["cat", "dog"]
    assert [entry["polygon"]["points"] for entry in answer["objects"]] == answer["contours"]
    assert answer["meta"]["id"] == "7"
    assert b"<annotations>" in base64.b64decode(answer["documents"]["cvat.xml"])


def test_answer_to_texts_has_all_objects_of_each_kind_or_none(server: Server) -> None:
    with pubsub_worker(server, names=("mask", "opex")), Listener(server, "out") as listener:
        send(server, message(picture_bytes(), {"text": ["a b", "c"]}, id=1))
        send(server, message(picture_bytes(), {"text": "nothing"}, id=2))
        wait_until(lambda: len(listener.heard) == 2)
    found = {answer["meta"]["id"]: answer for answer in listener.heard}
    assert [entry["label"] for entry in found["1"]["objects"]] == ["a b", "c", "a b"]
    assert found["2"]["objects"] == []
    assert found["2"]["contours"] == []


BAD: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "message"),
    "not even text": (b"\xff\xfe\x00", "message"),
    "deep": ("[" * 100_000, "message"),
    "a list": ([], "message"),
    "no picture": ({"prompt": PROMPT}, "image"),
    "picture is a number": ({"image": 1, "prompt": PROMPT}, "image"),
    "broken base64": ({"image": "ab*c", "prompt": PROMPT}, "image"),
    "empty picture": ({"image": "", "prompt": PROMPT}, "image"),
    "no prompt": ({"image": "QUJD"}, "prompt"),
    "odd prompt": ({"image": "QUJD", "prompt": {"box": 7}}, "prompt, box"),
    "odd id": (message(b"x", id=[1]), "id"),
}


def test_bad_messages_get_an_error_that_waikatos_receiver_can_read(
    server: Server, tmp_path: Path
) -> None:
    saved: list[np.ndarray] = []

    def save(received: dict[str, Any]) -> None:
        content = json.loads(received["data"].decode())
        with Image.open(io.BytesIO(base64.decodebytes(content["mask"].encode()))) as mask:
            saved.append(np.asarray(mask))
        assert isinstance(content["contours"], list)

    with pubsub_worker(server) as worker, Listener(server, "out", save) as listener:
        for content, _ in BAD.values():
            send(server, content)
        send(server, message(b"no picture at all"))
        send(server, message(picture_bytes()))
        wait_until(lambda: len(saved) == len(BAD) + 2)
        assert worker.telemetry.stats.now().rejected == len(BAD) + 1
    refused = [answer["error"] for answer in listener.heard if "error" in answer]
    assert sorted(r["place"] for r in refused if r["place"]) == sorted(
        place for _, place in BAD.values()
    )
    assert all(r["reason"] and r["remedy"] and r["code"] for r in refused)
    assert [mask.max() for mask in saved if mask.shape == (48, 64)] == [255]
    assert all(mask.shape == (1, 1) and not mask.any() for mask in saved if mask.shape != (48, 64))


# ── the channel ──


def test_buffer_drops_the_oldest_messages_and_counts_them(
    server: Server, logged: list[str]
) -> None:
    with pubsub_source(server, keep=3) as source:
        assert source.wait_subscribed(30)
        for number in range(8):
            send(server, message(b"x", id=number))
        wait_until(lambda: source.dropped == 5)
        jobs: list[Job] = []
        for job in source.jobs(threading.Event()):
            jobs.append(job)
            if len(jobs) == 3:
                break
    assert [job.id for job in jobs] == ["5", "6", "7"]
    assert any("5 in all" in line for line in logged)


def test_buffer_is_bounded_in_bytes_except_for_the_newest_message(server: Server) -> None:
    with pubsub_source(server, keep_mib=1) as source:
        assert source.wait_subscribed(30)
        for number in range(6):
            send(server, message(bytes(300_000), id=number))
        send(server, message(bytes(1_500_000), id="large"))
        wait_until(lambda: source.dropped == 6)
        assert source.waiting == 1
        assert next(source.jobs(threading.Event())).id == "large"


def test_an_ended_source_leaves_no_connection_open(server: Server) -> None:
    before = len(server.client.client_list())
    with pubsub_source(server) as source:
        assert source.wait_subscribed(30)
        send(server, message(picture_bytes()))
        source.reject(next(source.jobs(threading.Event())), PoisonError("for this test"))
    wait_until(lambda: len(server.client.client_list()) == before)


def test_channel_may_be_a_pattern(server: Server) -> None:
    with pubsub_worker(server, source="images.*"), Listener(server, "out") as listener:
        send(server, message(picture_bytes()), "images.cam1")
        wait_until(lambda: listener.heard)


def test_answers_are_not_taken_for_requests_though_the_pattern_matches_them(
    server: Server,
) -> None:
    with pubsub_worker(server, source="o*") as worker, Listener(server, "out") as listener:
        for name in ("a", "b"):
            assert server.client.publish("orders", json.dumps(message(picture_bytes(), id=name)))
            wait_until(lambda name=name: name in [one["meta"].get("id") for one in listener.heard])
        assert [one for one in listener.heard if "error" in one] == []
        wait_until(lambda: worker.answered >= 2)  # counted when the answer has been heard
        assert worker.answered == 2


def test_source_subscribes_again_after_a_restart_of_the_server(server: Server) -> None:
    with pubsub_worker(server) as worker:
        server.kill()
        wait_until(lambda: "redis" in worker.telemetry.alarms)
        server.start()
        wait_until(lambda: not worker.telemetry.alarms.active())
        with Listener(server, "out") as listener:
            send(server, message(picture_bytes()))
            wait_until(lambda: listener.heard)
    assert "error" not in listener.heard[0]


def test_answer_that_cannot_be_published_is_kept_until_the_server_is_back(server: Server) -> None:
    gate = threading.Event()
    with pubsub_worker(server, FakeEngine(gate=gate)) as worker:
        send(server, message(picture_bytes()))
        wait_until(lambda: worker.telemetry.stats.now().at_work)
        server.kill()
        gate.set()
        wait_until(lambda: "output" in worker.telemetry.alarms)
        server.start()
        wait_until(lambda: worker.answered == 1)
        wait_until(lambda: not worker.telemetry.alarms.active())


def test_message_too_large_for_the_listener_loses_no_other_message(tmp_path: Path) -> None:
    limit = "client-output-buffer-limit pubsub 1mb 1mb 1"
    with Server(tmp_path / "redis", limit) as server, pubsub_worker(server) as worker:
        server.client.publish(
            "in", bytes(8 << 20)
        )  # the server closes the connection of who should get it
        wait_until(lambda: "redis" in worker.telemetry.alarms or not server.client.pubsub_numpat())
        wait_until(lambda: server.client.pubsub_numpat() == 1)
        with Listener(server, "out") as listener:
            server.client.publish("in", json.dumps(message(picture_bytes())))
            wait_until(lambda: listener.heard)


def test_message_sent_while_the_listener_waits_after_a_lost_connection_is_answered(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[int] = []

    def send_meanwhile(backoff: Backoff, end: threading.Event) -> None:
        received.append(server.client.publish("in", json.dumps(message(picture_bytes()))))

    with pubsub_worker(server) as worker:
        monkeypatch.setattr(Backoff, "wait", send_meanwhile)
        server.client.client_kill_filter(_type="pubsub")
        wait_until(lambda: received)
        assert received == [1]
        wait_until(lambda: worker.answered == 1)


def test_source_logs_how_many_messages_are_lost_at_its_end(
    server: Server, logged: list[str]
) -> None:
    with pubsub_source(server) as source:
        assert source.wait_subscribed(30)
        send(server, message(b"x"))
        wait_until(lambda: source.waiting == 1)
    assert any("1 messages were not answered and are lost" in line for line in logged)


# ── sam_test_redis_send and sam_test_redis_recv ──


def flags(server: Server, channel: str, *more: str) -> list[str]:
    return ["-H", "127.0.0.1", "-p", str(server.port), "-d", "0", "-c", channel, *more]


class Receiving:
    """`sam_test_redis_recv` in a thread. Entering waits until it listens."""

    def __init__(self, server: Server, folder: Path, count: int, *more: str) -> None:
        self.code: ExitCode | None = None
        self._server = server
        arguments = flags(server, "out", "-o", str(folder), "--count", str(count), *more)
        self._thread = threading.Thread(
            target=lambda: setattr(self, "code", waikato_redis.recv(arguments))
        )

    def __enter__(self) -> Receiving:
        before = self._server.client.pubsub_numpat()
        self._thread.start()
        wait_until(lambda: self._server.client.pubsub_numpat() > before)
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "dog.jpg").write_bytes(picture_bytes())
    (tmp_path / "dog.json").write_text(json.dumps(PROMPT))
    return tmp_path / "dog.jpg", tmp_path / "dog.json"


def test_send_and_recv_work_with_this_worker(server: Server, tmp_path: Path) -> None:
    picture, prompt = files(tmp_path)
    with pubsub_worker(server), Receiving(server, tmp_path / "got", 1, "-f", "answer") as receiving:
        assert (
            waikato_redis.send(flags(server, "in", "-I", str(picture), "-P", str(prompt)))
            is ExitCode.OK
        )
    assert receiving.code is ExitCode.OK
    assert sorted(p.name for p in (tmp_path / "got").iterdir()) == ["answer.json", "answer.png"]
    with Image.open(tmp_path / "got" / "answer.png") as mask:
        assert mask.size == (64, 48)
    read = opex.ObjectPredictions.load_json_from_file(str(tmp_path / "got" / "answer.json"))
    assert read.id == "answer"
    assert read.objects[0].score is not None


def test_send_and_recv_work_with_waikatos_worker(server: Server, tmp_path: Path) -> None:
    """Waikato's worker sends one-bit masks, base64 with line breaks, and contours only."""
    picture, prompt = files(tmp_path)

    def predict(received: dict[str, Any]) -> None:
        content = json.loads(received["data"].decode())
        with Image.open(io.BytesIO(base64.b64decode(content["image"]))) as opened:
            mask = Image.new("1", opened.size)
        body = io.BytesIO()
        mask.save(body, format="PNG")
        made = {
            "contours": [[[1, 2], [5, 2], [5, 9]]],
            "mask": base64.encodebytes(body.getvalue()).decode("ascii"),
            "meta": {
                "segmenter": {"type": "sam", "model_type": "vit_b", "model_file": "x"},
                "prompt": content["prompt"],
            },
        }
        server.client.publish("out", json.dumps(made))

    into = tmp_path / "got", 2, "-f", "same"
    with Listener(server, "in", predict) as listener, Receiving(server, *into) as receiving:
        for _ in range(2):
            assert (
                waikato_redis.send(flags(server, "in", "-I", str(picture), "-P", str(prompt)))
                is ExitCode.OK
            )
    assert receiving.code is ExitCode.OK
    assert listener.heard[0]["prompt"] == PROMPT
    names = ["same.json", "same.png", "same~2.json", "same~2.png"]
    assert sorted(p.name for p in (tmp_path / "got").iterdir()) == names
    read = opex.ObjectPredictions.load_json_from_file(str(tmp_path / "got" / "same.json"))
    box = read.objects[0].bbox
    assert (box.left, box.top, box.right, box.bottom) == (1, 2, 5, 9)


def test_recv_saves_errors_and_skips_messages_that_are_no_answer(
    server: Server, tmp_path: Path
) -> None:
    with pubsub_worker(server), Receiving(server, tmp_path / "got", 3, "-f", "answer") as receiving:
        server.client.publish("out", "nonsense")
        server.client.publish("out", '{"mask": 1}')
        send(server, {"prompt": PROMPT})
    assert receiving.code is ExitCode.FAILED_JOBS
    (file,) = (tmp_path / "got").iterdir()
    assert file.name == "answer.error.json"
    assert json.loads(file.read_text())["error"]["reason"] == "there is no picture"


def test_recv_does_not_call_the_server_unreachable_where_its_folder_cannot_be_written(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    def publish() -> None:
        wait_until(lambda: server.client.pubsub_numpat())
        server.client.publish("out", '{"error": "no"}')

    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(publish)
        with pytest.raises(FileExistsError):
            waikato_redis.recv(flags(server, "out", "-o", str(tmp_path / "file"), "--count", "1"))
        published.result()


def test_send_ends_with_3_without_listeners(server: Server, tmp_path: Path) -> None:
    picture, prompt = files(tmp_path)
    assert (
        waikato_redis.send(flags(server, "in", "-I", str(picture), "-P", str(prompt)))
        is ExitCode.FAILED_JOBS
    )


def test_answer_without_objects_has_no_contours(server: Server) -> None:
    with Listener(server, "out") as listener, pubsub_source(server) as source:
        assert source.wait_subscribed(30)
        send(server, message(b"x"))
        job = next(source.jobs(threading.Event()))
        source.deliver(job, DOCUMENTS)
        wait_until(lambda: listener.heard)
    assert listener.heard[0]["contours"] == []
