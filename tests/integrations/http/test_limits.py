"""HTTP server: job source, token, limits, disconnected clients, stop, health and metrics."""

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

from sam_poll.core.errors import DeviceError, ExitCode, PoisonError, SamPollError, SettingsError
from sam_poll.core.types import Box, Job, Prompt
from sam_poll.engines.fake import FakeEngine
from sam_poll.imaging import decode
from sam_poll.integrations.http import auth as gate
from sam_poll.integrations.http import requests, responses, server
from sam_poll.integrations.http.errors import (
    BadRequestError,
    TooManyRequestsError,
    UnavailableError,
)
from sam_poll.integrations.http.source import HttpSource, Outcome, PendingResponse, stopping_error
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.worker_pool import WorkerPool, WorkerSpec
from sam_poll.pipeline.worker_process import WorkerSetup
from sam_poll.prompts import parser
from tests.conftest import picture_bytes, wait_until
from tests.support.http_server import TOKEN, Site, in_base64, json_body, running_site, settings
from tests.support.paths import ROOT
from tests.support.source_contract import SourceContract

MASK = {"formats": ["mask"]}

# ── the job source ──


def job(name: str) -> Job:
    return Job(name, f"{name}.jpg", b"", (Prompt(box=Box(0, 0, 1, 1)),))


class TestHttpSource(SourceContract):
    @pytest.fixture
    def source(self) -> HttpSource:
        self.ends: dict[str, list[Outcome]] = {"a": [], "b": []}
        made = HttpSource(places=2)
        for name, ends in self.ends.items():
            made.offer(job(name), PendingResponse(ends.append))
        return made

    def answers(self, source: Any) -> dict[str, bytes]:
        delivered = {
            name: end
            for name, ends in self.ends.items()
            for end in ends
            if not isinstance(end, SamPollError)
        }
        return {
            name + document.suffix: document.body
            for name, end in delivered.items()
            for document in end
        }

    def refusals(self, source: Any) -> dict[str, str]:
        return {
            n: end.reason
            for n, ends in self.ends.items()
            for end in ends
            if isinstance(end, SamPollError)
        }

    def test_a_released_job_is_handed_out_again(self, source: Any) -> None:
        for one in self.take(source).values():
            source.requeue(one)
        assert sorted(self.take(source)) == ["a", "b"]

    def test_requeued_job_is_dropped_after_its_client_disconnected(self, source: Any) -> None:
        jobs = self.take(source)
        source.give_up(jobs["a"].source_ref)
        source.requeue(jobs["a"])
        assert source.waiting == 0

    def test_requeue_with_trouble_ends_the_job_with_unavailable(self, source: Any) -> None:
        source.requeue(self.take(source)["a"], OSError("odd"))
        (outcome,) = self.ends["a"]
        assert isinstance(outcome, UnavailableError)

    def test_outcome_is_told_once(self, source: Any) -> None:
        one = self.take(source)["a"]
        source.deliver(one, [])
        source.reject(one, stopping_error())
        source.close(stopping_error())
        assert self.ends["a"] == [[]]
        assert self.refusals(source) == {"b": stopping_error().reason}

    def test_disconnected_client_is_told_nothing_and_its_job_is_dropped(self, source: Any) -> None:
        stop = threading.Event()
        for one in source.jobs(stop):
            other = "b" if one.id == "a" else "a"
            source.give_up(next(w.source_ref for w in source._waiting if w.id == other))
            source.give_up(one.source_ref)
            assert one.cancelled.is_set()
            source.deliver(one, [])
            break
        assert (self.ends, source.waiting) == ({"a": [], "b": []}, 0)

    def test_fail_attempt_tries_again_and_then_ends_with_poison(self, source: Any) -> None:
        one = self.take(source)["a"]
        for attempt in (2, 3):
            source.fail_attempt(one)
            (one,) = [w for w in source._waiting if w.id == "a"]
            source._waiting.remove(one)
            assert one.attempt == attempt
        source.fail_attempt(one)
        assert isinstance(self.ends["a"][0], PoisonError)

    def test_stop_ends_the_waiting_jobs(self, source: Any) -> None:
        stop = threading.Event()
        for _ in source.jobs(stop):
            stop.set()
        assert len(self.refusals(source)) == 1  # the other is at work

    def test_close_ends_all_jobs_and_refuses_further_ones_with_the_first_error(
        self, source: Any
    ) -> None:
        source.close(DeviceError("gone"))
        source.close(stopping_error())
        with pytest.raises(DeviceError):
            source.offer(job("c"), PendingResponse(lambda outcome: None))
        assert set(self.refusals(source).values()) == {"gone"}

    def test_places_are_limited_and_the_refusal_says_when_half_are_free(self) -> None:
        now = 1000.0
        made = HttpSource(places=4, clock=lambda: now)
        with made.place(), made.place(), made.place(), made.place():
            with pytest.raises(TooManyRequestsError) as caught, made.place():
                pass
            assert caught.value.wait_s == 5  # nothing is known yet
            for name in "ab":
                made.offer(job(name), PendingResponse(lambda outcome: None))
            jobs = self.take(made)
            for one in jobs.values():
                now += 3.0
                made.deliver(one, [])
            now += 1000.0  # nobody asked for anything
            made.offer(job("c"), PendingResponse(lambda outcome: None))
            with pytest.raises(TooManyRequestsError) as caught, made.place():
                pass
            assert caught.value.wait_s == pytest.approx(2 * 3.0)
        with made.place():
            assert made.inside == 1


# ── the token ──


def test_token_is_required_for_all_paths_but_health_and_openapi() -> None:
    with running_site(token=TOKEN) as site, site.client() as client:
        for header in (
            None,
            "",
            TOKEN,
            "Bearer",
            f"Bearer {TOKEN}x",
            "Bearer ä",
            "Basic !",
            "Basic eDp5",
        ):
            headers = {} if header is None else {"Authorization": header.encode()}
            answer = client.post("/predict", json=json_body(**MASK), headers=headers)
            assert (answer.status_code, answer.headers.get("www-authenticate")) == (
                401,
                "Bearer",
            ), header
            assert TOKEN not in answer.text
            assert client.get("/metrics", headers=headers).status_code == 401
            assert client.get("/nowhere", headers=headers).status_code == 401
        assert site.engine.calls["encode"] == 0
        assert client.get("/health").status_code == client.get("/openapi.json").status_code == 200
        basic = base64.b64encode(f"me:{TOKEN}".encode()).decode()
        for header in (f"Bearer {TOKEN}", f"bearer  {TOKEN}", f"Basic {basic}"):
            answer = client.post(
                "/predict", json=json_body(**MASK), headers={"Authorization": header}
            )
            assert answer.status_code == 200


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0"])
def test_listening_on_other_addresses_requires_a_token(address: str) -> None:
    with (
        pytest.raises(SettingsError) as caught,
        server.listening(address, with_authentication=False),
    ):
        pass
    assert caught.value.place == "serve.listen"
    assert gate.TOKEN in (caught.value.remedy or "")


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "127.0.0.2:0"])
def test_listening_on_loopback_addresses_requires_no_token(address: str) -> None:
    with server.listening(address, with_authentication=False) as opened:
        assert server.shown(opened).startswith("http://")


def test_port_in_use_is_a_settings_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        again = server.listening(f"127.0.0.1:{taken.getsockname()[1]}", with_authentication=False)
        with pytest.raises(SettingsError, match="no port") as caught, again:
            pass
    assert caught.value.remedy


def test_token_is_read_from_its_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    assert gate.read_token(file, {gate.TOKEN: "another-one-of-20-letters"}) == TOKEN
    assert gate.read_token(None, {gate.TOKEN: f" {TOKEN} "}) == TOKEN
    assert gate.read_token(None, {}) is gate.read_token(None, {gate.TOKEN: ""}) is None


@pytest.mark.parametrize(
    "text",
    [b"", b"short", b"two words of some length", "grün-grün-grün-grün".encode(), b"\xff" * 20],
)
def test_token_that_cannot_be_used_is_refused_and_not_quoted(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(text)
    with pytest.raises(SettingsError) as caught:
        gate.read_token(file, {})
    assert text.decode("latin-1") not in str(caught.value) or not text
    with pytest.raises(SettingsError):
        gate.read_token(tmp_path / "none", {})


# ── number and duration of requests ──


@contextmanager
def held(**flags: Any) -> Iterator[tuple[Site, threading.Event]]:
    """Run a server whose network waits until the event is set."""
    opened = threading.Event()
    with running_site(FakeEngine(gate=opened, batch=1), **flags) as site:
        try:
            yield site, opened
        finally:
            opened.set()


def test_full_server_refuses_further_requests_at_once_and_answers_the_others() -> None:
    with held(serve__queue=2) as (site, opened):
        inside = [site.start_post("/predict", json_body(n, **MASK)) for n in (0, 1)]
        wait_until(lambda: site.source.inside == 2)
        for path in ("/predict", "/interact", "/features"):
            answer = site.post(path, json_body(2, **MASK))
            assert (answer.status_code, answer.json()["code"]) == (429, "full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert site.get("/health").status_code == 200
        opened.set()
        assert {request.result().status_code for request in inside} == {200}
        assert site.post("/predict", json_body(2, **MASK)).status_code == 200
        wait_until(lambda: site.source.inside == 0)  # the answer is sent before the place is free


def test_request_without_an_answer_in_time_is_cancelled() -> None:
    with held(serve__timeout_s=1) as (site, opened):
        answer = site.post("/predict", json_body(**MASK))
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        wait_until(lambda: site.source.inside == 0)
        late = site.post("/predict", json_body(1, **MASK))
        assert late.status_code == 503
        opened.set()
        wait_until(lambda: site.telemetry.stats.now().at_work == 0)
        assert decode.digest_of(picture_bytes(seed=1)) not in site.engine.encoded


def test_body_that_is_not_complete_in_time_gets_408() -> None:
    with running_site(serve__timeout_s=0.2) as site:
        with site.send_without_reading("/predict", {}, length=1000) as caller:
            assert b" 408 " in caller.recv(4096)
        wait_until(lambda: site.source.inside == 0)


def test_client_that_disconnects_within_its_body_frees_its_place() -> None:
    with running_site() as site:
        with site.send_without_reading("/predict", {}, length=1000):
            wait_until(lambda: site.source.inside == 1)
        wait_until(lambda: site.source.inside == 0)


def test_client_that_disconnects_cancels_its_job_before_the_network_sees_it() -> None:
    with held() as (site, opened):
        first = site.start_post("/predict", json_body(0, **MASK))
        wait_until(lambda: site.engine.calls["encode"])
        with site.send_without_reading("/predict", json_body(1, **MASK)):
            wait_until(lambda: site.telemetry.stats.now().at_work == 2)
        wait_until(lambda: site.source.inside == 1)
        opened.set()
        assert first.result().status_code == 200
        wait_until(lambda: site.telemetry.stats.now().at_work == 0)
        assert site.engine.encoded == [decode.digest_of(picture_bytes(seed=0))]
        assert site.telemetry.stats.now().released == {"": 1}


def test_client_that_disconnects_while_waiting_never_reaches_the_pipeline() -> None:
    with held(pipeline__queue=1, pipeline__decode_threads=1, pipeline__finish_threads=1) as (
        site,
        opened,
    ):
        callers = [site.send_without_reading("/predict", json_body(n, **MASK)) for n in range(12)]
        wait_until(
            lambda: (
                site.source.inside == 12
                and site.source.waiting >= 7
                and site.engine.calls["encode"]
            )
        )
        for caller in callers:
            caller.close()
        wait_until(lambda: site.source.inside == site.source.waiting == 0)
        opened.set()
        wait_until(lambda: site.telemetry.stats.now().at_work == 0)
        assert len(site.engine.encoded) == 1


def test_client_that_does_not_read_keeps_its_place_for_the_request_timeout_at_most() -> None:
    big = cv2.imencode(".png", np.zeros((2000, 2500), np.uint8))[1].tobytes()
    body = {"image": in_base64(big), "obj_bbox": [[100, 100], [2400, 1900]]}
    with running_site(serve__timeout_s=4) as site, site.send_without_reading("/interact", body):
        wait_until(lambda: site.telemetry.stats.now().answered)
        assert site.source.inside == 1  # tens of megabytes lie in no buffer
        wait_until(lambda: site.source.inside == 0)


# ── stop ──


def test_stop_answers_running_requests_and_refuses_new_ones() -> None:
    with held() as (site, opened):
        first = site.start_post("/predict", json_body(**MASK))
        wait_until(lambda: site.engine.calls["encode"])
        site.stop.set()
        answer = site.post("/predict", json_body(1, **MASK))
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert site.get("/health").json()["ready"] is False
        opened.set()
        assert first.result().status_code == 200


def test_stop_ends_requests_that_do_not_finish_in_time() -> None:
    with held(drain_s=0.2) as (site, opened):
        first = site.start_post("/predict", json_body(0, **MASK))
        wait_until(lambda: site.engine.calls["encode"])
        second = site.start_post("/predict", json_body(1, **MASK))
        wait_until(lambda: site.pipeline._device_queue.qsize())
        site.stop.set()
        wait_until(site.pipeline._abort.is_set)
        opened.set()
        assert {request.result().status_code for request in (first, second)} == {503}


# ── health and metrics ──


def test_health_is_503_while_the_model_is_loaded_and_requests_are_refused() -> None:
    with running_site(work=False) as site:
        for answer in (site.get("/health"), site.post("/predict", json_body(**MASK))):
            assert answer.status_code == 503
        health = site.get("/health").json()
        assert (health["live"], health["ready"], health["model"]) == (True, False, None)
        site.work()
        answer = site.get("/health")
        assert (answer.status_code, answer.json()["model"]["name"], answer.json()["ready"]) == (
            200,
            "fake",
            True,
        )


def test_health_is_not_live_while_a_thread_hangs() -> None:
    with running_site() as site:
        site.telemetry.alarms.raise_("stuck", "the device loop has not moved")
        answer = site.get("/health")
        assert (answer.status_code, answer.json()["live"]) == (503, False)


def test_metrics_count_requests_as_jobs() -> None:
    with running_site() as site:
        site.post("/predict", json_body(**MASK))
        site.post(
            "/predict", json_body(prompt={"box": {"x0": 0, "y0": 0, "x1": 900, "y1": 9}}, **MASK)
        )
        wait_until(
            lambda: site.telemetry.stats.now().at_work == 0
        )  # an answer is counted when it is out
        answer = site.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    (jobs,) = (
        family
        for family in text_string_to_metric_families(answer.text)
        if family.name == "sam_poll_jobs"
    )
    counts = {(s.labels["result"], s.labels["reason"]): s.value for s in jobs.samples if s.value}
    assert counts == {("answered", ""): 1, ("rejected", "prompt"): 1}


# ── several devices ──


def equipped() -> WorkerSetup:
    return WorkerSetup(
        FakeEngine(side=1024), responses.formats_by_name(settings()), PipelineOptions()
    )


@pytest.mark.slow
def test_worker_pool_answers_in_the_requests_formats_and_returns_embeddings() -> None:
    stop = threading.Event()
    ends: dict[str, list[Outcome]] = {"mask": [], "coco": [], responses.FEATURES: []}
    source = HttpSource(places=3)
    specs = [
        WorkerSpec(f"cpu #{n}", equipped, {**os.environ, "PYTHONPATH": str(ROOT)}) for n in range(2)
    ]
    with WorkerPool(specs, stop) as pool:
        thread = threading.Thread(target=pool.run, args=(source, stop))
        thread.start()
        for wanted, outcomes in ends.items():
            prompts = () if wanted == responses.FEATURES else (Prompt(box=Box(5, 5, 30, 30)),)
            made = Job(
                wanted, "a.jpg", picture_bytes(), prompts, formats=(wanted,), embedding=not prompts
            )
            source.offer(made, PendingResponse(outcomes.append))
        wait_until(lambda: all(ends.values()))
        stop.set()
        thread.join(60)
    kinds = [
        document.media_type
        for (outcomes,) in ends.values()
        if not isinstance(outcomes, SamPollError)
        for document in outcomes
    ]
    assert kinds == ["image/png", "application/json", "application/json"]


# ── the command ──


@contextmanager
def process(*flags: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`sam-poll serve` with the bundled model on a free port."""
    command = [
        sys.executable,
        "-m",
        "sam_poll",
        "serve",
        "--listen",
        "0",
        "-m",
        "demo",
        "--device",
        "cpu",
        *flags,
    ]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
    ) as made:
        try:
            assert made.stderr
            lines = []
            for line in made.stderr:
                lines.append(line)
                if "serving at " in line:
                    break
            assert lines, "nothing was logged"
            assert "serving at " in lines[-1], lines
            yield made, lines[-1].split("serving at ")[1].strip()
        finally:
            made.kill()


@pytest.mark.slow
def test_command_answers_until_a_signal_and_ends_with_0() -> None:
    with process(SAM_POLL_SERVE_TOKEN=TOKEN) as (made, url):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
            health = client.get("/health").json()
            assert (health["ready"], health["model"]["name"]) == (True, "demo")
            picture = (ROOT / "examples" / "waikato" / "box.jpg").read_bytes()
            prompt = (ROOT / "examples" / "waikato" / "box.prompt").read_text()
            answer = client.post(
                "/predict", files={"picture": picture}, data={"prompt": prompt, "formats": "coco"}
            )
            assert answer.status_code == 200
            assert answer.json()["annotations"][0]["area"] > 1000
            assert httpx.get(f"{url}/metrics", trust_env=False).status_code == 401
        made.send_signal(signal.SIGTERM)
        _, log = made.communicate(timeout=60)
        assert made.returncode == ExitCode.OK
        assert "stopped: 1 jobs answered" in log or "stopped: 1 job answered" in log
        assert TOKEN not in log
        assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--listen", "0.0.0.0:0"], "there is no token"),
        (["--listen", "nowhere"], "not an address"),
        (["--token-file", "/nonexistent/token"], "cannot be read"),
    ],
)
def test_command_with_unusable_settings_ends_with_78_and_one_message(
    flags: list[str], expected: str
) -> None:
    command = [sys.executable, "-m", "sam_poll", "serve", "-m", "demo", *flags]
    done = subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, expected in done.stderr) == (ExitCode.SETTINGS, True), done.stderr
    assert "Traceback" not in done.stderr


def test_command_ends_with_70_after_a_device_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    engine.fail("decode", DeviceError("the card is gone"))
    monkeypatch.setattr("sam_poll.runtime.builders.engine_of", lambda *a, **k: engine)
    seen: list[httpx.Response] = []

    def ask(url: str) -> None:
        wait_until(lambda: httpx.get(f"{url}/health", trust_env=False).status_code == 200)
        seen.append(
            httpx.post(f"{url}/predict", json=json_body(**MASK), timeout=60, trust_env=False)
        )

    def shown(opened: socket.socket) -> str:
        url = f"http://127.0.0.1:{opened.getsockname()[1]}"
        threading.Thread(target=ask, args=(url,)).start()
        return url

    monkeypatch.setattr(server, "shown", shown)
    loaded = settings(serve__listen="127.0.0.1:0", serve__timeout_s=30)

    with pytest.raises(DeviceError) as caught:
        server.serve(loaded, env={})
    assert caught.value.exit_code == ExitCode.DEVICE
    wait_until(lambda: seen)
    assert (seen[0].status_code, seen[0].json()["code"]) == (500, "device")


def test_form_library_writes_no_lines_of_its_own_into_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.forward_uvicorn_log()
    kind = "multipart/form-data; boundary=X"
    with pytest.raises(BadRequestError):
        requests.parse_predict(kind, b"--Xgarbage", parse=parser.parse)
    assert caplog.records == []
