"""The folder door: pairs of picture and prompt go `in → work → done | failed`, answers appear in `out`.

The scan is the truth; events only wake it. A file has one owner, and changes owner by rename. A job always ends in one
of three places: answered, rejected with a reason beside the untouched input, or waiting.

What can still go wrong here: one daemon a share (an advisory lock sees to it); a claim is not yet a lease, so what a
killed daemon had in `work/` comes back when the next one starts, not before. A lone prompt is matched by name with a
picture in `done/` after `LONE_S`; if a new picture of that name was meant, it came too late.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from loguru import logger

from sam_poll import __version__, prompts
from sam_poll.doors.layout import ERROR_ENDING, Layout, Lock, prove, recover, unusable
from sam_poll.doors.scan import NEVER, Manners, Ready, Scanner, by_picture, look, spellings
from sam_poll.doors.settle import job_id
from sam_poll.errors import InputError, PromptError, SamPollError
from sam_poll.fs import exists, free_suffix, move_new, shown, sync_folder, with_suffix, write_whole
from sam_poll.types import Document, Everything, Job

_STOP_S = 0.25  # how soon a set `stop` is noticed
_NAME_MAX = 255  # bytes; ext4, XFS, and most others
_LONGEST_SUFFIX = 24  # `.overlay.jpg`, `.mask.10000.png`, `.error.json`, `~2`


@dataclass(slots=True, eq=False)
class _Picture:
    """A picture that jobs of this process use; several prompts may share it."""

    path: Path
    rel: str
    suffix: str = ""  # of its name in done/
    stays: bool = False  # it lies in done/ already and is not moved
    users: int = 0
    answered: bool = False


@dataclass(slots=True, eq=False)
class _Claim:
    """The files of one job. What is still to be put away is not None; `moved` are the names in their last folder."""

    picture: _Picture | None
    prompt: str | None
    rel: str
    suffix: str | None = None  # in done/ or failed/, chosen once
    moved: list[str] = field(default_factory=list)


class FolderDoor:
    """The share as a door. `with FolderDoor(layout, manners) as door: pipeline.run(door, stop)`.

    Entering proves the folders, takes the lock and recovers an earlier run's jobs; ShareError says what is in the way.
    """

    def __init__(self, layout: Layout, manners: Manners | None = None) -> None:
        self.layout, self.manners = layout, manners or Manners()
        self._wake = threading.Event()
        self._scanner = Scanner(layout, self.manners, self._wake)
        self._lock = threading.Lock()
        self._pictures: dict[str, _Picture] = {}
        self._prompts: set[str] = set()

    def __enter__(self) -> FolderDoor:
        prove(self.layout)
        self._guard = Lock(self.layout)
        self._guard.__enter__()
        try:
            recover(self.layout)
        except OSError as error:
            self._guard.__exit__()
            raise unusable("work", Path(error.filename or self.layout.work), error) from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._scanner.close()
        self._guard.__exit__()

    @property
    def waiting(self) -> int:
        """Pictures and prompts in `in/` at the last scan."""
        return self._scanner.waiting

    @property
    def scans(self) -> int:
        """How often `in/` has been looked through."""
        return self._scanner.scans

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Claimed jobs, oldest first, until `stop` is set or (`once`) nothing is left that could become a job."""
        pause = 1.0
        while not stop.is_set():
            self._wake.clear()
            started = time.monotonic()
            try:
                ready = self._scanner.scan(started, self._at_work())
                took = time.monotonic() - started
                for group in by_picture(ready):
                    if stop.is_set():
                        return
                    claimed = self._claim(group)
                    try:
                        while claimed and not stop.is_set():
                            yield claimed.pop(0)
                    finally:
                        self._put_back(claimed)
            except OSError as error:
                logger.error("the share cannot be used ({}); the next try is in {:g} s", error, pause)
                self._scanner.renew()
                self._wait(stop, pause)
                pause = min(pause * 2, 30.0)
                continue
            pause = 1.0
            if self.manners.once and self._scanner.due == NEVER and not ready and not self._busy():
                return
            stop.wait(min(took, 1.0))  # a burst of events must not turn into a scan for each
            self._wait(stop, min(self._scanner.due - time.monotonic(), self.manners.rescan_s))

    def _wait(self, stop: threading.Event, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not stop.is_set() and (left := deadline - time.monotonic()) > 0:
            if self._wake.wait(min(left, _STOP_S)):
                return

    def _at_work(self) -> list[str]:
        with self._lock:
            return list(self._pictures)

    def _busy(self) -> bool:
        with self._lock:
            return bool(self._prompts or self._pictures)

    # ── claim ──

    def _claim(self, group: list[Ready]) -> list[Job]:
        """Take a picture with all its ready prompts out of `in/`, so that it stays until the last of them has ended.

        What changed, vanished, or has its name still in `work/` is left for a later scan.
        """
        jobs: list[Job] = []
        picture: _Picture | None = None
        for ready in group:
            if picture and ready.picture:
                ready.signatures.pop(ready.picture, None)  # it came with the first prompt
            try:
                if any(look(self.layout.input / file) != seen for file, seen in ready.signatures.items()):
                    continue
                parsed, fault = self._read(ready)
                if parsed and parsed.image and ready.picture and os.path.basename(ready.picture) != parsed.image:
                    # Its name suggests one picture, its text names another: the next scan pairs it by the text.
                    self._scanner.learn(ready.prompt or "", ready.signatures[ready.prompt or ""], parsed.image)
                    continue
                with self._lock:  # a sibling's end must not move a shared picture meanwhile
                    claim = self._take(ready)
            except FileNotFoundError:
                continue  # taken away in this very moment
            except OSError as error:
                if not jobs:
                    raise
                logger.error("{} cannot be claimed: {}", shown(ready.prompt), error)
                break
            if claim:
                picture = claim.picture
                jobs.append(self._job(claim, parsed, fault))
        return jobs

    def _read(self, ready: Ready) -> tuple[prompts.PromptFile | None, SamPollError | None]:
        if ready.fault or not ready.prompt:
            return None, ready.fault
        try:
            return self._scanner.read(ready.prompt), None
        except PromptError as error:
            return None, error

    def _put_back(self, jobs: list[Job]) -> None:
        """Release what was claimed with its siblings and not handed out any more."""
        for job in jobs:
            try:
                self.release(job)
            except OSError as error:
                logger.warning("job {} stays in work/ until the next start: {}", shown(job.id), error)

    def _take(self, ready: Ready) -> _Claim | None:
        """The renames. None: a file of this name is still at work, or the shared picture has just gone."""
        if ready.prompt in self._prompts:
            return None
        picture = self._pictures.get(ready.picture) if ready.picture else None
        if ready.picture and ready.picture in ready.signatures:
            if picture:
                return None
            picture = self._pull(ready.picture)
        elif ready.picture and not picture:
            place = with_suffix(self.layout.done / ready.picture, ready.suffix)
            if not look(place):
                return None
            picture = _Picture(place, ready.picture, ready.suffix, stays=True)
        if ready.prompt:
            try:
                move_new(self.layout.input / ready.prompt, self.layout.work / ready.prompt)
            except OSError:
                if picture and not picture.stays and not picture.users:
                    picture.path.rename(self.layout.input / picture.rel)  # a pair is two renames: undo the first
                raise
            self._prompts.add(ready.prompt)
        if picture:
            picture.users += 1
            self._pictures[picture.rel] = picture
        return _Claim(picture, ready.prompt, ready.prompt or ready.picture or "")

    def _pull(self, rel: str) -> _Picture:
        # Its name in done/ is chosen now, because the answers will carry it.
        suffix = "" if self.layout.delete_input else free_suffix([self.layout.done / rel])
        picture = _Picture(self.layout.work / rel, rel, suffix)
        move_new(self.layout.input / rel, picture.path)
        return picture

    def _job(self, claim: _Claim, parsed: prompts.PromptFile | None, fault: SamPollError | None) -> Job:
        picture = claim.picture
        suffix = picture.suffix if picture else ""
        identity = self._identity(claim) + suffix
        if len(os.fsencode(os.path.basename(identity))) + _LONGEST_SUFFIX > _NAME_MAX:
            fault = fault or InputError(
                "the name is too long to append the outputs' endings to it",
                place=shown(os.path.basename(claim.rel)),
                remedy=f"use names of at most {_NAME_MAX - _LONGEST_SUFFIX} bytes",
            )
        logger.debug("claimed {}", shown(claim.rel))
        return Job(
            id=identity,
            name=self.layout.share_name(
                with_suffix(self.layout.done / (picture.rel if picture else claim.rel), suffix)
            ),
            picture=picture.path if picture else b"",
            prompts=parsed.prompts if parsed else Everything(),
            origin=claim,
            fault=fault,
            sha256=parsed.image_sha256 if parsed else None,
            nbytes=parsed.image_bytes if parsed else None,
        )

    def _identity(self, claim: _Claim) -> str:
        picture = claim.picture.rel if claim.picture else claim.rel
        places = (self.layout.input, self.layout.work, self.layout.done)
        others = [other for other in spellings(os.path.splitext(picture)[0]) if other != picture]
        twin = os.path.splitext(claim.rel)[0] + ".json"
        return job_id(
            claim.rel,
            picture,
            shares_stem=any(exists(place / other) for other in others for place in places),
            twin=claim.prompt is not None
            and twin != claim.prompt
            and (exists(self.layout.input / twin) or exists(self.layout.work / twin)),
        )

    # ── answers ──

    def deliver(self, job: Job, documents: Sequence[Document]) -> None:
        """Write the outputs whole, then move the inputs to `done/`; the prompt goes last. OSError: call again."""
        base = self.layout.output / job.id
        base.parent.mkdir(parents=True, exist_ok=True)
        for document in documents:
            suffix = self.layout.suffixes.get(document.suffix, document.suffix)
            write_whole(base.with_name(base.name + suffix), document.body)
        sync_folder(base.parent)
        with self._lock:
            claim: _Claim = job.origin
            if claim.picture:
                claim.picture.answered = True
                claim.suffix = claim.picture.suffix
            self._let_go(claim, self.layout.done)
            self._end_prompt(claim, self.layout.done)
        self._wake.set()

    def reject(self, job: Job, error: SamPollError) -> None:
        """Move the inputs untouched to `failed/`, with `<id>.error.json` beside them. OSError: call again."""
        with self._lock:
            claim: _Claim = job.origin
            self._let_go(claim, self.layout.failed)
            self._report(job, error)
            self._end_prompt(claim, self.layout.failed)
        self._wake.set()

    def release(self, job: Job) -> None:
        """Put a claimed job back into `in/`. OSError: it stays in `work/` and comes back at the next start."""
        with self._lock:
            claim: _Claim = job.origin
            claim.suffix = ""
            self._let_go(claim, self.layout.input)
            self._end_prompt(claim, self.layout.input)
        self._wake.set()

    def _let_go(self, claim: _Claim, target: Path) -> None:
        """Put the picture away if nobody else here uses it. Done once, so that a failed answer can be tried again."""
        picture = claim.picture
        if picture is None:
            return
        if picture.users == 1 and not picture.stays:
            # Answered for one prompt, it belongs to the picture tree, whatever became of its other prompts.
            home = self.layout.done if picture.answered else target
            suffix = picture.suffix if picture.answered else self._suffix(claim, target)
            name = self._move(picture.path, with_suffix(home / picture.rel, suffix))
            if home == target:
                claim.moved.append(name)
        picture.users -= 1
        if not picture.users:
            del self._pictures[picture.rel]
        claim.picture = None

    def _end_prompt(self, claim: _Claim, target: Path) -> None:
        if claim.prompt is None:
            return
        place = with_suffix(target / claim.prompt, self._suffix(claim, target))
        if target == self.layout.done and exists(place):  # a further prompt for a picture that was answered before
            place = with_suffix(target / claim.prompt, free_suffix([target / claim.prompt]))
        self._move(self.layout.work / claim.prompt, place)
        self._prompts.discard(claim.prompt)
        claim.prompt = None

    def _suffix(self, claim: _Claim, target: Path) -> str:
        """One for picture and prompt, chosen when the first of them moves."""
        if claim.suffix is None:
            names = [claim.prompt, claim.picture.rel if claim.picture else None]
            claim.suffix = free_suffix([target / name for name in names if name])
        return claim.suffix

    def _move(self, path: Path, place: Path) -> str:
        if self.layout.delete_input and place.is_relative_to(self.layout.done):
            path.unlink(missing_ok=True)
        elif not exists(path):
            logger.warning("{} has vanished from work/ while it was at work", shown(path.name))
        else:
            move_new(path, place)
            sync_folder(place.parent)
        return place.name

    def _report(self, job: Job, error: SamPollError) -> None:
        claim: _Claim = job.origin
        suffix = self._suffix(claim, self.layout.failed)
        place = with_suffix(self.layout.failed / claim.rel, suffix)
        files = [*claim.moved, *([place.name] if claim.prompt else [])]
        body = {
            "job": job.id,
            "code": error.code,
            "reason": error.reason,
            "place": error.place,
            "remedy": error.remedy,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "files": files,
            "versions": versions(),
        }
        place.parent.mkdir(parents=True, exist_ok=True)
        stem = os.fsdecode(os.fsencode(place.stem)[: _NAME_MAX - len(ERROR_ENDING)])
        if exists(place.with_name(stem + ERROR_ENDING)):  # dog.json failed before dog.prompt did
            stem = os.fsdecode(os.fsencode(place.name)[: _NAME_MAX - len(ERROR_ENDING)])
        write_whole(place.with_name(stem + ERROR_ENDING), json.dumps(body, indent=2).encode() + b"\n")


def versions() -> dict[str, str]:
    """What made an answer: package versions, read without importing them."""
    found = {"sam_poll": __version__}
    for package in ("torch", "sam2", "segment-anything", "opencv-python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
