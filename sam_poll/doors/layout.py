"""The share's folders: which there are, what their files are by name, walking through one.

What can still go wrong here: a listing is of its moment; files come and go while it is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_poll.doors.ignored import SYSTEM_ONLY, Ignored
from sam_poll.doors.settle import PROMPT_ENDINGS
from sam_poll.errors import PromptError
from sam_poll.fs import NO_FILE, shown
from sam_poll.images import ENDINGS
from sam_poll.safe_path import SafePath
from sam_poll.sidecars import is_aux

ERROR_ENDING = ".error.json"
ANNOTATION_ENDINGS = frozenset({".xml"})


@dataclass(frozen=True)
class Layout:
    """Where things lie.

    `suffixes` renames a format's outputs (`{".mask.png": ".png"}`). `prompt_endings` and `picture_endings` say which
    files are jobs, `annotation_endings` which are prompts for many pictures. `delete_input`: answered inputs are
    deleted, not moved to `done`. `ignored`: what is left alone in `in/`.
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
    def at(cls, *, input: Path, work: Path, output: Path, done: Path, failed: Path, **more: Any) -> Layout:
        """Return the layout of five directories, as the settings name them."""
        input_, work_, output_, done_, failed_ = map(SafePath.at, (input, work, output, done, failed))
        return cls(input=input_, work=work_, output=output_, done=done_, failed=failed_, **more)

    @classmethod
    def below(cls, share: Path, **more: Any) -> Layout:
        """Return the usual layout: `in`, `work`, `out`, `done`, `failed` in one directory."""
        names = {"input": "in", "work": "work", "output": "out", "done": "done", "failed": "failed"}
        return cls.at(**{name: share / folder for name, folder in names.items()}, **more)

    @property
    def folders(self) -> dict[str, SafePath]:
        """All five by name."""
        return {k: getattr(self, k) for k in ("input", "work", "output", "done", "failed")}

    @property
    def share(self) -> Path:
        """What the names in CVAT are relative to: the deepest folder that holds input and done."""
        return Path(os.path.commonpath([self.input.path.parent, self.done.path]))

    def share_name(self, path: SafePath) -> str:
        """A picture as CVAT knows it, `done/cam1/dog.jpg`."""
        return path.path.relative_to(self.share).as_posix()

    def is_prompt(self, name: str) -> bool:
        """Whether a file name is a prompt's, or that of annotations, which are many prompts."""
        ending = os.path.splitext(name)[1].lower()
        return ending in self.prompt_endings or self.is_annotations(name)

    def is_annotations(self, name: str) -> bool:
        """Whether a file name is that of annotations of many pictures; an `.aux.xml` goes with one."""
        return name[name.rfind(".") :].lower() in self.annotation_endings and not is_aux(name)

    def is_picture(self, name: str) -> bool:
        """Whether a file name is a picture's."""
        return os.path.splitext(name)[1].lower() in self.picture_endings


def prompt_bytes(path: SafePath, most: int) -> bytes:
    """What is in a prompt file, or in annotations; PromptError where it cannot be read. At most one byte more than is
    allowed, never through a link, and never waiting for a pipe: what was a file when it was listed may be something
    else by now."""
    try:
        return path.read_bytes(most + 1)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        remedy = "let the daemon's user read it, then `sam-poll retry`"
        raise PromptError(f"cannot be read: {error.strerror}", place=shown(path.name), remedy=remedy) from error


def walk(
    root: SafePath,
    visited: Callable[[str], object] = lambda folder: None,
    closed: Callable[[str], object] = lambda folder: None,
    ignored: Ignored = SYSTEM_ONLY,
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Regular files below a folder as (path relative to it with `/`, entry), without following any link. An entry may
    be looked at until the next one is asked for.

    `visited` is told each subfolder's path, empty ones included, `closed` those that may not be read, which are passed
    over as those are that vanish meanwhile, and those that are `ignored`; a root that cannot be read raises OSError.
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
                elif entry.is_file(follow_symlinks=False) and not (ignored.patterns and ignored.file(path)):
                    yield path, entry
