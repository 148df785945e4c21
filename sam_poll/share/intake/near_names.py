"""Explanations why a prompt has no picture, or a picture no prompt, with the nearest name.

Only names are compared.

Limitations: the nearest name is a guess. The other file may just not have been dropped yet.
"""

from __future__ import annotations

import difflib
import posixpath
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from sam_poll.core.errors import InputError, PromptError
from sam_poll.core.text import shown
from sam_poll.imaging.decode import not_read
from sam_poll.prompts.mask_files import is_mask_file
from sam_poll.share.file_kinds import is_temporary
from sam_poll.share.intake.directory_index import DirectoryIndex
from sam_poll.share.intake.pairing import Ambiguous, PictureIndex, candidate_stems
from sam_poll.share.layout import Layout

_UNSUPPORTED_PROMPTS = frozenset(
    {
        ".csv",
        ".geojson",
        ".json5",
        ".jsonc",
        ".jsonl",
        ".jsn",
        ".ndjson",
        ".toml",
        ".txt",
        ".yaml",
        ".yml",
    }
)
_NO_PROMPT = "no prompt of its name is beside it"
_MOST_COMPARED = 2000  # names among which a merely similar one is looked for


@dataclass
class _Folder:
    """The names in one folder.

    `alike`: names that differ only in case, form of accents and ending, by their `_key`.
    `links`: those that are links. `not_files`: names of pictures that are folders, pipes, sockets.
    """

    alike: dict[str, list[str]] = field(default_factory=dict)
    links: set[str] = field(default_factory=set)
    not_files: set[str] = field(default_factory=set)

    def add(self, name: str) -> None:
        for key in {_key(name), _key(posixpath.splitext(name)[0])}:
            self.alike.setdefault(key, []).append(name)


class PartnerExplainer:
    """Explain missing partners by the names of one listing, which must not change meanwhile."""

    def __init__(self, names: DirectoryIndex, layout: Layout, index: PictureIndex) -> None:
        self._names = names
        self._layout = layout
        self._index = index
        self._folders: dict[str, _Folder] = {}
        self._everywhere: dict[str, str] | None = None

    def explain_prompt(self, prompt: str, image: str | None) -> InputError:
        """Return why a prompt has no picture. `image`: the picture that its text names, if any."""
        folder, _ = posixpath.split(prompt)
        beside = self._beside(folder)
        if image:
            lead = f"its text names {image}, which is not beside it"
            wanted = [image, posixpath.splitext(image)[0]]
        else:
            lead = "no picture of its name is beside it"
            wanted = list(candidate_stems(prompt))
        for name in wanted:
            found = beside.alike.get(_key(name))
            if found:
                near = min(found, key=lambda one: (one not in beside.links, not not_read(one), one))
                if near in beside.not_files:
                    detail = f"{shown(near)} is not a file"
                    remedy = "put the picture itself there"
                else:
                    detail, remedy = self._describe(near, image, is_link=near in beside.links)
                return _error(prompt, f"{lead}; {detail}", remedy)
        for name in wanted:
            elsewhere = self._elsewhere(name)
            if elsewhere:
                return _error(
                    prompt,
                    f"{lead}; {shown(elsewhere)} is in another folder",
                    "put both into one folder",
                )
        near_keys = difflib.get_close_matches(
            _key(wanted[-1]), list(beside.alike)[:_MOST_COMPARED], n=1, cutoff=0.7
        )
        if near_keys:
            near = beside.alike[near_keys[0]][0]
            return _error(
                prompt, f"{lead}; the nearest name is {shown(near)}", "give both the same name"
            )
        return _error(prompt, lead, "drop the picture beside it")

    def explain_pictures(self, lone: Collection[str]) -> Iterator[tuple[str, InputError]]:
        """Yield (picture, reason) for pictures beside which a file may be meant as their prompt.

        A mask file is one: it needs a prompt that names it. `lone`: the pictures without a prompt.
        """
        for folder, others in self._names.others():
            for name, is_link in others.items():
                if not self._like_prompt(name):
                    continue
                picture = self._index.find(posixpath.join(folder, name))
                if isinstance(picture, str) and picture in lone:
                    yield picture, self._not_a_prompt(picture, name, is_link=is_link)
        for mask in sorted(self._names.masks):
            picture = self._index.find(mask)
            if isinstance(picture, str) and picture in lone:
                name = shown(posixpath.basename(mask))
                reason = f"{_NO_PROMPT}; {name} is a mask file, which a prompt must name"
                yield picture, _error(picture, reason, f'add a prompt: {{"mask": "{name}"}}')

    def has_pictures(self) -> bool:
        """Return whether any file may be meant as a picture."""
        others = (name for _, names in self._names.others() for name in names)
        return bool(self._names.pictures) or any(map(self._like_picture, others))

    @staticmethod
    def _describe(near: str, image: str | None, *, is_link: bool) -> tuple[str, str]:
        """Return what is wrong with the nearest name, and the remedy."""
        is_mask = is_mask_file(near)
        kind, near = not_read(near), shown(near)
        if is_link:
            return f"{near} is a link, and links are never followed", "put the picture itself there"
        if is_mask:
            return f"{near} is a mask file by its name, and no picture", "rename the picture"
        if kind:
            return f"{near} is {kind.name}, which is not read", kind.remedy
        same = image is None or _key(image) == _key(near)
        what = "differs in upper and lower case" if same else "has another ending"
        if image:
            return f"{near} {what}", f'write "image": "{near}" in it'
        return f"{near} {what}", f"call it {posixpath.splitext(near)[0]}.json"

    def _beside(self, folder: str) -> _Folder:
        """Return the names in a folder that are pictures, or may be meant as such."""
        if folder not in self._folders:
            names = self._folders[folder] = _Folder()
            for name in (*self._names.pictures_in(folder), *self._names.masks_in(folder)):
                names.add(name)
            for name, is_link in self._names.others_in(folder).items():
                if self._like_picture(name):
                    names.add(name)
                    if is_link:
                        names.links.add(name)
                    elif self._layout.is_picture(name):
                        names.not_files.add(name)
        return self._folders[folder]

    def _elsewhere(self, name: str) -> str | None:
        """Return a picture of such a name in any folder."""
        if self._everywhere is None:
            self._everywhere = {}
            for path in sorted(self._names.pictures, reverse=True):
                file = posixpath.basename(path)
                self._everywhere[_key(posixpath.splitext(file)[0])] = path
                self._everywhere[_key(file)] = path
        return self._everywhere.get(_key(name))

    def _like_picture(self, name: str) -> bool:
        return not is_temporary(name) and (
            self._layout.is_picture(name) or not_read(name) is not None
        )

    def _like_prompt(self, name: str) -> bool:
        ending = posixpath.splitext(name)[1].lower()
        return not is_temporary(name) and (
            self._layout.is_prompt(name) or ending in _UNSUPPORTED_PROMPTS
        )

    def _not_a_prompt(self, picture: str, name: str, *, is_link: bool) -> InputError:
        """Return the error for a picture beside which something is no prompt."""
        if is_link:
            reason = "is a link, and links are never followed"
            remedy = "put the prompt itself there"
        elif self._layout.is_prompt(name):
            reason, remedy = "is not a file", "put the prompt itself there"
        else:
            reason, remedy = "is of a kind that is not taken", _remedy(name)
        return _error(picture, f"{_NO_PROMPT}; {shown(name)} {reason}", remedy)


def ambiguous_error(prompt: str, found: Ambiguous) -> PromptError:
    """Return the error for a prompt that fits several pictures."""
    names = [posixpath.basename(p) for p in found.pictures]
    return PromptError(
        f"fits {' and '.join(names)}",
        place=posixpath.basename(prompt),
        remedy=f'say which in the prompt, `"image": "{names[0]}"`, or call it {names[0]}.json',
    )


def _key(name: str) -> str:
    """Return what is the same in names that differ only in case and in the form of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def _error(path: str, reason: str, remedy: str) -> InputError:
    return InputError(reason, place=shown(path), remedy=remedy)


def _remedy(name: str) -> str:
    """Return what to do about a file that is no prompt."""
    stem, ending = posixpath.splitext(name)
    if stem.lower().endswith((".json", ".prompt")):
        return f"call it {shown(stem)}"  # Windows hides the ending that it has added
    if ending.lower() == ".txt":
        return (
            "prompts are JSON (.json, .prompt); `sam-poll cvat prompts` makes them of YOLO's texts"
        )
    return "prompts are JSON (.json, .prompt)"
