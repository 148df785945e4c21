"""The share's five folders: their places, the kinds of their files, walking through one.

Limitations: a listing is of its moment; files come and go while it is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_poll.core.errors import PromptError
from sam_poll.core.files import NO_FILE
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.imaging.decode import ENDINGS
from sam_poll.imaging.sidecars import is_aux, is_sidecar
from sam_poll.prompts.mask_files import is_mask_file
from sam_poll.share.file_kinds import PROMPT_ENDINGS
from sam_poll.share.intake.ignored import SYSTEM_ONLY, Ignored

ERROR_ENDING = ".error.json"
ANNOTATION_ENDINGS = frozenset({".xml"})


@dataclass(frozen=True)
class Layout:
    """The five folders of a share.

    `suffixes` renames a format's outputs (`{".mask.png": ".png"}`). `prompt_endings` and
    `picture_endings` are those of jobs, `annotation_endings` those of annotation files, which are
    prompts for many pictures. `delete_input`: answered inputs are deleted, not moved to `done`.
    `ignored`: the files in `in/` that are left alone.
    """

    input: SafePath
    work: SafePath
    output: SafePath
    done: SafePath
    failed: SafePath
    delete_input: bool = False
    prompt_endings: frozenset[str] = PROMPT_ENDINGS
    picture_endings: frozenset[str] = ENDINGS
    annotation_endings: frozenset[str] = ANNOTATION_ENDINGS
    suffixes: dict[str, str] = field(default_factory=dict)
    ignored: Ignored = SYSTEM_ONLY

    @classmethod
    def at(
        cls, *, input: Path, work: Path, output: Path, done: Path, failed: Path, **more: Any
    ) -> Layout:
        """Return the layout of five directories, as the settings name them."""
        return cls(
            input=SafePath.at(input),
            work=SafePath.at(work),
            output=SafePath.at(output),
            done=SafePath.at(done),
            failed=SafePath.at(failed),
            **more,
        )

    @classmethod
    def below(cls, share: Path, **more: Any) -> Layout:
        """Return the usual layout: `in`, `work`, `out`, `done`, `failed` in one directory."""
        names = {"input": "in", "work": "work", "output": "out", "done": "done", "failed": "failed"}
        paths = {name: share / folder for name, folder in names.items()}
        return cls.at(**paths, **more)

    @property
    def folders(self) -> dict[str, SafePath]:
        """Return all five folders by name."""
        return {
            "input": self.input,
            "work": self.work,
            "output": self.output,
            "done": self.done,
            "failed": self.failed,
        }

    @property
    def share(self) -> Path:
        """Return what names in CVAT are relative to: the deepest folder with input and done."""
        return Path(os.path.commonpath([self.input.path.parent, self.done.path]))

    def share_name(self, path: SafePath) -> str:
        """Return a picture's name in CVAT, `done/cam1/dog.jpg`."""
        return path.path.relative_to(self.share).as_posix()

    def is_prompt(self, name: str) -> bool:
        """Return whether a file name is a prompt's, or an annotation file's."""
        ending = os.path.splitext(name)[1].lower()
        return ending in self.prompt_endings or self.is_annotations(name)

    def is_annotations(self, name: str) -> bool:
        """Return whether a file name is an annotation file's; an `.aux.xml` is a sidecar."""
        return name[name.rfind(".") :].lower() in self.annotation_endings and not is_aux(name)

    def is_picture(self, name: str) -> bool:
        """Return whether a file name is a picture's; a mask file is none."""
        ending = os.path.splitext(name)[1].lower()
        return ending in self.picture_endings and not is_mask_file(name)

    @staticmethod
    def goes_along(name: str) -> bool:
        """Return whether a file of this name goes with a picture: a sidecar or a mask file."""
        return is_sidecar(name) or is_mask_file(name)


def prompt_bytes(path: SafePath, max_bytes: int) -> bytes:
    """Return the content of a prompt or annotation file, at most one byte over `max_bytes`.

    Links are not followed, and a pipe is not waited for: the file may have been replaced since it
    was listed. Raises PromptError where it cannot be read, OSError for other errors.
    """
    try:
        return path.read_bytes(max_bytes + 1)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise PromptError(
            f"cannot be read: {error.strerror}",
            place=shown(path.name),
            remedy="let the daemon's user read it, then `sam-poll retry`",
        ) from error


def walk(
    root: SafePath,
    visited: Callable[[str], object] = lambda folder: None,
    closed: Callable[[str], object] = lambda folder: None,
    ignored: Ignored = SYSTEM_ONLY,
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the regular files below a folder as (path relative to it with `/`, entry).

    No link is followed. An entry may be examined until the next one is requested. `visited` is
    called with each subfolder's path, also of empty ones; `closed` with those that cannot be read.
    These are skipped, as are folders that vanish meanwhile, and folders and files that are
    `ignored`. Raises OSError where the root cannot be read.
    """
    pending = [""]
    while pending:
        folder = pending.pop()
        with ExitStack() as stack:
            try:
                entries = stack.enter_context((root / folder).scandir())
            except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
                if not folder:
                    raise
                if isinstance(error, PermissionError):
                    closed(folder)
                continue
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    if not (entry.name.startswith(".") or ignored.folder(path)):
                        visited(path)
                        pending.append(path)
                elif entry.is_file(follow_symlinks=False) and not (
                    ignored.patterns and ignored.file(path)
                ):
                    yield path, entry
