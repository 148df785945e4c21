"""`sam-poll cvat prompts`: an annotation file becomes prompt files beside their pictures.

For each picture its file is copied first and its prompt written then, both whole: whenever it ends, what is there is
right, and running it again does the rest. Nothing that lies there is overwritten.

What can still go wrong here: whether a name is taken is looked at before it is written; who drops another file of that
name in the same instant is overwritten.
"""

from __future__ import annotations

import errno
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer

from sam_poll import bytesof, fs, images, prompts
from sam_poll.annotations import files
from sam_poll.annotations.reading import image_place
from sam_poll.console import count, error_console
from sam_poll.cvat.containers import listed
from sam_poll.cvat.finding import Pictures
from sam_poll.cvat.sources import Source, opened
from sam_poll.doors.claims import outer_name
from sam_poll.doors.layout import walk
from sam_poll.doors.settle import is_temporary
from sam_poll.errors import ExitCode, InputError, PictureError, PromptError, UsageError
from sam_poll.reporting import say
from sam_poll.safe_path import SafePath

_SAID = 20  # troubles told one by one; the rest is counted


def write(
    annotations: Path,
    folder: Path,
    output: Path,
    *,
    labels: Collection[str] = (),
    negatives: Collection[str] = (),
    pictures: bool = True,
) -> ExitCode:
    """Write the prompts of an annotation file into `output`, with copies of their pictures, found below `folder`.

    FAILED_JOBS where pictures were passed over, each with its reason on stderr. UsageError, PromptError: nothing can be
    done. OSError: `output` cannot be written.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", place=f"--images {folder}")
    tally = Tally()
    sources = opened(annotations, tally.refuse)
    work = _Work(folder, output, labels, negatives, pictures, tally)
    try:
        for source, path in _shown(work.found(sources)):
            work.do(source, path)
    finally:
        work.flush()
        tally.tell(output)
    if labels and tally.labels and not (tally.objects or tally.answered or tally.troubles):
        raise UsageError(
            "no object has one of these labels", place="--label", remedy=f"there are: {', '.join(sorted(tally.labels))}"
        )
    return ExitCode.FAILED_JOBS if tally.troubles else ExitCode.OK


def _shown(pairs: Sequence[tuple[Source, str]]) -> Iterator[tuple[Source, str]]:
    from rich.progress import track

    console = error_console()
    yield from track(pairs, "prompts", console=console, transient=True, disable=not console.is_terminal)


@dataclass
class Tally:
    """What has been done, to be told at the end."""

    written: int = 0
    copied: int = 0
    same: int = 0
    answered: int = 0
    nothing: int = 0
    objects: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    labels: set[str] = field(default_factory=set)
    troubles: list[InputError] = field(default_factory=list)
    foreign_links: int = 0

    def refuse(self, name: str, error: InputError) -> None:
        """A picture or a file of annotations is passed over."""
        place = name if error.place is None else error.place if name in error.place else f"{name}: {error.place}"
        self.troubles.append(type(error)(error.reason, place=place, remedy=error.remedy))

    def tell(self, output: Path) -> None:
        """The summary, on stderr."""
        for error in self.troubles[:_SAID]:
            say(error)
        if len(self.troubles) > _SAID:
            typer.echo(f"… and {len(self.troubles) - _SAID:,} more", err=True)
        lines = [f"{count(self.written, 'prompt')} written to {output}, {count(self.objects, 'object')}"]
        lines += [f"{count(self.copied, 'picture')} copied"] if self.copied else []
        lines += [f"{self.same:,} there already"] if self.same else []
        lines += [f"{self.answered:,} answered already, or being answered"] if self.answered else []
        lines += [f"{count(self.nothing, 'picture')} without anything to ask for"] if self.nothing else []
        if self.left_out:
            kinds = [count(number, kind) for kind, number in sorted(self.left_out.items())]
            lines.append(f"left out: {', '.join(kinds)}")
        lines += [f"{len(self.troubles):,} passed over"] if self.troubles else []
        lines += [f"{count(self.foreign_links, 'link')} of other users not followed"] if self.foreign_links else []
        typer.echo("; ".join(lines), err=True)


class _Work:
    """One run: where pictures are, where they go, what has been written. Paths in strings are relative, with `/`."""

    def __init__(
        self,
        root: Path,
        output: Path,
        labels: Collection[str],
        negatives: Collection[str],
        copies: bool,
        tally: Tally,
    ) -> None:
        self._root, self._output = root.resolve(), SafePath.at(SafePath.at(output).root.real)
        self._work, self._done = (SafePath.at(self._output.path.parent / name) for name in ("work", "done"))
        self._labels, self._negatives, self._copies, self._tally = frozenset(labels), negatives, copies, tally
        below = listed(self._root, (self._output.path, self._done.path))
        tally.foreign_links = below.foreign
        self._files = {path: file for path, file in below.files.items() if _is_picture(path)}
        self._pictures = Pictures(self._files, _inside(self._output.path, self._root))
        targets = {self._target(path)[0] for path in self._files}
        if self._output.is_dir():
            targets.update(_pictures_below(self._output.path))
        self._stems = Counter(posixpath.splitext(target)[0] for target in targets)
        self._touched: set[SafePath] = set()

    def found(self, sources: Sequence[Source]) -> list[tuple[Source, str]]:
        """The sources with their pictures; the others are passed over."""
        pairs: list[tuple[Source, str]] = []
        for source in sources:
            try:
                pairs.append((source, self._pictures.find(source.names)))
            except InputError as error:
                self._tally.refuse(image_place(source.names[0]), error)
        times = Counter(path for _, path in pairs)
        for source, path in pairs:
            if times[path] > 1:
                reason = f"is one of {times[path]} names that all fit {fs.shown(path)}"
                remedy = "name the folder that the names are relative to by --images"
                self._tally.refuse(image_place(source.names[0]), PictureError(reason, remedy=remedy))
        return [(source, path) for source, path in pairs if times[path] == 1]

    def do(self, source: Source, path: str) -> None:
        """Write one picture's prompt, or pass it over. OSError: the output cannot be written."""
        try:
            self._do(source, path)
        except InputError as error:
            self._tally.refuse(image_place(source.names[0]), error)

    def flush(self) -> None:
        """Make what has been written survive a power cut."""
        for folder in self._touched:
            fs.sync_folder(folder)

    def _do(self, source: Source, path: str) -> None:
        target, lies_there = self._target(path)
        header = bytesof.header(SafePath.beside(self._files[path]))
        size = header.size
        prompts.check_size(source.size, size, lambda: header.stored)
        annotated = source.made(size)
        self._tally.left_out.update(dict(annotated.left_out))
        self._tally.labels.update(shape.label for shape in annotated.shapes)
        chosen = files.asked(annotated, labels=self._labels, negatives=self._negatives)
        if not chosen:
            self._tally.nothing += 1
            return
        found = files.split(chosen, size)
        if not found.sound:
            raise found.refused[0]
        for error in found.refused:
            self._tally.refuse(image_place(source.names[0]), error)
        body = files.document(chosen, posixpath.basename(target), size)
        # Of the rules for a whole file, which is not refused for one of its objects.
        prompts.parse(body)
        # In the order in which a daemon moves them: what is moved between two looks is met by the later one.
        same = any(_holds(self._output / name, body) for name in self._names(target))
        if not same and (self._at_work(target, body) or self._answered(path, target, body)):
            self._tally.answered += 1
            return
        prompt = self._output / self._names(target)[0]
        if not same and fs.exists(prompt):
            reason = f"another prompt lies there already: {fs.shown(prompt.name)}"
            raise PromptError(reason, remedy="wait until it is answered, or move it away")
        if lies_there is self._done:
            self._check_alone(target)
        elif lies_there is None and self._copies:
            self._copy(self._files[path], self._output / target)
        self._tally.objects += len(found.sound)
        if same:
            self._tally.same += 1
            return
        self._written(prompt, body)
        self._tally.written += 1

    def _target(self, path: str) -> tuple[str, SafePath | None]:
        """Where a picture belongs below the output, and the folder of the share that it lies in already."""
        there = self._files[path]
        for folder in (self._output, self._done):
            if there.is_relative_to(folder.path):
                return there.relative_to(folder.path).as_posix(), folder
        return path, None

    def _names(self, target: str) -> tuple[str, str]:
        """What the prompt of a picture may be called; the first is what it is called now."""
        stem = posixpath.splitext(target)[0]
        short, long = f"{stem}.json", f"{target}.json"
        return (long, short) if self._stems[stem] > 1 else (short, long)

    def _at_work(self, target: str, body: bytes) -> bool:
        """Whether a daemon is answering this very prompt."""
        folder = self._work / posixpath.dirname(target)
        for name in map(posixpath.basename, self._names(target)):
            for label in (posixpath.basename(target), name):  # of a pair, and of a lone prompt
                outer = folder / outer_name(label)
                if any(_holds(claim / name, body) for claim in _listed(outer)):
                    return True
        return False

    def _answered(self, path: str, target: str, body: bytes) -> bool:
        """Whether this very prompt lies in `done/`, with this very picture."""
        for name in self._names(target):
            number, asked = 1, self._done / name
            while fs.exists(asked):
                if _holds(asked, body) and _same(self._files[path], self._done / target):
                    return True
                number += 1
                asked = fs.with_suffix(self._done / name, f"~{number}")
        return False

    def _check_alone(self, target: str) -> None:
        """PromptError where a prompt alone would be taken for another picture than the one in `done/`."""
        newer = fs.with_suffix(self._done / target, "~2")
        for other in (self._output / target, newer):
            if fs.exists(other):
                there = other.path.relative_to(self._output.path.parent)
                raise PromptError(
                    f"another picture would be taken for it: {fs.shown(there)}",
                    remedy="give a copy of the picture by --images, from a folder outside the share",
                )

    def _copy(self, picture: Path, target: SafePath) -> None:
        if fs.exists(target):
            if _same(picture, target):
                return
            raise PictureError(
                f"another picture of this name lies there already: {fs.shown(target.name)}",
                remedy="wait until it is answered, or move it away",
            )
        data, seen = bytesof.read(SafePath.beside(picture))
        bytesof.check_unchanged(SafePath.beside(picture), seen)
        self._written(target, data)
        self._tally.copied += 1

    def _written(self, path: SafePath, body: bytes) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fs.write_whole(path, body)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise PictureError("its name is too long", remedy="rename the picture") from None
            raise
        self._touched.add(path.parent)


def _pictures_below(root: Path) -> list[str]:
    return [path for path, _ in walk(SafePath.at(root)) if _is_picture(path)]


def _is_picture(path: str) -> bool:
    name = posixpath.basename(path)
    return images.is_picture(name) and not is_temporary(name)


def _inside(inner: Path, outer: Path) -> str | None:
    """How the paths of what lies in `inner` begin, relative to `outer`; None: not below it, or the same."""
    if inner == outer or not inner.is_relative_to(outer):
        return None
    return inner.relative_to(outer).as_posix() + "/"


def _listed(folder: SafePath) -> list[SafePath]:
    try:
        return [folder / name for name in folder.names()]
    except OSError as error:
        if error.errno in fs.NOT_THERE:
            return []
        raise


def _holds(path: SafePath, body: bytes) -> bool:
    try:
        return path.lstat().st_size == len(body) and path.read_bytes() == body
    except OSError as error:
        if error.errno in fs.NOT_THERE:
            return False
        raise


def _same(one: Path, other: SafePath) -> bool:
    """Whether two files have the same bytes; no, where one is not there."""
    try:
        return fs.same(SafePath.beside(one), other)
    except OSError as error:
        if error.errno in fs.NOT_THERE:
            return False
        raise
