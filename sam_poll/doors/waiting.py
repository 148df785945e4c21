"""What waits in `in/` without a partner, and why: said once in the log by a daemon, and counted for who asks.

What can still go wrong here: of very many only the first are explained, and only so many prompts are read for the
picture that their text names; a prompt behind these counts as one without picture although its text may name one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from loguru import logger

from sam_poll import prompts
from sam_poll.doors.claims import listing
from sam_poll.doors.finished import Finished
from sam_poll.doors.layout import Layout, prompt_bytes
from sam_poll.doors.looks import NEVER
from sam_poll.doors.names import Names
from sam_poll.doors.partners import Partners
from sam_poll.doors.settle import Index
from sam_poll.errors import InputError, PromptError

REPORT_AFTER_S = 30.0  # who drops a pair by hand has dropped both by then
_MOST = 20
_MOST_READ = 1000
_REST = 20.0  # going through the names is followed by so many times its own length without


@dataclass
class Waiting:
    """Pictures and prompts in `in/` without a partner: their numbers, and explanations by path, prompts first.

    `explained` may have fewer entries than the numbers say. `any_picture`: whether `in/` has any file that may be meant
    as a picture.
    """

    pictures: int = 0
    prompts: int = 0
    explained: dict[str, InputError] = field(default_factory=dict)
    any_picture: bool = False

    def __bool__(self) -> bool:
        return self.pictures + self.prompts > 0


def without_partner(layout: Layout, *, most: int = _MOST) -> Waiting:
    """Find the pictures and prompts in `in/` that have no partner there, in `work/`, or (prompts only) in `done/`.

    Prompts that will be refused for another reason are left out. `Waiting.explained` gets at most `most` entries.
    Raises OSError where a folder cannot be read.
    """
    names = Names(layout, keep=False)
    names.look()
    at_work = [found.label for found in listing(layout.work).claims] if layout.work.is_dir() else []
    index = Index(itertools.chain(names.pictures, at_work))
    spoken_for: set[str] = set()
    lone: list[str] = []
    for prompt in names.prompts:
        picture = index.find(prompt)
        if isinstance(picture, str):
            spoken_for.add(picture)
        elif not picture and not layout.is_annotations(prompt):
            lone.append(prompt)
    partners = Partners(names, layout, index)
    waiting = Waiting(any_picture=partners.has_pictures())
    lone.sort()
    finished = Finished(layout)
    for prompt in lone[:_MOST_READ]:
        try:
            image = prompts.parse(prompt_bytes(layout.input / prompt, prompts.MAX_BYTES)).image
        except (PromptError, OSError):
            continue  # that is another trouble, and told where the prompt is read
        picture = index.named(prompt, image) if image else None
        if picture:
            spoken_for.add(picture)
        elif not finished.find(prompt, image):
            waiting.prompts += 1
            if len(waiting.explained) < most:
                waiting.explained[prompt] = partners.explain_prompt(prompt, image)
    waiting.prompts += max(0, len(lone) - _MOST_READ)
    alone = names.pictures - spoken_for
    waiting.pictures = len(alone)
    left = most - len(waiting.explained)
    waiting.explained.update(itertools.islice(partners.explain_pictures(alone), max(0, left)))
    return waiting


class Notices:
    """Log warnings about files that have waited without a partner, one for each file. Used by the scan's thread."""

    def __init__(self, names: Names, layout: Layout, clock: Callable[[], float] = time.monotonic) -> None:
        self._names, self._layout, self._clock = names, layout, clock
        self._reported: set[str] = set()
        self._prompts_at = self._pictures_at = 0.0

    def reported(self, path: str) -> bool:
        """Return whether a file has been reported."""
        return path in self._reported

    def forget_all_but(self, paths: Collection[str]) -> None:
        """Drop what is no longer there."""
        self._reported.intersection_update(paths)

    def report_prompts(self, index: Index, lone: Mapping[str, str | None]) -> float:
        """Log why these prompts have no picture; `lone` gives the picture that each prompt's text names.

        Calls are limited in rate, because each one goes through all names. Returns the time, by the clock, at which to
        call again for the prompts that were not reported now; `NEVER` if all were.
        """
        started = self._clock()
        if not lone:
            return NEVER
        if started < self._prompts_at:
            return self._prompts_at
        self._reported.update(lone)
        partners = Partners(self._names, self._layout, index)
        for prompt, image in itertools.islice(lone.items(), _MOST):
            logger.warning("{}", partners.explain_prompt(prompt, image))
        if len(lone) > _MOST:
            logger.warning("{} more prompts wait for their pictures; `sam-poll status` says more", len(lone) - _MOST)
        self._prompts_at = started + _REST * (self._clock() - started)
        return NEVER

    def report_pictures(
        self, index: Index, spoken_for: Callable[[], Collection[str]], since: Mapping[str, float]
    ) -> float:
        """Log which pictures without a prompt have a file beside them that may be meant as one.

        `spoken_for` returns the pictures that have a prompt; `since` gives the time at which each file was first seen.
        Returns the time at which to call again, or `NEVER`.
        """
        started = self._clock()
        if not any(self._names.others()):
            return NEVER
        if started < self._pictures_at:
            return self._pictures_at
        fresh: list[InputError] = []
        again = NEVER
        lone = self._names.pictures.difference(spoken_for())
        for picture, error in Partners(self._names, self._layout, index).explain_pictures(lone):
            if picture in self._reported:
                continue
            if started - since[picture] < REPORT_AFTER_S:
                again = min(again, since[picture] + REPORT_AFTER_S)
                continue
            self._reported.add(picture)
            fresh.append(error)
        for error in fresh[:_MOST]:
            logger.warning("{}", error)
        if len(fresh) > _MOST:
            logger.warning("{} more pictures have a file beside them that is no prompt", len(fresh) - _MOST)
        self._pictures_at = started + max(1.0, _REST * (self._clock() - started))
        return max(again, self._pictures_at)
