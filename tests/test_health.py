"""Being alive: who is told, when, and that nothing here dies of a file or socket that fails."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sam_poll import formats
from sam_poll.alarms import KINDS, Alarms
from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.scan import Manners
from sam_poll.engines.fake import FakeEngine
from sam_poll.health import Heartbeat, Monitor, Notifier, Signs
from sam_poll.pipeline import Pipeline
from sam_poll.stats import Pulse
from sam_poll.types import Embedding, Prepared
from tests.conftest import Share, wait_until


class Socket:
    """Plays systemd: takes what is sent to a notify socket."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.channel.bind("\0" + address[1:] if address.startswith("@") else address)
        self.channel.settimeout(0.01)
        self.heard: list[str] = []

    def lines(self) -> list[str]:
        while True:
            try:
                self.heard += self.channel.recv(65536).decode().split("\n")
            except TimeoutError:
                return self.heard

    def drop(self) -> None:
        """Forget what has been heard so far."""
        self.lines()
        self.heard.clear()


@pytest.fixture
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Socket]:
    made = Socket(str(tmp_path_factory.mktemp("n") / "notify"))
    yield made
    made.channel.close()


class Frozen(Pulse):
    """A loop that has not moved for `age` seconds."""

    def __init__(self, age: float = 0.0) -> None:
        self.frozen = age

    def beat(self) -> None:
        self.frozen = 0.0

    @property
    def age(self) -> float:
        return self.frozen


def monitor(signs: Signs, stop: threading.Event | None = None, **more: Any) -> Monitor:
    signs.intake, signs.device = Frozen(), Frozen()
    made = Monitor(signs, stop or threading.Event(), stuck_s=300.0, **more)
    made._jobs = Frozen()
    return made


# ── what counts as alive ──


@pytest.mark.parametrize(
    ("intake", "device", "said"),
    [
        (301.0, 0.0, ["the scan has not moved for over 300 s: does the share hang?"]),
        (0.0, 301.0, ["the device loop has not moved for over 300 s"]),
        (999.0, 999.0, ["the scan has not moved", "; the device loop has not moved"]),
    ],
)
def test_a_loop_that_stands_still_is_named_and_nobody_is_told_that_all_is_well(
    intake: float, device: float, said: list[str], systemd: Socket, tmp_path: Path
) -> None:
    signs = Signs()
    watch = monitor(signs, file=tmp_path / "alive", notify=Notifier({"NOTIFY_SOCKET": systemd.address}))
    signs.intake.frozen, signs.device.frozen = intake, device
    assert watch.look() is False
    (alarm,) = signs.alarms.active()
    assert alarm.kind == "stuck"
    assert all(words in alarm.message for words in said)
    assert "WATCHDOG=1" not in systemd.lines()
    assert not (tmp_path / "alive").exists()


def test_jobs_that_hang_where_no_loop_sees_it_are_stuck_and_one_that_ends_is_enough() -> None:
    signs = Signs()
    watch = monitor(signs)

    def look_after(seconds: float) -> bool:
        watch._jobs.frozen += seconds  # type: ignore[attr-defined]
        return watch.look()

    assert look_after(999.0), "nothing is at work"
    signs.stats.took()
    signs.stats.took()
    assert look_after(299.0)
    assert not look_after(2.0)
    assert "no job at work has ended for over 300 s: does the share hang" in signs.alarms.active()[0].message
    signs.stats.released()
    assert look_after(0.0)
    signs.alarms.raise_("output", "disk full")
    assert look_after(999.0), "an answer that is tried again and again is not stuck"


def test_loops_that_move_are_told_to_systemd_and_by_the_file(systemd: Socket, tmp_path: Path) -> None:
    signs = Signs()
    watch = monitor(signs, file=tmp_path / "alive", notify=Notifier({"NOTIFY_SOCKET": systemd.address}))
    signs.intake.frozen = signs.device.frozen = 299.0
    assert watch.look() is True
    assert "WATCHDOG=1" in systemd.lines()
    os.utime(tmp_path / "alive", (0, 0))
    assert watch.look() is True
    assert abs((tmp_path / "alive").stat().st_mtime - time.time()) < 60


def test_a_loop_that_moves_again_ends_the_alarm_and_each_look_is_not_a_line_in_the_log(logged: list[str]) -> None:
    signs = Signs()
    watch = monitor(signs)
    for age in (301.0, 302.0, 500.0):
        signs.intake.frozen = age
        watch.look()
    signs.intake.beat()
    watch.look()
    assert [line.split(":")[0] for line in logged] == ["ERROR alarm (stuck)", "INFO alarm (stuck) is over after 0 s"]


def test_after_stop_nothing_is_stuck_because_the_end_has_a_limit_of_its_own(systemd: Socket) -> None:
    signs, stop = Signs(), threading.Event()
    watch = monitor(signs, stop, notify=Notifier({"NOTIFY_SOCKET": systemd.address}))
    signs.intake.frozen = 9999.0
    stop.set()
    assert watch.look() is True
    watch.look()
    assert "STOPPING=1" in systemd.lines()
    assert systemd.heard.count("STOPPING=1") == 1
    assert not signs.alarms.active()


def test_entering_is_ready_leaving_is_stopping_and_the_time_of_loading_counts_for_nothing(systemd: Socket) -> None:
    signs = Signs()
    watch = monitor(signs, notify=Notifier({"NOTIFY_SOCKET": systemd.address}), summary=lambda: "3 jobs\nanswered")
    signs.intake.frozen = signs.device.frozen = 9999.0
    with watch:
        wait_until(lambda: "WATCHDOG=1" in systemd.lines())
        wait_until(lambda: "STATUS=3 jobs\\nanswered" in systemd.lines())
    assert systemd.lines()[0] == "READY=1"
    assert systemd.lines()[-1] == "STOPPING=1"
    assert not signs.alarms.active()


def test_a_status_is_sent_when_it_changes_only(systemd: Socket) -> None:
    said = ["a", "a", "b"]
    watch = monitor(Signs(), notify=Notifier({"NOTIFY_SOCKET": systemd.address}), summary=lambda: said.pop(0))
    for _ in range(3):
        watch.look()
    assert [line for line in systemd.lines() if line.startswith("STATUS=")] == ["STATUS=a", "STATUS=b"]


# ── what fails ──


@pytest.mark.parametrize("address", ["", "/nowhere/notify", "@nobody-listens", "/" + "x" * 200, "vsock:2:1", "a\0b"])
def test_a_notify_socket_that_is_none_is_no_error(address: str) -> None:
    assert Notifier({"NOTIFY_SOCKET": address})("READY=1") is False


def test_an_abstract_socket_is_one() -> None:
    abstract = Socket(f"@sam-poll-test-{os.getpid()}")
    try:
        assert Notifier({"NOTIFY_SOCKET": abstract.address})("READY=1", "STATUS=x\udcff") is True
        assert abstract.lines() == ["READY=1", "STATUS=x?"]
    finally:
        abstract.channel.close()


def test_a_listener_that_does_not_read_holds_nobody_up(systemd: Socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sam_poll.health._SEND_S", 0.01)
    told = Notifier({"NOTIFY_SOCKET": systemd.address})
    assert not all(told("STATUS=" + "x" * 10_000) for _ in range(2000))


@pytest.mark.parametrize("kind", ["no folder", "folder", "link", "fifo"])
def test_a_heartbeat_file_that_cannot_be_touched_is_said_once(tmp_path: Path, kind: str, logged: list[str]) -> None:
    path = tmp_path / "alive"
    if kind == "no folder":
        path = tmp_path / "none" / "alive"
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    heartbeat = Heartbeat(path)
    for _ in range(3):
        heartbeat.touch()
    assert len(logged) == 1
    assert "alive cannot be touched" in logged[0]
    assert not (tmp_path / "elsewhere").exists()


def test_a_surprise_in_one_look_does_not_end_the_looking(logged: list[str]) -> None:
    signs, looks = Signs(), list[int]()

    def summary() -> str:
        looks.append(1)
        if len(looks) == 1:
            raise ZeroDivisionError("odd")
        return "fine"

    with monitor(signs, summary=summary, every_s=0.001):
        wait_until(lambda: len(looks) > 2)
    assert any("the monitor has failed: odd" in line for line in logged)


# ── what others may know ──


def test_the_state_is_json_and_says_model_counts_and_alarms() -> None:
    signs = Signs()
    assert (signs.state()["model"], signs.ooms, signs.info) == (None, 0, None)
    signs.engine = FakeEngine()
    signs.stats.took()
    signs.stats.took()
    signs.stats.rejected("a", "prompt")
    signs.alarms.raise_("share", "gone")
    state = json.loads(json.dumps(signs.state()))
    assert (state["model"], state["device"]) == (signs.engine.info.name, signs.engine.info.device)
    assert (state["answered"], state["rejected"], state["at_work"]) == (0, 1, 1)
    assert [(a["kind"], a["message"]) for a in state["alarms"]] == [("share", "gone")]


def test_an_engine_that_counts_its_ooms_is_asked_for_them() -> None:
    signs = Signs()
    signs.engine = FakeEngine()
    assert signs.ooms == 0
    signs.engine.ooms = 3  # type: ignore[attr-defined]
    assert signs.ooms == 3


def test_the_alarms_in_use_are_those_that_are_known() -> None:
    package = Path(__file__).parent.parent / "sam_poll"
    raised = {
        kind
        for path in package.rglob("*.py")
        for kind in re.findall(r"raise_\(\s*\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert raised <= set(KINDS)
    assert "stuck" in raised


def test_an_alarm_that_lasts_is_one_line_and_its_end_another(logged: list[str]) -> None:
    alarms = Alarms()
    alarms.clear("share")
    for _ in range(3):
        alarms.raise_("share", "gone")
    alarms.raise_("share", "not writable")
    assert "share" in alarms
    alarms.clear("share")
    assert "share" not in alarms
    assert [line.split(maxsplit=1)[0] for line in logged] == ["ERROR", "ERROR", "INFO"]


# ── the real loops ──


def test_a_network_that_hangs_stops_the_device_loops_pulse_and_not_the_scans(share: Share) -> None:
    signs, stop, go_on = Signs(), threading.Event(), threading.Event()

    class Hanging(FakeEngine):
        def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
            go_on.wait(60)
            return super().encode(pictures)

    def told() -> str:
        return " ".join(alarm.message for alarm in signs.alarms.active())

    pipeline = Pipeline(
        Hanging(),
        formats.load(["mask"], formats.FormatOptions()),
        stats=signs.stats,
        alarms=signs.alarms,
        intake=signs.intake,
        device=signs.device,
    )
    manners = Manners(quiet_s=0.0, events=False, rescan_s=0.05)
    door = FolderDoor(share.layout, manners, alarms=signs.alarms, pulse=signs.intake)
    with door, Monitor(signs, stop, stuck_s=3.0, every_s=0.05):
        thread = threading.Thread(target=pipeline.run, args=(door, stop))
        thread.start()
        try:
            share.pair("dog")
            wait_until(lambda: "the device loop has not moved for over 3 s" in told())
            assert "the scan" not in told()
            go_on.set()
            wait_until(lambda: signs.stats.now().answered == 1 and not told())
        finally:
            go_on.set()
            stop.set()
            thread.join(60)


# ── a real daemon ──


def test_a_daemon_tells_systemd_that_it_is_ready_alive_and_stopping(
    share: Share, systemd: Socket, tmp_path: Path
) -> None:
    alive = tmp_path / "alive"
    env = os.environ | {"NOTIFY_SOCKET": systemd.address, "SAM_POLL_HEALTH__FILE": str(alive)}
    command = [sys.executable, "-m", "sam_poll", "watch", str(share.input), "-m", "fake", "--log", "text"]
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


def test_a_sick_share_is_an_alarm_in_the_status_and_its_end_another_and_the_daemon_counts_as_alive(
    share: Share, systemd: Socket, tmp_path: Path
) -> None:
    sentinel, alive = share.root / "here", tmp_path / "alive"
    sentinel.touch()
    more = {"SENTINEL": str(sentinel), "WATCH__RESCAN_S": "0.2", "HEALTH__FILE": str(alive), "HEALTH__STUCK_S": "20"}
    env = os.environ | {"NOTIFY_SOCKET": systemd.address} | {f"SAM_POLL_{key}": value for key, value in more.items()}
    command = [sys.executable, "-m", "sam_poll", "watch", str(share.input), "-m", "fake", "--log", "text"]

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
