"""Metrics for Prometheus: their names and values, and a port that is taken."""

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

from sam_poll import __version__
from sam_poll.core.alarms import KINDS
from sam_poll.core.errors import ExitCode, SettingsError
from sam_poll.core.telemetry import Telemetry
from sam_poll.engines.fake import FakeEngine
from sam_poll.runtime import metrics
from tests.conftest import Share, wait_until
from tests.support import ports
from tests.support.commands import watch_command

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
    "sam_poll_disk_cache_total",
    "sam_poll_orphans",
    "sam_poll_alarm",
    "sam_poll_info",
}


@dataclass
class Folder:
    """Stands for the folder source."""

    waiting: int = 0
    oldest_s: float = 0.0
    last_scan: float = 0.0
    orphans: int = 0
    recovered: int = 0


@pytest.fixture
def free_port() -> int:
    return ports.free_port()


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def folder() -> Folder:
    return Folder()


@pytest.fixture
def served(telemetry: Telemetry, folder: Folder, free_port: int) -> Iterator[int]:
    with metrics.serve(f"127.0.0.1:{free_port}", telemetry, folder):
        yield free_port


def scrape(port: int, host: str = "127.0.0.1") -> dict[str, dict[tuple[str, ...], float]]:
    """Return name → label values → number; labels from z to a, as in `{result,reason}`."""
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


def test_all_series_are_there_and_zero_from_the_start(served: int) -> None:
    seen = scrape(served)
    jobs = seen["sam_poll_jobs_total"]
    assert {
        ("answered", ""),
        ("rejected", "prompt"),
        ("rejected", "picture"),
        ("released", ""),
    } <= set(jobs)
    assert set(jobs.values()) == {0}
    assert seen["sam_poll_alarm"] == dict.fromkeys([(kind,) for kind in KINDS], 0)
    assert seen["sam_poll_info"] == {(__version__, "", ""): 1}


def test_jobs_are_counted_by_how_they_ended(served: int, telemetry: Telemetry) -> None:
    for _ in range(6):
        telemetry.stats.started()
    telemetry.stats.answered("a", 1, {"total": 40.0})
    telemetry.stats.answered("b", 2, {"total": 60_000.0})
    telemetry.stats.rejected("c", "prompt")
    telemetry.stats.released()
    telemetry.stats.released("picture")
    seen = scrape(served)
    assert {labels: n for labels, n in seen["sam_poll_jobs_total"].items() if n} == {
        ("answered", ""): 2,
        ("rejected", "prompt"): 1,
        ("released", ""): 1,
        ("released", "picture"): 1,
    }
    assert seen["sam_poll_jobs_in_progress"] == {(): 1}


def test_durations_fall_into_cumulative_buckets_in_seconds(
    served: int, telemetry: Telemetry
) -> None:
    for ms in (50.0, 51.0, 400_000.0):
        telemetry.stats.started()
        telemetry.stats.answered("a", 1, {"total": ms})
    seen = scrape(served)
    buckets = {bound: n for (bound,), n in seen["sam_poll_job_duration_seconds_bucket"].items()}
    assert (buckets["0.05"], buckets["0.1"], buckets["300.0"], buckets["+Inf"]) == (1, 2, 2, 3)
    assert seen["sam_poll_job_duration_seconds_count"] == {(): 3}
    assert seen["sam_poll_job_duration_seconds_sum"][()] == pytest.approx(400.101)


def test_share_alarms_and_model_are_those_of_the_moment(
    served: int, telemetry: Telemetry, folder: Folder
) -> None:
    folder.waiting = 4
    folder.oldest_s = 12.5
    folder.last_scan = 1.75e9
    folder.orphans = 2
    folder.recovered = 3
    telemetry.engine = FakeEngine()
    telemetry.engine.ooms = 7  # type: ignore[attr-defined]
    telemetry.alarms.raise_("output", "disk full")
    telemetry.alarms.raise_("moon", "an alarm nobody has listed")
    seen = scrape(served)
    assert seen["sam_poll_pending_jobs"] == {(): 4}
    assert seen["sam_poll_oldest_pending_seconds"] == {(): 12.5}
    assert seen["sam_poll_last_scan_timestamp_seconds"] == {(): 1.75e9}
    assert seen["sam_poll_orphans"] == {(): 2}
    assert seen["sam_poll_claims_recovered_total"] == {(): 3}
    assert seen["sam_poll_gpu_oom_total"] == {(): 7}
    assert {kind for (kind,), active in seen["sam_poll_alarm"].items() if active} == {
        "output",
        "moon",
    }
    assert seen["sam_poll_info"] == {
        (__version__, telemetry.engine.info.name, telemetry.engine.info.device): 1
    }
    telemetry.alarms.clear("output")
    assert scrape(served)["sam_poll_alarm"]["output",] == 0


def test_the_port_is_open_at_the_given_address_only_while_entered(
    telemetry: Telemetry, free_port: int
) -> None:
    with metrics.serve(f"127.0.0.1:{free_port}", telemetry, Folder()):
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", free_port), timeout=5):
            pass
        assert scrape(free_port, "localhost")
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", free_port), timeout=5):
        pass


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "no-such-host.invalid", "192.0.2.1", "[2001:db8::1]", "." * 70]
)
def test_a_port_that_cannot_be_opened_raises_settings_error_with_a_remedy(
    telemetry: Telemetry, served: int, host: str
) -> None:
    with (
        pytest.raises(SettingsError) as caught,
        metrics.serve(f"{host}:{served}", telemetry, Folder()),
    ):
        pass
    assert caught.value.exit_code == ExitCode.SETTINGS
    assert caught.value.place == "health.metrics"
    assert f"{host}:{served}" in caught.value.reason


def watch(share: Share, *flags: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        *flags,
        "watch",
        str(share.input),
        "-m",
        "fake",
        "--once",
        "--log",
        "text",
    ]
    return subprocess.run(
        command,
        env=os.environ | env,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=share.root,
    )


def test_a_daemon_with_a_port_that_is_taken_ends_with_78(share: Share, served: int) -> None:
    done = watch(share, "-m", "sam_poll", SAM_POLL_HEALTH__METRICS=str(served))
    assert done.returncode == ExitCode.SETTINGS
    assert f"no port can be opened at 127.0.0.1:{served}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_daemon_without_prometheus_client_says_what_to_install_and_ends_with_78(
    share: Share, tmp_path: Path
) -> None:
    script = tmp_path / "bare.py"
    script.write_text(
        "import sys\nsys.modules['prometheus_client'] = None\n"
        "from sam_poll.cli.main import main\nmain()\n"
    )
    done = watch(share, str(script), SAM_POLL_HEALTH__METRICS="9464")
    assert done.returncode == ExitCode.SETTINGS
    assert "pip install 'sam_poll[metrics]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert watch(share, str(script)).returncode == ExitCode.OK


@pytest.mark.slow
def test_a_daemon_answers_prometheus_while_it_works(share: Share, free_port: int) -> None:
    command = watch_command(share)
    env = os.environ | {"SAM_POLL_HEALTH__METRICS": str(free_port)}
    share.pair("dog")
    share.pair("cat", prompt={"box": 1})
    seen: dict[str, dict[tuple[str, ...], float]] = {}

    def counted() -> bool:
        with contextlib.suppress(OSError):
            seen.update(scrape(free_port))
        jobs = seen.get("sam_poll_jobs_total", {})
        answered, rejected = jobs.get(("answered", "")), jobs.get(("rejected", "prompt"))
        # The number of pending jobs is that of the last scan.
        scanned = seen.get("sam_poll_pending_jobs") == {(): 0}
        return answered == rejected == 1 and scanned

    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(counted, 60)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert set(seen) == NAMES
    assert seen["sam_poll_last_scan_timestamp_seconds"][()] > 1.7e9
