"""Whether the torture's verdict sees what it is there for; its runs take minutes and are `make
torture`.
"""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tools.chaos_jobs import key_of
from tools.chaos_share import ChaosError, Daemon
from tools.torture_jobs import Job, Shot, Writers
from tools.torture_names import BLOCKED
from tools.torture_verdict import answered_twice, differences, judge, make_outside, seen_outside

BOX = (4, 4, 40, 40)


@pytest.fixture
def ended(tmp_path: Path) -> Writers:
    """A share on which one job was answered, without a daemon."""
    known = Writers(tmp_path / "share", 0.5, foreign=None)
    for folder in ("in", "work", "out", "done", "failed"):
        (known.share / folder).mkdir(parents=True)
    (known.share / "done/dog.png").write_bytes(b"picture")
    (known.share / "done/dog.json").write_bytes(b"prompt")
    shot = Shot("dog.png", key_of(b"picture"), 64, 48)
    known.jobs.append(Job("job 1", "plain", shot, BOX, key_of(b"prompt")))
    _answer(known.share, "dog")
    return known


def _answer(share: Path, stem: str, *, label: str = "job 1", width: int = 64) -> None:
    box = dict(zip(("x0", "y0", "x1", "y1"), BOX, strict=True))
    thing = {"label": label, "meta": {"prompt": json.dumps({"box": box})}}
    meta = {"image": "done/dog.png", "width": str(width), "height": "48"}
    (share / f"out/{stem}.opex.json").write_text(json.dumps({"objects": [thing], "meta": meta}))
    mask = np.zeros((48, 64), np.uint8)
    cv2.ellipse(mask, (22, 22), (18, 18), 0, 0, 360, 255, -1)
    cv2.imwrite(str(share / f"out/{stem}.mask.png"), mask)


def test_an_answered_job_is_no_fault(ended: Writers) -> None:
    verdict = judge(ended.share, ended)
    assert (verdict.answered, verdict.lost, verdict.wrong_pair, verdict.partial) == (1, [], [], [])
    assert (verdict.twice, verdict.touched, verdict.left, verdict.other) == ([], [], [], [])


@pytest.mark.parametrize("name", ["out/dog.opex.json", "done/dog.json", "done/dog.png"])
def test_a_file_that_is_gone_is_seen(ended: Writers, name: str) -> None:
    (ended.share / name).unlink()
    assert judge(ended.share, ended).lost


@pytest.mark.parametrize("name", ["out/dog.mask.png", "out/dog.opex.json"])
def test_half_an_answer_is_seen(ended: Writers, name: str) -> None:
    path = ended.share / name
    path.write_bytes(path.read_bytes()[:-20])
    assert judge(ended.share, ended).partial


def test_an_answer_without_its_mask_is_seen(ended: Writers) -> None:
    (ended.share / "out/dog.mask.png").unlink()
    assert judge(ended.share, ended).partial


def test_a_mask_of_another_box_is_seen(ended: Writers) -> None:
    cv2.imwrite(str(ended.share / "out/dog.mask.png"), np.full((48, 64), 255, np.uint8))
    assert judge(ended.share, ended).partial


def test_a_second_answer_is_seen(ended: Writers) -> None:
    _answer(ended.share, "dog~2")
    assert judge(ended.share, ended).twice
    assert answered_twice(["job dog done: job 1=0.95 (total 1 ms)"] * 2)


def test_an_answer_on_another_picture_is_seen(ended: Writers) -> None:
    _answer(ended.share, "dog", width=65)
    assert judge(ended.share, ended).wrong_pair


def test_an_answer_to_what_is_no_job_is_seen(ended: Writers) -> None:
    _answer(ended.share, "link", label="planted by a user")
    assert judge(ended.share, ended).touched


def test_a_refusal_without_a_reason_is_seen(ended: Writers) -> None:
    for path in (ended.share / "out").iterdir():
        path.unlink()
    (ended.share / "done/dog.json").rename(ended.share / "failed/dog.json")
    assert judge(ended.share, ended).left
    ended.jobs[0].ends = ("failed",)
    assert judge(ended.share, ended).lost
    told = {"files": ["dog.json"], "code": "prompt"}
    (ended.share / "failed/dog.error.json").write_text(json.dumps(told))
    verdict = judge(ended.share, ended)
    assert not verdict.lost
    assert verdict.refused == {"plain: prompt": 1}


def test_whatever_changes_outside_is_seen(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    make_outside(outside)
    before = seen_outside(outside)
    assert differences(before, seen_outside(outside)) == []
    (outside / "writable.bin").chmod(0o600)
    (outside / "folder/a.jpg").write_bytes(b"other")
    (outside / "folder/deep/b.json").unlink()
    (outside / "new").touch()
    found = {text.split(":")[0] for text in differences(before, seen_outside(outside))}
    assert {
        f"outside/{name}" for name in ("writable.bin", "folder/a.jpg", "folder/deep/b.json", "new")
    } <= found


def test_a_daemon_may_leave_jobs_for_a_blocked_folder_and_those_of_a_killed_process(
    tmp_path: Path,
) -> None:
    daemon = object.__new__(Daemon)
    daemon.share = tmp_path
    daemon._blocked = BLOCKED
    daemon.log = tmp_path / "1.log"
    (tmp_path / "work" / BLOCKED[0] / ".a.jpg/g1.done@me").mkdir(parents=True)
    daemon.log.touch()
    daemon.left_nothing("me")
    for left in (f"{BLOCKED[0]}/.b.jpg/g1.a1.n1@me", "cam1/.a.jpg/g1.done@me"):
        (tmp_path / "work" / left).mkdir(parents=True)
        with pytest.raises(ChaosError, match="left"):
            daemon.left_nothing("me")
        (tmp_path / "work" / left).rmdir()
    (tmp_path / "work/.c.jpg/g1.a1.n1@me").mkdir(parents=True)
    daemon.log.write_text('{"message": "cpu: its process was ended by SIGKILL; it is restarted"}\n')
    daemon.left_nothing("me")
