"""What the torture's writers drop: each job with a label, a box and a picture size that no other
job has.

So an answer tells by itself which prompt and which picture it was made of. A writer has one way of
its own for each drop: renamed, copied, in parts, hidden names as rsync's, prompt first, prompt
late, several prompts, reused names …

Limitations: a writer that this machine holds up for longer than the settle time
looks finished; its jobs are marked `excused` and may end in `failed/` too."""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import shutil
import subprocess
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tools.chaos_jobs import key_of, move_in
from tools.torture_names import BLOCKED

Box = tuple[int, int, int, int]
_LEAST, _SIDES = 48, 200  # pictures have 200 × 200 different sizes
_TRIES = 200
_FOLDERS = (
    "",
    "",
    "cam1",
    "cam1/day 2",
    "straße",
    "a.b/c.d",
    unicodedata.normalize("NFD", "bücher"),
)
_STEMS = (
    "{n}",
    "pic.{n}.x",
    "a b {n}",
    "é{n}",
    unicodedata.normalize("NFD", "ü{n}"),
    "-{n}",
    "{n}.JPG copy",
    "日本{n}",
)
_ENDINGS = (".jpg", ".png", ".bmp", ".JPG", ".jpeg", ".webp", ".tif")
GROUPS = {
    "foreign": ("foreign",),
    "patience": ("cut_prompt",),
    "nfd": ("two_spellings",),
    "blocked": ("blocked",),
    "mirror": (),
}
"""Kinds of drops that can be left out together, by the name for `--without`."""


@dataclass(frozen=True)
class Shot:
    """A picture as it was dropped."""

    name: str
    key: str
    width: int
    height: int


@dataclass
class Job:
    """One prompt, or one picture of an annotation file. `ends`: where its prompt may lie at the
    end.
    """

    label: str
    kind: str
    shot: Shot
    box: Box
    prompt: str | None = None
    """The key of the prompt's bytes; None where the program makes it of an annotation file."""
    ends: tuple[str, ...] = ("done",)
    excused: bool = False


class Writers:
    """What all writers of one share know together: the jobs, and numbers that are given once."""

    def __init__(self, share: Path, settle_s: float, *, foreign: int | None) -> None:
        self.share = share
        self.settle_s = settle_s
        self.foreign = foreign
        self.jobs: list[Job] = []
        self.others: dict[str, str] = {}
        """Keys of files that are no jobs, and their places: lone pictures, annotation files."""
        self.kinds: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def number(self) -> int:
        """The next number; no two are the same."""
        with self._lock:
            return next(self._numbers)


class Writer(threading.Thread):
    """One user who drops jobs, until it is told to stop; then it finishes what it has begun."""

    def __init__(self, known: Writers, seed: str, kinds: dict[str, int], pause_s: float) -> None:
        super().__init__(name=f"writer {seed}", daemon=True)
        self._known = known
        self._rng = random.Random(seed)
        self._pause_s = pause_s
        self._kinds = kinds
        self._mine = seed.rpartition(" ")[2]
        self._later: list[tuple[float, int, Callable[[], object]]] = []
        self.stop = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stop.wait(self._rng.uniform(0, 2 * self._pause_s)):
                self._do_later(time.monotonic())
                (kind,) = self._rng.choices(list(self._kinds), list(self._kinds.values()))
                self._known.kinds[kind] += 1
                getattr(self, f"_{kind}")()
            while self._later:
                self._do_later(time.monotonic())
                time.sleep(0.05)
        except BaseException as error:  # told by the run
            self.error = error
            raise

    def _do_later(self, now: float) -> None:
        while self._later and self._later[0][0] <= now:
            heapq.heappop(self._later)[2]()

    def _after(self, seconds: float, act: Callable[[], object]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, self._known.number(), act))

    # ── what is dropped ──

    def _base(self, folder: str | None = None) -> str:
        number = f"{self._known.number():06d}"
        stem = self._rng.choice(_STEMS).format(n=number)
        if folder is None:
            folder = self._rng.choice(_FOLDERS)
        return f"{folder}/{stem}" if folder else stem

    def _shot(self, name: str) -> tuple[Shot, bytes]:
        number = self._known.number()
        width, height = _LEAST + number % _SIDES, _LEAST + number // _SIDES % _SIDES
        coarse = np.random.default_rng(number).integers(
            0, 255, (height // 8, width // 8, 3), np.uint8
        )
        pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
        body = bytes(cv2.imencode(os.path.splitext(name)[1].lower(), pixels)[1].tobytes())
        return Shot(name, key_of(body), width, height), body

    def _job(self, shot: Shot, kind: str, **more: Any) -> tuple[Job, bytes]:
        """A job on this picture, and its prompt. It counts from now on."""
        label = f"job {self._known.number():06d}"
        x0, y0 = self._rng.randint(1, shot.width - 24), self._rng.randint(1, shot.height - 24)
        box = (
            x0,
            y0,
            self._rng.randint(x0 + 20, shot.width - 1),
            self._rng.randint(y0 + 20, shot.height - 1),
        )
        body = json.dumps(
            {"label": label, "box": dict(zip(("x0", "y0", "x1", "y1"), box, strict=True))}
        ).encode()
        job = Job(label, kind, shot, box, key_of(body), **more)
        self._known.jobs.append(job)
        return job, body

    def _pair(
        self, kind: str, folder: str | None = None, **more: Any
    ) -> tuple[Job, bytes, bytes, str]:
        """A job, its picture's bytes, its prompt's bytes, and its prompt's name."""
        base = self._base(folder)
        shot, picture = self._shot(base + self._rng.choice(_ENDINGS))
        job, body = self._job(shot, kind, **more)
        name = self._rng.choice(
            [base + ".json", base + ".json", base + ".prompt", shot.name + ".json"]
        )
        return job, picture, body, name

    # ── kinds of drops ──

    def _plain(self) -> None:
        job, picture, body, name = self._pair("plain")
        files = [(job.shot.name, picture), (name, body)]
        self._rng.shuffle(files)
        for file, content in files:
            self._put(job, file, content)

    def _prompt_first(self) -> None:
        job, picture, body, name = self._pair("prompt_first")
        self._put(job, name, body)
        self._after(self._rng.uniform(0.5, 14), lambda: self._put(job, job.shot.name, picture))

    def _prompt_late(self) -> None:
        job, picture, body, name = self._pair("prompt_late")
        self._put(job, job.shot.name, picture)
        self._after(self._rng.uniform(0.5, 8), lambda: self._put(job, name, body))

    def _halves(self) -> None:
        job, picture, body, name = self._pair("halves")
        self._put(job, job.shot.name, picture)
        self._write_slowly(job, self._path(name), body, parts=2)

    def _cut_prompt(self) -> None:
        """Half a prompt, closed, and the rest when it has long settled."""
        job, picture, body, name = self._pair("cut_prompt")
        self._put(job, job.shot.name, picture)
        path = self._path(name)
        _again(lambda: path.write_bytes(body[:20]))
        time.sleep(self._known.settle_s * self._rng.uniform(1.1, 2.0))
        _again(lambda: _append(path, body[20:]))

    def _two_spellings(self) -> None:
        base = f"{self._known.number():06d} übung"
        shot, picture = self._shot(unicodedata.normalize("NFC", base) + ".png")
        job, body = self._job(shot, "two_spellings")
        self._put(job, shot.name, picture)
        self._put(job, unicodedata.normalize("NFD", base) + ".json", body)

    def _several(self) -> None:
        base = self._base()
        shot, picture = self._shot(base + self._rng.choice(_ENDINGS))
        names = [base + ".json", base + ".left.json", base + ".b.prompt", shot.name + ".json"]
        jobs = [self._job(shot, "several") for _ in names[: self._rng.randint(2, 4)]]
        for (job, body), name in zip(jobs, names, strict=False):
            self._put(job, name, body)
        self._put_all([job for job, _ in jobs], shot.name, picture)

    def _further(self) -> None:
        """One more prompt for a picture that lies in done/."""
        done = [job for job in self._known.jobs[-300:] if job.kind == "plain"]
        if not done:
            return
        shot = self._rng.choice(done).shot
        if not (self._known.share / "done" / shot.name).exists():
            return
        job, body = self._job(shot, "further")
        self._put(job, f"{os.path.splitext(shot.name)[0]}.more{self._known.number()}.json", body)

    def _reused(self) -> None:
        """`latest.jpg` again, as soon as the one before has left in/."""
        base = f"cam1/latest-{self._mine}"
        names = (base + ".jpg", base + ".json")
        if any(os.path.lexists(self._known.share / "in" / name) for name in names):
            return
        shot, picture = self._shot(names[0])
        _, body = self._job(shot, "reused")
        move_in_again(self._known.share, names[0], picture)
        time.sleep(self._rng.uniform(0, 1))
        move_in_again(self._known.share, names[1], body)

    def _folder(self) -> None:
        """A folder that is removed as soon as it is empty."""
        folder = f"folder {self._known.number()}/deep"
        job, picture, body, name = self._pair("folder", folder)
        self._put(job, name, body)
        self._put(job, job.shot.name, picture)
        for seconds in (1, 3, 6, 30):
            self._after(seconds, lambda: self._remove(folder))

    def _remove(self, folder: str) -> None:
        for path in (self._known.share / "in" / folder, (self._known.share / "in" / folder).parent):
            try:
                path.rmdir()
            except OSError:
                return

    def _annotations(self) -> None:
        folder = f"task {self._known.number()}"
        images = []
        pictures = []
        jobs = []
        for n in range(self._rng.randint(1, 3)):
            shot, picture = self._shot(f"{folder}/p{n}.png")
            job, _ = self._job(shot, "annotations")
            job.prompt = None
            jobs.append(job)
            pictures.append((shot.name, picture))
            x0, y0, x1, y1 = job.box
            images.append(
                f'<image id="{n}" name="p{n}.png" width="{shot.width}" height="{shot.height}">'
                f'<box label="{job.label}" xtl="{x0}" ytl="{y0}" xbr="{x1}" ybr="{y1}" '
                'occluded="0"/></image>'
            )
        text = f"<annotations><version>1.1</version>{''.join(images)}</annotations>".encode()
        self._known.others[key_of(text)] = "done"
        files = [*pictures, (f"{folder}/annotations.xml", text)]
        self._rng.shuffle(files)
        for name, body in files:
            self._put_all(jobs, name, body)

    def _broken(self) -> None:
        job, _, body, name = self._pair("broken", ends=("failed",))
        text = f"no picture: {job.label}".encode()
        job.shot = Shot(job.shot.name, key_of(text), 0, 0)
        self._put(job, job.shot.name, text)
        self._put(job, name, body)

    def _lone(self) -> None:
        shot, picture = self._shot(f"{self._base()}.png")
        self._known.others[shot.key] = "in"
        move_in_again(self._known.share, shot.name, picture)

    def _blocked(self) -> None:
        job, picture, body, name = self._pair(
            "blocked", self._rng.choice(BLOCKED), ends=("done", "failed")
        )
        self._put(job, job.shot.name, picture)
        self._put(job, name, body)

    def _foreign(self) -> None:
        """A folder of another user, a sticky one, or a file that cannot be moved; given free after
        a while.
        """
        uid = self._known.foreign
        if uid is None:
            return
        folder = f"foreign {self._known.number()}"
        job, picture, body, name = self._pair("foreign", folder)
        way = self._rng.choice(["closed", "sticky", "immutable"])
        path = self._path(name).parent
        fixed = self._known.share / "in" / job.shot.name
        path.chmod(0o755)
        fixed.write_bytes(picture)
        self._path(name).write_bytes(body)
        if way == "immutable":
            path.chmod(0o777)
            immutable(fixed, True)
        else:
            for each in (path, *path.iterdir()):
                os.chown(each, uid, uid)
            path.chmod(0o1777 if way == "sticky" else 0o755)
        self._after(self._rng.uniform(2, 10), lambda: self._give_free(path, fixed))

    def _give_free(self, path: Path, fixed: Path) -> None:
        if fixed.exists():
            immutable(fixed, False)
        if path.exists():
            path.chmod(0o777)

    # ── ways to put a file there ──

    def _path(self, name: str) -> Path:
        path = self._known.share / "in" / name
        _again(lambda: path.parent.mkdir(parents=True, exist_ok=True))
        return path

    def _put(self, job: Job, name: str, body: bytes) -> None:
        self._put_all([job], name, body)

    def _put_all(self, jobs: list[Job], name: str, body: bytes) -> None:
        """One file, in one of the ways in which people and tools write files."""
        way = self._rng.choice(["rename", "rename", "part", "rsync", "write", "slow", "cp"])
        folder, _, file = name.rpartition("/")
        if way == "rename":
            move_in_again(self._known.share, name, body)
        elif way in ("part", "rsync"):
            aside = os.path.join(folder, f"{file}.part" if way == "part" else f".{file}.Ab12Cd")
            _again(lambda: self._write_and_rename(self._path(aside), self._path(name), body))
        elif way == "write":
            _again(lambda: self._path(name).write_bytes(body))
        elif way == "cp":
            _again(lambda: self._copy(self._path(name), body))
        else:
            for job in jobs[1:]:
                job.excused = job.excused or jobs[0].excused
            self._write_slowly(jobs[0], self._path(name), body, parts=4)
            for job in jobs:
                job.excused = job.excused or jobs[0].excused

    def _write_and_rename(self, aside: Path, path: Path, body: bytes) -> None:
        aside.write_bytes(body)
        self._path(str(path.relative_to(self._known.share / "in")))
        aside.rename(path)

    def _copy(self, path: Path, body: bytes) -> None:
        """As `cp -p`: an old time on a new file."""
        source = self._known.share / "aside" / f"cp-{threading.get_ident()}"
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(body)
        os.utime(source, (1_600_000_000, 1_600_000_000))
        shutil.copy2(source, path)

    def _write_slowly(self, job: Job, path: Path, body: bytes, parts: int) -> None:
        """In place, with pauses below the settle time."""
        out = _again(
            lambda: self._path(str(path.relative_to(self._known.share / "in"))).open(
                "wb", buffering=0
            )
        )
        step = -(-len(body) // parts)
        last = time.monotonic()
        with out:
            for start in range(0, len(body), step):
                out.write(body[start : start + step])
                now = time.monotonic()
                job.excused = job.excused or now - last > self._known.settle_s * 0.8
                last = now
                time.sleep(self._known.settle_s * self._rng.uniform(0.05, 0.4))
            job.excused = job.excused or time.monotonic() - last > self._known.settle_s * 0.8


def _append(path: Path, body: bytes) -> None:
    """To a file that is still there: a new one of this name would be half a prompt."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(handle, body)
    finally:
        os.close(handle)


def _again(act: Callable[[], Any]) -> Any:
    """Folders come and go: a writer makes them once more."""
    for attempt in range(_TRIES):
        try:
            return act()
        except (FileNotFoundError, FileExistsError, NotADirectoryError):
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.01)
    raise AssertionError("unreachable")


def move_in_again(share: Path, name: str, body: bytes) -> None:
    """`chaos_jobs.move_in`, with the folder made anew where another has removed it."""

    def act() -> None:
        (share / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        move_in(share, name, body)

    _again(act)


def immutable(path: Path, on: bool) -> None:
    """A file, or all below a folder, cannot be moved (or can again) where the file system has
    it.
    """
    subprocess.run(
        ["chattr", "-R", "+i" if on else "-i", str(path)], capture_output=True, check=False
    )
