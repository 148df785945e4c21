"""A watcher and workers as processes, real brokers, and `kill -9` for each of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Share, wait_until
from tests.support.cluster_processes import Part
from tests.support.cluster_sources import holds
from tools.chaos_cluster import SERVERS, disturbed_run
from tools.chaos_share import HERE, environment, new_share

JOBS = 60  # `make chaos` has 300 with each broker


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    with SERVERS[request.param](tmp_path / request.param) as made:
        yield made


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_job_is_lost_or_answered_otherwise_when_worker_broker_and_watcher_are_killed(
    tmp_path: Path, server: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    report = disturbed_run(tmp_path, server, JOBS)
    with capsys.disabled():  # figures for who runs the tests; nothing is asserted of them
        sys.stdout.write(f"\n{report}\n")


def dramatiq_command(folder: Path, server: Any, log: Any) -> subprocess.Popen[bytes]:
    line = [
        *(sys.executable, "-m", "dramatiq", "sam_poll.integrations.cluster.actors"),
        *("--processes", "1", "--threads", "4"),
    ]
    env = environment(
        SAM_POLL_BROKER_URL=server.url,
        SAM_POLL_INPUT=folder / "in",
        SAM_POLL_OUTPUT=folder / "out",
        SAM_POLL_MODEL="fake",
        SAM_POLL_FORMATS="mask",
    )
    return subprocess.Popen(line, env=env, cwd=HERE, stdout=log, stderr=log, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("server", ["redis"], indirect=True)
def test_dramatiqs_own_command_runs_a_worker_and_ends_it(tmp_path: Path, server: Any) -> None:
    folder = new_share(tmp_path)
    share = Share(folder)
    with (tmp_path / "log").open("wb") as log, Part("watch", folder, server):
        command = dramatiq_command(folder, server, log)
        try:
            share.pair("dog")
            wait_until(lambda: share.tree("output") == ["dog.mask.png"], timeout=60)
            wait_until(lambda: not holds(share))
        finally:
            command.send_signal(signal.SIGTERM)
            assert command.wait(60) == 0, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("server", ["redis"], indirect=True)
def test_second_signal_ends_dramatiqs_own_command_at_once(tmp_path: Path, server: Any) -> None:
    folder = new_share(tmp_path)
    path = tmp_path / "log"
    with path.open("wb") as log:
        command = dramatiq_command(folder, server, log)
        try:
            wait_until(lambda: "watching " in path.read_text(), timeout=60)
            command.send_signal(signal.SIGTERM)
            wait_until(lambda: "Stopping worker process" in path.read_text(), timeout=60)
            command.send_signal(signal.SIGTERM)
            # 0: the first signal was obeyed before the second one came
            assert command.wait(60) in (0, 1), path.read_text()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(command.pid, signal.SIGKILL)


def test_dramatiqs_own_command_ends_with_the_code_of_a_wrong_setting(tmp_path: Path) -> None:
    env = {**os.environ, "SAM_POLL_INPUT": str(tmp_path / "in"), "SAM_POLL_LEASE_S": "soon"}
    line = [sys.executable, "-m", "dramatiq", "sam_poll.integrations.cluster.actors", "-p", "1"]
    ended = subprocess.run(line, env=env, cwd=HERE, capture_output=True, text=True, check=False)
    assert ended.returncode == 78, ended.stderr
    assert "SAM_POLL_LEASE_S: not a number" in ended.stderr
    assert "Traceback" not in ended.stderr
