"""Liveness: what is reported, when, and that files or sockets that fail end nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from sam_poll.core.protocols import Embedding
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import ModelInput
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.runtime.health import LivenessFile, Monitor, SystemdNotifier
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource
from tests.conftest import Share, wait_until
from tests.support.commands import watch_command
from tests.support.monitors import monitor


class Socket:
    """Stands for systemd: receives what is sent to a notify socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind("\0" + address[1:] if address.startswith("@") else address)
        self.channel.settimeout(0.01)
        self.received: list[str] = []

    def lines(self) -> list[str]:
        while True:
            try:
                self.received += self.channel.recv(65536).decode().split("\n")
            except TimeoutError:
                return self.received

    def drop(self) -> None:
        """Forget what has been received so far."""
        self.lines()
        self.received.clear()


@pytest.fixture
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Socket]:
    made = Socket(str(tmp_path_factory.mktemp("n") / "notify"))
    yield made
    made.channel.close()


# ── what counts as alive ──


@pytest.mark.parametrize(
    ("intake", "device", "said"),
    [
        (301.0, 0.0, ["the scan has not moved for over 300 s: does the share hang?"]),
        (0.0, 301.0, ["the device loop has not moved for over 300 s"]),
        (999.0, 999.0, ["the scan has not moved", "; the device loop has not moved"]),
    ],
)
def test_a_loop_that_stands_still_is_named_and_systemd_and_file_get_no_sign_of_life(
    intake: float, device: float, said: list[str], systemd: Socket, tmp_path: Path
) -> None:
    telemetry = Telemetry()
    watch = monitor(
        telemetry,
        file=tmp_path / "alive",
        notify=SystemdNotifier({"NOTIFY_SOCKET": systemd.address}),
    )
    telemetry.intake.frozen, telemetry.device.frozen = intake, device
    assert watch.check() is False
    (alarm,) = telemetry.alarms.active()
    assert alarm.kind == "stuck"
    assert all(words in alarm.message for words in said)
    assert "WATCHDOG=1" not in systemd.lines()
    assert not (tmp_path / "alive").exists()


def test_jobs_are_stuck_when_none_ends_although_both_loops_move() -> None:
    telemetry = Telemetry()
    watch = monitor(telemetry)

    def check_after(seconds: float) -> bool:
        watch._jobs.frozen += seconds  # type: ignore[attr-defined]
        return watch.check()

    assert check_after(999.0), "no job is in progress"
    telemetry.stats.started()
    telemetry.stats.started()
    assert check_after(299.0)
    assert not check_after(2.0)
    assert (
        "no job in progress has ended for over 300 s: does the share hang"
        in telemetry.alarms.active()[0].message
    )
    telemetry.stats.released()
    assert check_after(0.0)
    telemetry.alarms.raise_("output", "disk full")
    assert check_after(999.0), "an output that is retried is not stuck"


def test_loops_that_move_feed_the_watchdog_and_touch_the_file(
    systemd: Socket, tmp_path: Path
) -> None:
    telemetry = Telemetry()
    watch = monitor(
        telemetry,
        file=tmp_path / "alive",
        notify=SystemdNotifier({"NOTIFY_SOCKET": systemd.address}),
    )
    telemetry.intake.frozen = telemetry.device.frozen = 299.0
    assert watch.check() is True
    assert "WATCHDOG=1" in systemd.lines()
    os.utime(tmp_path / "alive", (0, 0))
    assert watch.check() is True
    assert abs((tmp_path / "alive").stat().st_mtime - time.time()) < 60


def test_a_loop_that_moves_again_ends_the_alarm_and_the_log_has_one_line_for_each_change(
    logged: list[str],
) -> None:
    telemetry = Telemetry()
    watch = monitor(telemetry)
    for age in (301.0, 302.0, 500.0):
        telemetry.intake.frozen = age
        watch.check()
    telemetry.intake.beat()
    watch.check()
    assert [line.split(":")[0] for line in logged] == [
        "ERROR alarm (stuck)",
        "INFO alarm (stuck) is over after 0 s",
    ]


def test_after_stop_nothing_is_stuck(
    systemd: Socket,
) -> None:
    telemetry, stop = Telemetry(), threading.Event()
    watch = monitor(telemetry, stop, notify=SystemdNotifier({"NOTIFY_SOCKET": systemd.address}))
    telemetry.intake.frozen = 9999.0
    stop.set()
    assert watch.check() is True
    watch.check()
    assert "STOPPING=1" in systemd.lines()
    assert systemd.received.count("STOPPING=1") == 1
    assert not telemetry.alarms.active()


def test_entering_sends_ready_leaving_sends_stopping_and_loading_time_does_not_count(
    systemd: Socket,
) -> None:
    telemetry = Telemetry()
    watch = monitor(
        telemetry,
        notify=SystemdNotifier({"NOTIFY_SOCKET": systemd.address}),
        summary=lambda: "3 jobs\nanswered",
    )
    telemetry.intake.frozen = telemetry.device.frozen = 9999.0
    with watch:
        wait_until(lambda: "WATCHDOG=1" in systemd.lines())
        wait_until(lambda: "STATUS=3 jobs\\nanswered" in systemd.lines())
    assert systemd.lines()[0] == "READY=1"
    assert systemd.lines()[-1] == "STOPPING=1"
    assert not telemetry.alarms.active()


def test_a_status_is_sent_only_when_it_changes(systemd: Socket) -> None:
    said = ["a", "a", "b"]
    watch = monitor(
        Telemetry(),
        notify=SystemdNotifier({"NOTIFY_SOCKET": systemd.address}),
        summary=lambda: said.pop(0),
    )
    for _ in range(3):
        watch.check()
    assert [line for line in systemd.lines() if line.startswith("STATUS=")] == [
        "STATUS=a",
        "STATUS=b",
    ]


# ── what fails ──


@pytest.mark.parametrize(
    "address", ["", "/nowhere/notify", "@nobody-listens", "/" + "x" * 200, "vsock:2:1", "a\0b"]
)
def test_a_notify_socket_that_cannot_be_used_is_no_error(address: str) -> None:
    assert SystemdNotifier({"NOTIFY_SOCKET": address})("READY=1") is False


def test_an_abstract_notify_socket_is_used() -> None:
    abstract = Socket(f"@sam-poll-test-{os.getpid()}")
    try:
        assert (
            SystemdNotifier({"NOTIFY_SOCKET": abstract.address})("READY=1", "STATUS=x\udcff")
            is True
        )
        assert abstract.lines() == ["READY=1", "STATUS=x?"]
    finally:
        abstract.channel.close()


def test_a_systemd_that_does_not_read_delays_nothing(
    systemd: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sam_poll.runtime.health._SEND_S", 0.01)
    notify = SystemdNotifier({"NOTIFY_SOCKET": systemd.address})
    assert not all(notify("STATUS=" + "x" * 10_000) for _ in range(2000))


@pytest.mark.parametrize("kind", ["no folder", "folder", "link", "fifo"])
def test_a_heartbeat_file_that_cannot_be_touched_is_logged_once(
    tmp_path: Path, kind: str, logged: list[str]
) -> None:
    path = tmp_path / "alive"
    if kind == "no folder":
        path = tmp_path / "none" / "alive"
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    heartbeat = LivenessFile(path)
    for _ in range(3):
        heartbeat.touch()
    assert len(logged) == 1
    assert "alive cannot be touched" in logged[0]
    assert not (tmp_path / "elsewhere").exists()


def test_an_error_in_one_check_does_not_end_the_monitor(logged: list[str]) -> None:
    telemetry, checks = Telemetry(), list[int]()

    def summary() -> str:
        checks.append(1)
        if len(checks) == 1:
            raise ZeroDivisionError("odd")
        return "fine"

    with monitor(telemetry, summary=summary, every_s=0.001):
        wait_until(lambda: len(checks) > 2)
    assert any("the monitor has failed: odd" in line for line in logged)


# ── the real loops ──


def test_a_network_that_hangs_stops_the_heartbeat_of_the_device_loop_and_not_of_the_scan(
    share: Share,
) -> None:
    telemetry = Telemetry()
    stop = threading.Event()
    go_on = threading.Event()

    class Hanging(FakeEngine):
        def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
            go_on.wait(60)
            return super().encode(pictures)

    def messages() -> str:
        return " ".join(alarm.message for alarm in telemetry.alarms.active())

    pipeline = Pipeline(
        Hanging(),
        registry.load(["mask"], registry.FormatOptions()),
        telemetry=telemetry,
    )
    options = FolderOptions(settle_s=0.0, mode="poll", rescan_s=0.05)
    source = FolderSource(share.layout, options, alarms=telemetry.alarms, pulse=telemetry.intake)
    with source, Monitor(telemetry, stop, stuck_s=3.0, every_s=0.05):
        thread = threading.Thread(target=pipeline.run, args=(source, stop))
        thread.start()
        try:
            share.pair("dog")
            wait_until(lambda: "the device loop has not moved for over 3 s" in messages())
            assert "the scan" not in messages()
            go_on.set()
            wait_until(lambda: telemetry.stats.now().answered == 1 and not messages())
        finally:
            go_on.set()
            stop.set()
            thread.join(60)


# ── a real daemon ──


def test_a_daemon_reports_to_systemd_that_it_is_ready_alive_and_stopping(
    share: Share, systemd: Socket, tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    env = os.environ | {"NOTIFY_SOCKET": systemd.address, "SAM_POLL_HEALTH__FILE": str(alive)}
    command = watch_command(share)
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: "READY=1" in systemd.lines(), 60)
            wait_until(lambda: "WATCHDOG=1" in systemd.lines() and alive.exists())
            share.pair("dog")
            wait_until(lambda: any("1 job answered" in line for line in systemd.lines()))
            systemd.drop()
            os.utime(alive, (0, 0))
            wait_until(lambda: "WATCHDOG=1" in systemd.lines() and alive.stat().st_mtime > 0)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "STOPPING=1" in systemd.lines()


@pytest.mark.slow
def test_a_share_that_is_away_is_an_alarm_in_the_status_while_the_daemon_counts_as_alive(
    share: Share, systemd: Socket, tmp_path: Path
) -> None:
    sentinel, alive = share.root / "here", tmp_path / "alive"
    sentinel.touch()
    more = {
        "SENTINEL": str(sentinel),
        "WATCH__RESCAN_S": "0.2",
        "HEALTH__FILE": str(alive),
        "HEALTH__STUCK_S": "20",
    }
    env = (
        os.environ
        | {"NOTIFY_SOCKET": systemd.address}
        | {f"SAM_POLL_{key}": value for key, value in more.items()}
    )
    command = watch_command(share)

    def status() -> str:
        return next((line for line in reversed(systemd.lines()) if line.startswith("STATUS=")), "")

    with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: "0 files waiting" in status(), 60)
            sentinel.unlink()
            wait_until(lambda: "alarm (share) for" in status())
            os.utime(alive, (0, 0))
            wait_until(lambda: alive.stat().st_mtime > 0)
            sentinel.touch()
            wait_until(lambda: status() and "alarm" not in status())
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
