"""`sam-poll cvat find`: find the objects that a task's labels name, and upload their shapes.

    read the jobs → plan → find what the journal lacks → for each job: upload → verify

It can be interrupted at any point; the next run does what is left (`journal`, `upload`). An object
is left out where the job has a shape of its label in nearly the same box already, from any source:
neither a second run with other options nor objects that were annotated before are doubled.

Limitations: tracks are neither exemplars nor compared with what is found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ExitCode, PromptError, UsageError
from sam_poll.core.protocols import Engine
from sam_poll.core.types import Box
from sam_poll.integrations.cvat import find_plan, frame_runner, shapes
from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.find_plan import (
    FindItem,
    FindOptions,
    FindPlan,
    FindRequest,
    make_plan,
)
from sam_poll.integrations.cvat.frame_runner import MakeEngine
from sam_poll.integrations.cvat.scope import Job
from sam_poll.integrations.cvat.shapes import FramePicture
from sam_poll.integrations.cvat.task_command import JobWork, TaskCommand, print_refused
from sam_poll.integrations.cvat.upload import Entry, Upload
from sam_poll.runtime import builders
from sam_poll.runtime.console import count

# IoU of two boxes from which an object is the one that a shape of its label marks already.
SAME_OBJECT = 0.7

Work = JobWork[FindPlan]


@dataclass(slots=True)
class Outcome:
    """What was done in all jobs, for the summary.

    `written` and `already_there` count shapes, `done_before` and `annotated` objects: those of
    earlier runs, and those that a shape marks already. `found` counts objects by label's name,
    those of a frame of two jobs once; `frames` are the numbers of the frames that have some, and
    `full` those of the frames with as many as may be found, by label.
    """

    written: int = 0
    already_there: int = 0
    done_before: int = 0
    annotated: int = 0
    found: Counter[str] = field(default_factory=Counter)
    frames: set[int] = field(default_factory=set)
    full: dict[str, set[int]] = field(default_factory=dict)
    _counted: set[tuple[str, str]] = field(default_factory=set)

    def count(self, item: FindItem, objects: int) -> None:
        """Count the objects that a search has found."""
        name = item.search.label.name
        if (name, item.key) in self._counted:
            return
        self._counted.add((name, item.key))
        self.found[name] += objects
        if objects:
            self.frames.add(item.frame.number)
        if objects >= item.request.max_objects:
            self.full.setdefault(name, set()).add(item.frame.number)


def run(
    client: CvatClient,
    task: int,
    options: FindOptions,
    settings: Settings,
    state: Path,
    *,
    engine_of: MakeEngine = builders.engine_of,
) -> ExitCode:
    """Find the objects of a task's labels, upload their shapes, and print what was done.

    `state` is the folder for journals. Returns FAILED_JOBS if some pictures could not be searched,
    or some shapes could not be exemplars. Raises CvatError, ModelError and the other errors that
    end the whole command.
    """
    return _Find(client, task, options, settings, state, name="find").run(engine_of)


class _Find(TaskCommand[FindOptions, FindPlan, Outcome]):
    """The command on one task."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._wanted = find_plan.searches(self.scope.labels, self.options)

    def plan(self, job: Job, entries: Sequence[Mapping[str, Any]], written: set[str]) -> FindPlan:
        """Return what is searched for on a job's frames."""
        return make_plan(
            job, entries, self.scope, self._wanted, self.options, self.settings, written
        )

    def writes(self, work: Work) -> bool:
        """Return whether a job has frames that are searched."""
        return bool(work.plan.items)

    # ── finding ──

    def check(self, engine: Engine, works: Sequence[Work]) -> None:
        """Check each search once, before any picture is fetched."""
        items = {item.search: item for work in works for item in work.plan.items}
        for search, item in items.items():
            try:
                engine.check_concept(item.request)
            except PromptError as error:
                raise UsageError(
                    error.reason, place=f"label {search.label.name!r}", remedy=error.remedy
                ) from None

    def requests(self, works: Sequence[Work]) -> list[FindRequest]:
        """Return the requests for the searches whose answers are not in the journal."""
        files = self.journal.answer_files()
        items: dict[FramePicture, dict[str, FindItem]] = {}
        for work in works:
            for item in work.plan.items:
                items.setdefault(item.frame, {}).setdefault(item.key, item)
        requests = []
        for frame, by_key in sorted(items.items(), key=lambda pair: pair[0].number):
            answers = self._answers(files.get(frame.number, ()))
            missing = [item for key, item in by_key.items() if key not in answers]
            requests += find_plan.requests_of(missing)
        return requests

    def _answers(self, files: Sequence[Path]) -> dict[str, Any]:
        return self.journal.read_answers(files, find_plan.is_valid_find)

    # ── writing ──

    def write(self, works: Sequence[Work]) -> Outcome:
        """Upload the shapes of all answers to each job, and verify them."""
        outcome = Outcome()
        files = self.journal.answer_files()
        for work in works:
            done = self.done_before(work.job)
            upload = Upload(self.client, self.task, self.journal, job=work.job.id)
            objects = self._objects(work, files, outcome)
            upload.put_once(objects, None, done, work.annotations)
            outcome.written += upload.created
            outcome.already_there += upload.already_there
            outcome.done_before += upload.done_before
        return outcome

    def _objects(
        self, work: Work, files: Mapping[int, Sequence[Path]], outcome: Outcome
    ) -> Iterator[tuple[str, list[Entry]]]:
        """Yield the objects found in a job that no shape marks yet, with their shapes.

        The key of an object is the fingerprint of its first shape: it is the same for all options
        that find it.
        """
        on_frame: dict[int, list[Mapping[str, Any]]] = {}
        for entry in work.annotations["shapes"]:
            on_frame.setdefault(int(entry["frame"]), []).append(entry)
        contours = self.settings.contours
        for frame, items in work.plan.by_frame():
            answers = self._answers(files.get(frame.number, ()))
            objects = []
            for item in items:
                answer = answers.get(item.key)
                if answer is None:  # the search has failed
                    continue
                outcome.count(item, len(answer["objects"]))
                objects += [
                    shapes.SegmentedObject(item.search.label, one["mask"], one["score"])
                    for one in answer["objects"]
                ]
            made = [
                (one, entries)
                for one, entries in zip(
                    objects,
                    shapes.entries_of(
                        frame.number,
                        objects,
                        self.options.form,
                        tolerance_px=contours.tolerance_px,
                        min_area_px=contours.min_area_px,
                    ),
                    strict=True,
                )
                if entries
            ]
            # What an interrupted run has written is no reason to leave its object out.
            own = {shapes.fingerprint(entry) for _, entries in made for entry in entries}
            marked = _Marked(
                e for e in on_frame.get(frame.number, ()) if shapes.fingerprint(e) not in own
            )
            for one, entries in made:
                if marked.has(one):
                    outcome.annotated += 1
                else:
                    yield shapes.fingerprint(entries[0]).hex(), entries

    # ── printing ──

    def print_plan(self, works: Sequence[Work]) -> None:
        """Print what is searched for, and what is left out."""
        options = self.options
        scope = self.scope
        wanted = self._wanted
        print_refused(works)
        items = [item for work in works for item in work.plan.items]
        pictures = count(len({item.frame.number for item in items}), "picture")
        what = ", ".join(map(str, wanted))
        exemplars = ""
        if options.like_existing:
            number = sum(len(item.request.exemplars) for item in items)
            exemplars = f", like {count(number, 'existing shape')}"
        typer.echo(f"{self.title}: finding {what} on {pictures}{exemplars}", err=True)
        names = {search.label.name for search in wanted}
        others = [label.name for label in scope.labels.values() if label.name not in names]
        if others and not options.labels:
            typer.echo(
                f"labels left out, which allow no {options.form} or are for negative points: "
                f"{', '.join(others)}",
                err=True,
            )
        frame_runner.print_honeypots(
            frame for frame in scope.covered_frames() if frame.number in scope.honeypots
        )
        frame_runner.print_unscored(search.label for search in wanted)
        if options.dry_run:
            typer.echo(
                f"dry run: shapes of type {options.form} would be written for what is found; "
                "nothing was computed or written"
            )

    def print_outcome(self, outcome: Outcome, works: Sequence[Work]) -> None:
        """Print what was found, written and left out."""
        options = self.options
        for search in self._wanted:
            if not outcome.found[search.label.name]:
                threshold = f"{search.request.threshold:g}"
                typer.echo(f"nothing found for {search} (threshold {threshold})", err=True)
        for name, frames in outcome.full.items():
            typer.echo(
                f"{name!r}: on {count(len(frames), 'picture')} as many objects as are taken "
                f"at most ({options.max_objects}); --max-objects raises the limit",
                err=True,
            )
        found = ", ".join(
            f"{number} {name}" for name, number in outcome.found.most_common() if number
        )
        pictures = len({item.frame.number for work in works for item in work.plan.items})
        parts = [f"{count(outcome.written, options.form)} written"]
        if outcome.already_there:
            parts.append(f"{outcome.already_there} already on the server")
        if outcome.annotated:
            objects = count(outcome.annotated, "object")
            parts.append(f"{objects} left out, which shapes of the label mark already")
        if outcome.done_before:
            objects = count(outcome.done_before, "object")
            parts.append(f"{objects} done before (--again writes missing shapes again)")
        on = f" on {len(outcome.frames)} of {count(pictures, 'picture')}" if found else ""
        typer.echo(f"{self.title}: found {found or 'nothing'}{on}; {', '.join(parts)}")


class _Marked:
    """The boxes of a frame's shapes, by label."""

    def __init__(self, entries: Iterator[Mapping[str, Any]]) -> None:
        self._boxes: dict[int, list[Box]] = {}
        for entry in entries:
            box = shapes.box_around(entry)
            if box is not None:
                self._boxes.setdefault(int(entry["label_id"]), []).append(box)

    def has(self, one: shapes.SegmentedObject) -> bool:
        """Return whether a shape of the object's label has nearly its box."""
        box = shapes.box_around({"type": "mask", "points": one.flat})
        others = self._boxes.get(one.label.id, ())
        return box is not None and any(_iou(box, other) >= SAME_OBJECT for other in others)


def _iou(one: Box, other: Box) -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box.x1 - box.x0) * (box.y1 - box.y0) for box in (one, other))
    return width * height / (areas - width * height)
