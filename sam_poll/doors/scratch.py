"""Folders in `work/` for what is done of mosaics. They outlive the claims, and let daemons that are idle take a part.

    work/.sam_poll-mosaic/3f2a…-91c0…/open.json   whose it is, where its picture lies, what is asked
    work/.sam_poll-mosaic/3f2a…-91c0…/advanced    something was done since the job was last taken over
    work/.sam_poll-mosaic/3f2a…-91c0…/…           the mosaic's own

A folder goes when its job has been answered or refused, or when nothing in `in/` and `work/` asks for it any more.

What can still go wrong here: a job that was given back under another name, because its own was taken, begins anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from loguru import logger

from sam_poll import prompts
from sam_poll.doors.claims import Claim, Listing
from sam_poll.doors.layout import Layout
from sam_poll.doors.looks import look
from sam_poll.errors import PromptError
from sam_poll.fs import NO_FILE, TEMP_PREFIX, exists, read_json, shown, write_whole
from sam_poll.safe_path import SafePath
from sam_poll.types import ADVANCED, Job, Mosaic

FOLDER = f"{TEMP_PREFIX}mosaic"
_OPEN = "open.json"
_MAX_ABOUT = 16 << 20
LOOK_S = 2.0  # between two looks for something to help with
_SHORT_S = 2.0  # help that ends so soon was of no use
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 600.0  # until it is offered again


class Scratch:
    """These folders of one share, and this daemon's part in other's mosaics. For the scan's thread; `drop` and `over`
    for any."""

    def __init__(self, layout: Layout) -> None:
        self._layout, self._root = layout, layout.work / FOLDER
        self._lock = threading.Lock()
        self._helping: Counter[SafePath] = Counter()
        self._begun: dict[SafePath, float] = {}
        self._pauses: dict[SafePath, tuple[float, float]] = {}  # how long the last one was, and when it ends
        self._since: dict[SafePath, float] = {}
        self._looked = -LOOK_S

    # ── for jobs of our own ──

    def given(self, claim: Claim, prompt: str | None, job: Job) -> Job:
        """The job with a folder of its own, in which others find what they need to help. OSError."""
        folder = self._root / f"{_key(self._label(claim.outer))}-{_key(prompt or '')}"
        folder.mkdir(parents=True, exist_ok=True)
        assert isinstance(job.picture, SafePath)
        place = "work" if claim.picture else "done"
        about = {
            "claim": self._label(claim.outer),
            "waits": claim.below(prompt or claim.picture or ""),
            "picture": [place, job.picture.below(self._layout.folders[place])],
            "id": job.id,
            "name": job.name,
            "prompts": prompts.as_document(job.prompts),
        }
        write_whole(folder / _OPEN, json.dumps(about).encode())
        return replace(job, scratch=folder)

    def advanced(self, outer: SafePath) -> Callable[[], None] | None:
        """Whether anything was done for a claim since it was last taken over; to be called when that is taken note of.
        OSError."""
        try:
            names = self._root.names()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None
        mine = [self._root / n / ADVANCED for n in names if n.startswith(f"{_key(self._label(outer))}-")]
        marks = [mark for mark in mine if exists(mark)]

        def noted() -> None:
            for mark in marks:
                mark.unlink(missing_ok=True)

        return noted if marks else None

    @staticmethod
    def drop(job: Job) -> None:
        """The job is over, and what was kept for it goes."""
        if job.scratch:
            _removed(job.scratch)

    # ── for those of others ──

    def helps(self, hands: int, is_ours: Callable[[SafePath], bool], *, only_ours: bool = False) -> list[Job]:
        """A part in each mosaic at which fewer than `hands` of this daemon's devices are; as many parts as there are
        devices. `is_ours` says of the name of a claim whether it is at work here. OSError."""
        now, found = time.monotonic(), list[Job]()
        if not hands or now - self._looked < LOOK_S:
            return found
        self._looked = now
        for folder in self._folders():
            about = self._about(folder)
            with self._lock:
                here, places = self._helping[folder], hands - self._helping.total()
                pause = self._pauses.get(folder, (0.0, 0.0))[1]
            if about is None or pause > now or places <= 0:
                continue
            ours = is_ours(self._layout.work / about["claim"])
            if here + ours < hands and (ours or not only_ours) and (job := self._help(folder, about)):
                with self._lock:
                    self._helping[folder] += 1
                    self._begun[folder] = now
                logger.debug("takes tiles of {}, too", shown(job.id))
                found.append(job)
        return found

    def over(self, job: Job) -> None:
        """A part has ended: there is nothing left for us, or we are to stop."""
        assert job.scratch
        now = time.monotonic()
        with self._lock:
            self._helping[job.scratch] -= 1
            before, _ = self._pauses.get(job.scratch, (0.0, 0.0))
            useless = now - self._begun.get(job.scratch, 0.0) < _SHORT_S
            pause = min(max(_FIRST_PAUSE_S, 2 * before * useless), _LONGEST_PAUSE_S)
            self._pauses[job.scratch] = pause, now + pause

    def _help(self, folder: SafePath, about: dict[str, Any]) -> Job | None:
        try:
            place, below = about["picture"]
            picture = self._layout.folders[place] / below
            asked = prompts.parse(json.dumps(about["prompts"]).encode()).prompts
        except (PromptError, ValueError, KeyError, TypeError, RecursionError):  # of a newer version
            return None
        if not isinstance(asked, Mosaic) or look(picture) is None:
            return None
        return Job(about["id"], about["name"], picture, asked, scratch=folder, helps=True)

    # ── looking ──

    def sweep(self, listing: Listing, now: float, after_s: float) -> None:
        """Remove what nothing in `in/` and `work/` has asked for in `after_s`. `now` is a monotonic clock. OSError."""
        claims = {self._label(found.outer) for found in listing.claims}
        left, seen = dict[SafePath, float](), self._folders()
        for folder in seen:
            about = self._about(folder)
            if about and (about["claim"] in claims or self._waits(about["waits"])):
                continue
            left[folder] = self._since.get(folder, now)
            if now - left[folder] > after_s:
                _removed(folder)
        self._since = left
        with self._lock:
            for folder in [folder for folder in self._pauses if not (self._helping[folder] or folder in seen)]:
                for notes in (self._pauses, self._begun, self._helping):
                    notes.pop(folder, None)

    def _waits(self, rel: str) -> bool:
        try:
            return exists(self._layout.input / rel)
        except PermissionError:  # nobody can tell, so it is kept
            return True

    def _folders(self) -> list[SafePath]:
        try:
            return sorted(self._root / name for name in self._root.names())
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []

    def _about(self, folder: SafePath) -> dict[str, Any] | None:
        """None: it is just being made, or is none of ours. Others may have written it."""
        try:
            about = read_json(folder / _OPEN, _MAX_ABOUT)
        except ValueError:
            return None
        except OSError as error:
            if error.errno in NO_FILE or isinstance(error, FileNotFoundError):
                return None
            raise
        texts = [about.get(key) for key in ("claim", "waits", "id", "name")] if isinstance(about, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or not {"picture", "prompts"} <= about.keys():
            return None
        try:
            self._layout.work / about["claim"], self._layout.input / about["waits"]
        except ValueError:
            return None
        return dict(about)

    def _label(self, outer: SafePath) -> str:
        return outer.below(self._layout.work)


def _removed(folder: SafePath) -> None:
    """Remove a mosaic's folder, as far as it goes now; what is left the next look removes."""
    with contextlib.suppress(OSError):
        folder.remove_tree()


def _key(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
