"""Files that wait in `in/` without a partner, and why: for the log, and for `sam-poll status`.

Limitations: of very many files only the first are explained. Only the first prompts are read for
the picture that their text names (`_MOST_READ` of those whose name is no picture's,
`_MOST_PAIRED_READ` of the others); of those after them only the names count.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from loguru import logger

from sam_poll.core.errors import InputError, PromptError
from sam_poll.prompts import parser as prompts
from sam_poll.share.claims.model import list_work
from sam_poll.share.intake.directory_index import DirectoryIndex
from sam_poll.share.intake.done_lookup import DoneLookup
from sam_poll.share.intake.near_names import PartnerExplainer
from sam_poll.share.intake.pairing import PictureIndex
from sam_poll.share.intake.stat_cache import NEVER
from sam_poll.share.layout import Layout, prompt_bytes

REPORT_AFTER_S = 30.0
"""Seconds after which a file is reported: a pair dropped by hand is complete by then."""

_MOST = 20  # so many files are explained
_MOST_READ = 1000
_MOST_PAIRED_READ = 200
_REST = 20.0  # pause after going through the names, as a multiple of the time that it took


@dataclass
class Waiting:
    """The numbers of pictures and prompts in `in/` without a partner, and explanations.

    `explained` has the reasons by path, prompts first; it may have fewer entries than the numbers
    say. `any_picture`: whether any file in `in/` may be meant as a picture. `paths` are the paths
    of these pictures and prompts, sorted.
    """

    pictures: int = 0
    prompts: int = 0
    paths: list[str] = field(default_factory=list)
    explained: dict[str, InputError] = field(default_factory=dict)
    any_picture: bool = False

    def __bool__(self) -> bool:
        return self.pictures + self.prompts > 0


def without_partner(layout: Layout, *, most: int = _MOST) -> Waiting:
    """Find the pictures and prompts in `in/` that have no partner.

    A partner may be in `in/`, in `work/`, or (of a prompt only) in `done/`. Prompts that will be
    rejected for another reason are left out. `Waiting.explained` gets at most `most` entries.

    Raises OSError where a folder cannot be read.
    """
    names = DirectoryIndex(layout, keep=False)
    names.refresh()
    claimed: list[str] = []
    if layout.work.is_dir():
        claimed = [entry.label for entry in list_work(layout.work).claims]
    index = PictureIndex(itertools.chain(names.pictures, claimed))
    by_name: dict[str, str] = {}
    lone: list[str] = []
    for prompt in names.prompts:
        picture = index.find(prompt)
        if isinstance(picture, str):
            by_name[prompt] = picture
        elif not picture and not layout.is_annotations(prompt):
            lone.append(prompt)
    partners = PartnerExplainer(names, layout, index)
    waiting = Waiting(any_picture=partners.has_pictures())
    lone.sort()
    done = DoneLookup(layout)
    paired = sorted(by_name)
    with_prompt = {by_name[prompt] for prompt in paired[_MOST_PAIRED_READ:]}
    for prompt in itertools.chain(lone[:_MOST_READ], paired[:_MOST_PAIRED_READ]):
        picture = by_name.get(prompt)
        try:
            body = prompt_bytes(layout.input / prompt, prompts.MAX_BYTES)
            image = prompts.parse(body, mask_files=True).image
        except (PromptError, OSError):  # another problem, reported where the prompt is read
            with_prompt.update({picture} if picture else ())
            continue
        if image:
            picture = index.named(prompt, image)
        if picture:
            with_prompt.add(picture)
        elif not done.find(prompt, image):
            waiting.prompts += 1
            waiting.paths.append(prompt)
            if len(waiting.explained) < most:
                waiting.explained[prompt] = partners.explain_prompt(prompt, image)
    waiting.prompts += max(0, len(lone) - _MOST_READ)
    waiting.paths += lone[_MOST_READ:]
    alone = names.pictures - with_prompt
    waiting.paths = sorted([*waiting.paths, *alone])
    waiting.pictures = len(alone)
    left = most - len(waiting.explained)
    waiting.explained.update(itertools.islice(partners.explain_pictures(alone), max(0, left)))
    return waiting


class WaitingReporter:
    """Logs a warning for each file that has waited without a partner. Used by the scan's thread."""

    def __init__(
        self, names: DirectoryIndex, layout: Layout, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._names = names
        self._layout = layout
        self._clock = clock
        self._reported: set[str] = set()
        self._next_prompts = 0.0
        self._next_pictures = 0.0

    def reported(self, path: str) -> bool:
        """Return whether a file has been reported."""
        return path in self._reported

    def forget_all_but(self, paths: Collection[str]) -> None:
        """Forget files that are gone."""
        self._reported.intersection_update(paths)

    def report_prompts(self, index: PictureIndex, lone: Mapping[str, str | None]) -> float:
        """Log why these prompts have no picture.

        `lone` gives the picture that each prompt's text names. The rate of calls is limited,
        because each goes through all names. Returns the time, by the clock, at which to call again
        for the prompts that were not reported now; `NEVER` if all were.
        """
        started = self._clock()
        if not lone:
            return NEVER
        if started < self._next_prompts:
            return self._next_prompts
        self._reported.update(lone)
        partners = PartnerExplainer(self._names, self._layout, index)
        for prompt, image in itertools.islice(lone.items(), _MOST):
            logger.warning("{}", partners.explain_prompt(prompt, image))
        if len(lone) > _MOST:
            logger.warning(
                "{} more prompts wait for their pictures; `sam-poll status` says more",
                len(lone) - _MOST,
            )
        self._next_prompts = started + _REST * (self._clock() - started)
        return NEVER

    def report_pictures(
        self,
        index: PictureIndex,
        with_prompt: Callable[[], Collection[str]],
        since: Mapping[str, float],
    ) -> float:
        """Log which pictures without a prompt have a file beside them that may be meant as one.

        `with_prompt` returns the pictures that have a prompt. `since` gives the time at which each
        file was first seen. Returns the time at which to call again, or `NEVER`.
        """
        started = self._clock()
        if not (self._names.masks or any(self._names.others())):
            return NEVER
        if started < self._next_pictures:
            return self._next_pictures
        fresh: list[InputError] = []
        again = NEVER
        lone = self._names.pictures.difference(with_prompt())
        for picture, error in PartnerExplainer(self._names, self._layout, index).explain_pictures(
            lone
        ):
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
            logger.warning(
                "{} more pictures have a file beside them that is no prompt", len(fresh) - _MOST
            )
        self._next_pictures = started + max(1.0, _REST * (self._clock() - started))
        return max(again, self._next_pictures)
