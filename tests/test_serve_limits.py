"""SAM over HTTP: who may ask, how many at once, who has gone, how it stops, and what it says of itself."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from sam_poll import images
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import DeviceError, ExitCode, PoisonError, SamPollError, SettingsError
from sam_poll.fleet import Fleet, Post
from sam_poll.member import Equipment
from sam_poll.pipeline import Sizes
from sam_poll.serve import answers, gate, run
from sam_poll.serve.door import Exchange, HttpDoor, Outcome, stopping
from sam_poll.serve.refusals import FullError, UnavailableError
from sam_poll.types import Box, Job, Prompt
from tests.conftest import picture_bytes, wait_until
from tests.door_contract import DoorContract
from tests.serve_site import TOKEN, Site, in_base64, json_body, settings, site

ROOT = Path(__file__).parent.parent
MASK = {"formats": ["mask"]}

# ── the door ──


def job(name: str) -> Job:
    return Job(name, f"{name}.jpg", b"", (Prompt(box=Box(0, 0, 1, 1)),))


class TestHttpDoor(DoorContract):
    @pytest.fixture
    def door(self) -> HttpDoor:
        self.ends: dict[str, list[Outcome]] = {"a": [], "b": []}
        made = HttpDoor(places=2)
        for name, ends in self.ends.items():
            made.offer(job(name), Exchange(ends.append))
        return made

    def answers(self, door: Any) -> dict[str, bytes]:
        told = {name: end for name, ends in self.ends.items() for end in ends if not isinstance(end, SamPollError)}
        return {name + document.suffix: document.body for name, end in told.items() for document in end}

    def refusals(self, door: Any) -> dict[str, str]:
        return {n: end.reason for n, ends in self.ends.items() for end in ends if isinstance(end, SamPollError)}

    def test_a_released_job_is_handed_out_again(self, door: Any) -> None:
        for one in self.take(door).values():
            door.release(one)
        assert sorted(self.take(door)) == ["a", "b"]

    def test_a_released_job_whose_caller_has_gone_is_not(self, door: Any) -> None:
        jobs = self.take(door)
        door.give_up(jobs["a"].origin)
        door.release(jobs["a"])
        assert door.waiting == 0

    def test_with_trouble_its_caller_is_told_to_come_again(self, door: Any) -> None:
        door.release(self.take(door)["a"], OSError("odd"))
        (told,) = self.ends["a"]
        assert isinstance(told, UnavailableError)

    def test_it_is_told_once_how_a_job_ends(self, door: Any) -> None:
        one = self.take(door)["a"]
        door.deliver(one, [])
        door.reject(one, stopping())
        door.close(stopping())
        assert self.ends["a"] == [[]]
        assert self.refusals(door) == {"b": stopping().reason}

    def test_who_has_gone_is_told_nothing_and_handed_out_no_more(self, door: Any) -> None:
        stop = threading.Event()
        for one in door.jobs(stop):
            other = "b" if one.id == "a" else "a"
            door.give_up(next(w.origin for w in door._waiting if w.id == other))
            door.give_up(one.origin)
            assert one.gone.is_set()
            door.deliver(one, [])
            break
        assert (self.ends, door.waiting) == ({"a": [], "b": []}, 0)

    def test_a_job_that_ends_its_process_is_tried_again_and_then_poison(self, door: Any) -> None:
        one = self.take(door)["a"]
        for attempt in (2, 3):
            door.abandon(one)
            (one,) = [w for w in door._waiting if w.id == "a"]
            door._waiting.remove(one)
            assert one.attempt == attempt
        door.abandon(one)
        assert isinstance(self.ends["a"][0], PoisonError)

    def test_at_stop_those_who_wait_are_told(self, door: Any) -> None:
        stop = threading.Event()
        for _ in door.jobs(stop):
            stop.set()
        assert len(self.refusals(door)) == 1  # the other is at work

    def test_closed_it_takes_nothing_and_says_why(self, door: Any) -> None:
        door.close(DeviceError("gone"))
        door.close(stopping())
        with pytest.raises(DeviceError):
            door.offer(job("c"), Exchange(lambda outcome: None))
        assert set(self.refusals(door).values()) == {"gone"}

    def test_places_are_so_many_and_who_comes_then_is_told_when_half_are_free(self) -> None:
        now = 1000.0
        made = HttpDoor(places=4, clock=lambda: now)
        with made.place(), made.place(), made.place(), made.place():
            with pytest.raises(FullError) as told, made.place():
                pass
            assert told.value.wait_s == 5  # nothing is known yet
            for name in "ab":
                made.offer(job(name), Exchange(lambda outcome: None))
            jobs = self.take(made)
            for one in jobs.values():
                now += 3.0
                made.deliver(one, [])
            now += 1000.0  # nobody asked for anything
            made.offer(job("c"), Exchange(lambda outcome: None))
            with pytest.raises(FullError) as told, made.place():
                pass
            assert told.value.wait_s == pytest.approx(2 * 3.0)
        with made.place():
            assert made.inside == 1


# ── who may ask ──


def test_without_the_token_nothing_but_health_and_the_description_is_told() -> None:
    with site(token=TOKEN) as there, there.client() as client:
        for header in (None, "", TOKEN, "Bearer", f"Bearer {TOKEN}x", "Bearer ä", "Basic !", "Basic eDp5"):
            headers = {} if header is None else {"Authorization": header.encode()}
            answer = client.post("/predict", json=json_body(**MASK), headers=headers)
            assert (answer.status_code, answer.headers.get("www-authenticate")) == (401, "Bearer"), header
            assert TOKEN not in answer.text
            assert client.get("/metrics", headers=headers).status_code == 401
            assert client.get("/nowhere", headers=headers).status_code == 401
        assert there.engine.calls["encode"] == 0
        assert client.get("/health").status_code == client.get("/openapi.json").status_code == 200
        basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
        for header in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"Basic {basic}"):
            answer = client.post("/predict", json=json_body(**MASK), headers={"Authorization": header})
            assert answer.status_code == 200


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_others_may_not_ask_without_a_token(address: str) -> None:
    with pytest.raises(SettingsError) as told, run.listening(address, guarded=False):
        pass
    assert told.value.place == "serve.listen"
    assert gate.TOKEN in (told.value.remedy or "")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "127.0.0.2:0"])
def test_on_this_machine_they_may(address: str) -> None:
    with run.listening(address, guarded=False) as opened:
        assert run.shown(opened).startswith("http://")


def test_a_port_that_is_taken_is_a_settings_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        again = run.listening(f"127.0.0.1:{taken.getsockname()[1]}", guarded=False)
        with pytest.raises(SettingsError, match="no port") as told, again:
            pass
    assert told.value.remedy


def test_the_token_comes_from_its_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    assert gate.token_of(file, {gate.TOKEN: "another-one-of-20-letters"}) == TOKEN
    assert gate.token_of(None, {gate.TOKEN: f" {TOKEN} "}) == TOKEN
    assert gate.token_of(None, {}) is gate.token_of(None, {gate.TOKEN: ""}) is None


@pytest.mark.parametrize(
    "text", [b"", b"short", b"two words of some length", "grün-grün-grün-grün".encode(), b"\xff" * 20]
)
def test_a_token_of_no_use_is_refused_and_never_shown(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(text)
    with pytest.raises(SettingsError) as told:
        gate.token_of(file, {})
    assert text.decode("latin-1") not in str(told.value) or not text
    with pytest.raises(SettingsError):
        gate.token_of(tmp_path / "none", {})


# ── how many at once, and how long ──


@contextmanager
def held(**flags: Any) -> Iterator[tuple[Site, threading.Event]]:
    """A site whose network waits until the event is set."""
    opened = threading.Event()
    with site(FakeEngine(gate=opened, batch=1), **flags) as there:
        try:
            yield there, opened
        finally:
            opened.set()


def test_who_finds_no_place_is_told_at_once_when_to_come_again_and_the_others_are_answered() -> None:
    with held(serve__queue=2) as (there, opened):
        inside = [there.later("/predict", json_body(n, **MASK)) for n in (0, 1)]
        wait_until(lambda: there.door.inside == 2)
        for path in ("/predict", "/interact", "/features"):
            answer = there.post(path, json_body(2, **MASK))
            assert (answer.status_code, answer.json()["code"]) == (429, "full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert there.get("/health").status_code == 200
        opened.set()
        assert {asked.done().status_code for asked in inside} == {200}
        assert there.post("/predict", json_body(2, **MASK)).status_code == 200
        wait_until(lambda: there.door.inside == 0)  # the answer is sent before the place is free


def test_what_is_not_answered_in_time_is_given_up() -> None:
    with held(serve__timeout_s=0.2) as (there, opened):
        answer = there.post("/predict", json_body(**MASK))
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert there.door.inside == 0
        late = there.post("/predict", json_body(1, **MASK))
        assert late.status_code == 503
        opened.set()
        wait_until(lambda: there.signs.stats.now().at_work == 0)
        assert images.digest_of(picture_bytes(seed=1)) not in there.engine.encoded


def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with site(serve__timeout_s=0.2) as there:
        with there.begin("/predict", {}, length=1000) as caller:
            assert b" 408 " in caller.recv(4096)
        wait_until(lambda: there.door.inside == 0)


def test_a_caller_who_hangs_up_before_his_body_is_there_leaves_his_place() -> None:
    with site() as there:
        with there.begin("/predict", {}, length=1000):
            wait_until(lambda: there.door.inside == 1)
        wait_until(lambda: there.door.inside == 0)


def test_a_caller_who_has_gone_takes_his_job_along_before_the_network_sees_it() -> None:
    with held() as (there, opened):
        first = there.later("/predict", json_body(0, **MASK))
        wait_until(lambda: there.engine.calls["encode"])
        with there.begin("/predict", json_body(1, **MASK)):
            wait_until(lambda: there.signs.stats.now().at_work == 2)
        wait_until(lambda: there.door.inside == 1)
        opened.set()
        assert first.done().status_code == 200
        wait_until(lambda: there.signs.stats.now().at_work == 0)
        assert there.engine.encoded == [images.digest_of(picture_bytes(seed=0))]
        assert there.signs.stats.now().released == {"": 1}


def test_one_who_waits_for_a_slot_of_the_pipeline_and_goes_is_never_handed_out() -> None:
    with held(pipeline__queue=1, pipeline__decode_threads=1, pipeline__finish_threads=1) as (there, opened):
        callers = [there.begin("/predict", json_body(n, **MASK)) for n in range(12)]
        wait_until(lambda: there.door.inside == 12 and there.door.waiting >= 7 and there.engine.calls["encode"])
        for caller in callers:
            caller.close()
        wait_until(lambda: there.door.inside == there.door.waiting == 0)
        opened.set()
        wait_until(lambda: there.signs.stats.now().at_work == 0)
        assert len(there.engine.encoded) == 1


def test_a_caller_who_does_not_read_his_answer_keeps_his_place_no_longer_than_a_request_may_take() -> None:
    big = cv2.imencode(".png", np.zeros((3000, 4000), np.uint8))[1].tobytes()
    body = {"image": in_base64(big), "obj_bbox": [[100, 100], [3900, 2900]]}
    with site(serve__timeout_s=4) as there, there.begin("/interact", body):
        wait_until(lambda: there.signs.stats.now().answered)
        assert there.door.inside == 1  # tens of megabytes lie in no buffer
        wait_until(lambda: there.door.inside == 0)


# ── stop ──


def test_at_stop_what_is_at_work_is_answered_and_who_comes_is_turned_away() -> None:
    with held() as (there, opened):
        first = there.later("/predict", json_body(**MASK))
        wait_until(lambda: there.engine.calls["encode"])
        there.stop.set()
        answer = there.post("/predict", json_body(1, **MASK))
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert there.get("/health").json()["ready"] is False
        opened.set()
        assert first.done().status_code == 200


def test_what_does_not_finish_in_its_time_is_told_so() -> None:
    with held(drain_s=0.2) as (there, opened):
        first = there.later("/predict", json_body(0, **MASK))
        wait_until(lambda: there.engine.calls["encode"])
        second = there.later("/predict", json_body(1, **MASK))
        wait_until(lambda: there.pipeline._device_queue.qsize())
        there.stop.set()
        wait_until(there.pipeline._hurry.is_set)
        opened.set()
        assert {asked.done().status_code for asked in (first, second)} == {503}


# ── what it says of itself ──


def test_health_is_503_while_the_network_is_loaded_and_requests_are_told_to_come_again() -> None:
    with site(work=False) as there:
        for look in (there.get("/health"), there.post("/predict", json_body(**MASK))):
            assert look.status_code == 503
        told = there.get("/health").json()
        assert (told["live"], told["ready"], told["model"]) == (True, False, None)
        there.work()
        answer = there.get("/health")
        assert (answer.status_code, answer.json()["model"]["name"], answer.json()["ready"]) == (200, "fake", True)


def test_health_says_when_something_hangs() -> None:
    with site() as there:
        there.signs.alarms.raise_("stuck", "the device loop has not moved")
        answer = there.get("/health")
        assert (answer.status_code, answer.json()["live"]) == (503, False)


def test_metrics_count_requests_as_jobs() -> None:
    with site() as there:
        there.post("/predict", json_body(**MASK))
        there.post("/predict", json_body(prompt={"box": {"x0": 0, "y0": 0, "x1": 900, "y1": 9}}, **MASK))
        wait_until(lambda: there.signs.stats.now().at_work == 0)  # an answer is counted when it is out
        answer = there.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    (jobs,) = (family for family in text_string_to_metric_families(answer.text) if family.name == "sam_poll_jobs")
    counts = {(s.labels["result"], s.labels["reason"]): s.value for s in jobs.samples if s.value}
    assert counts == {("answered", ""): 1, ("rejected", "prompt"): 1}


# ── several devices ──


def equipped() -> Equipment:
    return FakeEngine(side=1024), answers.menu_of(settings()), Sizes()


def test_a_fleet_answers_requests_in_their_formats_and_hands_embeddings_out() -> None:
    stop = threading.Event()
    ends: dict[str, list[Outcome]] = {"mask": [], "coco": [], answers.FEATURES: []}
    door = HttpDoor(places=3)
    posts = [Post(f"cpu #{n}", equipped, {**os.environ, "PYTHONPATH": str(ROOT)}) for n in range(2)]
    with Fleet(posts, stop) as fleet:
        thread = threading.Thread(target=fleet.run, args=(door, stop))
        thread.start()
        for wanted, told in ends.items():
            prompts = () if wanted == answers.FEATURES else (Prompt(box=Box(5, 5, 30, 30)),)
            made = Job(wanted, "a.jpg", picture_bytes(), prompts, formats=(wanted,), embedding=not prompts)
            door.offer(made, Exchange(told.append))
        wait_until(lambda: all(ends.values()))
        stop.set()
        thread.join(60)
    kinds = [
        document.media_type for (told,) in ends.values() if not isinstance(told, SamPollError) for document in told
    ]
    assert kinds == ["image/png", "application/json", "application/json"]


# ── the real thing ──


@contextmanager
def process(*flags: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`sam-poll serve` with the bundled model on a free port."""
    command = [sys.executable, "-m", "sam_poll", "serve", "--listen", "0", "-m", "demo", "--device", "cpu", *flags]
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **env}, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    ) as made:
        try:
            assert made.stderr
            lines = []
            for line in made.stderr:
                lines.append(line)
                if "serving at " in line:
                    break
            assert lines, "it said nothing"
            assert "serving at " in lines[-1], lines
            yield made, lines[-1].split("serving at ")[1].strip()
        finally:
            made.kill()


def test_the_command_answers_until_a_signal_and_ends_with_0() -> None:
    with process(SAM_POLL_SERVE_TOKEN=TOKEN) as (made, url):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
            health = client.get("/health").json()
            assert (health["ready"], health["model"]["name"]) == (True, "demo")
            picture = (ROOT / "examples" / "waikato" / "box.jpg").read_bytes()
            prompt = (ROOT / "examples" / "waikato" / "box.prompt").read_text()
            answer = client.post("/predict", files={"picture": picture}, data={"prompt": prompt, "formats": "coco"})
            assert answer.status_code == 200
            assert answer.json()["annotations"][0]["area"] > 1000
            assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 401
        made.send_signal(signal.SIGTERM)
        _, said = made.communicate(timeout=60)
        assert made.returncode == ExitCode.OK
        assert "stopped: 1 jobs answered" in said or "stopped: 1 job answered" in said
        assert TOKEN not in said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--listen", "0.0.0.0:0"], "there is no token"),
        (["--listen", "nowhere"], "not an address"),
        (["--token-file", "/nonexistent/token"], "cannot be read"),
    ],
)
def test_a_start_that_makes_no_sense_ends_with_78_and_one_message(flags: list[str], said: str) -> None:
    command = [sys.executable, "-m", "sam_poll", "serve", "-m", "demo", *flags]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, said in done.stderr) == (ExitCode.SETTINGS, True), done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_device_ends_the_server_with_70(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    engine.fail("decode", DeviceError("the card is gone"))
    monkeypatch.setattr("sam_poll.app.engine_of", lambda *a, **k: engine)
    seen: list[httpx.Response] = []

    def ask(url: str) -> None:
        wait_until(lambda: httpx.get(f"{url}/health", trust_env=False).status_code == 200)
        seen.append(httpx.post(f"{url}/predict", json=json_body(**MASK), timeout=60, trust_env=False))

    def shown(opened: socket.socket) -> str:
        url = f"http://127.0.0.1:{opened.getsockname()[1]}"
        threading.Thread(target=ask, args=(url,)).start()
        return url

    monkeypatch.setattr(run, "shown", shown)
    asked = settings(serve__listen="127.0.0.1:0", serve__timeout_s=30)

    with pytest.raises(DeviceError) as told:
        run.serve(asked, env={})
    assert told.value.exit_code == ExitCode.DEVICE
    wait_until(lambda: seen)
    assert (seen[0].status_code, seen[0].json()["code"]) == (500, "device")
