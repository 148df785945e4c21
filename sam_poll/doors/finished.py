"""Pictures that lie in `done/`, and which prompts that wait alone they are for.

What can still go wrong here: a picture is looked for by the endings that pictures usually have, small and large;
`Dog.Jpg` in `done/` is found by a prompt that names it, not by its stem.
"""

from __future__ import annotations

import itertools
import os
import time
import unicodedata
from collections.abc import Callable

from sam_poll.doors.layout import Layout
from sam_poll.doors.looks import NEVER, look
from sam_poll.doors.names import Unchanged
from sam_poll.doors.settle import composed, stems
from sam_poll.fs import NOT_THERE, with_suffix
from sam_poll.images import ENDINGS
from sam_poll.safe_path import SafePath

_FEW = 64  # so many prompts are looked up one by one; for more of them the folder is listed once
_REST = 10.0  # a listing of a folder in done/ is followed by so many times its own length without one


class _Asked:
    """One folder of `done/`: which prompts have found nothing in it, and since when that is known."""

    __slots__ = ("not_before", "prompts", "unchanged")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.unchanged = Unchanged(clock)
        self.prompts: set[str] = set()
        self.not_before = 0.0


class Finished:
    """Finds the pictures of prompts that wait alone. Used by one thread."""

    def __init__(self, layout: Layout, clock: Callable[[], float] = time.monotonic) -> None:
        self._layout, self._clock = layout, clock
        self._asked: dict[str, _Asked] = {}

    def find(self, prompt: str, image: str | None) -> tuple[str, str] | None:
        """The picture in `done/` that a lone prompt means: its path as in `in/`, and the suffix of the newest one."""
        folder = os.path.dirname(prompt)
        plain = [image] if image else [name for stem in stems(prompt) for name in (stem, *spellings(stem))]
        names = [form for name in plain for form in _forms(name)]
        for name in names:
            path = os.path.join(folder, name)
            if self._layout.is_picture(name) and look(self._layout.done / path):
                return path, self._newest(path)
        return None

    def _newest(self, picture: str) -> str:
        """The suffix of the last picture of this name in `done/`: the one a prompt without picture means."""
        numbers = itertools.takewhile(
            lambda n: look(with_suffix(self._layout.done / picture, f"~{n}")), itertools.count(2)
        )
        return max((f"~{n}" for n in numbers), key=lambda suffix: int(suffix[1:]), default="")

    def forget(self, prompt: str) -> None:
        """A prompt has changed, and may mean another picture now."""
        for asked in self._asked.values():
            asked.prompts.discard(prompt)

    def stirred(self) -> bool:
        """Whether something may have come to `done/` where prompts have looked in vain."""
        now = self._clock()
        return any(
            now >= asked.not_before and not asked.unchanged.holds(self._where(folder))
            for folder, asked in self._asked.items()
        )

    def worth_asking(self, waiting: dict[str, dict[str, str | None]]) -> tuple[list[str], float]:
        """Of all prompts that wait alone (by folder, with the picture they name) those to be looked up now, and when to
        ask again at the latest for what was not looked at now (`NEVER`: all were)."""
        self._asked = {folder: asked for folder, asked in self._asked.items() if folder in waiting}
        chosen: list[str] = []
        again = NEVER
        for folder, prompts in waiting.items():
            asked = self._asked.setdefault(folder, _Asked(self._clock))
            started = self._clock()
            if started < asked.not_before:
                again = min(again, asked.not_before)
                continue
            where = self._where(folder)
            fresh = list(prompts)
            if asked.unchanged.holds(where):
                fresh = [prompt for prompt in prompts if prompt not in asked.prompts]
            else:
                asked.unchanged.begin(where)
            if len(fresh) > _FEW:
                fresh = self._listed(where, {prompt: prompts[prompt] for prompt in fresh})
                asked.not_before = started + (1 + _REST) * (self._clock() - started)
            asked.prompts = set(prompts)
            chosen += fresh
        return chosen, again

    def _where(self, folder: str) -> SafePath:
        return self._layout.done / folder

    @staticmethod
    def _listed(where: SafePath, prompts: dict[str, str | None]) -> list[str]:
        """Those of the prompts for which a picture of a fitting name may lie in a folder."""
        wanted: dict[str, list[str]] = {}
        for prompt, image in prompts.items():
            for stem in [os.path.splitext(image)[0]] if image else stems(prompt):
                wanted.setdefault(composed(stem), []).append(prompt)
        found: dict[str, None] = {}
        try:
            with where.scandir() as entries:
                for entry in entries:
                    name = entry.name
                    for stem in (name, name[: name.rfind(".")]):
                        if not stem.isascii():
                            stem = composed(stem)
                        if stem in wanted:
                            found.update(dict.fromkeys(wanted[stem]))
        except OSError as error:
            if error.errno not in NOT_THERE and not isinstance(error, PermissionError):
                raise
        return list(found)


def _forms(name: str) -> list[str]:
    """A name, and those that look the same."""
    if name.isascii():
        return [name]
    return list(dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))))


def spellings(stem: str) -> list[str]:
    """The names a picture with this stem usually has: every ending, small and large."""
    return [stem + e for ending in sorted(ENDINGS) for e in (ending, ending.upper())]
