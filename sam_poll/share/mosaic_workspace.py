"""Folders in `work/` for the finished tiles of mosaics.

    work/.sam_poll-mosaic/3f2a…-91c0…/open.json   the claim, picture and prompts of a mosaic
    work/.sam_poll-mosaic/3f2a…-91c0…/advanced    a tile is finished since the last takeover
    work/.sam_poll-mosaic/3f2a…-91c0…/…           written by `sam_poll.mosaic`

They outlive claims, and let idle daemons help. A folder is removed when its job has been answered
or rejected, or when nothing in `in/` and `work/` needs it any more.

Limitations: a job that was put back under another name, because its own was taken, starts from the
beginning.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from loguru import logger

from sam_poll.core.errors import PromptError
from sam_poll.core.files import NO_FILE, TEMP_PREFIX, exists, read_json, write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import ADVANCED, Job, Mosaic
from sam_poll.prompts import parser
from sam_poll.share.claims.model import Claim, WorkListing
from sam_poll.share.intake.stat_cache import file_signature
from sam_poll.share.layout import Layout

FOLDER = f"{TEMP_PREFIX}mosaic"
_OPEN = "open.json"
_MAX_OPEN_BYTES = 16 << 20
LOOK_S = 2.0  # between two searches for mosaics to help with
_SHORT_S = 2.0  # help that ends so soon did nothing
_FIRST_PAUSE_S = 5.0  # until help is offered again
_LONGEST_PAUSE_S = 600.0


@dataclass(frozen=True, slots=True)
class _OpenMosaic:
    """The content of `open.json`, which another daemon has written.

    `claim`: the claim's outer folder, relative to `work/`. `file`: the job's prompt or picture,
    relative to `in/`. `picture` and `prompts` are not validated.
    """

    claim: str
    file: str
    id: str
    name: str
    picture: Any
    prompts: Any


@dataclass(slots=True)
class _Help:
    """The daemon's help with one mosaic. Times are of the monotonic clock.

    `active`: helper jobs that run.
    """

    active: int = 0
    started: float = 0.0
    pause_s: float = 0.0
    not_before: float = 0.0


class MosaicWorkspace:
    """The mosaics' folders of one share, and this daemon's help with them.

    For the scan's thread; `remove` and `helper_ended` for any.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._root = layout.work / FOLDER
        self._lock = threading.Lock()
        self._help: dict[SafePath, _Help] = {}
        self._unneeded_since: dict[SafePath, float] = {}
        self._last_search = -LOOK_S

    # ── this daemon's own mosaics ──

    def prepare(self, claim: Claim, prompt: str | None, job: Job) -> Job:
        """Return the job with a folder of its own, in which other daemons find what they need.

        Raises OSError.
        """
        label = self._label(claim.outer)
        folder = self._root / f"{_key(label)}-{_key(prompt or '')}"
        folder.mkdir(parents=True, exist_ok=True)
        assert isinstance(job.picture, SafePath)
        place = "work" if claim.picture else "done"
        description = {
            "claim": label,
            "waits": claim.below(prompt or claim.picture or ""),
            "picture": [place, job.picture.below(self._layout.folders[place])],
            "id": job.id,
            "name": job.name,
            "prompts": parser.as_document(job.prompts),
        }
        write_whole(folder / _OPEN, json.dumps(description).encode())
        return replace(job, scratch=folder)

    def progress(self, outer: SafePath) -> Callable[[], None] | None:
        """Return a call that resets the progress of a claim; None where there is none.

        Progress is a tile that was finished since the last reset. `outer`: the claim's outer
        folder. Raises OSError.
        """
        try:
            names = self._root.names()
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return None
        prefix = f"{_key(self._label(outer))}-"
        candidates = [self._root / name / ADVANCED for name in names if name.startswith(prefix)]
        marks = [mark for mark in candidates if exists(mark)]

        def reset() -> None:
            for mark in marks:
                mark.unlink(missing_ok=True)

        return reset if marks else None

    @staticmethod
    def remove(job: Job) -> None:
        """Remove the folder of a job that was answered or rejected."""
        if job.scratch:
            _remove(job.scratch)

    # ── help with mosaics, also of other daemons ──

    def helper_jobs(
        self, device_count: int, is_ours: Callable[[SafePath], bool], *, only_ours: bool = False
    ) -> list[Job]:
        """Return a helper job for each mosaic that more of this daemon's devices can work on.

        At most `device_count` devices work on one mosaic, and as many helper jobs run at a time.
        `is_ours` returns whether the claim with this outer folder is active here; with `only_ours`,
        other mosaics are left out. Raises OSError.
        """
        now = time.monotonic()
        jobs: list[Job] = []
        if not device_count or now - self._last_search < LOOK_S:
            return jobs
        self._last_search = now
        for folder in self._folders():
            description = self._read_open(folder)
            with self._lock:
                help_here = self._help.get(folder, _Help())
                active_here, not_before = help_here.active, help_here.not_before
                places = device_count - sum(each.active for each in self._help.values())
            if description is None or not_before > now or places <= 0:
                continue
            ours = is_ours(self._layout.work / description.claim)
            if active_here + ours >= device_count or (only_ours and not ours):
                continue
            job = self._helper_job(folder, description)
            if job:
                with self._lock:
                    record = self._help.setdefault(folder, _Help())
                    record.active += 1
                    record.started = now
                logger.debug("helps with the tiles of {}", shown(job.id))
                jobs.append(job)
        return jobs

    def helper_ended(self, job: Job) -> None:
        """Note that a helper job has ended: no tiles are left, or the daemon stops."""
        assert job.scratch
        now = time.monotonic()
        with self._lock:
            record = self._help.setdefault(job.scratch, _Help())
            record.active -= 1
            pause_s = _FIRST_PAUSE_S
            if now - record.started < _SHORT_S:
                pause_s = max(pause_s, 2 * record.pause_s)
            record.pause_s = min(pause_s, _LONGEST_PAUSE_S)
            record.not_before = now + record.pause_s

    def _helper_job(self, folder: SafePath, description: _OpenMosaic) -> Job | None:
        try:
            place, below = description.picture
            picture = self._layout.folders[place] / below
            prompts = parser.parse(json.dumps(description.prompts).encode()).prompts
        except (PromptError, ValueError, KeyError, TypeError, RecursionError):  # a newer version's
            return None
        if not isinstance(prompts, Mosaic) or file_signature(picture) is None:
            return None
        return Job(
            description.id, description.name, picture, prompts, scratch=folder, is_helper=True
        )

    # ── cleanup ──

    def sweep(self, listing: WorkListing, now: float, after_s: float) -> None:
        """Remove folders that nothing in `in/` and `work/` has needed for `after_s` seconds.

        `now`: monotonic. Raises OSError.
        """
        claims = {self._label(entry.outer) for entry in listing.claims}
        unneeded: dict[SafePath, float] = {}
        folders = self._folders()
        for folder in folders:
            description = self._read_open(folder)
            if description and (description.claim in claims or self._is_in_input(description.file)):
                continue
            unneeded[folder] = self._unneeded_since.get(folder, now)
            if now - unneeded[folder] > after_s:
                _remove(folder)
        self._unneeded_since = unneeded
        with self._lock:
            for folder, record in list(self._help.items()):
                if not record.active and folder not in folders:
                    del self._help[folder]

    def _is_in_input(self, rel: str) -> bool:
        try:
            return exists(self._layout.input / rel)
        except PermissionError:  # unknown, so the folder is kept
            return True

    def _folders(self) -> list[SafePath]:
        try:
            return sorted(self._root / name for name in self._root.names())
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return []

    def _read_open(self, folder: SafePath) -> _OpenMosaic | None:
        """Return the content of a folder's `open.json`; None where it is missing or malformed."""
        try:
            body = read_json(folder / _OPEN, _MAX_OPEN_BYTES)
        except ValueError:
            return None
        except OSError as error:
            if error.errno in NO_FILE or isinstance(error, FileNotFoundError):
                return None
            raise
        if not isinstance(body, dict) or not {"picture", "prompts"} <= body.keys():
            return None
        claim, file = body.get("claim"), body.get("waits")
        identity, name = body.get("id"), body.get("name")
        if not (
            isinstance(claim, str)
            and isinstance(file, str)
            and isinstance(identity, str)
            and isinstance(name, str)
        ):
            return None
        try:
            _ = self._layout.work / claim
            _ = self._layout.input / file
        except ValueError:  # a path that leads out of the folder
            return None
        return _OpenMosaic(
            claim, file, identity, name, picture=body["picture"], prompts=body["prompts"]
        )

    def _label(self, outer: SafePath) -> str:
        return outer.below(self._layout.work)


def _remove(folder: SafePath) -> None:
    """Remove a mosaic's folder as far as possible; the next sweep removes the rest."""
    with contextlib.suppress(OSError):
        folder.remove_tree()


def _key(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]
