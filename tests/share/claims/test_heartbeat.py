"""Heartbeat files, and the rule by which a worker counts as dead."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.alarms import Alarms
from sam_poll.core.safe_path import SafePath
from sam_poll.share.claims import heartbeat, liveness
from sam_poll.share.claims.heartbeat import WorkerHeartbeat, is_dispatcher
from sam_poll.share.claims.liveness import LivenessTracker, heartbeat_files
from tests.conftest import wait_until

LEASE = 60.0
OTHER = "box-7-abcdef-0"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The heartbeat file of a worker on another machine."""
    path = tmp_path / f"{heartbeat.PREFIX}{OTHER}{heartbeat.ENDING}"
    path.write_text("{}")
    return path


@pytest.fixture
def life(tmp_path: Path) -> Iterator[WorkerHeartbeat]:
    """A worker that writes its heartbeat every 10 ms."""
    with WorkerHeartbeat(SafePath.at(tmp_path), 0.04, Alarms()) as life:
        yield life


def stamp(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


# ── who is dead ──


@pytest.mark.parametrize("year", [1971, 2026, 2099])
def test_dead_after_a_lease_without_change_whatever_the_files_time_says(
    tmp_path: Path, other: Path, year: int
) -> None:
    stamp(other, (year - 1970) * 365.25 * 86400)
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    assert not tracker.dead(OTHER, 1000.0)
    assert not tracker.dead(OTHER, 1060.0)
    assert tracker.dead(OTHER, 1060.1)


@pytest.mark.parametrize("step", [+1, -1, 10**9, -(10**9)])
def test_alive_after_any_change_even_one_into_the_past(
    tmp_path: Path, other: Path, step: int
) -> None:
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    for number in range(5):
        stamp(other, 1.5e9 + step * number)
        assert not tracker.dead(OTHER, 1000.0 + 55 * number)
    assert not tracker.dead(OTHER, 1000.0 + 55 * 4 + 60)
    assert tracker.dead(OTHER, 1000.0 + 55 * 4 + 61)


def test_alive_again_after_a_change(tmp_path: Path, other: Path) -> None:
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    tracker.dead(OTHER, 0.0)
    assert tracker.dead(OTHER, 100.0)
    stamp(other, 5.0)
    assert not tracker.dead(OTHER, 101.0)


def test_alive_after_the_file_was_made_again_with_the_same_time(
    tmp_path: Path, other: Path
) -> None:
    stamp(other, 5.0)
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    tracker.dead(OTHER, 0.0)
    again = other.with_name("again")
    again.write_text("{}")
    stamp(again, 5.0)
    again.replace(other)
    assert not tracker.dead(OTHER, 100.0)


def test_dead_after_a_lease_without_a_file_and_not_before(tmp_path: Path) -> None:
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    assert not tracker.dead(OTHER, 0.0)
    assert not tracker.dead(OTHER, 60.0)
    assert tracker.dead(OTHER, 61.0)


def test_expires_says_when_a_worker_will_be_dead(tmp_path: Path, other: Path) -> None:
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    tracker.dead(OTHER, 1000.0)
    tracker.dead(OTHER, 1030.0)
    assert tracker.expires(OTHER) == 1060.0
    stamp(other, 5.0)
    tracker.dead(OTHER, 1050.0)
    assert tracker.expires(OTHER) == 1110.0


def test_unsure_until_the_file_changes_where_no_lock_tells(tmp_path: Path, other: Path) -> None:
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    tracker.dead(OTHER, 0.0)
    assert tracker.unsure(OTHER)
    stamp(other, 5.0)
    tracker.dead(OTHER, 1.0)
    assert not tracker.unsure(OTHER)


def test_forget_all_but_forgets_the_others(tmp_path: Path, other: Path) -> None:
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    for number in range(100):
        tracker.dead(f"old-{number}-0", 0.0)
    tracker.dead(OTHER, 0.0)
    stamp(other, 5.0)
    tracker.dead(OTHER, 1.0)
    tracker.forget_all_but({OTHER})
    assert set(tracker._seen) == {OTHER}
    assert tracker._moved == {OTHER}
    tracker.forget_all_but(set())
    assert not tracker._seen
    assert not tracker._moved


# ── locks ──


@pytest.fixture
def boot_known() -> None:
    if heartbeat.boot_id() == "0":
        pytest.skip("this machine has no boot id")


@pytest.mark.usefixtures("boot_known")
def test_dead_at_once_after_its_end_on_one_machine(tmp_path: Path) -> None:
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    with WorkerHeartbeat(SafePath.at(tmp_path), LEASE, Alarms()) as life:
        assert not tracker.dead(life.worker, 0.0)
        assert not tracker.unsure(life.worker)
    assert tracker.dead(life.worker, 0.1)


@pytest.mark.usefixtures("boot_known")
def test_dead_after_a_lease_although_a_frozen_worker_keeps_its_lock(
    tmp_path: Path,
) -> None:
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    with WorkerHeartbeat(SafePath.at(tmp_path), 1e6, Alarms()) as life:
        assert not tracker.dead(life.worker, 0.0)
        assert tracker.dead(life.worker, 61.0)


def test_lock_of_another_kernel_does_not_count(tmp_path: Path) -> None:
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    with WorkerHeartbeat(SafePath.at(tmp_path), LEASE, Alarms()) as life:
        elsewhere = f"{life.worker.rpartition('-')[0]}-zzzz"
        life.path.path.rename(tmp_path / f"{heartbeat.PREFIX}{elsewhere}{heartbeat.ENDING}")
    assert not tracker.dead(elsewhere, 0.0)
    assert tracker.unsure(elsewhere)
    assert tracker.dead(elsewhere, 61.0)


def test_dead_after_a_lease_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_lock", lambda handle, exclusive: False)
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    with WorkerHeartbeat(SafePath.at(tmp_path), LEASE, Alarms()) as life:
        assert life.worker.endswith("-0")
    assert not tracker.dead(life.worker, 0.0)
    assert tracker.dead(life.worker, 61.0)


# ── writing ──


def test_workers_never_have_the_same_name(tmp_path: Path) -> None:
    lives = [WorkerHeartbeat(SafePath.at(tmp_path), LEASE, Alarms()) for _ in range(50)]
    assert len({life.worker for life in lives}) == 50


def test_heartbeat_is_written_with_the_state(tmp_path: Path) -> None:
    said = {"answered": 1}
    with WorkerHeartbeat(SafePath.at(tmp_path), 0.04, Alarms(), state=lambda: said) as life:
        before = life.path.lstat().st_mtime_ns
        said["answered"] = 2
        wait_until(lambda: _read(life.path.path).get("answered") == 2)
        assert life.path.lstat().st_mtime_ns > before
        told = _read(life.path.path)
    assert (told["worker"], told["pid"], told["lease_s"]) == (life.worker, os.getpid(), 0.04)
    assert life.path.path.exists()  # others must see whose claims they take over
    life.remove()
    assert list(tmp_path.iterdir()) == []
    life.remove()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except ValueError:  # read while it was written
        return {}


def test_heartbeat_may_become_shorter(tmp_path: Path) -> None:
    said = {"alarms": "x" * 1000}
    with WorkerHeartbeat(SafePath.at(tmp_path), 0.04, Alarms(), state=lambda: said) as life:
        said["alarms"] = ""
        wait_until(lambda: _read(life.path.path).get("alarms") == "")


def test_heartbeat_file_that_was_removed_is_made_again_with_the_same_name(
    tmp_path: Path, life: WorkerHeartbeat
) -> None:
    worker = life.worker
    for _ in range(3):
        life.path.unlink()
        wait_until(life.path.path.exists)
        wait_until(lambda: _read(life.path.path).get("worker") == worker)
    assert life.worker == worker
    tracker = LivenessTracker(SafePath.at(tmp_path), LEASE)
    assert not tracker.dead(worker, 0.0)
    assert [p.name for p in tmp_path.iterdir()] == [life.path.name]


def test_heartbeat_that_cannot_be_written_raises_an_alarm_until_it_can(tmp_path: Path) -> None:
    alarms, work = Alarms(), tmp_path / "work"
    work.mkdir()
    with WorkerHeartbeat(SafePath.at(work), 0.04, alarms) as life:
        work.rename(tmp_path / "gone")
        wait_until(lambda: "lease" in alarms)
        (tmp_path / "gone").rename(work)
        wait_until(lambda: "lease" not in alarms)
        wait_until(life.path.path.exists)
        assert not LivenessTracker(SafePath.at(work), LEASE).dead(
            life.worker, 0.0
        )  # the lock of the file that is seen


def test_heartbeat_is_not_written_to_a_bare_mountpoint(tmp_path: Path) -> None:
    """The bare mountpoint has a `work/`, too."""
    alarms, work = Alarms(), tmp_path / "work"
    work.mkdir()

    def check_mounted() -> None:
        if not (work / "sentinel").exists():
            raise OSError(errno.ESTALE, "the share is not there")

    (work / "sentinel").touch()
    with WorkerHeartbeat(SafePath.at(work), 0.04, alarms, check_mounted=check_mounted) as life:
        work.rename(tmp_path / "gone")
        work.mkdir()
        wait_until(lambda: "lease" in alarms)
        assert list(work.iterdir()) == []
        work.rmdir()
        (tmp_path / "gone").rename(work)
        wait_until(lambda: "lease" not in alarms)
        assert life.path.path.exists()


def test_heartbeat_file_is_touched_on_a_full_disk(
    tmp_path: Path, life: WorkerHeartbeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def full(*args: Any) -> int:
        tries.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    wait_until(lambda: tries)
    before = life.path.lstat().st_mtime_ns
    wait_until(lambda: life.path.lstat().st_mtime_ns > before)
    wait_until(lambda: len(tries) > 3)
    assert "lease" not in life._alarms


def test_heartbeat_goes_on_where_the_state_raises(tmp_path: Path) -> None:
    def state() -> dict[str, Any]:
        if tells:
            return {}
        raise RuntimeError("a bug")

    tells = [True]
    with WorkerHeartbeat(SafePath.at(tmp_path), 0.04, Alarms(), state=state) as life:
        tells.clear()
        before = life.path.lstat().st_mtime_ns
        wait_until(lambda: life.path.lstat().st_mtime_ns > before + 50_000_000)


# ── reading ──


def test_read_returns_what_a_worker_wrote_and_whether_it_lives(
    tmp_path: Path, other: Path, life: WorkerHeartbeat
) -> None:
    stamp(other, 1000.0)
    other.write_text('{"answered": 5, "lease_s": 60.0}')
    stamp(other, 1000.0)
    assert liveness.read_heartbeat(OTHER, SafePath.beside(other), 1010.0) == {
        **{"answered": 5, "lease_s": 60.0, "worker": OTHER},
        **{"beat_s": 10.0, "alive": True},
    }
    assert (liveness.read_heartbeat(OTHER, SafePath.beside(other), 1061.0) or {})["alive"] is False
    assert sorted(
        worker for worker, _ in liveness.heartbeat_files(SafePath.at(tmp_path))
    ) == sorted([OTHER, life.worker])


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "null", '{"lease_s": "x"}', '{"lease_s": null}', "\x00"]
)
def test_read_ignores_nonsense(other: Path, body: str) -> None:
    other.write_text(body)
    stamp(other, 1000.0)
    found = liveness.read_heartbeat(OTHER, SafePath.beside(other), 1001.0)
    assert found
    assert (found["worker"], found["alive"], found["beat_s"]) == (OTHER, True, 1.0)


def test_read_of_a_file_that_has_just_gone_returns_none(tmp_path: Path) -> None:
    assert liveness.read_heartbeat(OTHER, SafePath.beside(tmp_path / "gone"), 0.0) is None
    assert list(liveness.heartbeat_files(SafePath.at(tmp_path / "gone"))) == []


def test_is_dispatcher_whatever_the_machine_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SafePath.at(tmp_path)
    for host in ("box", "dispatcher", "dispatcher-box", "a-b-c-d-e"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        with (
            WorkerHeartbeat(folder, LEASE, Alarms()) as one,
            WorkerHeartbeat(folder, LEASE, Alarms(), dispatcher=True) as other,
        ):
            assert not is_dispatcher(one.worker)
            assert is_dispatcher(other.worker)
            assert dict(heartbeat_files(folder)).keys() == {one.worker, other.worker}
            one.remove()
            other.remove()
