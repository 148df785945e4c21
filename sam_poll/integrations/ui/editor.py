"""Prompts that are clicked: the picture that they are for, and where they are saved.

A saved prompt is a file as a user would drop it: written whole, beside its picture, by a rename.

| picture | what saving does |
|---|---|
| waiting in `in/` | writes the prompt beside it |
| failed | writes the prompt over the one in `failed/`, then does what `sam-poll retry` does |
| answered, in `done/` | writes the prompt alone into `in/`: a further job of the same picture |

Limitations: a picture that a daemon claims while its prompt is clicked can no longer be prompted;
saving says so.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sam_poll.core.errors import IncompleteFileError, InputError, PictureError, PromptError
from sam_poll.core.files import exists, with_suffix, write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import ConceptRequest, Prompt, Size
from sam_poll.imaging import decode
from sam_poll.integrations.ui import names
from sam_poll.integrations.ui.answers import picture_of, read_answer
from sam_poll.integrations.ui.share_index import AnswerEntry
from sam_poll.prompts import mask_files, parser
from sam_poll.prompts.parser import PromptFile
from sam_poll.runtime.console import count
from sam_poll.share.error_report import read_report
from sam_poll.share.file_kinds import is_temporary
from sam_poll.share.intake.done_lookup import DoneLookup
from sam_poll.share.layout import ERROR_ENDING, Layout, prompt_bytes
from sam_poll.share.status import retry_jobs

Place = Literal["waiting", "failed", "answered"]
_MAX_NUMBER = 1000  # prompts of one picture


@dataclass(frozen=True, slots=True)
class Target:
    """A picture that prompts are clicked for.

    `key` is its path in `in/`, or the id of the failed or answered job. `prompt` is the job's
    present prompt, if it has one.
    """

    place: Place
    key: str
    picture: SafePath
    prompt: SafePath | None = None

    @property
    def folder(self) -> str:
        """The folder relative to `in/`."""
        return self.key.rpartition("/")[0]


class Editor:
    """Finds targets and saves prompts. `parse` parses a prompt file with the share's limits."""

    def __init__(
        self, layout: Layout, parse: Callable[[bytes], PromptFile], max_pixels: int
    ) -> None:
        self._layout = layout
        self._parse = parse
        self._max_pixels = max_pixels
        self._lock = threading.Lock()

    # ── pictures ──

    def waiting(self, path: str) -> Target:
        """Return a picture in `in/`. Raises NotFoundError."""
        picture = names.below(self._layout.input, path)
        if not self._layout.is_picture(path) or not picture.is_file():
            raise names.not_found("the picture is not in in/ any more; a daemon may have taken it")
        return Target("waiting", path, picture)

    def failed(self, identity: str) -> Target:
        """Return the picture of a failed job. Raises NotFoundError."""
        report = names.below(self._layout.failed, identity + ERROR_ENDING)
        try:
            files = read_report(report).files
        except OSError:
            raise names.not_found("the job is not in failed/ any more") from None
        pictures = [name for name in files if self._layout.is_picture(name)]
        if not pictures or not report.with_name(pictures[0]).is_file():
            raise names.not_found("there is no picture with this failed job")
        prompts = [name for name in files if _is_prompt(self._layout, name)]
        prompt = report.with_name(prompts[0]) if prompts else None
        return Target("failed", identity, report.with_name(pictures[0]), prompt)

    def answered(self, entry: AnswerEntry) -> Target:
        """Return the picture of an answer. Raises NotFoundError."""
        try:
            answer = read_answer(self._layout, entry)
        except (InputError, OSError):
            answer = None
        picture = picture_of(self._layout, entry, answer)
        if picture is None:
            raise names.not_found("the picture of this answer is not in done/")
        return Target("answered", entry.id, picture, self._prompt_of(entry.id, picture))

    def _prompt_of(self, identity: str, picture: SafePath) -> SafePath | None:
        """Return the newest prompt of an answer.

        Of further jobs of one picture it is `dog~2.json`, `dog~3.json` …; where there is a picture
        `dog~2.jpg`, too, the prompt is that picture's.
        """
        for ending in sorted(self._layout.prompt_endings):
            prompt = names.below(self._layout.done, identity + ending)
            if not exists(prompt):
                continue
            for number in range(2, _MAX_NUMBER):
                suffix = f"~{number}"
                further = with_suffix(prompt, suffix)
                if not exists(further) or exists(with_suffix(picture, suffix)):
                    break
                prompt = further
            return prompt
        return None

    # ── prompts ──

    def present_prompt(
        self, target: Target, size: Size
    ) -> tuple[list[dict[str, Any]], tuple[str, ...], str | None]:
        """Return a target's present prompt: objects as JSON, texts, and why some are left out."""
        if target.prompt is None:
            return [], (), None
        try:
            requested = self._parse(prompt_bytes(target.prompt, parser.MAX_BYTES)).prompts
        except (PromptError, FileNotFoundError) as error:
            return [], (), shown(error)
        if isinstance(requested, ConceptRequest) and not requested.exemplars:
            return [], requested.texts, None
        if not isinstance(requested, tuple):
            return (
                [],
                (),
                "the present prompt asks for all objects, or all of a kind; "
                "what is clicked here replaces that",
            )
        shown_here = [prompt for prompt in requested if not prompt.mask_file]
        fitting = [prompt for prompt in shown_here if _fits(prompt, size)]
        notes = [
            f"{count(number, 'object')} of the present prompt left out: {reason}"
            for number, reason in (
                (len(requested) - len(shown_here), "with a mask in a file"),
                (len(shown_here) - len(fitting), "outside the picture"),
            )
            if number
        ]
        objects = [parser.as_dict(prompt) for prompt in fitting]
        return objects, (), "; ".join(notes) or None

    def parse_request(self, body: bytes, size: Size) -> tuple[Prompt, ...] | ConceptRequest:
        """Return what `{"objects": […]}` or `{"text": …}` requests of a picture of a size.

        Raises PromptError.
        """
        requested = parser.fit_request(self._parse(body).prompts, size)
        if not isinstance(requested, tuple | ConceptRequest):
            raise PromptError(
                "objects or words are expected", remedy='send {"objects": […]} or {"text": […]}'
            )
        for name in mask_files.names_in(requested):
            raise PromptError(
                "a mask in a file cannot be saved here",
                place=mask_files.place_of_name(requested, name),
                remedy="put the prompt and the file into the input folder",
            )
        return requested

    def save(self, target: Target, body: bytes, size: Size) -> str:
        """Save what `parse_request` takes as a target's prompt; return its path below `in/`.

        Raises InputError, with place and remedy, and OSError.
        """
        self.parse_request(body, size)
        document = {
            **json.loads(body),
            "image": target.picture.name,
            "image_size": {"width": size.width, "height": size.height},
        }
        text = _written(document)
        try:
            self._parse(text)
        except PromptError as error:
            if error.place != "image":
                raise
            # Such a name (line breaks, not UTF-8) cannot be in a prompt, which is found by its own.
            del document["image"]
            text = _written(document)
        with self._lock:  # two tabs must not choose the same free name
            if target.place == "failed":
                return self._save_failed(target, text)
            if target.place == "answered":
                self._check_is_newest(target, document.get("image"))
            elif not exists(target.picture):
                raise InputError(
                    "a daemon has taken the picture meanwhile",
                    place=shown(target.key),
                    remedy="wait for its answer, and add objects there",
                )
            return self._write_beside(target, text)

    def _save_failed(self, target: Target, text: bytes) -> str:
        layout = self._layout
        taken = [
            name
            for name in (target.picture, target.prompt)
            if name and exists(layout.input / _join(target.folder, name.name))
        ]
        if taken:
            raise InputError(
                "a file of this name waits in in/ already",
                place=shown(taken[0].name),
                remedy="wait until it is answered",
            )
        if target.prompt is not None:
            write_whole(target.prompt, text)
        if not retry_jobs(layout, [target.key]):
            raise InputError(
                "the job could not be put back", place=shown(target.key), remedy="see the log"
            )
        if target.prompt is not None:
            return _join(target.folder, target.prompt.name)
        return self._write_beside(target, text)

    def _write_beside(self, target: Target, text: bytes) -> str:
        """Write a prompt into `in/` under a free name; return its path there."""
        folder = target.folder
        stem = os.path.splitext(target.picture.name)[0]
        for number in range(1, _MAX_NUMBER):
            name = f"{stem}.json" if number == 1 else f"{stem}.{number}.json"
            path = names.below(self._layout.input, _join(folder, name))
            if not exists(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, text)
                return _join(folder, name)
        raise InputError("too many prompts wait for this picture", place=shown(target.key))

    def _check_is_newest(self, target: Target, image: str | None) -> None:
        """Raise InputError where a prompt alone would be for another picture than this one.

        `image` is the picture that the prompt names, if it names one.
        """
        path = _join(target.folder, target.picture.name)
        remedy = "drop the picture again, with a name of its own"
        if exists(self._layout.input / path):
            raise InputError(
                "another picture of this name waits in in/", place=shown(path), remedy=remedy
            )
        prompt = f"{os.path.splitext(path)[0]}.json"
        if DoneLookup(self._layout).find(prompt, image) != (path, ""):
            which = "a newer" if image else "another"
            raise InputError(
                f"{which} picture of this name was answered", place=shown(path), remedy=remedy
            )

    # ── uploads ──

    def upload(self, name: str, body: bytes) -> str:
        """Write a picture into `in/`, as a user would drop it; return its path there.

        Raises InputError for a name or content that the daemons would not take.
        """
        layout = self._layout
        plain = name == os.path.basename(name) and name.isprintable() and "\\" not in name
        if not plain or not name.strip(". ") or len(os.fsencode(name)) > 200:
            raise InputError("not a plain file name", place=shown(name), remedy="rename the file")
        if is_temporary(name) or layout.ignored.covers(name):
            raise InputError(
                "the daemons ignore files of this name", place=name, remedy="rename the file"
            )
        if not layout.is_picture(name):
            kind = decode.not_read(name)
            raise PictureError(
                f"{kind.name} is not read" if kind else "not the name of a picture",
                place=name,
                remedy=kind.remedy if kind else "JPEG and PNG are, and docs/formats.md has more",
            )
        try:
            decode.decode(body, min_decode_side=1, both=False, max_pixels=self._max_pixels)
        except IncompleteFileError as error:
            raise PictureError(error.reason, place=name, remedy="upload it again") from None
        with self._lock:
            stem, ending = os.path.splitext(name)
            for number in range(1, _MAX_NUMBER):
                free = name if number == 1 else f"{stem}-{number}{ending}"
                if not exists(layout.input / free):
                    write_whole(layout.input / free, body)
                    return free
        raise InputError("too many files of this name", place=name, remedy="rename the file")


def version_of(picture: SafePath) -> str:
    """Return what tells a picture from one that has replaced it under its name."""
    status = picture.lstat()
    return f"{status.st_size}-{status.st_mtime_ns}"


def check_version(picture: SafePath, version: str) -> None:
    """Raise InputError where a picture is not the one that was clicked in; "" is any."""
    if version and version_of(picture) != version:
        raise InputError(
            "another picture has replaced the one that is shown here",
            place=shown(picture.name),
            remedy="reload the page, and click in that",
        )


def _fits(prompt: Prompt, size: Size) -> bool:
    try:
        parser.fit((prompt,), size)
    except PromptError:
        return False
    return True


def _written(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=2).encode("ascii") + b"\n"


def _is_prompt(layout: Layout, name: str) -> bool:
    """Return whether a file is a prompt that can be written over: not one for many pictures."""
    return layout.is_prompt(name) and not layout.is_annotations(name)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
