"""`sam-poll cvat push`: a task of the pictures that have been answered, with their masks.

    read the answers → look at the server's share → make the task → have it take the pictures → compare → upload

The task gets an explicit list of files, so that it never takes a mask's PNG for a picture, and its frames are known by
exact name. What has been done is noted before and after each step; the next run goes on with the task it has made.

What can still go wrong here: an answer to "make a task" that got lost while somebody else makes one of the same name;
that is told and left to a person.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from threading import Event
from time import monotonic
from typing import Any

import typer

from sam_poll.console import count
from sam_poll.cvat import shapes
from sam_poll.cvat.calls import FailedError
from sam_poll.cvat.journal import Journal, digest, folder_of
from sam_poll.cvat.server import Server
from sam_poll.cvat.shapes import FramePicture, Label
from sam_poll.cvat.upload import Upload
from sam_poll.doors.layout import walk
from sam_poll.errors import CvatError, ExitCode, InputError, UsageError
from sam_poll.formats import FormatOptions
from sam_poll.formats.merge import merge_cvat
from sam_poll.fs import shown
from sam_poll.safe_path import SafePath
from sam_poll.types import Size

ENDING = ".cvat.xml"
_NAMED = 5  # names in an error
_LONGEST_S = 3600.0
_IDLE = 30  # looks at a server that neither works on the pictures nor has them
_AT_WORK = ("queued", "started")
_MOUNT = (
    "mount the share in cvat_server and cvat_worker_import (docs/cvat.md), under the path that the names begin in; "
    "--share-prefix where it lies deeper"
)


@dataclass(frozen=True, slots=True)
class Wish:
    """What `cvat push` was asked to do."""

    name: str
    prefix: str = ""
    labels: tuple[str, ...] = ()
    project: int | None = None
    polygon: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Drawn:
    """One object of an answer: `mask` in CVAT's flat form, or a list of points; its score as text."""

    label: str
    form: str
    points: list[float]
    z_order: int
    score: float | None
    group: int


@dataclass(slots=True)
class Found:
    """The answers of a folder: size and objects of each picture by its name on the server's share."""

    sizes: dict[str, Size] = field(default_factory=dict)
    objects: dict[str, list[Drawn]] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """The labels of all objects, sorted."""
        return sorted({one.label for drawn in self.objects.values() for one in drawn})


def read(folder: Path, wish: Wish) -> Found:
    """The answers below `folder`. UsageError where there are none, InputError for files that contradict each other."""
    if not wish.name.strip():
        raise UsageError("the task needs a name", place="--task-name")
    prefix = PurePosixPath(wish.prefix.strip("/")) if wish.prefix.strip("/") else PurePosixPath()
    if ".." in prefix.parts:
        raise UsageError("leads out of the share", place="--share-prefix")
    if not folder.is_dir():
        raise UsageError("there is no such folder", place=shown(folder))
    answers = SafePath.at(folder)
    names = sorted(name for name, _ in walk(answers) if name.endswith(ENDING))
    if not names:
        remedy = "add `cvat` to `formats` and answer again"
        raise UsageError(f"no {ENDING} files", place=shown(folder), remedy=remedy)
    merged = merge_cvat((name, (answers / name).read_bytes()) for name in names)
    found = Found()
    for _, image in ET.iterparse(io.BytesIO(merged)):  # noqa: S314  merge_cvat wrote it
        if image.tag != "image":
            continue
        name = str(prefix / image.get("name", ""))
        try:
            found.sizes[name] = Size(int(image.get("width", "")), int(image.get("height", "")))
            found.objects[name] = list(_drawn(image))
        except (ValueError, TypeError) as error:
            raise InputError(f"cannot be understood: {error}", place=f"image {shown(name)!r}") from None
        image.clear()
    return found


def _drawn(image: ET.Element) -> Iterator[Drawn]:
    for one in image:
        score = next((float(a.text or "nan") for a in one.findall("attribute") if a.get("name") == shapes.SCORE), None)
        more = int(one.get("z_order", "0")), score, int(one.get("group_id", "0"))
        if one.tag == "mask":
            runs = [int(value) for value in one.get("rle", "").split(",")]
            left, top, width, height = (int(one.get(key, "")) for key in ("left", "top", "width", "height"))
            yield Drawn(one.get("label", ""), "mask", [*runs, left, top, left + width - 1, top + height - 1], *more)
        elif one.tag == "polygon":
            pairs = [pair.split(",") for pair in one.get("points", "").split(";")]
            yield Drawn(one.get("label", ""), "polygon", [float(value) for x, y in pairs for value in (x, y)], *more)


def run(server: Server, found: Found, wish: Wish, state: Path, organization: str | None = None) -> ExitCode:
    """Make the task, or go on with it. CvatError, with the remedy to run the same command again where that helps."""
    labels = list(dict.fromkeys([*found.labels, *wish.labels]))
    if wish.project is not None:
        labels = _project_labels(server, wish.project, labels)
    _check_share(server, found)
    objects = sum(map(len, found.objects.values()))
    what = f"{count(len(found.sizes), 'picture')}, {count(objects, 'object')}, labels {', '.join(labels) or 'none'}"
    if wish.dry_run:
        where = f" in project {wish.project}" if wish.project is not None else ""
        typer.echo(f"dry run: a task {wish.name!r}{where} of {what}; nothing was written")
        for name in found.sizes:
            typer.echo(shown(name))
        return ExitCode.OK
    key = digest([wish.name, wish.project, organization])
    with Journal(folder_of(state, server.host, f"push-{key}")) as journal:
        task = _task(server, journal, wish, labels, sorted(found.sizes))
        frames = _frames(server, task, found)
        made = _upload(server, journal, task, frames, found, wish)
    typer.echo(f"task {task}: {what}; {count(made, 'shape')} written, {server.host}/tasks/{task}")
    return ExitCode.OK


def _project_labels(server: Server, project: int, wanted: list[str]) -> list[str]:
    there = {label.name for label in shapes.labels_of(server.labels(project=project)).values()}
    missing = [name for name in wanted if name not in there]
    if missing:
        raise CvatError(
            f"the project has no label {_some(missing)}",
            ExitCode.CVAT_REFUSED,
            place=f"project {project}",
            remedy="add it there, with a text attribute `score`: a task in a project has the project's labels",
        )
    return wanted


def _check_share(server: Server, found: Found) -> None:
    """All pictures must be on the share as the server sees it; where we may not look, the server will tell."""
    folders: dict[str, set[str]] = {}
    for name in found.sizes:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, set()).add(file)
    missing = []
    for folder, files in sorted(folders.items()):
        there = server.shared(folder)
        if there is not None:
            missing += [f"{folder}/{file}".lstrip("/") for file in sorted(files - there)]
    if missing:
        raise _not_shared(missing)


def _not_shared(names: list[str]) -> CvatError:
    reason = f"the server does not find on its share: {_some(names)}"
    return CvatError(reason, ExitCode.CVAT_REFUSED, place="share", remedy=_MOUNT)


# ── the task ──


def _task(server: Server, journal: Journal, wish: Wish, labels: list[str], names: list[str]) -> int:
    """The task that the journal knows, or a new one; with its pictures in it."""
    known = journal.read()
    task = _known_task(server, known, wish)
    if task is None:
        known = {"name": wish.name, "before": [one["id"] for one in server.tasks_named(wish.name)]}
        journal.write(known)
        task = _create(server, known, wish, labels)
    if known.get("task") != task:
        known = {**known, "task": task, "request": None}
        journal.write(known)
    if not server.task(task).get("size"):
        _fill(server, journal, known, task, names)
    return task


def _known_task(server: Server, known: Mapping[str, Any], wish: Wish) -> int | None:
    """The task of an earlier run, if it is still there; also one whose making was not heard of any more."""
    if isinstance(known.get("task"), int):
        try:
            server.task(known["task"])
        except FailedError as failure:
            if failure.kind != ExitCode.CVAT_NOT_FOUND:
                raise
            return None  # deleted since
        return int(known["task"])
    return _unheard(server, known, wish) if "before" in known else None


def _unheard(server: Server, known: Mapping[str, Any], wish: Wish) -> int | None:
    """The one task of this name that we have made since `before` was noted."""
    me = server.myself().get("id")
    new = [one for one in server.tasks_named(wish.name) if one["id"] not in known["before"]]
    ours = [one for one in new if (one.get("owner") or {}).get("id") in (me, None) and not one.get("size")]
    if len(ours) > 1:
        numbers = ", ".join(str(one["id"]) for one in ours)
        raise CvatError(
            f"tasks {numbers} have this name and no pictures; which is ours is not known",
            ExitCode.CVAT_CONFLICT,
            place=f"task {wish.name!r}",
            remedy="delete the empty ones, and run the same command again",
        )
    return int(ours[0]["id"]) if ours else None


def _create(server: Server, known: Mapping[str, Any], wish: Wish, labels: list[str]) -> int:
    # `text` because a number attribute of CVAT takes whole steps only
    score = {"name": shapes.SCORE, "mutable": False, "input_type": "text", "values": [""]}
    spec: dict[str, Any] = {"name": wish.name}
    if wish.project is None:
        spec["labels"] = [{"name": name, "attributes": [score]} for name in labels]
    else:
        spec["project_id"] = wish.project
    number = 0
    while True:
        try:
            return server.create_task(spec)
        except FailedError as failure:
            if not server.pause(number, failure):
                raise
        number += 1
        task = _unheard(server, known, wish)
        if task is not None:
            return task


def _fill(server: Server, journal: Journal, known: dict[str, Any], task: int, names: list[str]) -> None:
    """Have the server take the pictures into the task, and wait until it has."""
    state, words = server.intake(task, known.get("request")) if "asked" in known else ("unknown", "")
    if state not in _AT_WORK and not server.task(task).get("size"):
        journal.write({**known, "asked": True})
        request = _ask(server, task, names)
        known = {**known, "asked": True, "request": request}
        journal.write(known)
    pause, idle, until = Event(), 0, monotonic() + _LONGEST_S
    while True:
        state, words = server.intake(task, known.get("request"))
        if state == "failed":
            why = shown(" ".join(words.split()))[:200] or "it does not say why"
            reason = f"the server could not take the pictures: {why}"
            raise CvatError(
                reason, ExitCode.CVAT_REFUSED, place=f"task {task}", remedy=f"{_MOUNT}; then run this again"
            )
        if state not in _AT_WORK:
            if server.task(task).get("size"):
                return
            idle += 1
        if idle > _IDLE or monotonic() > until:
            reason = f"the server has not taken the pictures; its state is {shown(state)!r}"
            remedy = "look at cvat_worker_import's log; the same command goes on waiting"
            raise CvatError(reason, ExitCode.CVAT_TIMEOUT, place=f"task {task}", remedy=remedy)
        pause.wait(server.limits.poll_s)


def _ask(server: Server, task: int, names: list[str]) -> str | None:
    number = 0
    while True:
        try:
            return server.add_pictures(task, names)
        except FailedError as failure:
            if not server.pause(number, failure):
                raise
        number += 1
        state, _ = server.intake(task, None)
        if state in _AT_WORK or server.task(task).get("size"):
            return None


def _frames(server: Server, task: int, found: Found) -> dict[str, FramePicture]:
    """The task's frames by name: exactly the pictures that were asked for, in their sizes."""
    frames = {frame.name: frame for frame in shapes.frames_of(server.meta(task)).values()}
    missing, more = sorted(set(found.sizes) - set(frames)), sorted(set(frames) - set(found.sizes))
    if missing or more:
        what = f"it lacks {_some(missing)}" if missing else f"it also has {_some(more)}"
        raise CvatError(
            f"the task's pictures are not those of the answers: {what}",
            ExitCode.CVAT_REFUSED,
            place=f"task {task}",
            remedy="a task's pictures never change: push the answers under another --task-name",
        )
    for name, size in found.sizes.items():
        if frames[name].size != size:
            there = frames[name].size
            raise CvatError(
                f"the picture is {there.width}×{there.height} there, its answer is for {size.width}×{size.height}",
                ExitCode.CVAT_REFUSED,
                place=f"task {task}: {shown(name)}",
                remedy="answer the picture again that lies on the share now",
            )
    return frames


# ── the annotations ──


def _upload(
    server: Server, journal: Journal, task: int, frames: Mapping[str, FramePicture], found: Found, wish: Wish
) -> int:
    labels = {label.name: label for label in shapes.labels_of(server.labels(task=task)).values()}
    missing = [name for name in found.labels if name not in labels]
    if missing:
        raise CvatError(
            f"the task has no label {_some(missing)}",
            ExitCode.CVAT_REFUSED,
            place=f"task {task}",
            remedy="add it in CVAT, with a text attribute `score`, and run the same command again",
        )
    signs: list[bytes] = []

    def objects() -> Iterator[list[dict[str, Any]]]:
        for name, drawn in found.objects.items():
            for together in _together(drawn):
                entries = [e for one in together for e in _entries(frames[name], one, labels[one.label], wish.polygon)]
                signs.extend(map(shapes.sign, entries))
                yield entries

    upload = Upload(server, task, journal)
    upload.put(objects(), sum(map(len, found.objects.values())))
    upload.prove(signs)
    return upload.made


def _together(drawn: list[Drawn]) -> Iterator[list[Drawn]]:
    """The parts of one object together: those of one group."""
    groups: dict[int, list[Drawn]] = {}
    for index, one in enumerate(drawn):
        groups.setdefault(one.group or -index - 1, []).append(one)
    yield from groups.values()


def _entries(frame: FramePicture, one: Drawn, label: Label, polygon: bool) -> Iterator[dict[str, Any]]:
    form, lists = one.form, [one.points]
    if polygon and form == "mask":
        options = FormatOptions()
        mask = shapes.unflat([int(value) for value in one.points], one.label, one.score or 0.0)
        form, lists = (
            "polygon",
            shapes.points_of(mask, "polygon", (), tolerance_px=options.tolerance_px, min_area_px=options.min_area_px),
        )
    for points in lists:
        yield {**shapes.entry(frame.number, label, form, points, one.score), "z_order": one.z_order}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(shown(name) for name in names[:_NAMED]) + more
