"""What `predict` and `check` do before (or instead of) running a network: flags and files become jobs or findings.

What can still go wrong here: `check` looks at a picture's header only; whether its pixels decode is seen when it is
answered.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sam_poll import bytesof, images, prompts
from sam_poll import settings as settings_
from sam_poll.annotations import Annotated, Asked, files
from sam_poll.annotations.reading import image_place
from sam_poll.complaints import complaints
from sam_poll.doors.layout import ANNOTATION_ENDINGS, Layout, walk
from sam_poll.doors.settle import PROMPT_ENDINGS, Ambiguous, Index, is_temporary
from sam_poll.doors.spread import asked
from sam_poll.doors.waiting import without_partner
from sam_poll.errors import InputError, PictureError, PromptError, SamPollError, SettingsError, ShareError, UsageError
from sam_poll.headers import for_decoder
from sam_poll.prompt_forms import Label
from sam_poll.prompts import PromptFile
from sam_poll.safe_path import SafePath
from sam_poll.sidecars import is_aux
from sam_poll.types import Box, Everything, Job, Mosaic, Point, Prompt

_MOST_LONE = 1000


def point_flag(text: str) -> Point:
    """`x,y` or `x,y,label`, label 1 foreground (default) or 0 background. UsageError."""
    numbers = _numbers(text, "--point", "x,y or x,y,0 for background", (2, 3))
    if len(numbers) == 3 and numbers[2] not in (0, 1):
        raise UsageError("a point's label is 1 (foreground) or 0 (background)", place=f"--point {text}")
    return Point(numbers[0], numbers[1], int(numbers[2]) if len(numbers) == 3 else 1)


def label_flag(text: str) -> str:
    """A label, as prompt files have it. UsageError."""
    try:
        TypeAdapter(Label).validate_python(text)
    except ValidationError as error:
        (problem, *_) = complaints(error, text, lambda loc: ())
        raise UsageError(problem.reason, place=f"--label {text!r}", remedy="use a plain name on one line") from None
    return text


def box_flag(text: str) -> Box:
    """`x0,y0,x1,y1`. UsageError."""
    x0, y0, x1, y1 = _numbers(text, "--box", "x0,y0,x1,y1", (4,))
    if x0 >= x1 or y0 >= y1:
        raise UsageError("the box is empty or inside out", place=f"--box {text}", remedy="x0 < x1 and y0 < y1")
    return Box(x0, y0, x1, y1)


def _numbers(text: str, flag: str, form: str, lengths: tuple[int, ...]) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in lengths or any(n != n or abs(n) == float("inf") for n in numbers):
        raise UsageError("not the numbers expected", place=f"{flag} {text}", remedy=f"write {form}")
    return numbers


def prompts_of_flags(
    points: Sequence[str], boxes: Sequence[str], label: str, everything: bool = False
) -> tuple[Prompt, ...] | Everything:
    """All points and one box are one object; several boxes are several objects. Empty where no flag is given."""
    if everything:
        if points or boxes:
            raise UsageError("--everything is segmenting without a prompt: it cannot be combined with --point or --box")
        return Everything()
    label = label_flag(label)
    placed = tuple(map(point_flag, points))
    framed = tuple(map(box_flag, boxes))
    if len(framed) > 1 and placed:
        raise UsageError("points and several boxes do not say which belongs to which", remedy="use --prompt FILE")
    if placed and not framed and all(p.label == 0 for p in placed):
        raise UsageError("there is no foreground point", place="--point", remedy="add one, or a --box")
    if len(framed) > 1:
        return tuple(Prompt(label, box=box) for box in framed)
    return (Prompt(label, placed, framed[0] if framed else None),) if placed or framed else ()


def jobs_for(pictures: Sequence[Path], given: tuple[Prompt, ...] | Everything, prompt_file: Path | None) -> list[Job]:
    """One job a picture: with the prompts given, or the prompt file, or the prompt that lies beside the picture.

    UsageError, PromptError; outputs are named by the picture's stem, with a number where a stem comes twice. A picture
    that is not there gets a job with a fault.
    """
    if given and prompt_file:
        raise UsageError("--prompt cannot be combined with --point, --box or --everything")
    shared = PromptFile(given) if given else _read_prompt(prompt_file) if prompt_file else None
    jobs, used = [], set()
    for picture in pictures:
        name, number = picture.stem, 2
        while name in used:
            name, number = f"{picture.stem}~{number}", number + 1
        used.add(name)
        file = picture.resolve()  # who names a link means the file; the pipeline follows none
        there = os.path.lexists(file)
        if not there:
            fault = PictureError("cannot be read: No such file or directory")
            jobs.append(Job(name, picture.name, SafePath.beside(file), (), fault=fault))
            continue
        read = shared or _prompt_beside(picture)
        jobs.append(Job(name, picture.name, SafePath.beside(file), read.prompts, image_size=read.image_size))
    return jobs


def faults_of(jobs: Sequence[Job], max_pixels: int) -> dict[Job, SamPollError]:
    """Which of the jobs are bound to be refused, as far as it can be told quickly: files that cannot be opened, and
    pictures that are cut off, have no readable header or do not fit their prompts, up to the first good one.

    Where all are refused no model needs to be loaded; where one is good, the pipeline refuses the others.
    """
    faults: dict[Job, SamPollError] = {}
    good = False
    for job in jobs:
        try:
            _try(job, None if good else max_pixels)
            good = True
        except OSError as error:
            faults[job] = PictureError(f"cannot be read: {error.strerror or error}")
        except SamPollError as error:
            faults[job] = error
    return faults


def _try(job: Job, max_pixels: int | None) -> None:
    assert isinstance(job.picture, SafePath)
    if job.fault:
        raise job.fault
    if max_pixels is None:
        bytesof.openable(job.picture)
        return
    data, _ = bytesof.read(job.picture)
    header = images.read_header(data, max_pixels=max_pixels)
    for_decoder(data, header)
    prompts.check_size(job.image_size, header.size, lambda: header.stored)
    if isinstance(job.prompts, tuple):
        prompts.fit(job.prompts, header.size)


def make_writable(folder: Path) -> None:
    """Make the folder for the answers, and see that files can be made in it. UsageError, ShareError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UsageError("is no folder", place=f"-o {folder}", remedy="name a folder; it is made if needed") from None
    except OSError as error:
        reason = f"answers cannot be written there: {error.strerror or error}"
        raise ShareError(reason, place=f"-o {folder}", remedy="name a folder that this user may write to") from error


def _prompt_beside(picture: Path) -> PromptFile:
    for ending in sorted(PROMPT_ENDINGS):
        beside = picture.with_suffix(ending)
        if beside.is_file():
            return _read_prompt(beside)
    raise UsageError(
        "no prompt",
        place=str(picture),
        remedy=f"give --point, --box, --everything or --prompt, or put {picture.stem}.json beside it",
    )


def _read_prompt(path: Path) -> PromptFile:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot be read: {error.strerror}", place=str(path)) from error
    try:
        return prompts.parse(data)
    except PromptError as error:
        error.place = f"{path}: {error.place}" if error.place else str(path)
        raise


@dataclass(frozen=True)
class Finding:
    """One file looked at; `error` None: it is fine."""

    path: Path
    error: SamPollError | None = None


def check(paths: Iterable[Path]) -> Iterator[Finding]:
    """Look at prompts, pictures' headers and settings files, folders with all that is in them."""
    for path in paths:
        if path.is_dir():
            closed: list[str] = []
            found = walk(SafePath.at(path), closed=closed.append)
            names = sorted(name for name, entry in found if not is_temporary(entry.name))
            for folder in sorted(closed):
                remedy = "let the daemon's user read and write there"
                yield Finding(path / folder, InputError("may not be read", remedy=remedy))
            index = Index(n for n in names if images.is_picture(n))
            tiled = _tiled(path, names, index)
            lone = _without_partner(path)
            for name in names:
                if name in lone:
                    yield Finding(path / name, lone[name])
                elif _is_annotations(name):
                    yield _annotations(path / name)
                elif path / name in tiled:
                    yield _open(path / name)
                elif images.is_picture(name) or _is_prompt(name):
                    yield _look(path / name, _partner(path, name, index))
        elif path.exists() and not path.is_file():  # a pipe, which nobody may ever write to
            yield Finding(path, InputError("cannot be read: it is not a file"))
        elif path.suffix.lower() in (".yaml", ".yml"):
            yield _settings(path)
        elif _is_annotations(path.name):
            yield _annotations(path)
        elif images.is_picture(path.name) or _is_prompt(path.name):
            beside = sorted(p.name for p in path.parent.iterdir()) if path.exists() else []
            index = Index(name for name in beside if images.is_picture(name))
            near = [name for name in beside if name.startswith(path.stem)]
            in_tiles = path in _tiled(path.parent, near, index)
            yield _open(path) if in_tiles else _look(path, _partner(path.parent, path.name, index))
        else:
            kinds = "a prompt (.json, .prompt), CVAT's .xml, a picture, a settings file (.yaml) or a folder"
            yield Finding(
                path, InputError("cannot be checked" if path.exists() else "is not there", remedy=f"give {kinds}")
            )


def _without_partner(folder: Path) -> Mapping[str, SamPollError]:
    """What has no partner, if the folder is used as a share's input; not in a folder of prompts alone."""
    beside = settings_.absolute(folder).parent
    share = Layout.at(
        input=folder, work=beside / "work", output=beside / "out", done=beside / "done", failed=beside / "failed"
    )
    waiting = without_partner(share, most=_MOST_LONE)
    for error in waiting.explained.values():
        error.place = None  # the finding names the file
    return waiting.explained if waiting.any_picture else {}


def _is_prompt(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PROMPT_ENDINGS


def _is_annotations(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ANNOTATION_ENDINGS and not is_aux(name)


def _annotations(path: Path) -> Finding:
    """Whether all its pictures would get a prompt file, each object of them an answer, and are of the size stated."""
    try:
        for annotated, chosen in asked(_content(path), path.name, images.is_picture)[0]:
            _check_asked(annotated, chosen, _lies_near(path, annotated.name))
    except OSError as error:
        return Finding(path, InputError(f"cannot be read: {error.strerror}"))
    except SamPollError as error:
        return Finding(path, error)
    return Finding(path)


def _check_asked(annotated: Annotated, chosen: Sequence[Asked], picture: Path | None) -> None:
    """PromptError, PictureError where the picture's prompt, or one of its objects, would be refused."""
    size = annotated.size
    try:
        if picture is not None:
            header = bytesof.header(SafePath.beside(picture))
            prompts.check_size(size, header.size, lambda: header.stored)
            size = header.size
        refused = files.split(chosen, size).refused
        if refused:
            raise refused[0]
    except InputError as error:
        place = image_place(annotated.name)
        error.place = f"{place}, {error.place}" if error.place else place
        raise


def _lies_near(annotations: Path, name: str) -> Path | None:
    """The picture that an annotation file means by a name: beside the file, its folders cut one after another, or
    below the share whose `in` the file lies in."""
    parts = name.split("/")
    tried = [annotations.parent.joinpath(*parts[start:]) for start in range(len(parts))]
    return next((path for path in (*tried, annotations.parent.parent / name) if path.is_file()), None)


def _partner(folder: Path, name: str, index: Index) -> Path | None:
    found = index.find(name) if _is_prompt(name) else None
    return folder / found if isinstance(found, str) and not isinstance(found, Ambiguous) else None


def _tiled(folder: Path, names: Iterable[str], index: Index) -> set[Path]:
    """The pictures that a prompt asks for as a mosaic: they may be larger than others."""
    found = set()
    for name in filter(_is_prompt, names):
        try:
            read = prompts.parse(_content(folder / name, prompts.MAX_BYTES + 1))
        except (OSError, PromptError):
            continue  # said where it is looked at itself
        picture = (folder / name).with_name(read.image) if read.image else _partner(folder, name, index)
        if picture and isinstance(read.prompts, Mosaic):
            found.add(picture)
    return found


def _content(path: Path, most: int = -1) -> bytes:
    """A regular file's bytes. What was one when it was listed may be a pipe by now, which nobody waits for. OSError."""
    return SafePath.beside(path.resolve()).read_bytes(most)


def _open(path: Path) -> Finding:
    """Whether a picture can be read in windows; without the extra `geo`, whether it can be read at all."""
    try:
        try:
            from sam_poll.mosaic.source import opened
        except ModuleNotFoundError:
            path.open("rb").close()
            return Finding(path)
        with opened(SafePath.beside(path)):
            return Finding(path)
    except OSError as error:
        return Finding(path, InputError(f"cannot be read: {error.strerror}"))
    except SamPollError as error:
        error.place = None if error.place == str(path) else error.place
        return Finding(path, error)


def _look(path: Path, picture: Path | None) -> Finding:
    try:
        data = _content(path)
        if not _is_prompt(path.name):
            images.read_header(data)
            return Finding(path)
        read = prompts.parse(data)
        picture = path.with_name(read.image) if read.image else picture
        if picture and picture.is_file() and isinstance(read.prompts, tuple):
            header = bytesof.header(SafePath.beside(picture))
            prompts.check_size(read.image_size, header.size, lambda: header.stored)
            prompts.fit(read.prompts, header.size)
    except OSError as error:
        return Finding(path, InputError(f"cannot be read: {error.strerror}"))
    except SamPollError as error:
        return Finding(path, error)
    return Finding(path)


def _settings(path: Path) -> Finding:
    try:
        settings_.load(path, env={})
    except SettingsError as error:
        return Finding(path, error)
    return Finding(path)
