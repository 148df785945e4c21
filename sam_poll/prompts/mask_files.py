"""Mask files: rough masks in files beside their picture, which prompts name.

`{"mask": "dog.rough.png"}` names one for `dog.jpg`. Its name ends in `.rough.png`, so that it is
never taken for a picture, and begins with the stem of its picture, so that it belongs to one.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sam_poll.core.errors import PromptError
from sam_poll.core.files import MASK_FILE_ENDING, suffixed
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import MaskFile, Prompt, Request
from sam_poll.core.validation import Loc, place

ENDING = MASK_FILE_ENDING
"""The ending of mask files' names, in any case."""

_NUMBERS = re.compile(r"(~\d{1,9})+(?=\.|\Z)", re.ASCII)
_LAST_NUMBERS = re.compile(r"(~\d{1,9})+\Z", re.ASCII)


def is_mask_file(name: str) -> bool:
    """Return whether a file of this name is a mask file."""
    return len(name) > len(ENDING) and name[-len(ENDING) :].lower() == ENDING


def names_in(request: Request) -> list[str]:
    """Return the mask files that a request names, each once."""
    prompts = request if isinstance(request, tuple) else ()
    return list(dict.fromkeys(p.mask_file.name for p in prompts if p.mask_file is not None))


def located(request: Request, paths: Mapping[str, SafePath]) -> Request:
    """Return the request with the place of each mask file that it names; `paths` has them all."""
    if not isinstance(request, tuple):
        return request
    return tuple(
        replace(prompt, mask_file=MaskFile(prompt.mask_file.name, paths[prompt.mask_file.name]))
        if prompt.mask_file
        else prompt
        for prompt in request
    )


def place_of(prompts: Sequence[Prompt], index: int) -> str:
    """Return the place of the mask of a file's prompt, `objects[1].mask` or `mask`."""
    loc: Loc = ("objects", index) if len(prompts) > 1 else ()
    return place((*loc, "mask"))


def place_of_name(request: Request, name: str) -> str:
    """Return the place of the first mask of a request that is in the file `name`."""
    prompts = request if isinstance(request, tuple) else ()
    index = next(i for i, p in enumerate(prompts) if p.mask_file and p.mask_file.name == name)
    return place_of(prompts, index)


def forms(name: str, prompt: str) -> list[str]:
    """Return the names that a mask file may have by now, the most likely one first.

    Where a name was taken, a prompt and the files that go with it were given a number:
    `dog~2.json` and `dog~2.rough.png`. `prompt` is the file name of the prompt.
    """
    stem = os.path.splitext(prompt)[0]
    names = [suffixed(name, number) for number in _given_numbers(name[: -len(ENDING)], stem)]
    # macOS writes accents in another way, which looks the same.
    composed = [unicodedata.normalize(form, one) for one in names for form in ("NFC", "NFD")]
    return list(dict.fromkeys([*names, *composed]))


def _given_numbers(mask: str, prompt: str) -> list[str]:
    """Return what may have been appended to both stems, the most likely one first; "": nothing."""
    last = _LAST_NUMBERS.search(prompt)
    numbers = last[0].split("~")[1:] if last else []
    given = ["".join(f"~{n}" for n in numbers[start:]) for start in range(len(numbers) + 1)]
    # Numbers that the text names are the picture's own: those of `IMG~2.rough.png`.
    own, now = ("".join(found[0] for found in _NUMBERS.finditer(one)) for one in (mask, prompt))
    if now.startswith(own) and now[len(own) :] in given:
        given.insert(0, now[len(own) :])
    return list(dict.fromkeys(given))


def check_names(request: Request, picture: str) -> None:
    """Check that the mask files of a request belong to its picture, by their names.

    Raises PromptError.
    """
    stem = _plain(os.path.splitext(picture)[0])
    for name in names_in(request):
        if not _plain(name[: -len(ENDING)] + ".").startswith(stem + "."):
            raise PromptError(
                f"{shown(name)} is not named after its picture, {shown(picture)}",
                place=place_of_name(request, name),
                remedy=f"call it {shown(stem + ENDING)}, or {shown(f'{stem}.NAME{ENDING}')}",
            )


def _plain(name: str) -> str:
    """Return a name without the numbers of `core.files.suffixed`, in one form of its accents."""
    return _NUMBERS.sub("", unicodedata.normalize("NFC", name))
