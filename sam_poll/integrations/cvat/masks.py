"""`sam-poll cvat masks`: segment the objects that a task's shapes mark, and upload them.

    read the jobs → plan → segment what the journal lacks → for each job: upload → verify →
    delete boxes

Each job is written by itself (`scope`); a frame that two jobs cover is segmented once. Each step
can be interrupted at any point; the next run does what is left. A box is deleted (`--replace`) only
after its mask has been read back from the same job.

Limitations: CVAT's editor saves its own view of a job. What a user saves in a browser at the same
time may be lost, or may bring back what was deleted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ExitCode
from sam_poll.core.text import shown
from sam_poll.integrations.cvat import frame_runner, shapes, task_source
from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.frame_runner import MakeEngine
from sam_poll.integrations.cvat.plan import (
    Item,
    MasksOptions,
    Plan,
    make_plan,
    objects_by_label,
)
from sam_poll.integrations.cvat.scope import Job
from sam_poll.integrations.cvat.shapes import Fingerprint, FramePicture, ServerShapes
from sam_poll.integrations.cvat.task_command import JobWork, TaskCommand, print_refused
from sam_poll.integrations.cvat.upload import Entry, Upload
from sam_poll.prompts.importers.shapes import PromptObject
from sam_poll.runtime import builders
from sam_poll.runtime.console import count

AnswerFiles = Mapping[int, Sequence[Path]]  # files of the journal, by frame number
Work = JobWork[Plan]


@dataclass(slots=True)
class Outcome:
    """What was done in all jobs, for the summary.

    `written` and `already_there` count shapes, `done_before` objects, `deleted` and `kept` shapes
    and objects of `--replace`; `empty` are the objects with an empty mask, by their `done_key`.
    """

    written: int = 0
    already_there: int = 0
    done_before: int = 0
    deleted: int = 0
    empty: dict[str, Item] = field(default_factory=dict)
    kept: int = 0


def run(
    client: CvatClient,
    task: int,
    options: MasksOptions,
    settings: Settings,
    state: Path,
    *,
    engine_of: MakeEngine = builders.engine_of,
) -> ExitCode:
    """Segment the objects of a task, upload their shapes, and print what was done.

    `state` is the folder for journals. Returns FAILED_JOBS if some objects could not be segmented.
    Raises CvatError, ModelError and the other errors that end the whole command.
    """
    return _Masks(client, task, options, settings, state, name="task").run(engine_of)


class _Masks(TaskCommand[MasksOptions, Plan, Outcome]):
    """The command on one task."""

    def plan(self, job: Job, entries: Sequence[Mapping[str, Any]], written: set[str]) -> Plan:
        """Return which objects that a job's shapes mark are segmented."""
        return make_plan(entries, self.scope, self.options, self.settings, written)

    def writes(self, work: Work) -> bool:
        """Return whether a job has objects whose answers are needed."""
        return any(self._needed(work))

    # ── segmenting ──

    def requests(self, works: Sequence[Work]) -> list[task_source.FrameRequest]:
        """Return the frames with objects whose answers are needed and not in the journal."""
        files = self.journal.answer_files()
        missing: dict[FramePicture, dict[str, PromptObject]] = {}
        for work in works:
            for item in self._needed(work):
                missing.setdefault(item.frame, {}).setdefault(item.key, item.prompt_object)
        requests = []
        for frame, objects in sorted(missing.items(), key=lambda pair: pair[0].number):
            answers = self._answers(files.get(frame.number, ()))
            unanswered = {key: one for key, one in objects.items() if key not in answers}
            if unanswered:
                requests.append(task_source.FrameRequest(frame, tuple(unanswered.items())))
        return requests

    def _needed(self, work: Work) -> Iterator[Item]:
        """Yield the objects of a job whose answers are needed.

        To delete a box, its answer is needed: it tells which shapes replace the box.
        """
        done = self.done_before(work.job)
        for item in work.plan.items:
            if self.options.replace or item.done_key not in done:
                yield item

    def _answers(self, files: Sequence[Path]) -> dict[str, Any]:
        """Return the valid answers in these files of the journal, by key."""
        return self.journal.read_answers(files, task_source.is_valid_answer)

    # ── writing ──

    def write(self, works: Sequence[Work]) -> Outcome:
        """Upload the shapes of all answers to each job, verify them, and delete the prompts."""
        outcome = Outcome()
        files = self.journal.answer_files()
        for work in works:
            self._write_job(work, files, outcome)
        return outcome

    def _write_job(self, work: Work, files: AnswerFiles, outcome: Outcome) -> None:
        fingerprints: dict[str, list[Fingerprint]] = {}

        def objects() -> Iterator[tuple[str, list[Entry]]]:
            for item, entries in self._entries(work.plan, files):
                fingerprints[item.done_key] = [shapes.fingerprint(entry) for entry in entries]
                if entries:
                    yield item.done_key, entries
                else:
                    outcome.empty[item.done_key] = item

        upload = Upload(self.client, self.task, self.journal, job=work.job.id)
        deletes = self.options.replace and work.plan.items
        now = upload.put_once(
            objects(),
            len(work.plan.items),
            self.done_before(work.job),
            None if deletes else work.annotations,
        )
        outcome.written += upload.created
        outcome.already_there += upload.already_there
        outcome.done_before += upload.done_before
        if self.options.replace:
            own = self._delete_prompts(work.plan, fingerprints, now, upload, outcome)
            self.journal.append(upload.written, own)

    def _entries(self, plan: Plan, files: AnswerFiles) -> Iterator[tuple[Item, list[Entry]]]:
        """Yield each object of a job that has an answer with its shapes, frame by frame.

        The list is empty if the mask is empty.
        """
        contours = self.settings.contours
        form = self.options.form
        for frame, items in plan.by_frame():
            answers = self._answers(files.get(frame.number, ()))
            answered = [item for item in items if item.key in answers]
            objects = [
                shapes.SegmentedObject(
                    item.label, answers[item.key]["mask"], answers[item.key]["score"], item.template
                )
                for item in answered
            ]
            entries = shapes.entries_of(
                frame.number,
                objects,
                form,
                tolerance_px=contours.tolerance_px,
                min_area_px=contours.min_area_px,
            )
            yield from zip(answered, entries, strict=True)

    def _delete_prompts(
        self,
        plan: Plan,
        fingerprints: Mapping[str, list[Fingerprint]],
        annotations: Mapping[str, Any],
        upload: Upload,
        outcome: Outcome,
    ) -> set[str]:
        """Delete the shapes that are prompts of a job and whose answers are in the job.

        A shape that was changed since the start of the command is not deleted.

        Returns the fingerprints (hex) of the shapes that stay because they equal their own answer;
        from now on they count as written by this program.
        """
        by_id = {int(entry["id"]): entry for entry in annotations["shapes"]}
        on_server = ServerShapes(annotations["shapes"])
        answers = {key for keys in fingerprints.values() for key in keys}
        to_delete: dict[int, Mapping[str, Any]] = {}
        own: set[str] = set()
        for item in plan.items:
            keys = fingerprints.get(item.done_key)
            if not keys:
                continue
            if any(key not in on_server for key in keys):
                # Written by an earlier run, and since then changed or deleted by a user.
                outcome.kept += 1
                continue
            for shape in item.prompt_object.shapes:
                number, key = int(shape.key["id"]), shapes.fingerprint(shape.key)
                if key in answers:  # a rectangle or polygon that was tight already
                    own.add(key.hex())
                    continue
                if number in by_id and shapes.fingerprint(by_id[number]) == key:
                    to_delete[number] = by_id[number]
        if to_delete:
            upload.delete(list(to_delete.values()))
        outcome.deleted += len(to_delete)
        return own

    # ── printing ──

    def print_plan(self, works: Sequence[Work]) -> None:
        """Print which objects are segmented, and what is left out."""
        options = self.options
        print_refused(works)
        # A frame that two jobs cover may have equal objects in both.
        items = {item.done_key: item for work in works for item in work.plan.items}
        marks = "boxes or points" if options.source == "boxes" else "polygons"
        objects = f"no {marks} to segment"
        if items:
            pictures = count(len({item.frame.number for item in items.values()}), "picture")
            labels = objects_by_label(items.values())
            objects = f"{count(len(items), 'object')} ({labels}) on {pictures}"
        typer.echo(f"{self.title}: {objects}{_in_jobs(works)}{_left_out(works, options)}", err=True)
        honeypots = {n: frame for work in works for n, frame in work.plan.honeypots.items()}
        frame_runner.print_honeypots(honeypots.values())
        frame_runner.print_unscored(item.label for item in items.values())
        if options.dry_run:
            deleted = ""
            if options.replace:
                prompts = sum(
                    len(i.prompt_object.shapes) for work in works for i in work.plan.items
                )
                deleted = f", and {count(prompts, 'shape')} deleted"
            typer.echo(
                f"dry run: shapes of type {options.form} would be written for these "
                f"objects{deleted}; nothing was written"
            )

    def print_outcome(self, outcome: Outcome, works: Sequence[Work]) -> None:
        """Print what was written, deleted and left."""
        options = self.options
        empty = Counter(
            (item.frame.number, item.frame.name, item.label.name) for item in outcome.empty.values()
        )
        kept = "its box or points are kept" if options.source == "boxes" else "its polygon is kept"
        consequence = kept if options.replace else "nothing is written"
        for (_, name, label), number in empty.items():
            what = "the mask is empty" if number == 1 else f"{number} masks are empty"
            typer.echo(f"{shown(name)}: {label!r}: {what}; {consequence}", err=True)
        parts = [f"{count(outcome.written, options.form)} written{_in_jobs(works)}"]
        if outcome.already_there:
            parts.append(f"{outcome.already_there} already on the server")
        if outcome.done_before:
            objects = count(outcome.done_before, "object")
            parts.append(f"{objects} done before (--again writes missing shapes again)")
        if outcome.empty:
            parts.append(f"{len(outcome.empty)} empty")
        if options.replace:
            parts.append(f"{count(outcome.deleted, 'prompt shape')} deleted")
        if outcome.kept:
            parts.append(f"{outcome.kept} kept, because their shapes were changed or deleted")
        typer.echo(f"{self.title}: {', '.join(parts)}")


def _in_jobs(works: Sequence[Work]) -> str:
    used = sum(bool(work.plan.items) for work in works)
    return f" in {used} jobs" if used > 1 else ""


def _left_out(works: Sequence[Work], options: MasksOptions) -> str:
    kinds: Counter[str] = Counter()
    for work in works:
        kinds += shapes.other_shapes(work.annotations, options.source)
    parts = [count(number, kind) for kind, number in sorted(kinds.items())]
    own_shapes = sum(work.plan.own_shapes for work in works)
    if own_shapes:
        kind = "rectangle" if options.source == "boxes" else "polygon"
        parts.append(f"{count(own_shapes, kind)} of earlier runs")
    return f"; left out: {', '.join(parts)}" if parts else ""
