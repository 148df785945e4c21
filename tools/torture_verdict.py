"""The verdict of the torture: every job by the content of its answer, and whether anything outside
was touched.

Limitations: a file outside that was changed and changed back between two looks is
not seen."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tools.chaos_jobs import key_of, picture
from tools.chaos_share import TEMPORARY, broken, files_below, located
from tools.torture_jobs import Job, Writers
from tools.torture_names import MARK

KINDS = ("lost", "partial", "twice", "wrong_pair", "touched", "left", "other")
# IoU of a mask with the ellipse in its box that the fake network draws; small masks have rough
# edges
_ALIKE = 0.8


@dataclass
class Verdict:
    """What is wrong; `other`: a surprise in a log, a daemon that ended, a file that is nothing that
    was dropped.
    """

    lost: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong_pair: list[str] = field(default_factory=list)
    touched: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    other: list[str] = field(default_factory=list)
    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Jobs in failed/ that may lie there, by kind and code."""


# ── outside ──


def make_outside(folder: Path) -> None:
    """What nobody may touch: files that look like what daemons work with, closed and open to
    everybody.
    """
    (folder / "folder/deep").mkdir(parents=True)
    (folder / "open").mkdir()
    for name in (
        "folder/a.jpg",
        "folder/.hidden",
        "folder/deep/b.json",
        "open/dog.json",
        "text.json",
        "writable.bin",
    ):
        (folder / name).write_bytes(MARK + b" outside " + name.encode())
    (folder / "real.png").write_bytes(picture(".png", 1))
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (1_700_000_000, 1_700_000_000))
    (folder / "writable.bin").chmod(0o666)
    (folder / "open").chmod(0o777)
    (folder / "open/dog.json").chmod(0o666)
    folder.chmod(0o777)


def seen_outside(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything there: kind and mode, owner, size, time of change, content."""
    found = {}
    for path in [folder, *folder.rglob("*")]:
        s = path.lstat()
        body = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(s.st_mode) else ""
        size = s.st_size if body else 0
        found[str(path.relative_to(folder))] = (
            oct(s.st_mode),
            s.st_uid,
            s.st_gid,
            size,
            s.st_mtime_ns,
            body,
        )
    return found


def differences(before: dict[str, tuple[Any, ...]], now: dict[str, tuple[Any, ...]]) -> list[str]:
    """What has come, gone or changed."""
    return [
        f"outside/{name}: {before.get(name, 'was not there')} → {now.get(name, 'is gone')}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]


# ── jobs ──


@dataclass
class _Answer:
    path: Path
    told: dict[str, Any]


def quiet(share: Path, known: Writers) -> bool:
    """Whether nothing waits or is at work but what has to lie in in/ for ever."""
    waiting = {path for path in files_below(share / "in") if not path.name.startswith(".")}
    work = [p for p in files_below(share / "work") if not p.name.startswith(TEMPORARY)]
    if work or len(waiting) > 50 + 2 * len(known.others):
        return False
    may_stay = {key for key, place in known.others.items() if place == "in"}
    return all(key_of(_bytes(path)) in may_stay or MARK in _bytes(path) for path in waiting)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def judge(share: Path, known: Writers) -> Verdict:
    """Hold a share on which no daemon works any more to every job that was dropped."""
    verdict, places = Verdict(), located(share)
    answers = _answers(share, verdict)
    reasons = _reasons(share)
    for job in known.jobs:
        _judge_job(share, job, answers.get(job.label, []), places, reasons, verdict)
    _pictures(known.jobs, places, verdict)
    for key, place in known.others.items():
        _one_place(f"a file for {place}/", places.get(key, []), {place}, verdict)
    labels = {job.label for job in known.jobs}
    for label in answers.keys() - labels:
        verdict.touched += [f"{a.path} answers {label!r}, which is no job" for a in answers[label]]
    verdict.other += _strange(share, places, known)
    return verdict


def _answers(share: Path, verdict: Verdict) -> dict[str, list[_Answer]]:
    """Label → the answers with it."""
    found: dict[str, list[_Answer]] = {}
    for path in files_below(share / "out"):
        body = path.read_bytes()
        if path.name.startswith(TEMPORARY) or MARK in body[:40]:
            continue
        if fault := broken(path, body):
            verdict.partial.append(f"{path.relative_to(share)}: {fault}")
        elif path.name.endswith(".opex.json"):
            told = json.loads(body)
            for label in {o["label"] for o in told["objects"]} or {"no object"}:
                found.setdefault(label, []).append(_Answer(path, told))
    return found


def _judge_job(
    share: Path,
    job: Job,
    answers: list[_Answer],
    places: dict[str, list[str]],
    reasons: dict[str, str],
    verdict: Verdict,
) -> None:
    name = f"{job.label} ({job.kind}, {job.shot.name})"
    ends = {*job.ends, *(("failed",) if job.excused else ())}
    where = (
        places.get(job.prompt, []) if job.prompt else [p for a in answers for p in ["done/"]][:1]
    )
    if len(answers) > 1:
        verdict.twice.append(
            f"{name} is answered in {', '.join(str(a.path.relative_to(share)) for a in answers)}"
        )
    if job.prompt is None and not answers:
        verdict.lost.append(f"{name} has no answer")
        return
    place = _one_place(name, where, ends, verdict)
    if place == "failed":
        if where[0] not in reasons:
            verdict.lost.append(f"{name} was refused without a reason: {where[0]}")
        else:
            verdict.refused[
                f"{job.kind}{' (held up)' if job.excused else ''}: {reasons[where[0]]}"
            ] += 1
    elif place == "done":
        if not answers:
            verdict.lost.append(f"{name} lies in {where[0]}, and has no answer")
            return
        verdict.answered += 1
    for answer in answers:
        if wrong := _wrong_pair(share, job, answer, places):
            verdict.wrong_pair.append(f"{name}: {wrong}")
        if wrong := _wrong_mask(answer, job):
            verdict.partial.append(f"{name}: {wrong}")


def _one_place(name: str, where: list[str], ends: set[str], verdict: Verdict) -> str | None:
    """The folder that a file lies in, if it is one that it may lie in."""
    if not where:
        verdict.lost.append(f"{name} lies nowhere")
    elif len(where) > 1:
        verdict.twice.append(f"{name} lies in {', '.join(where)}")
    elif where[0].split("/")[0] not in ends:
        verdict.left.append(f"{name} lies in {where[0]}, not in {' or '.join(sorted(ends))}")
    else:
        return where[0].split("/")[0]
    return None


def _wrong_pair(share: Path, job: Job, answer: _Answer, places: dict[str, list[str]]) -> str | None:
    meta, (thing, *more) = answer.told["meta"], answer.told["objects"]
    if more:
        return f"{answer.path.name} has {len(more) + 1} objects"
    if (int(meta["width"]), int(meta["height"])) != (job.shot.width, job.shot.height):
        return (
            f"it was answered on a picture of {meta['width']}×{meta['height']}, not "
            f"{job.shot.width}×{job.shot.height}"
        )
    box = json.loads(thing["meta"]["prompt"])["box"]
    if tuple(map(int, (box["x0"], box["y0"], box["x1"], box["y1"]))) != job.box:
        return f"it was asked with {box}, not {job.box}"
    if meta["image"] not in places.get(job.shot.key, []):
        return f"it names {meta['image']}, and its picture lies in {places.get(job.shot.key)}"
    return None


def _wrong_mask(answer: _Answer, job: Job) -> str | None:
    path = answer.path.with_name(answer.path.name.removesuffix(".opex.json") + ".mask.png")
    mask = cv2.imread(os.fspath(path), cv2.IMREAD_UNCHANGED) if path.is_file() else None
    if mask is None:
        return f"{path.name} is not there"
    if mask.shape != (job.shot.height, job.shot.width):
        return f"{path.name} is {mask.shape[1]}×{mask.shape[0]}"
    x0, y0, x1, y1 = job.box
    y, x = np.mgrid[0 : job.shot.height, 0 : job.shot.width] + 0.5
    ellipse = np.hypot((2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0)) <= 1
    overlap = (ellipse & (mask > 0)).sum() / max(1, (ellipse | (mask > 0)).sum())
    return (
        None if overlap > _ALIKE else f"{path.name} is not the mask of its box (IoU {overlap:.2f})"
    )


def _pictures(jobs: Iterable[Job], places: dict[str, list[str]], verdict: Verdict) -> None:
    """Each picture lies in one place."""
    for shot, job in {job.shot.key: (job.shot, job) for job in jobs}.values():
        where = places.get(shot.key, [])
        if len(where) != 1:
            kind = verdict.lost if not where else verdict.twice
            kind.append(
                f"{shot.name} ({job.kind}) lies {'in ' + ', '.join(where) if where else 'nowhere'}"
            )


def _reasons(share: Path) -> dict[str, str]:
    """File in failed/ → the code that its error file tells."""
    found = {}
    for path in files_below(share / "failed"):
        if path.name.endswith(".error.json"):
            told = json.loads(path.read_bytes())
            for name in told["files"]:
                found[(path.parent / name).relative_to(share).as_posix()] = told["code"]
    return found


def _strange(share: Path, places: dict[str, list[str]], known: Writers) -> list[str]:
    """Files that are neither dropped, nor planted, nor made by the program."""
    dropped = {
        key for job in known.jobs for key in (job.shot.key, job.prompt)
    } | known.others.keys()
    made = re.compile(
        r"failed/.*\.error\.json|(done|failed)/task \d+/p\d(\.png)?\.annotations(~\d+)?\.json"
    )
    found = []
    for key, where in places.items():
        for place in where if key not in dropped else ():
            if not made.fullmatch(place) and MARK not in _bytes(share / place):
                found.append(f"{place} is nothing that was dropped")
    return found


def answered_twice(messages: Iterable[str]) -> list[str]:
    """Labels that daemons say to have answered more than once."""
    done = Counter(m[1] for text in messages if (m := re.search(r" done: (job \d+)=", text)))
    return [
        f"{label} was answered {count} times by the logs"
        for label, count in done.items()
        if count > 1
    ]
