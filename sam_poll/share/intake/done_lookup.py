"""Pictures in `done/`, for prompts that have come without a picture.

Limitations: a picture is looked for with the endings that pictures usually have, in lower and upper
case. `Dog.Jpg` in `done/` is found by a prompt whose text names it, not by the prompt's stem.
"""

from __future__ import annotations

import itertools
import os
import time
import unicodedata
from collections.abc import Callable

from sam_poll.core.files import NOT_THERE, with_suffix
from sam_poll.core.safe_path import SafePath
from sam_poll.imaging.decode import ENDINGS
from sam_poll.share.intake.directory_index import DirectoryStamp
from sam_poll.share.intake.pairing import candidate_stems, nfc_path
from sam_poll.share.intake.stat_cache import NEVER, file_signature
from sam_poll.share.layout import Layout

_FEW = 64  # so many prompts are looked up one by one; for more the folder is listed once
_REST = 10.0  # pause after a listing of a folder in `done/`, as a multiple of the listing's length


class _Folder:
    """One folder of `done/`: the prompts that have found nothing in it, and since when."""

    __slots__ = ("not_before", "prompts", "unchanged")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.unchanged = DirectoryStamp(clock)
        self.prompts: set[str] = set()
        self.not_before = 0.0


class DoneLookup:
    """Finds the pictures of lone prompts in `done/`. Used by one thread."""

    def __init__(self, layout: Layout, clock: Callable[[], float] = time.monotonic) -> None:
        self._layout, self._clock = layout, clock
        self._folders: dict[str, _Folder] = {}

    def find(self, prompt: str, image: str | None) -> tuple[str, str] | None:
        """Return the picture in `done/` that a prompt is for.

        `image` is the picture that the prompt's text names, if it names one. Returns the picture's
        path as it was in `in/`, and the suffix of the newest picture of that name in `done/`; None
        where there is none. Raises OSError.
        """
        folder = os.path.dirname(prompt)
        if image:
            plain = [image]
        else:
            plain = [
                name for stem in candidate_stems(prompt) for name in (stem, *usual_names(stem))
            ]
        for name in (form for one in plain for form in _forms(one)):
            path = os.path.join(folder, name)
            if self._layout.is_picture(name) and file_signature(self._layout.done / path):
                return path, self._newest(path)
        return None

    def _newest(self, picture: str) -> str:
        """Return the suffix of the last picture of this name: the one that a prompt alone means."""
        numbers = itertools.takewhile(
            lambda n: file_signature(with_suffix(self._layout.done / picture, f"~{n}")),
            itertools.count(2),
        )
        return max((f"~{n}" for n in numbers), key=lambda suffix: int(suffix[1:]), default="")

    def forget(self, prompt: str) -> None:
        """Forget that a prompt has found nothing, for one that may be for another picture now."""
        for folder in self._folders.values():
            folder.prompts.discard(prompt)

    def may_have_new(self) -> bool:
        """Return whether a picture may have come to a folder in which prompts found nothing."""
        now = self._clock()
        return any(
            now >= known.not_before and not known.unchanged.holds(self._where(folder))
            for folder, known in self._folders.items()
        )

    def choose(self, waiting: dict[str, dict[str, str | None]]) -> tuple[list[str], float]:
        """Return the prompts to look up now, and when to call again at the latest for the others.

        `waiting` has all lone prompts by their folder, with the picture that a prompt's text names.
        The time is `NEVER` where no prompt was left out. Raises OSError.
        """
        self._folders = {name: known for name, known in self._folders.items() if name in waiting}
        chosen: list[str] = []
        again = NEVER
        for folder, prompts in waiting.items():
            known = self._folders.setdefault(folder, _Folder(self._clock))
            started = self._clock()
            if started < known.not_before:
                again = min(again, known.not_before)
                continue
            where = self._where(folder)
            fresh = list(prompts)
            if known.unchanged.holds(where):
                fresh = [prompt for prompt in prompts if prompt not in known.prompts]
            else:
                known.unchanged.begin(where)
            if len(fresh) > _FEW:
                fresh = self._with_candidates(where, {prompt: prompts[prompt] for prompt in fresh})
                known.not_before = started + (1 + _REST) * (self._clock() - started)
            known.prompts = set(prompts)
            chosen += fresh
        return chosen, again

    def _where(self, folder: str) -> SafePath:
        return self._layout.done / folder

    @staticmethod
    def _with_candidates(where: SafePath, prompts: dict[str, str | None]) -> list[str]:
        """Return the prompts for which a folder may contain a picture, by one listing of it."""
        wanted: dict[str, list[str]] = {}
        for prompt, image in prompts.items():
            for stem in [os.path.splitext(image)[0]] if image else candidate_stems(prompt):
                wanted.setdefault(nfc_path(stem), []).append(prompt)
        found: dict[str, None] = {}
        try:
            with where.scandir() as entries:
                for entry in entries:
                    name = entry.name
                    for stem in (name, name[: name.rfind(".")]):
                        if not stem.isascii():
                            stem = nfc_path(stem)
                        if stem in wanted:
                            found.update(dict.fromkeys(wanted[stem]))
        except OSError as error:
            if error.errno not in NOT_THERE and not isinstance(error, PermissionError):
                raise
        return list(found)


def _forms(name: str) -> list[str]:
    """Return a name, and its other Unicode forms, which look the same."""
    if name.isascii():
        return [name]
    return list(
        dict.fromkeys((name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))))
    )


def usual_names(stem: str) -> list[str]:
    """Return the usual names of a picture with this stem: every ending, in lower and upper case."""
    return [stem + e for ending in sorted(ENDINGS) for e in (ending, ending.upper())]
