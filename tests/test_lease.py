"""Signs of life: who gives them lives, whatever the clocks say; who stops is dead after a lease, or at once."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sam_poll.alarms import Alarms
from sam_poll.doors import lease
from sam_poll.doors.lease import Life, Watch, is_dispatcher, workers
from sam_poll.safe_path import SafePath
from tests.conftest import wait_until

LEASE = 60.0
OTHER = "box-7-abcdef-0"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The file of a daemon on another machine."""
    path = tmp_path / f"{lease.PREFIX}{OTHER}{lease.ENDING}"
    path.write_text("{}")
    return path


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    """A daemon that gives signs of life every 10 ms."""
    with Life(SafePath.at(tmp_path), 0.04, Alarms()) as life:
        yield life


def stamp(path: Path, seconds: float) -> None:
    os.utime(path, (seconds, seconds))


# ── watching ──


@pytest.mark.parametrize("year", [1971, 2026, 2099])
def test_a_file_that_stays_the_same_for_a_lease_is_a_dead_daemons_whatever_its_time_says(
    tmp_path: Path, other: Path, year: int
) -> None:
    stamp(other, (year - 1970) * 365.25 * 86400)
    watch = Watch(SafePath.at(tmp_path), LEASE)
    assert not watch.dead(OTHER, 1000.0)
    assert not watch.dead(OTHER, 1060.0)
    assert watch.dead(OTHER, 1060.1)


@pytest.mark.parametrize("step", [+1, -1, 10**9, -(10**9)])
def test_any_change_is_a_sign_of_life_even_one_into_the_past(tmp_path: Path, other: Path, step: int) -> None:
    watch = Watch(SafePath.at(tmp_path), LEASE)
    for number in range(5):
        stamp(other, 1.5e9 + step * number)
        assert not watch.dead(OTHER, 1000.0 + 55 * number)
    assert not watch.dead(OTHER, 1000.0 + 55 * 4 + 60)
    assert watch.dead(OTHER, 1000.0 + 55 * 4 + 61)


def test_a_dead_daemon_that_gives_a_sign_of_life_lives(tmp_path: Path, other: Path) -> None:
    watch = Watch(SafePath.at(tmp_path), LEASE)
    watch.dead(OTHER, 0.0)
    assert watch.dead(OTHER, 100.0)
    stamp(other, 5.0)
    assert not watch.dead(OTHER, 101.0)


def test_a_file_made_anew_with_the_same_time_is_a_sign_of_life(tmp_path: Path, other: Path) -> None:
    stamp(other, 5.0)
    watch = Watch(SafePath.at(tmp_path), LEASE)
    watch.dead(OTHER, 0.0)
    again = other.with_name("again")
    again.write_text("{}")
    stamp(again, 5.0)
    again.replace(other)
    assert not watch.dead(OTHER, 100.0)


def test_a_daemon_without_a_file_is_dead_after_a_lease_and_not_before(tmp_path: Path) -> None:
    watch = Watch(SafePath.at(tmp_path), LEASE)
    assert not watch.dead(OTHER, 0.0)
    assert not watch.dead(OTHER, 60.0)
    assert watch.dead(OTHER, 61.0)


def test_it_is_known_when_a_daemon_will_be_dead(tmp_path: Path, other: Path) -> None:
    watch = Watch(SafePath.at(tmp_path), LEASE)
    watch.dead(OTHER, 1000.0)
    watch.dead(OTHER, 1030.0)
    assert watch.expires(OTHER) == 1060.0
    stamp(other, 5.0)
    watch.dead(OTHER, 1050.0)
    assert watch.expires(OTHER) == 1110.0


def test_who_has_not_moved_yet_and_whose_lock_does_not_tell_may_be_dead(tmp_path: Path, other: Path) -> None:
    watch = Watch(SafePath.at(tmp_path), LEASE)
    watch.dead(OTHER, 0.0)
    assert watch.unsure(OTHER)
    stamp(other, 5.0)
    watch.dead(OTHER, 1.0)
    assert not watch.unsure(OTHER)


def test_nobody_is_remembered_who_is_not_there_any_more(tmp_path: Path, other: Path) -> None:
    watch = Watch(SafePath.at(tmp_path), LEASE)
    for number in range(100):
        watch.dead(f"old-{number}-0", 0.0)
    watch.dead(OTHER, 0.0)
    stamp(other, 5.0)
    watch.dead(OTHER, 1.0)
    watch.forget_all_but({OTHER})
    assert set(watch._seen) == {OTHER}
    assert watch._moved == {OTHER}
    watch.forget_all_but(set())
    assert not watch._seen
    assert not watch._moved


# ── locks ──


@pytest.fixture
def told_apart() -> None:
    if lease.boot() == "0":
        pytest.skip("this machine does not tell its kernels apart")


@pytest.mark.usefixtures("told_apart")
def test_on_one_machine_an_end_is_seen_at_once(tmp_path: Path) -> None:
    watch = Watch(SafePath.at(tmp_path), LEASE)
    with Life(SafePath.at(tmp_path), LEASE, Alarms()) as life:
        assert not watch.dead(life.worker, 0.0)
        assert not watch.unsure(life.worker)
    assert watch.dead(life.worker, 0.1)


@pytest.mark.usefixtures("told_apart")
def test_the_lock_of_a_frozen_daemon_does_not_keep_its_claims_for_longer_than_a_lease(tmp_path: Path) -> None:
    watch = Watch(SafePath.at(tmp_path), LEASE)
    with Life(SafePath.at(tmp_path), 1e6, Alarms()) as life:
        assert not watch.dead(life.worker, 0.0)
        assert watch.dead(life.worker, 61.0)


def test_the_lock_of_another_kernel_is_not_asked(tmp_path: Path) -> None:
    watch = Watch(SafePath.at(tmp_path), LEASE)
    with Life(SafePath.at(tmp_path), LEASE, Alarms()) as life:
        elsewhere = f"{life.worker.rpartition('-')[0]}-zzzz"
        life.path.path.rename(tmp_path / f"{lease.PREFIX}{elsewhere}{lease.ENDING}")
    assert not watch.dead(elsewhere, 0.0)
    assert watch.unsure(elsewhere)
    assert watch.dead(elsewhere, 61.0)


def test_without_locks_only_the_lease_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_lock", lambda handle, exclusive: False)
    watch = Watch(SafePath.at(tmp_path), LEASE)
    with Life(SafePath.at(tmp_path), LEASE, Alarms()) as life:
        assert life.worker.endswith("-0")
    assert not watch.dead(life.worker, 0.0)
    assert watch.dead(life.worker, 61.0)


# ── living ──


def test_two_lives_never_bear_one_name(tmp_path: Path) -> None:
    lives = [Life(SafePath.at(tmp_path), LEASE, Alarms()) for _ in range(50)]
    assert len({life.worker for life in lives}) == 50


def test_a_life_gives_signs_and_says_what_it_is_asked_to(tmp_path: Path) -> None:
    said = {"answered": 1}
    with Life(SafePath.at(tmp_path), 0.04, Alarms(), state=lambda: said) as life:
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


def test_what_is_said_may_become_shorter(tmp_path: Path) -> None:
    said = {"alarms": "x" * 1000}
    with Life(SafePath.at(tmp_path), 0.04, Alarms(), state=lambda: said) as life:
        said["alarms"] = ""
        wait_until(lambda: _read(life.path.path).get("alarms") == "")


def test_a_sign_of_life_that_was_swept_is_made_anew_under_the_same_name(tmp_path: Path, life: Life) -> None:
    worker = life.worker
    for _ in range(3):
        life.path.unlink()
        wait_until(life.path.path.exists)
        wait_until(lambda: _read(life.path.path).get("worker") == worker)
    assert life.worker == worker
    watch = Watch(SafePath.at(tmp_path), LEASE)
    assert not watch.dead(worker, 0.0)
    assert [p.name for p in tmp_path.iterdir()] == [life.path.name]


def test_who_can_give_no_sign_of_life_raises_an_alarm_until_it_can(tmp_path: Path) -> None:
    alarms, work = Alarms(), tmp_path / "work"
    work.mkdir()
    with Life(SafePath.at(work), 0.04, alarms) as life:
        work.rename(tmp_path / "gone")
        wait_until(lambda: "lease" in alarms)
        (tmp_path / "gone").rename(work)
        wait_until(lambda: "lease" not in alarms)
        wait_until(life.path.path.exists)
        assert not Watch(SafePath.at(work), LEASE).dead(life.worker, 0.0)  # the lock of the file that is seen


def test_no_sign_of_life_is_given_where_the_share_is_not(tmp_path: Path) -> None:
    """The bare mountpoint has a `work/`, too."""
    alarms, work = Alarms(), tmp_path / "work"
    work.mkdir()

    def still_there() -> None:
        if not (work / "sentinel").exists():
            raise OSError(errno.ESTALE, "the share is not there")

    (work / "sentinel").touch()
    with Life(SafePath.at(work), 0.04, alarms, still_there=still_there) as life:
        work.rename(tmp_path / "gone")
        work.mkdir()
        wait_until(lambda: "lease" in alarms)
        assert list(work.iterdir()) == []
        work.rmdir()
        (tmp_path / "gone").rename(work)
        wait_until(lambda: "lease" not in alarms)
        assert life.path.path.exists()


def test_on_a_full_disk_a_sign_of_life_is_given_all_the_same(
    tmp_path: Path, life: Life, monkeypatch: pytest.MonkeyPatch
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


def test_a_bug_in_what_is_told_does_not_cost_the_lease(tmp_path: Path) -> None:
    def state() -> dict[str, Any]:
        if tells:
            return {}
        raise RuntimeError("a bug")

    tells = [True]
    with Life(SafePath.at(tmp_path), 0.04, Alarms(), state=state) as life:
        tells.clear()
        before = life.path.lstat().st_mtime_ns
        wait_until(lambda: life.path.lstat().st_mtime_ns > before + 50_000_000)


# ── reading ──


def test_what_a_daemon_says_is_read_with_whether_it_lives(tmp_path: Path, other: Path, life: Life) -> None:
    stamp(other, 1000.0)
    other.write_text('{"answered": 5, "lease_s": 60.0}')
    stamp(other, 1000.0)
    assert lease.read(OTHER, SafePath.beside(other), 1010.0) == {
        **{"answered": 5, "lease_s": 60.0, "worker": OTHER},
        **{"beat_s": 10.0, "alive": True},
    }
    assert (lease.read(OTHER, SafePath.beside(other), 1061.0) or {})["alive"] is False
    assert sorted(worker for worker, _ in lease.workers(SafePath.at(tmp_path))) == sorted([OTHER, life.worker])


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"lease_s": "x"}', '{"lease_s": null}', "\x00"])
def test_a_daemons_file_that_says_nonsense_is_read_as_far_as_it_goes(other: Path, body: str) -> None:
    other.write_text(body)
    stamp(other, 1000.0)
    found = lease.read(OTHER, SafePath.beside(other), 1001.0)
    assert found
    assert (found["worker"], found["alive"], found["beat_s"]) == (OTHER, True, 1.0)


def test_a_daemons_file_that_has_just_gone_is_none(tmp_path: Path) -> None:
    assert lease.read(OTHER, SafePath.beside(tmp_path / "gone"), 0.0) is None
    assert list(lease.workers(SafePath.at(tmp_path / "gone"))) == []


def test_a_name_tells_who_only_hands_out_whatever_the_machine_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SafePath.at(tmp_path)
    for host in ("box", "dispatcher", "dispatcher-box", "a-b-c-d-e"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        with Life(folder, LEASE, Alarms()) as one, Life(folder, LEASE, Alarms(), dispatcher=True) as other:
            assert not is_dispatcher(one.worker)
            assert is_dispatcher(other.worker)
            assert dict(workers(folder)).keys() == {one.worker, other.worker}
            one.remove()
            other.remove()
