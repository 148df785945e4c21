"""Prompts in `in/` without a picture there: they wait for one, find it in `done/`, or are rejected.

Annotation files are offered here, too: they are prompts without a picture of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto

from sam_poll.core.errors import PromptError
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.done_lookup import DoneLookup
from sam_poll.share.intake.inventory import Inventory
from sam_poll.share.intake.near_names import ambiguous_error
from sam_poll.share.intake.next_scan import NextScan
from sam_poll.share.intake.offers import Offers
from sam_poll.share.intake.pair_table import PairTable
from sam_poll.share.intake.pairing import Ambiguous
from sam_poll.share.intake.prompt_texts import PromptTexts
from sam_poll.share.intake.stat_cache import NEVER, StatCache
from sam_poll.share.intake.waiting import REPORT_AFTER_S, WaitingReporter
from sam_poll.share.layout import Layout
from sam_poll.share.pending_job import PendingJob


class _Verdict(Enum):
    """What is to become of a prompt without a picture that is not rejected."""

    WAITS = auto()
    """It waits for its picture."""
    LATER = auto()
    """A later scan decides: its text could not be read yet, or has just named its picture."""


@dataclass(slots=True)
class _Waiting:
    """The prompts that have waited, by what is to be done; with the pictures that they name."""

    to_look_up: dict[str, dict[str, str | None]] = field(default_factory=dict)
    """By folder: prompts that may be for a picture in `done/`."""
    timed_out: list[str] = field(default_factory=list)
    """Prompts to reject, because no picture has come in time."""
    to_report: dict[str, str | None] = field(default_factory=dict)
    """Prompts to explain in the log."""


class LonePrompts:
    """Finds what may be claimed of the prompts without a picture. Used by one thread."""

    def __init__(
        self,
        layout: Layout,
        options: FolderOptions,
        files: StatCache,
        inventory: Inventory,
        pairs: PairTable,
        texts: PromptTexts,
        offers: Offers,
        done: DoneLookup,
        notices: WaitingReporter,
        next_scan: NextScan,
    ) -> None:
        self._layout = layout
        self._options = options
        self._files = files
        self._inventory = inventory
        self._pairs = pairs
        self._texts = texts
        self._offers, self._done = offers, done
        self._notices, self._next_scan = notices, next_scan
        self._report_after_s = max(REPORT_AFTER_S, 1.5 * options.lone_wait)

    def find(self, now: float) -> list[PendingJob]:
        """Return what may be claimed: to be answered on a picture in `done/`, or to be rejected."""
        ready: list[PendingJob] = []
        waiting = _Waiting()
        for prompt, match in self._pairs.pairs():
            if (
                isinstance(match, str)
                or not self._files.settled(prompt)
                or not self._offers.may_offer(prompt, now, prompt)
            ):
                continue
            if self._layout.is_annotations(prompt):
                ready.append(self._offers.prompt(prompt))
                continue
            verdict = self._examine(prompt, match, now)
            if verdict is _Verdict.WAITS:
                self._note_waiting(prompt, waiting, now)
            elif isinstance(verdict, PromptError):
                ready.append(self._offers.prompt(prompt, verdict))
        found_late = self._without_picture(waiting)
        self._report(waiting, found_late)
        return ready + found_late

    def _examine(self, prompt: str, match: Ambiguous | None, now: float) -> PromptError | _Verdict:
        """Return the error to reject a prompt with, or what becomes of it."""
        if not self._pairs.text_known(prompt):
            error = self._texts.learn_image(prompt)
            if error:
                return error
            if self._pairs.image_of(prompt) or not self._pairs.text_known(prompt):
                return _Verdict.LATER
        if match and not self._pairs.image_of(prompt):
            waited_s = now - self._inventory.first_seen[prompt]
            limit_s = self._options.partial_match_wait
            if prompt in self._pairs.index.partial and not self._next_scan.is_over(
                limit_s, waited_s, now
            ):
                return _Verdict.LATER
            return ambiguous_error(prompt, match)
        return _Verdict.WAITS

    def _note_waiting(self, prompt: str, waiting: _Waiting, now: float) -> None:
        """Note for which of its limits a prompt has waited long enough."""
        image, waited_s = self._pairs.image_of(prompt), now - self._inventory.first_seen[prompt]
        limit_s = self._options.pair_timeout_s
        is_over = self._next_scan.is_over
        if is_over(self._options.lone_wait, waited_s, now):
            waiting.to_look_up.setdefault(os.path.dirname(prompt), {})[prompt] = image
        if limit_s is not None and is_over(limit_s, waited_s, now):
            waiting.timed_out.append(prompt)
        if not (self._options.once or self._notices.reported(prompt)) and is_over(
            self._report_after_s, waited_s, now
        ):
            waiting.to_report[prompt] = image

    def _without_picture(self, waiting: _Waiting) -> list[PendingJob]:
        """Offer the prompts whose picture is in `done/`, and those for which none came in time."""
        ready: dict[str, PendingJob] = {}
        chosen, again = self._done.choose(waiting.to_look_up)
        self._next_scan.no_later_than(again)
        for prompt in chosen:
            image = waiting.to_look_up[os.path.dirname(prompt)][prompt]
            picture = self._done.find(prompt, image)
            if picture:
                # So that it is looked up, and offered, in each scan until it is claimed.
                self._done.forget(prompt)
                path, suffix = picture
                ready[prompt] = self._offers.pair(prompt, path, suffix)
        for prompt in waiting.timed_out if again == NEVER else ():
            if prompt not in ready:
                error = PromptError(
                    f"its picture did not come within {self._options.pair_timeout_s:g} s",
                    place=os.path.basename(prompt),
                    remedy="drop the picture, then `sam-poll retry`",
                )
                ready[prompt] = self._offers.prompt(prompt, error)
        return list(ready.values())

    def _report(self, waiting: _Waiting, found: Iterable[PendingJob]) -> None:
        """Log why the prompts that have waited long enough have no picture."""
        unmatched = waiting.to_report
        if unmatched:
            for job in found:
                unmatched.pop(job.prompt or "", None)
        self._next_scan.no_later_than(self._notices.report_prompts(self._pairs.index, unmatched))
