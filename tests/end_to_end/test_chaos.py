"""Real daemon processes, killed, frozen and starved: the short forms of `make chaos` and `make
soak`.
"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tools import chaos, chaos_scenarios, soak
from tools.chaos_jobs import File, pair, plan
from tools.chaos_share import (
    ChaosError,
    Daemon,
    Watcher,
    answered_twice,
    broken,
    judge,
    log_lines,
    new_share,
)

SHORT = chaos.Torment(
    jobs=40, daemons=3, kills=6, freezes=2, terms=2, jumps=2, seed=1, lag_ms=10, late=False
)
CANNOT_MOUNT = chaos_scenarios.cannot_mount()


@pytest.mark.slow
def test_no_job_is_lost_or_done_twice_under_torment(tmp_path: Path) -> None:
    report = chaos.run(tmp_path, SHORT)
    assert report.verdict.faults == [], str(report)
    assert report.blows == {"kill": 6, "freeze": 2, "term": 2, "jump": 2}


@pytest.mark.slow
@pytest.mark.parametrize("blow", ["SIGKILL", "SIGSTOP", "EIO"])
def test_a_daemon_struck_at_any_step_leaves_nothing_undone(tmp_path: Path, blow: str) -> None:
    first = random.Random(blow).randint(1, 15)
    steps = ["--first", str(first), "--stride", "15", "--heirs", "1"]
    command = [
        sys.executable,
        "-m",
        "tools.chaos_sweep",
        "--blow",
        blow,
        *steps,
        "--root",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", chaos_scenarios.PLAIN)
def test_trouble_is_survived(name: str, tmp_path: Path) -> None:
    chaos_scenarios.PLAIN[name](tmp_path)


@pytest.mark.skipif(bool(CANNOT_MOUNT), reason=CANNOT_MOUNT or "")
@pytest.mark.parametrize("name", chaos_scenarios.MOUNTING)
def test_a_sick_share_is_survived(name: str, tmp_path: Path) -> None:
    chaos_scenarios.MOUNTING[name](tmp_path)


@pytest.mark.slow
def test_handles_and_threads_stay_flat(tmp_path: Path) -> None:
    samples = soak.soak(tmp_path, 300, every_s=0.1)
    judged = [s for s in samples if s.jobs >= 100]
    early = min(s.handles for s in judged if s.jobs < 200)
    late = min(s.handles for s in judged if s.jobs >= 200)
    # The fewest: what it has open just then comes and goes, what leaks stays open.
    assert late - early <= 4
    assert max(s.threads for s in judged) == min(s.threads for s in judged)


# ── whether the verdict sees what it is there for ──


@pytest.fixture
def ended(tmp_path: Path) -> tuple[Path, list[File]]:
    """A share on which one pair was answered, without a daemon."""
    share = new_share(tmp_path)
    files = pair("dog", 1)
    for file in files:
        (share / "done" / file.name).parent.mkdir(exist_ok=True)
        (share / "done" / file.name).write_bytes(file.body)
    (share / "out").mkdir()
    (share / "out/dog.opex.json").write_text("{}")
    judge(share, files).hold()
    return share, files


def test_the_verdict_sees_a_lost_file(ended: tuple[Path, list[File]]) -> None:
    share, files = ended
    (share / "done/dog.png").unlink()
    assert judge(share, files).lost == ["dog.png lies nowhere"]


def test_the_verdict_sees_a_file_in_two_places(ended: tuple[Path, list[File]]) -> None:
    share, files = ended
    (share / "done/dog~2.json").write_bytes(files[1].body)
    assert len(judge(share, files).twice) == 1


def test_the_verdict_sees_a_file_in_the_wrong_place(ended: tuple[Path, list[File]]) -> None:
    share, files = ended
    (share / "done/dog.json").rename(share / "in/dog.json")
    assert len(judge(share, files).left) == 1


def test_the_verdict_sees_a_refusal_without_a_reason(ended: tuple[Path, list[File]]) -> None:
    share, files = ended
    (share / "failed").mkdir()
    (share / "done/dog.json").rename(share / "failed/dog.json")
    moved = [files[0], File(files[1].name, files[1].body, frozenset({"failed"}))]
    assert judge(share, moved).lost == ["failed/dog.json has no error file"]


@pytest.mark.parametrize(
    "name", ["in/.sam_poll-1.tmp", "out/cam1/.sam_poll-1-2.tmp", "work/.dog.png/g1.a1.n1@w/dog.png"]
)
def test_the_verdict_sees_what_was_left_over(ended: tuple[Path, list[File]], name: str) -> None:
    share, files = ended
    (share / name).parent.mkdir(parents=True, exist_ok=True)
    (share / name).write_bytes(b"x")
    assert judge(share, files).left


def test_the_verdict_sees_other_bytes_than_those_of_an_undisturbed_run(
    ended: tuple[Path, list[File]], tmp_path: Path
) -> None:
    share, files = ended
    calm = new_share(tmp_path / "calm")
    (calm / "out").mkdir()
    (calm / "out/dog.opex.json").write_text('{"id": 1}')
    (calm / "done").symlink_to(share / "done")
    assert judge(share, files, calm=calm).differs == [
        "out/dog.opex.json has other bytes than in the undisturbed run"
    ]


@pytest.mark.parametrize("body", [b"", b"\x89PNG\r\n\x1a\n", pair("dog", 1)[0].body[:-5]])
def test_half_a_png_is_not_whole(body: bytes) -> None:
    assert broken(Path("dog.mask.png"), body)
    assert broken(Path("dog.opex.json"), body)
    assert not broken(Path("dog.mask.png"), pair("dog", 1)[0].body)


def test_the_watcher_sees_a_half_file_that_is_whole_later(tmp_path: Path) -> None:
    share = new_share(tmp_path)
    (share / "out").mkdir()
    watcher = Watcher(share)
    (share / "out/dog.opex.json").write_text('{"id":')
    watcher.look()
    (share / "out/dog.opex.json").write_text('{"id": 1}')
    watcher.look()
    assert len(watcher.partial) == 1
    assert len(watcher.changed) == 1


def test_a_log_with_a_traceback_is_no_log(tmp_path: Path) -> None:
    log = tmp_path / "00001.log"
    log.write_text('{"level": "INFO", "message": "fine"}\nTraceback (most recent call last):\n')
    assert len(list(log_lines(log, cut=True))) == 1
    with pytest.raises(ChaosError, match="line 2"):
        list(log_lines(log, cut=False))
    log.write_text('{"level": "ERROR", "message": "unexpected", "exception": "KeyError()"}\n')
    with pytest.raises(ChaosError, match="surprise"):
        list(log_lines(log, cut=False))


def test_a_job_that_two_daemons_have_answered_is_told() -> None:
    line = {"message": "job cam1/dog done: dog=0.95 (total 11 ms)"}
    assert answered_twice([line]) == []
    assert len(answered_twice([line, line])) == 1


def test_a_plan_is_the_same_for_the_same_seed_and_every_file_has_bytes_of_its_own() -> None:
    made = plan(300, 5, late=True)
    assert made == plan(300, 5, late=True)
    assert made != plan(300, 6, late=True)
    keys = [file.key for file in made.files]
    assert len(keys) == len(set(keys))
    assert {end for file in made.files for end in file.ends} == {"done", "failed", "in"}
    assert {file.how for file in made.files} == {"rename", "write", "slow"}
    assert any(drop.prompts > 1 for drop in made.drops)
    assert any(drop.after for drop in made.drops)


def test_a_slope_is_told_by_what_comes_after_the_warm_up() -> None:
    samples = [
        soak.Sample(jobs, 5000 + max(0, 3000 - jobs) + jobs, 9, 11)
        for jobs in range(0, 10_001, 500)
    ]
    assert soak.slope(samples, "handles", 3000) == pytest.approx(0)
    assert soak.slope(samples, "rss_kib", 3000) == pytest.approx(1000)
    assert soak.slope(samples, "rss_kib", 0) < 999
    with pytest.raises(ChaosError, match="too few"):
        soak.slope(samples, "rss_kib", 9500)


def test_a_daemon_that_ends_by_itself_is_told(tmp_path: Path) -> None:
    share = new_share(tmp_path)
    with (
        Daemon(share, lease_s="nonsense") as daemon,
        pytest.raises(ChaosError, match="has ended with 78"),
    ):
        daemon.started()
