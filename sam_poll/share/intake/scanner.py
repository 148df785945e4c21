"""The scanner: finds the jobs in `in/` that are ready to be claimed, and says when to scan again.

A scan takes the names first, and looks only at files that could make a job. It moves nothing.
Each step of it is a class of its own, and `Scanner.scan` has their order:

- `Watcher`: events, which start a scan early. `DirectoryIndex`: the names. `StatCache`: the files.
- `Inventory`: since when each file has been there. `DeferredJobs`, `PathHolds`: what waits.
- `PairTable`: which picture each prompt is for. `PromptTexts`: what the prompts' texts say of it.
- `ReadyPairs`, `LonePictures`, `LonePrompts`: what is ready. `Offers`: the result.
- `NextScan`: when the next scan is due. All of them add to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

from loguru import logger

from sam_poll.core.errors import InputError, PromptError, SamPollError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.prompts import parser
from sam_poll.share.claims.deferrals import Deferral
from sam_poll.share.folder_options import LONE_S as LONE_S
from sam_poll.share.folder_options import FolderOptions as FolderOptions
from sam_poll.share.intake.deferred_jobs import DeferredJobs
from sam_poll.share.intake.directory_index import TRUTH_S, DirectoryIndex
from sam_poll.share.intake.done_lookup import DoneLookup
from sam_poll.share.intake.events import Watcher
from sam_poll.share.intake.inventory import Inventory
from sam_poll.share.intake.lone_pictures import LonePictures
from sam_poll.share.intake.lone_prompts import LonePrompts
from sam_poll.share.intake.next_scan import NextScan
from sam_poll.share.intake.offers import Offers
from sam_poll.share.intake.pair_table import PairTable
from sam_poll.share.intake.prompt_texts import PromptTexts
from sam_poll.share.intake.ready_pairs import ReadyPairs
from sam_poll.share.intake.stability import Signature
from sam_poll.share.intake.stat_cache import NEVER, StatCache
from sam_poll.share.intake.waiting import WaitingReporter
from sam_poll.share.layout import Layout
from sam_poll.share.path_holds import PathHolds
from sam_poll.share.pending_job import PendingJob as PendingJob
from sam_poll.share.pending_job import by_picture as by_picture

_BUDGET_S = 0.15  # a scan looks at files for so long; the next scan looks at the others
_PRESCAN_BUDGET_S = 0.1  # a model is loaded at the same time, and the first job waits for that
_RECHECK_S = 0.001  # polling: lone prompts are looked at again after so long for each of them


class Scanner:
    """Finds the jobs that are ready. Used by one thread, except `hold` and the watcher's events."""

    def __init__(
        self,
        layout: Layout,
        options: FolderOptions,
        wake: threading.Event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wake` is set when something has happened that is a reason to scan."""
        self._layout = layout
        self._options = options
        self._clock = clock
        self._next_scan = NextScan(once=options.once)
        self._files = StatCache(layout, options.settle_s, clock, changed=self._file_changed)
        self._watcher = Watcher(layout.input.path, wake, self._files.note_event)
        # Where other machines write, a folder's times may not be those of its last change.
        self._names = DirectoryIndex(layout, keep=options.mode == "events", clock=clock)
        self._inventory = Inventory(layout, self._names)
        self._deferred = DeferredJobs(self._files, self._next_scan, options.patience)
        self.path_holds = PathHolds(layout, once=options.once)
        """Paths that cannot be claimed now; they are not offered."""
        self._pairs = PairTable(layout, self._names)
        self._texts = PromptTexts(
            layout, options, self._files, self._pairs, self._deferred, self._next_scan
        )
        self.finished = DoneLookup(layout, clock)
        """Pictures in `done/`."""
        self._notices = WaitingReporter(self._names, layout, clock)
        offers = Offers(self._names, self._files, self._deferred, self.path_holds)
        self._lone_pictures = LonePictures(
            options, self._names, self._files, self._inventory, offers, self._next_scan
        )
        self._ready_pairs = ReadyPairs(
            options,
            self._names,
            self._files,
            self._inventory,
            self._pairs,
            self._texts,
            offers,
            self._lone_pictures,
            self._next_scan,
        )
        self._lone_prompts = LonePrompts(
            layout,
            options,
            self._files,
            self._inventory,
            self._pairs,
            self._texts,
            offers,
            self.finished,
            self._notices,
            self._next_scan,
        )
        self._watched: set[Path] = set()
        self._closed: set[str] = set()
        self._prescanned: float | None = None
        self._idle = False
        self._recheck_at = 0.0
        self.oldest_s = 0.0
        """Seconds for which the oldest picture or prompt had been there at the last scan."""
        self.scans = 0
        """How often `in/` has been scanned."""
        self.last = 0.0
        """When it was last scanned, wall-clock time; for people."""

    # ── state ──

    @property
    def due(self) -> float:
        """When to scan again at the latest, by the monotonic clock."""
        return self._next_scan.due

    @due.setter
    def due(self, due: float) -> None:
        self._next_scan.due = due

    @property
    def waiting(self) -> int:
        """Return the number of pictures and prompts in `in/` at the last scan."""
        return self._inventory.count

    @property
    def siblings(self) -> dict[str, list[PendingJob]]:
        """Return the settled prompts of pictures that other daemons have claimed, by picture."""
        return self._ready_pairs.siblings

    @property
    def spreading(self) -> bool:
        """Whether annotation files in `work/`, of any daemon, are becoming prompts.

        To be set by `elsewhere` of `scan`.
        """
        return self._lone_pictures.spreading

    @spreading.setter
    def spreading(self, spreading: bool) -> None:
        self._lone_pictures.spreading = spreading

    @property
    def closed(self) -> set[str]:
        """Return the folders below `in/` that, or whose files, may not be read."""
        return self._names.closed | (self._files.closed & self._names.below)

    def close(self) -> None:
        """End the watcher's threads for good; another thread may still be in a scan that hangs."""
        self._watcher.end()

    def renew(self) -> None:
        """Watch and list everything again, after the folder was away."""
        self._watcher.close()
        self._names.forget()
        self._prescanned = None
        self._watched = set()

    # ── scanning ──

    def prescan(self) -> None:
        """Scan before the first `scan`, so that files settle from now on. Raises OSError.

        Nothing is offered. The first scan after it does not list `in/` again if this one is younger
        than `rescan_s`, and is followed by another at once: where very many files wait, the first
        job is not to wait for a second listing.
        """
        now = self._clock()
        self._scan(now, [], tuple, prescan=True)
        self._prescanned, self._idle = now, False
        self._lone_pictures.wait_for_listing()

    def scan(
        self,
        now: float,
        at_work: Collection[str],
        elsewhere: Callable[[], Collection[str]] = tuple,
    ) -> list[PendingJob]:
        """Return the jobs that are ready, the oldest first.

        `at_work`: pictures that this daemon has claimed, which further prompts may join.
        `elsewhere` returns those that other daemons have claimed, whose further prompts wait until
        these are done. It is called after `in/` has been listed: files go from there to `work/`, so
        looking in the same order misses none.

        Of a crowd, `_MANY` pictures are offered at a time, the oldest of those that were looked at,
        and the next scan is due at once. Files are looked at in the order of the listing, for
        `_BUDGET_S` or half the time of listing. Where nothing can have become ready since the last
        scan, its files are not gone through again.

        Raises OSError when `in/` itself cannot be read.
        """
        return self._scan(now, at_work, elsewhere)

    def _scan(
        self,
        now: float,
        at_work: Collection[str],
        elsewhere: Callable[[], Collection[str]],
        *,
        prescan: bool = False,
    ) -> list[PendingJob]:
        """Scan; a `prescan` looks only at as many files as its time permits."""
        if self._options.mode == "events" and not self._watched:
            # Watch before listing, so that no file comes unnoticed between the two.
            self._watcher.watch({self._layout.input.path})
        # Take in events before listing. One that comes during the listing may be of a file that the
        # listing has missed, and must not be forgotten with the files that are gone; it has also
        # set `wake`, so that the next scan is near.
        stirred = (
            self._deferred.take_in() | self._files.take_events() | self.path_holds.refresh(now)
        )
        believed = self._prescanned is not None and now - self._prescanned < self._options.rescan_s
        changed, due = self._names_changed(now, believed=believed, prescan=prescan)
        in_work = frozenset((*at_work, *elsewhere()))
        self.scans += 1
        self.last = time.time()
        if changed:
            self._forget_gone(now)
        self.oldest_s = self._inventory.oldest_s(now)
        moved = in_work != self._pairs.in_work
        if not (changed or stirred or moved) and self._may_rest(now):
            return []
        if changed or moved:
            self._pairs.update(in_work)
        self._next_scan.due = due
        self._recheck(now)
        if prescan:
            self._pairs.limit(self._files)
        ready = self._ready_pairs.find(now, set(at_work)) + self._lone_prompts.find(now)
        ready.sort(key=lambda job: job.age)
        if not (prescan or self._options.once):
            self._report_pictures()
        self._next_scan.no_later_than(now if self._files.out_of_time else self._files.soonest)
        self._idle = not ready
        if believed:
            self._pairs.invalidate()  # the table may have been limited
        return ready

    def _names_changed(self, now: float, *, believed: bool, prescan: bool) -> tuple[bool, float]:
        """List `in/`, unless the prescan's listing is believed, and begin the time for files.

        Returns whether names have changed, and when to list again at the latest.
        """
        started = self._clock()
        if believed:
            changed = False
            due = now
            budget_s = 0.0  # the first job comes first
        else:
            changed, due = self._list(now)
            least_s = _PRESCAN_BUDGET_S if prescan else _BUDGET_S
            budget_s = max(least_s, (self._clock() - started) / 2)
            if self._prescanned is not None:
                self._pairs.invalidate()
        self._prescanned = None
        self._files.begin(budget_s)
        return changed, due

    def _may_rest(self, now: float) -> bool:
        """Return whether going through the files again would find nothing, with the same names."""
        nothing_due = self._idle and not self._deferred and now < min(self.due, self._recheck_at)
        return nothing_due and not self.finished.may_have_new()

    def _list(self, now: float) -> tuple[bool, float]:
        """Return whether names have changed, and when to list again at the latest."""
        changed, due = self._names.refresh(), NEVER
        closed = self.closed
        for folder in closed - self._closed:
            logger.warning(
                "{} is not readable: its contents wait", shown(self._layout.input / folder)
            )
        self._closed = closed
        root = self._layout.input.path
        folders = {root, *(root / folder for folder in self._names.below)}
        if self._options.mode == "events" and (folders != self._watched or self._watcher.stale):
            if folders - self._watched - {root} or self._watcher.stale:
                # What came between the listing and the new watch is found by one more listing.
                due, changed = now, True
            self._watcher.watch(folders)
            self._watched = folders
        return changed, due

    def _forget_gone(self, now: float) -> None:
        """Take over the names, and forget what is known about files that are gone."""
        seen = self._inventory.update(now)
        self._files.forget_all_but(seen | self._names.masks)
        self._pairs.forget_all_but(seen)
        self._notices.forget_all_but(seen)

    def _recheck(self, now: float) -> None:
        """Choose files to look at again.

        These are the files of deferred jobs, and from time to time all lone prompts: they are not
        claimed, so that nothing else looks at them.
        """
        self._deferred.forget_all_but(self._inventory.first_seen, now)
        self._files.doubt(self._deferred.files())
        if now < self._recheck_at:
            return
        lone = self._pairs.read_without_picture()
        self._files.doubt(lone)
        rest_s = TRUTH_S
        if self._options.mode != "events":
            rest_s = max(self._options.rescan_s, len(lone) * _RECHECK_S)
        self._recheck_at = now + rest_s

    def _report_pictures(self) -> None:
        again = self._notices.report_pictures(
            self._pairs.index, self._pairs.pictures_with_prompt, self._inventory.first_seen
        )
        self._next_scan.no_later_than(again)

    def _file_changed(self, path: str) -> None:
        """Forget what was read from a prompt that has changed since."""
        if self._pairs.unlearn(path):
            self._next_scan.at_once()
            self.finished.forget(path)

    # ── for those who claim the jobs ──

    def still(self, ready: PendingJob) -> bool:
        """Return whether a job's files are as they were when it was offered. Raises OSError.

        What has changed must settle again.
        """
        changed = self._files.changed(ready.signatures)
        for path in changed:
            self._next_scan.no_later_than(self._clock() + max(0.0, self._files.left(path)))
        return not changed

    def read(self, prompt: SafePath) -> parser.PromptFile:
        """Read and parse a prompt file. Raises PromptError, OSError."""
        return self._texts.read(prompt)

    def learn(self, prompt: str, image: str | None) -> None:
        """Note which picture a prompt's text names; if any, the next scan is due at once."""
        self._texts.learn(prompt, image)

    def shares_stem(self, picture: str) -> bool:
        """Return whether at the last scan another picture had this one's stem.

        Pictures in `in/` and `work/` count.
        """
        return self._pairs.index.shares_stem(picture)

    def no_prompt_fault(self, picture: str) -> InputError | None:
        """Return the error for a picture without a prompt; None: segment everything in it."""
        return self._lone_pictures.error(picture)

    def hold(
        self,
        job: str,
        signatures: dict[str, Signature],
        seconds: float,
        error: SamPollError | None = None,
    ) -> None:
        """Defer a job (its prompt, or a picture without one). See `Deferral`. From any thread."""
        self._deferred.add(Deferral(job, signatures, seconds, error))

    def file_in_input(self, path: str) -> tuple[Signature | None, bool]:
        """Return a file's signature as it is now, None where there is none, and if it has settled.

        For files that are neither pictures nor prompts. Raises OSError.
        """
        signature = self._files.refresh(path)
        return signature, signature is not None and self._files.left(path) <= 0

    def hold_until_there(
        self,
        prompt: str,
        signatures: dict[str, Signature],
        awaited: Collection[Collection[str]],
        error: SamPollError,
    ) -> None:
        """Defer a prompt until files have come; see `DeferredJobs.add_awaiting`."""
        self._deferred.add_awaiting(prompt, signatures, awaited, error)

    def hold_unread(self, prompt: str, signatures: dict[str, Signature], trouble: OSError) -> None:
        """Defer a prompt that could not be read; see `DeferredJobs.add_unread`."""
        self._deferred.add_unread(prompt, signatures, trouble)

    def hold_if_incomplete(
        self, prompt: str, signatures: dict[str, Signature], error: PromptError
    ) -> bool:
        """Defer a prompt that may be incomplete; see `DeferredJobs.add_if_incomplete`."""
        return self._deferred.add_if_incomplete(prompt, signatures, error)
