"""The numbers for Prometheus: their names, that they count what they say, and what happens when the port is taken."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sam_poll import __version__, metrics
from sam_poll.alarms import KINDS
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import ExitCode, SettingsError
from sam_poll.health import Signs
from tests.conftest import Share, wait_until

NAMES = {
    "sam_poll_jobs_total",
    "sam_poll_job_duration_seconds_bucket",
    "sam_poll_job_duration_seconds_count",
    "sam_poll_job_duration_seconds_sum",
    "sam_poll_jobs_in_progress",
    "sam_poll_pending_jobs",
    "sam_poll_oldest_pending_seconds",
    "sam_poll_last_scan_timestamp_seconds",
    "sam_poll_claims_recovered_total",
    "sam_poll_gpu_oom_total",
    "sam_poll_orphans",
    "sam_poll_alarm",
    "sam_poll_info",
}


@dataclass
class Folder:
    """Stands where the folder door would."""

    waiting: int = 0
    oldest_s: float = 0.0
    last_scan: float = 0.0
    orphans: int = 0
    recovered: int = 0


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def signs() -> Signs:
    return Signs()


@pytest.fixture
def folder() -> Folder:
    return Folder()


@pytest.fixture
def served(signs: Signs, folder: Folder, free_port: int) -> Iterator[int]:
    with metrics.serve(f"127.0.0.1:{free_port}", signs, folder):
        yield free_port


def scrape(port: int, host: str = "127.0.0.1") -> dict[str, dict[tuple[str, ...], float]]:
    """Name → labels' values → number; labels from z to a, as in `sam_poll_jobs_total{result,reason}`."""
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[
                tuple(value for _, value in sorted(sample.labels.items(), reverse=True))
            ] = sample.value
    return found


def test_the_names_are_those_of_the_docs(served: int) -> None:
    assert set(scrape(served)) == NAMES


def test_before_anything_happens_all_series_are_there_and_zero(served: int) -> None:
    seen = scrape(served)
    jobs = seen["sam_poll_jobs_total"]
    assert {("answered", ""), ("rejected", "prompt"), ("rejected", "picture"), ("released", "")} <= set(jobs)
    assert set(jobs.values()) == {0}
    assert seen["sam_poll_alarm"] == dict.fromkeys([(kind,) for kind in KINDS], 0)
    assert seen["sam_poll_info"] == {(__version__, "", ""): 1}


def test_jobs_are_counted_by_how_they_ended(served: int, signs: Signs) -> None:
    for _ in range(6):
        signs.stats.took()
    signs.stats.answered("a", 1, {"total": 40.0})
    signs.stats.answered("b", 2, {"total": 60_000.0})
    signs.stats.rejected("c", "prompt")
    signs.stats.released()
    signs.stats.released("picture")
    seen = scrape(served)
    assert {labels: n for labels, n in seen["sam_poll_jobs_total"].items() if n} == {
        ("answered", ""): 2,
        ("rejected", "prompt"): 1,
        ("released", ""): 1,
        ("released", "picture"): 1,
    }
    assert seen["sam_poll_jobs_in_progress"] == {(): 1}


def test_durations_fall_into_cumulative_buckets_in_seconds(served: int, signs: Signs) -> None:
    for ms in (50.0, 51.0, 400_000.0):
        signs.stats.took()
        signs.stats.answered("a", 1, {"total": ms})
    seen = scrape(served)
    buckets = {bound: n for (bound,), n in seen["sam_poll_job_duration_seconds_bucket"].items()}
    assert (buckets["0.05"], buckets["0.1"], buckets["300.0"], buckets["+Inf"]) == (1, 2, 2, 3)
    assert seen["sam_poll_job_duration_seconds_count"] == {(): 3}
    assert seen["sam_poll_job_duration_seconds_sum"][()] == pytest.approx(400.101)


def test_the_shares_numbers_alarms_and_network_are_those_of_the_moment(
    served: int, signs: Signs, folder: Folder
) -> None:
    folder.waiting, folder.oldest_s, folder.last_scan, folder.orphans, folder.recovered = 4, 12.5, 1.75e9, 2, 3
    signs.engine = FakeEngine()
    signs.engine.ooms = 7  # type: ignore[attr-defined]
    signs.alarms.raise_("output", "disk full")
    signs.alarms.raise_("moon", "an alarm nobody has listed")
    seen = scrape(served)
    assert seen["sam_poll_pending_jobs"] == {(): 4}
    assert seen["sam_poll_oldest_pending_seconds"] == {(): 12.5}
    assert seen["sam_poll_last_scan_timestamp_seconds"] == {(): 1.75e9}
    assert seen["sam_poll_orphans"] == {(): 2}
    assert seen["sam_poll_claims_recovered_total"] == {(): 3}
    assert seen["sam_poll_gpu_oom_total"] == {(): 7}
    assert {kind for (kind,), active in seen["sam_poll_alarm"].items() if active} == {"output", "moon"}
    assert seen["sam_poll_info"] == {(__version__, signs.engine.info.name, signs.engine.info.device): 1}
    signs.alarms.clear("output")
    assert scrape(served)["sam_poll_alarm"]["output",] == 0


def test_it_listens_on_the_address_given_and_stops_with_the_daemon(signs: Signs, free_port: int) -> None:
    with metrics.serve(f"127.0.0.1:{free_port}", signs, Folder()):
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", free_port), timeout=5):
            pass
        assert scrape(free_port, "localhost")
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", free_port), timeout=5):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid", "192.0.2.1", "[2001:db8::1]", "." * 70])
def test_a_port_that_cannot_be_had_is_a_wrong_setting_with_a_remedy(signs: Signs, served: int, host: str) -> None:
    with pytest.raises(SettingsError) as caught, metrics.serve(f"{host}:{served}", signs, Folder()):
        pass
    assert caught.value.exit_code == ExitCode.SETTINGS
    assert caught.value.place == "health.metrics"
    assert f"{host}:{served}" in caught.value.reason


def watch(share: Share, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *flags, "watch", str(share.input), "-m", "fake", "--once", "--log", "text"]
    return subprocess.run(
        command, env=os.environ | env, check=False, capture_output=True, text=True, timeout=120, cwd=share.root
    )


def test_a_daemon_with_a_port_that_is_taken_ends_with_78(share: Share, served: int) -> None:
    done = watch(share, "-m", "sam_poll", SAM_POLL_HEALTH__METRICS=str(served))
    assert done.returncode == ExitCode.SETTINGS
    assert f"no port can be opened at 127.0.0.1:{served}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_daemon_without_prometheus_client_says_what_to_install_and_ends_with_78(share: Share, tmp_path: Path) -> None:
    script = tmp_path / "bare.py"
    script.write_text("import sys\nsys.modules['prometheus_client'] = None\nfrom sam_poll.cli import main\nmain()\n")
    done = watch(share, str(script), SAM_POLL_HEALTH__METRICS="9464")
    assert done.returncode == ExitCode.SETTINGS
    assert "pip install 'sam_poll[metrics]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert watch(share, str(script)).returncode == ExitCode.OK


def test_a_daemon_answers_prometheus_while_it_works(share: Share, free_port: int) -> None:
    command = [sys.executable, "-m", "sam_poll", "watch", str(share.input), "-m", "fake", "--log", "text"]
    env = os.environ | {"SAM_POLL_HEALTH__METRICS": str(free_port)}
    share.pair("dog")
    share.pair("cat", prompt={"box": 1})
    seen: dict[str, dict[tuple[str, ...], float]] = {}

    def counted() -> bool:
        with contextlib.suppress(OSError):
            seen.update(scrape(free_port))
        jobs = seen.get("sam_poll_jobs_total", {})
        return jobs.get(("answered", "")) == jobs.get(("rejected", "prompt")) == 1

    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(counted, 60)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert set(seen) == NAMES
    assert seen["sam_poll_last_scan_timestamp_seconds"][()] > 1.7e9
    assert seen["sam_poll_pending_jobs"] == {(): 0}
