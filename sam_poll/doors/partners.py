"""Why a prompt has no picture, or a picture no prompt: in words, with the nearest name. Looks at names only.

What can still go wrong here: the nearest name is a guess; somebody may just not have dropped the other file yet.
"""

from __future__ import annotations

import difflib
import posixpath
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from sam_poll.doors.layout import Layout
from sam_poll.doors.names import Names
from sam_poll.doors.settle import Ambiguous, Index, is_temporary, stems
from sam_poll.errors import InputError, PromptError
from sam_poll.fs import shown
from sam_poll.images import not_read

_UNSUPPORTED_PROMPTS = frozenset(
    {".csv", ".geojson", ".json5", ".jsonc", ".jsonl", ".jsn", ".ndjson", ".toml", ".txt", ".yaml", ".yml"}
)
_MOST_COMPARED = 2000  # names, when nothing but a similar one is left to look for


@dataclass
class _Folder:
    """Names in one folder: by what is the same in them but for case, accents' form and ending; and which are links."""

    alike: dict[str, list[str]] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)

    def add(self, name: str) -> None:
        for key in {_key(name), _key(posixpath.splitext(name)[0])}:
            self.alike.setdefault(key, []).append(name)


class Partners:
    """Explain missing partners from the names of one listing, which must not change while this is used."""

    def __init__(self, names: Names, layout: Layout, index: Index) -> None:
        self._names, self._layout, self._index = names, layout, index
        self._folders: dict[str, _Folder] = {}
        self._everywhere: dict[str, str] | None = None

    def explain_prompt(self, prompt: str, image: str | None) -> InputError:
        """Return why a prompt has no picture. `image`: the name of the picture in its text, if it has one."""
        folder, _ = posixpath.split(prompt)
        beside = self._beside(folder)
        lead = f"its text names {image}, which is not beside it" if image else "no picture of its name is beside it"
        wanted = [image, posixpath.splitext(image)[0]] if image else list(stems(prompt))
        for name in wanted:
            found = beside.alike.get(_key(name))
            if found:
                near = min(found, key=lambda one: (one not in beside.links, not not_read(one), one))
                detail, remedy = self._describe(near, near in beside.links, image)
                return _error(prompt, f"{lead}; {detail}", remedy)
        for name in wanted:
            elsewhere = self._elsewhere(name)
            if elsewhere:
                return _error(prompt, f"{lead}; {shown(elsewhere)} is in another folder", "put both into one folder")
        near_keys = difflib.get_close_matches(_key(wanted[-1]), list(beside.alike)[:_MOST_COMPARED], n=1, cutoff=0.7)
        if near_keys:
            near = beside.alike[near_keys[0]][0]
            return _error(prompt, f"{lead}; the nearest name is {shown(near)}", "give both the same name")
        return _error(prompt, lead, "drop the picture beside it")

    def explain_pictures(self, lone: Collection[str]) -> Iterator[tuple[str, InputError]]:
        """Yield (picture, reason) for each of the `lone` pictures with a file beside it that may be meant as its
        prompt."""
        for folder, others in self._names.others():
            for name, is_link in others.items():
                if not self._like_prompt(name, is_link):
                    continue
                picture = self._index.find(posixpath.join(folder, name))
                if isinstance(picture, str) and picture in lone:
                    reason = "is a link, and links are never followed" if is_link else "is of a kind that is not taken"
                    yield (
                        picture,
                        _error(
                            picture,
                            f"no prompt of its name is beside it; {shown(name)} {reason}",
                            _remedy(name, is_link),
                        ),
                    )

    def has_pictures(self) -> bool:
        """Return whether any file may be meant as a picture."""
        others = (name for _, names in self._names.others() for name in names)
        return bool(self._names.pictures) or any(map(self._like_picture, others))

    def _describe(self, near: str, is_link: bool, image: str | None) -> tuple[str, str]:
        """Return what is wrong with the nearest name, and the remedy."""
        kind, near = not_read(near), shown(near)
        if is_link:
            return f"{near} is a link, and links are never followed", "put the picture itself there"
        if kind:
            return f"{near} is {kind.name}, which is not read", kind.remedy
        same = image is None or _key(image) == _key(near)
        what = "differs in upper and lower case" if same else "has another ending"
        stem = posixpath.splitext(near)[0]
        return f"{near} {what}", f'write "image": "{near}" in it' if image else f"call it {stem}.json"

    def _beside(self, folder: str) -> _Folder:
        if folder not in self._folders:
            found = self._folders[folder] = _Folder()
            for name in self._names.pictures_in(folder):
                found.add(name)
            for name, is_link in self._names.others_in(folder).items():
                if self._like_picture(name):
                    found.add(name)
                    if is_link:
                        found.links.add(name)
        return self._folders[folder]

    def _elsewhere(self, name: str) -> str | None:
        """A picture of such a name in any folder."""
        if self._everywhere is None:
            self._everywhere = {}
            for path in sorted(self._names.pictures, reverse=True):
                file = posixpath.basename(path)
                self._everywhere[_key(file)] = self._everywhere[_key(posixpath.splitext(file)[0])] = path
        return self._everywhere.get(_key(name))

    def _like_picture(self, name: str) -> bool:
        return not is_temporary(name) and (self._layout.is_picture(name) or not_read(name) is not None)

    def _like_prompt(self, name: str, is_link: bool) -> bool:
        if is_temporary(name):
            return False
        return is_link if self._layout.is_prompt(name) else posixpath.splitext(name)[1].lower() in _UNSUPPORTED_PROMPTS


def ambiguous(prompt: str, found: Ambiguous) -> PromptError:
    """What to say of a prompt that fits several pictures."""
    names = [posixpath.basename(p) for p in found.pictures]
    return PromptError(
        f"fits {' and '.join(names)}",
        place=posixpath.basename(prompt),
        remedy=f'say which in the prompt, `"image": "{names[0]}"`, or call it {names[0]}.json',
    )


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _error(path: str, reason: str, remedy: str) -> InputError:
    return InputError(reason, place=shown(path), remedy=remedy)


def _remedy(name: str, is_link: bool) -> str:
    """What to do about a file that is no prompt."""
    stem, ending = posixpath.splitext(name)
    if is_link:
        return "put the prompt itself there"
    if stem.lower().endswith((".json", ".prompt")):
        return f"call it {shown(stem)}"  # Windows hides the ending that it has added
    if ending.lower() == ".txt":
        return "prompts are JSON (.json, .prompt); `sam-poll cvat prompts` makes them of YOLO's texts"
    return "prompts are JSON (.json, .prompt)"
