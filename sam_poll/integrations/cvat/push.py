"""`sam-poll cvat push`: create a CVAT task of the answered pictures, with their masks.

    read the answers → find their pictures in the tasks on the server → check the server's share
    → create a task of the others → upload the shapes

A task gets an explicit list of files, so that it never includes a mask's PNG, and its frames are
matched by exact name. Which pictures are in a task already, the server tells: those are never
pushed again. The journal tells which tasks this command has created, and which shapes it has
uploaded to them and read back: what a person has changed or deleted since is left as it is.

A task's pictures never change. With `update`, pictures that are in no task are pushed as a further
task: of the project, or of the same name.

Limitations: two machines that push the same pictures at the same time create a task each. Shapes
are uploaded only to tasks that this journal has created.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from sam_poll.core.errors import CvatError, ExitCode, UsageError
from sam_poll.core.text import listed, shown
from sam_poll.formats.registry import FormatOptions
from sam_poll.integrations.cvat import shapes
from sam_poll.integrations.cvat.answers import AnswerSet, ShapeRecord
from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.journal import Journal, digest, folder_of
from sam_poll.integrations.cvat.shapes import Fingerprint, FramePicture, Label, ServerShapes
from sam_poll.integrations.cvat.task_creation import MOUNT, TaskCreation
from sam_poll.integrations.cvat.transport import RequestFailedError
from sam_poll.integrations.cvat.upload import Entry, Upload
from sam_poll.runtime.console import count

DONE = "done"  # the journal's list of objects whose shapes have been read back from the server


@dataclass(frozen=True, slots=True)
class PushOptions:
    """The options of `cvat push`; `name` is `--task-name`. Raises UsageError for an empty name."""

    name: str
    labels: tuple[str, ...] = ()
    project: int | None = None
    update: bool = False
    polygon: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UsageError("the task needs a name", place="--task-name")


@dataclass(frozen=True, slots=True)
class TaskPictures:
    """The pictures of a task on the server.

    `names` are those of all its frames, `frames` the frames by name without the deleted ones.
    """

    task: int
    names: frozenset[str]
    frames: Mapping[str, FramePicture]


@dataclass(slots=True)
class Survey:
    """Where the pictures of the answers are.

    `own` are the tasks that this journal has created, `others` further ones in which a picture
    counts as pushed; `new` are the pictures that are in none of them, sorted.
    """

    own: list[TaskPictures] = field(default_factory=list)
    others: list[TaskPictures] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Objects:
    """The objects of a task's pictures, each with its picture's name.

    `done` are those whose shapes the journal lists as read back from the server, `missing` the
    others; `keys` are the journal's lines for the latter.
    """

    done: list[tuple[str, list[ShapeRecord]]] = field(default_factory=list)
    missing: list[tuple[str, list[ShapeRecord]]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The number of shapes created, and of earlier ones that are not on the server any more."""

    created: int = 0
    changed: int = 0


def run(
    client: CvatClient,
    answers: AnswerSet,
    options: PushOptions,
    state: Path,
    organization: str | None = None,
) -> ExitCode:
    """Push the pictures that are in no task yet, and upload the shapes.

    `state` is the folder for journals. Raises CvatError; its remedy says if the same command should
    be run again.
    """
    key = digest([options.name, options.project, organization])
    journal = Journal(folder_of(state, client.host, f"push-{key}"))
    command = _PushRun(client, answers, options, journal)
    if options.dry_run:
        command.print_plan()
        return ExitCode.OK
    with journal:
        try:
            command.push()
        except RequestFailedError as failure:
            if failure.transient or command.has_task:
                failure.remedy = command.with_continuation(failure.remedy)
            raise
        except KeyboardInterrupt:
            typer.echo(command.with_continuation("interrupted"), err=True)
            raise
    return ExitCode.OK


class _PushRun:
    """One run of the command; the journal is locked except for a dry run."""

    def __init__(
        self,
        client: CvatClient,
        answers: AnswerSet,
        options: PushOptions,
        journal: Journal,
    ) -> None:
        self._client = client
        self._answers = answers
        self._options = options
        self._journal = journal
        self._creation = TaskCreation(client, journal, options.name)
        self._native_score = False
        self._done: set[str] = set()

    def print_plan(self) -> None:
        """Print what would be pushed. Raises CvatError as `push` does before it writes anything."""
        survey = self._checked_survey()
        options = self._options
        where = f" in project {options.project}" if options.project is not None else ""
        if survey.new:
            typer.echo(
                f"dry run: a task {options.name!r}{where} of "
                f"{self._content(self._answers.of(survey.new))}; nothing was written"
            )
        else:
            typer.echo("dry run: all pictures are in a task already; nothing was written")
        for name in survey.new:
            typer.echo(shown(name))
        self._print_others(survey)

    def push(self) -> None:
        """Complete the tasks of earlier runs, and create one of the new pictures."""
        self._done = self._journal.lines(DONE)
        survey = self._checked_survey()
        changed = 0
        is_written = False
        for pictures in survey.own:
            outcome = self._upload(pictures, check_done=pictures is survey.own[-1])
            changed += outcome.changed
            if outcome.created:
                is_written = True
                self._print_task(pictures, outcome)
        new = survey.new
        while new:
            is_written = True
            pictures = self._new_task(new)
            self._print_task(pictures, self._upload(pictures))
            new = [name for name in new if name not in pictures.names]
        self._print_others(survey)
        if not is_written:
            self._print_nothing_to_do(survey, changed)

    @property
    def has_task(self) -> bool:
        """Return whether this command has created a task, now or earlier."""
        return bool(self._creation.known)

    def with_continuation(self, text: str | None) -> str:
        """Return the text with the addition that the same command continues, and with which task.

        Where the text tells to run the command again, it is not repeated.
        """
        known = self._creation.known
        who = "it" if text and "same command" in text else "the same command"
        where = f"with task {known[-1]}" if known else "from here"
        addition = f"{who} continues {where}"
        return f"{text}; {addition}" if text else addition

    # ── what is on the server ──

    def _checked_survey(self) -> Survey:
        """Return where the pictures are. Raises CvatError if they may not be pushed."""
        self._native_score = shapes.has_native_score(self._client.version())
        if self._options.project is not None:
            self._check_project_labels(self._options.project)
        survey = self._survey()
        self._check_pictures(survey)
        self._check_share(survey.new)
        return survey

    def _check_project_labels(self, project: int) -> None:
        labels = shapes.labels_of(self._client.labels(project=project)).values()
        existing = {label.name for label in labels}
        missing = [name for name in self._all_labels() if name not in existing]
        if missing:
            advice = shapes.advice_for_new_labels(native_score=self._native_score)
            raise CvatError(
                f"the project has no label {listed(missing)}",
                ExitCode.CVAT_REFUSED,
                place=f"project {project}",
                remedy=f"add it there{advice}: a task in a project has the project's labels",
            )

    def _all_labels(self) -> list[str]:
        """Return the labels of the answers, and further ones that were requested."""
        return list(dict.fromkeys([*self._answers.labels, *self._options.labels]))

    def _survey(self) -> Survey:
        survey = Survey()
        own = self._creation.known
        similar = {int(entry["id"]): entry for entry in self._similar_tasks()}
        for task in own:
            entry = similar.pop(task, None) or self._task(task)
            if entry and entry.get("size"):
                survey.own.append(self._pictures_of(task))
        for task, entry in similar.items():
            if entry.get("size"):
                survey.others.append(self._pictures_of(task))
        placed = {name for one in (*survey.own, *survey.others) for name in one.names}
        survey.new = sorted(name for name in self._answers.sizes if name not in placed)
        return survey

    def _similar_tasks(self) -> list[Mapping[str, Any]]:
        """Return the tasks whose pictures count as pushed.

        They are those of the same name, or all of the project that is updated.
        """
        project = self._options.project
        if project is not None and self._options.update:
            return self._client.tasks_in_project(project)
        named = self._client.tasks_named(self._options.name)
        return [entry for entry in named if project in (None, entry.get("project_id"))]

    def _task(self, task: int) -> Mapping[str, Any] | None:
        """Return the task itself; None if it has been deleted."""
        try:
            return self._client.task(task)
        except RequestFailedError as failure:
            if failure.kind != ExitCode.CVAT_NOT_FOUND:
                raise
            return None

    def _pictures_of(self, task: int) -> TaskPictures:
        meta = self._client.meta(task)
        names = frozenset(str(frame.get("name")) for frame in meta["frames"])
        frames = {frame.name: frame for frame in shapes.frames_of(meta).values()}
        return TaskPictures(task, names, frames)

    def _check_pictures(self, survey: Survey) -> None:
        """Raise CvatError if the pictures may not be pushed to tasks.

        Without `update`, the tasks of earlier runs must have exactly the pictures of the answers.
        """
        if not self._options.update:
            wanted = set(self._answers.sizes)
            own_names = frozenset[str]().union(*(one.names for one in survey.own))
            if survey.own:
                _check_same_pictures(wanted, own_names, [one.task for one in survey.own])
            for one in survey.others:
                _check_not_pushed(wanted - own_names, one)

    def _check_share(self, names: Iterable[str]) -> None:
        """Check that the server sees these pictures on its share.

        A folder that may not be listed is not checked; the import then fails if a picture is
        missing.
        """
        folders: dict[str, set[str]] = {}
        for name in names:
            folder, _, file = name.rpartition("/")
            folders.setdefault(folder, set()).add(file)
        missing = []
        for folder, files in sorted(folders.items()):
            existing = self._client.share_names(folder)
            if existing is not None:
                missing += [f"{folder}/{file}".lstrip("/") for file in sorted(files - existing)]
        if missing:
            raise CvatError(
                f"not found on the server's share: {listed(missing)}",
                ExitCode.CVAT_REFUSED,
                place="share",
                remedy=MOUNT,
            )

    # ── what is written ──

    def _new_task(self, names: list[str]) -> TaskPictures:
        """Return a task of these pictures, created now or begun by an earlier run.

        Raises CvatError unless it has exactly these pictures; with `update`, a task that an earlier
        run has begun may have others.
        """
        known = self._creation.known
        task = self._creation.task_with(names, self._labels_of_new_task())
        pictures = self._pictures_of(task)
        if not self._options.update or task not in known:
            _check_same_pictures(set(names), pictures.names, [task])
        return pictures

    def _labels_of_new_task(self) -> dict[str, Any]:
        """Return the part of a new task's specification that gives it labels."""
        if self._options.project is not None:
            return {"project_id": self._options.project}
        names = self._all_labels()
        return {
            "labels": [shapes.new_label(name, native_score=self._native_score) for name in names]
        }

    def _upload(self, pictures: TaskPictures, *, check_done: bool = False) -> _Outcome:
        """Upload the shapes that the journal does not list as done.

        `check_done`: read the task even if all shapes are done, and delete duplicates of them that
        a late write of an earlier run has made. Raises CvatError.
        """
        task = pictures.task
        objects = self._objects(pictures)
        if not objects.missing and not (check_done and objects.done):
            return _Outcome()
        _check_sizes(pictures, self._answers.of(dict.fromkeys(n for n, _ in objects.missing)))
        labels = self._labels(task, objects)
        fingerprints: list[Fingerprint] = []

        def missing() -> Iterator[list[Entry]]:
            for name, parts in objects.missing:
                entries = list(self._entries(pictures.frames[name], parts, labels))
                fingerprints.extend(map(shapes.fingerprint, entries))
                yield entries

        upload = Upload(self._client, task, self._journal)
        if objects.missing:
            upload.put(missing(), len(objects.missing))
        done = {
            shapes.fingerprint(entry)
            for name, parts in objects.done
            for entry in self._entries(pictures.frames[name], parts, labels)
        }
        on_server = ServerShapes(upload.verify(fingerprints, done)["shapes"])
        self._journal.append(DONE, objects.keys)
        return _Outcome(upload.created, sum(one not in on_server for one in done))

    def _objects(self, pictures: TaskPictures) -> _Objects:
        """Return the objects of the task's pictures, without those of deleted frames."""
        names = [name for name in pictures.frames if name in self._answers.sizes]
        found = _Objects()
        for name, parts in self._answers.of(names).objects():
            key = self._done_key(pictures.task, name, parts)
            if key in self._done:
                found.done.append((name, parts))
            else:
                found.missing.append((name, parts))
                found.keys.append(key)
        return found

    def _done_key(self, task: int, name: str, parts: list[ShapeRecord]) -> str:
        """Return the journal's line for an object whose shapes are on the server."""
        points = [[part.label, part.form, part.points] for part in parts]
        return f"{task}-{digest([name, points, self._options.polygon])}"

    def _labels(self, task: int, objects: _Objects) -> dict[str, Label]:
        """Return the task's labels by name.

        Raises CvatError if one of the objects to write has another label.
        """
        found = shapes.labels_of(self._client.labels(task=task), native_score=self._native_score)
        labels = {label.name: label for label in found.values()}
        wanted = {part.label for _, parts in objects.missing for part in parts}
        missing = sorted(wanted - set(labels))
        if missing:
            advice = shapes.advice_for_new_labels(native_score=self._native_score)
            raise CvatError(
                f"the task has no label {listed(missing)}",
                ExitCode.CVAT_REFUSED,
                place=f"task {task}",
                remedy=f"add it in CVAT{advice}, and run the same command again",
            )
        return labels

    def _entries(
        self, frame: FramePicture, parts: list[ShapeRecord], labels: Mapping[str, Label]
    ) -> Iterator[Entry]:
        """Yield the shapes of an object as the API takes them, without those of unknown labels."""
        for part in parts:
            if part.label in labels:
                yield from _entries(frame, part, labels[part.label], polygon=self._options.polygon)

    # ── printing ──

    def _content(self, answers: AnswerSet) -> str:
        labels = dict.fromkeys([*answers.labels, *self._options.labels])
        return (
            f"{count(len(answers.sizes), 'picture')}, {count(answers.shape_count, 'object')}, "
            f"labels {', '.join(labels) or 'none'}"
        )

    def _print_task(self, pictures: TaskPictures, outcome: _Outcome) -> None:
        answers = self._answers.of(pictures.names & self._answers.sizes.keys())
        typer.echo(
            f"task {pictures.task}: {self._content(answers)}; "
            f"{count(outcome.created, 'shape')} written{_changed(outcome.changed)}, "
            f"{self._client.host}/tasks/{pictures.task}"
        )

    def _print_others(self, survey: Survey) -> None:
        """Print which pictures are in tasks that this command has not created."""
        for one in survey.others:
            held = len(one.names & self._answers.sizes.keys())
            if held:
                typer.echo(
                    f"task {one.task} has {count(held, 'picture')} of these already; this command "
                    "has not created it, and writes nothing to it",
                    err=True,
                )

    def _print_nothing_to_do(self, survey: Survey, changed: int) -> None:
        tasks = [
            one.task
            for one in (*survey.own, *survey.others)
            if one.names & self._answers.sizes.keys()
        ]
        typer.echo(
            f"all is there already: {self._content(self._answers)}, in "
            f"{'task' if len(tasks) == 1 else 'tasks'} {listed(list(map(str, tasks)))}; "
            f"nothing was written{_changed(changed)}, {self._client.host}/tasks/{tasks[-1]}"
        )


def _changed(number: int) -> str:
    """Return an addition to a summary: shapes that a person has changed or deleted."""
    return f", {count(number, 'earlier shape')} changed or deleted in CVAT" if number else ""


def _check_same_pictures(wanted: set[str], existing: frozenset[str], tasks: list[int]) -> None:
    """Raise CvatError unless the tasks have exactly the pictures of the answers."""
    missing = sorted(wanted - existing)
    unexpected = sorted(existing - wanted)
    if missing:
        difference = f"lacks {listed(missing)}"
        remedy = "give --update to push what is new as a further task, or another --task-name"
    elif unexpected:
        difference = f"also has {listed(unexpected)}"
        remedy = "push the answers under another --task-name, or give --update to push what is new"
    else:
        return
    raise CvatError(
        f"the task's pictures are not those of the answers: it {difference}",
        ExitCode.CVAT_REFUSED,
        place=f"task {', '.join(map(str, tasks))}",
        remedy=f"a task's pictures never change: {remedy}",
    )


def _check_not_pushed(wanted: set[str], other: TaskPictures) -> None:
    """Raise CvatError if pictures are in a task that this journal has not created."""
    held = sorted(wanted & other.names)
    if held:
        raise CvatError(
            f"a task of this name has these pictures already: {listed(held)}",
            ExitCode.CVAT_REFUSED,
            place=f"task {other.task}",
            remedy="give --update to push only what is new, or another --task-name; "
            "if that task is of no use, delete it",
        )


def _check_sizes(pictures: TaskPictures, answers: AnswerSet) -> None:
    """Raise CvatError if a picture's size is not the one that its answer is for."""
    for name, size in answers.sizes.items():
        actual = pictures.frames[name].size
        if actual != size:
            raise CvatError(
                f"the picture is {actual.width}×{actual.height} there, "
                f"its answer is for {size.width}×{size.height}",
                ExitCode.CVAT_REFUSED,
                place=f"task {pictures.task}: {shown(name)}",
                remedy="segment the picture again that is on the share now",
            )


def _entries(
    frame: FramePicture, record: ShapeRecord, label: Label, *, polygon: bool
) -> Iterator[Entry]:
    """Yield a shape as the API takes it; with `polygon`, a mask as one polygon for each part."""
    form, point_lists = record.form, [record.points]
    if polygon and form == "mask":
        options = FormatOptions()
        form = "polygon"
        point_lists = shapes.points_of(
            shapes.mask_of(
                [int(value) for value in record.points], record.label, record.score or 0.0
            ),
            "polygon",
            (),
            tolerance_px=options.tolerance_px,
            min_area_px=options.min_area_px,
        )
    for points in point_lists:
        entry = shapes.entry(frame.number, label, form, points, record.score)
        yield {**entry, "z_order": record.z_order}
