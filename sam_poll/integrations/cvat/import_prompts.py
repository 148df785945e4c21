"""`sam-poll cvat prompts`: write the prompts of an annotation file beside their pictures.

For each picture its file is copied first and then its prompt written, each whole: whenever the
command is interrupted, what exists is correct, and running it again does the rest. Existing files
are never overwritten.

Limitations: whether a file exists is checked before it is written; a file of the same name that
arrives in between is overwritten.
"""

from __future__ import annotations

import errno
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import typer

from sam_poll.core import files, text
from sam_poll.core.errors import ExitCode, InputError, PictureError, PromptError, UsageError
from sam_poll.core.safe_path import SafePath
from sam_poll.imaging import decode, source_file
from sam_poll.integrations.cvat.archives import list_files
from sam_poll.integrations.cvat.image_lookup import Pictures
from sam_poll.integrations.cvat.sources import PictureAnnotations, read_annotations
from sam_poll.prompts import parser
from sam_poll.prompts.importers import prompt_files
from sam_poll.prompts.importers.common import image_place
from sam_poll.prompts.importers.prompt_files import Split
from sam_poll.prompts.mask_files import is_mask_file
from sam_poll.runtime.console import count, error_console, print_error
from sam_poll.share.claims.model import claim_name
from sam_poll.share.file_kinds import is_temporary
from sam_poll.share.layout import walk

_MAX_PRINTED = 20  # problems printed one by one; the others are counted


def write_prompts(
    annotations: Path,
    folder: Path,
    output: Path,
    *,
    labels: Collection[str] = (),
    negatives: Collection[str] = (),
    pictures: bool = True,
) -> ExitCode:
    """Write the prompts of an annotation file into `output`, with copies of their pictures.

    The pictures are looked up below `folder`; without `pictures` they are not copied.

    Returns FAILED_JOBS if pictures were skipped, each with its reason on stderr. Raises UsageError
    and PromptError if nothing can be done, OSError if `output` cannot be written.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", place=f"--images {folder}")
    summary = Summary()
    annotated = read_annotations(annotations, summary.add_problem)
    writer = _PromptWriter(folder, output, labels, negatives, pictures, summary)
    try:
        for picture, path in _with_progress(writer.match(annotated)):
            writer.write_prompt(picture, path)
    finally:
        writer.sync()
        summary.print(output)
    anything_done = summary.objects or summary.answered or summary.problems
    if labels and summary.labels and not anything_done:
        raise UsageError(
            "no object has one of these labels",
            place="--label",
            remedy=f"there are: {', '.join(sorted(summary.labels))}",
        )
    return ExitCode.FAILED_JOBS if summary.problems else ExitCode.OK


Match = tuple[PictureAnnotations, str]  # the annotations of a picture, and the picture's path


def _with_progress(matches: Sequence[Match]) -> Iterator[Match]:
    from rich.progress import track

    console = error_console()
    yield from track(
        matches, "prompts", console=console, transient=True, disable=not console.is_terminal
    )


@dataclass
class Summary:
    """What was done, for the summary that is printed at the end.

    `unchanged` counts prompts that exist already, `answered` those that are answered or in
    progress, `without_objects` pictures without anything to segment.
    """

    written: int = 0
    copied: int = 0
    unchanged: int = 0
    answered: int = 0
    without_objects: int = 0
    objects: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    labels: set[str] = field(default_factory=set)
    problems: list[InputError] = field(default_factory=list)
    foreign_links: int = 0

    def add_problem(self, name: str, error: InputError) -> None:
        """Record why a picture or an annotation file was skipped."""
        place = name
        if error.place is not None:
            place = error.place if name in error.place else f"{name}: {error.place}"
        self.problems.append(type(error)(error.reason, place=place, remedy=error.remedy))

    def print(self, output: Path) -> None:
        """Print the problems and the summary on stderr."""
        for error in self.problems[:_MAX_PRINTED]:
            print_error(error)
        if len(self.problems) > _MAX_PRINTED:
            typer.echo(f"… and {len(self.problems) - _MAX_PRINTED:,} more", err=True)
        parts = [
            f"{count(self.written, 'prompt')} written to {output}, {count(self.objects, 'object')}"
        ]
        if self.copied:
            parts.append(f"{count(self.copied, 'picture')} copied")
        if self.unchanged:
            parts.append(f"{self.unchanged:,} there already")
        if self.answered:
            parts.append(f"{self.answered:,} already answered or in progress")
        if self.without_objects:
            parts.append(f"{count(self.without_objects, 'picture')} without boxes or points")
        if self.left_out:
            kinds = [count(number, kind) for kind, number in sorted(self.left_out.items())]
            parts.append(f"left out: {', '.join(kinds)}")
        if self.problems:
            parts.append(f"{len(self.problems):,} skipped")
        if self.foreign_links:
            parts.append(f"{count(self.foreign_links, 'link')} of other users not followed")
        typer.echo("; ".join(parts), err=True)


class _Existing(Enum):
    """Where on the output's share a picture already is."""

    NOWHERE = "nowhere"
    OUTPUT = "output"
    DONE = "done"


class _Target(NamedTuple):
    """A picture's path below the output, and where on the share the picture already is."""

    path: str
    existing: _Existing


class _PromptWriter:
    """One run: matches annotations with pictures and writes prompts.

    Paths in strings are relative, with `/`.
    """

    def __init__(
        self,
        root: Path,
        output: Path,
        labels: Collection[str],
        negatives: Collection[str],
        copies: bool,
        summary: Summary,
    ) -> None:
        self._root = root.resolve()
        self._output = SafePath.at(SafePath.at(output).root.real)
        self._work = SafePath.at(self._output.path.parent / "work")
        self._done = SafePath.at(self._output.path.parent / "done")
        self._labels = frozenset(labels)
        self._negatives = negatives
        self._copies = copies
        self._summary = summary
        listing = list_files(self._root, (self._output.path, self._done.path))
        summary.foreign_links = listing.foreign_links
        self._files = {path: file for path, file in listing.files.items() if _is_picture(path)}
        self._pictures = Pictures(self._files, _prefix_below(self._output.path, self._root))
        targets = {self._target(path).path for path in self._files}
        if self._output.is_dir():
            targets.update(_pictures_below(self._output.path))
        self._stems = Counter(posixpath.splitext(target)[0] for target in targets)
        self._touched: set[SafePath] = set()

    def match(self, pictures: Sequence[PictureAnnotations]) -> list[Match]:
        """Return the annotations with their pictures; those without exactly one are skipped."""
        matches: list[Match] = []
        for annotated in pictures:
            try:
                matches.append((annotated, self._pictures.find(annotated.names)))
            except InputError as error:
                self._add_problem(annotated, error)
        uses = Counter(path for _, path in matches)
        for annotated, path in matches:
            if uses[path] > 1:
                ambiguous = PictureError(
                    f"is one of {uses[path]} names that all match {text.shown(path)}",
                    remedy="name the folder that the names are relative to by --images",
                )
                self._add_problem(annotated, ambiguous)
        return [(annotated, path) for annotated, path in matches if uses[path] == 1]

    def write_prompt(self, picture: PictureAnnotations, path: str) -> None:
        """Write one picture's prompt, or skip it. Raises OSError if the output is not writable."""
        try:
            self._write_prompt(picture, path)
        except InputError as error:
            self._add_problem(picture, error)

    def sync(self) -> None:
        """Sync the folders that were written to, so that the files survive a power cut."""
        for folder in self._touched:
            files.sync_folder(folder)

    def _add_problem(self, picture: PictureAnnotations, error: InputError) -> None:
        self._summary.add_problem(image_place(picture.names[0]), error)

    def _write_prompt(self, picture: PictureAnnotations, path: str) -> None:
        target = self._target(path)
        objects = self._objects(picture, path, target.path)
        if objects is None:
            return
        split, body = objects
        # Looked up in the order in which a daemon moves a prompt (in, work, done), so that one that
        # is moved between two checks is found by the later one.
        unchanged = any(
            _has_content(self._output / name, body) for name in self._names(target.path)
        )
        if not unchanged and (
            self._is_in_progress(target.path, body) or self._is_answered(path, target.path, body)
        ):
            self._summary.answered += 1
            return
        prompt = self._output / self._names(target.path)[0]
        if not unchanged and files.exists(prompt):
            raise PromptError(
                f"another prompt has this name: {text.shown(prompt.name)}",
                remedy="wait until it is answered, or move it away",
            )
        if target.existing is _Existing.DONE:
            self._check_no_other_picture(target.path)
        elif target.existing is _Existing.NOWHERE and self._copies:
            self._copy(self._files[path], self._output / target.path)
        self._summary.objects += len(split.sound)
        if unchanged:
            self._summary.unchanged += 1
            return
        self._write_file(prompt, body)
        self._summary.written += 1

    def _objects(
        self, picture: PictureAnnotations, path: str, target: str
    ) -> tuple[Split, bytes] | None:
        """Return the picture's objects, divided into sound and refused ones, and its prompt file.

        Returns None if there is nothing to segment. Raises InputError if all objects are refused,
        or if the annotations are for a picture of another size.
        """
        header = source_file.header(SafePath.beside(self._files[path]))
        size = header.size
        parser.check_size(picture.size, size, lambda: header.stored)
        annotated = picture.annotated(size)
        self._summary.left_out.update(dict(annotated.left_out))
        self._summary.labels.update(shape.label for shape in annotated.shapes)
        chosen = prompt_files.selected_objects(
            annotated, labels=self._labels, negatives=self._negatives
        )
        if not chosen:
            self._summary.without_objects += 1
            return None
        split = prompt_files.split(chosen, size)
        if not split.sound:
            raise split.refused[0]
        for error in split.refused:
            self._add_problem(picture, error)
        body = prompt_files.document(chosen, posixpath.basename(target), size)
        # Checks the limits of a whole file; its refused objects are only noted in it.
        parser.parse(body)
        return split, body

    def _target(self, path: str) -> _Target:
        file = self._files[path]
        for folder, existing in (
            (self._output, _Existing.OUTPUT),
            (self._done, _Existing.DONE),
        ):
            if file.is_relative_to(folder.path):
                return _Target(file.relative_to(folder.path).as_posix(), existing)
        return _Target(path, _Existing.NOWHERE)

    def _names(self, target: str) -> tuple[str, str]:
        """Return the possible names of a picture's prompt; the first is the one to use now.

        The long name is needed if several pictures have the same stem.
        """
        stem = posixpath.splitext(target)[0]
        short, long = f"{stem}.json", f"{target}.json"
        return (long, short) if self._stems[stem] > 1 else (short, long)

    def _is_in_progress(self, target: str, body: bytes) -> bool:
        """Return whether a daemon is working on this very prompt."""
        folder = self._work / posixpath.dirname(target)
        for name in map(posixpath.basename, self._names(target)):
            # The claim is named after the picture of a pair, or after a prompt without a picture.
            for label in (posixpath.basename(target), name):
                outer = folder / claim_name(label)
                if any(_has_content(claim / name, body) for claim in _children(outer)):
                    return True
        return False

    def _is_answered(self, path: str, target: str, body: bytes) -> bool:
        """Return whether this very prompt is in `done/`, with this very picture."""
        for name in self._names(target):
            number = 1
            prompt = self._done / name
            while files.exists(prompt):
                if _has_content(prompt, body) and _is_same_file(
                    self._files[path], self._done / target
                ):
                    return True
                number += 1
                prompt = files.with_suffix(self._done / name, f"~{number}")
        return False

    def _check_no_other_picture(self, target: str) -> None:
        """Check that a prompt without a picture is matched with the picture in `done/`.

        Raises PromptError if another picture of its name would be used.
        """
        newer = files.with_suffix(self._done / target, "~2")
        for other in (self._output / target, newer):
            if files.exists(other):
                shown_path = text.shown(other.path.relative_to(self._output.path.parent))
                raise PromptError(
                    f"another picture would be used for it: {shown_path}",
                    remedy="give a copy of the picture by --images, from outside the share",
                )

    def _copy(self, source: Path, target: SafePath) -> None:
        if files.exists(target):
            if _is_same_file(source, target):
                return
            raise PictureError(
                f"another picture has this name: {text.shown(target.name)}",
                remedy="wait until it is answered, or move it away",
            )
        data, seen = source_file.read(SafePath.beside(source))
        source_file.check_unchanged(SafePath.beside(source), seen)
        self._write_file(target, data)
        self._summary.copied += 1

    def _write_file(self, path: SafePath, body: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_whole(path, body)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise PictureError("its name is too long", remedy="rename the picture") from None
            raise
        self._touched.add(path.parent)


def _pictures_below(root: Path) -> list[str]:
    return [path for path, _ in walk(SafePath.at(root)) if _is_picture(path)]


def _is_picture(path: str) -> bool:
    name = posixpath.basename(path)
    return decode.is_picture(name) and not (is_temporary(name) or is_mask_file(name))


def _prefix_below(inner: Path, outer: Path) -> str | None:
    """Return the prefix, relative to `outer`, of all paths in `inner`; None if it is not below."""
    if inner == outer or not inner.is_relative_to(outer):
        return None
    return inner.relative_to(outer).as_posix() + "/"


def _children(folder: SafePath) -> list[SafePath]:
    try:
        return [folder / name for name in folder.names()]
    except OSError as error:
        if error.errno in files.NOT_THERE:
            return []
        raise


def _has_content(path: SafePath, body: bytes) -> bool:
    """Return whether the file exists and has exactly this content."""
    try:
        return path.lstat().st_size == len(body) and path.read_bytes() == body
    except OSError as error:
        if error.errno in files.NOT_THERE:
            return False
        raise


def _is_same_file(one: Path, other: SafePath) -> bool:
    """Return whether both files exist and have the same content."""
    try:
        return files.same_content(SafePath.beside(one), other)
    except OSError as error:
        if error.errno in files.NOT_THERE:
            return False
        raise
