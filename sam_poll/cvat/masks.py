"""`sam-poll cvat masks`: the boxes and points of a task are answered with masks, which go to the same task.

    read the task → plan → what is not answered yet through the pipeline into the journal → upload → prove → replace

Each step can be cut off anywhere; the next run does what is left. A box is deleted (`--replace`) only after its mask
has been read back from the server.

What can still go wrong here: what somebody saves in a browser in the same seconds; CVAT's editor saves its own view of
a job, and may bring back what was deleted.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import typer

from sam_poll import app
from sam_poll.console import count
from sam_poll.cvat import door, plan, shapes
from sam_poll.cvat.journal import Journal, folder_of
from sam_poll.cvat.plan import Item, Plan, Wish
from sam_poll.cvat.server import Server
from sam_poll.cvat.shapes import Placed, Sign
from sam_poll.cvat.upload import WRITTEN, Upload, progress
from sam_poll.errors import CvatError, ExitCode, InputError, SamPollError
from sam_poll.formats.cvat import z_orders
from sam_poll.fs import shown
from sam_poll.pipeline import Pipeline
from sam_poll.reporting import say
from sam_poll.settings import Settings
from sam_poll.types import Engine

DONE = "done"
MakeEngine = Callable[[Settings], Engine]


@dataclass(slots=True)
class Outcome:
    """What came of the objects, for the summary."""

    made: int = 0
    there: int = 0
    before: int = 0
    deleted: int = 0
    empty: list[Item] = field(default_factory=list)
    kept: int = 0


def run(
    server: Server,
    task: int,
    wish: Wish,
    settings: Settings,
    state: Path,
    *,
    engine_of: MakeEngine = app.engine_of,
) -> ExitCode:
    """Answer a task's boxes and points. FAILED_JOBS when some of them could not be; CvatError, ModelError, …"""
    labels = shapes.labels_of(server.labels(task=task))
    frames = shapes.frames_of(server.meta(task))
    annotations = server.annotations(task)
    journal = Journal(folder_of(state, server.host, f"task-{task}"))
    if wish.dry_run:
        made = plan.make(annotations["shapes"], labels, frames, wish, settings, journal.noted(WRITTEN))
        _tell_plan(made, annotations, wish, task)
        return ExitCode.FAILED_JOBS if made.refused else ExitCode.OK
    with journal:
        made = plan.make(annotations["shapes"], labels, frames, wish, settings, journal.noted(WRITTEN))
        _tell_plan(made, annotations, wish, task)
        try:
            left = _answer(made, journal, server, task, wish, settings, engine_of)
            outcome = _write(made, journal, server, task, wish, settings, annotations)
        except CvatError as error:
            kept = f"the answers are kept in {shown(journal.folder)}, and the same command goes on from there"
            error.remedy = f"{error.remedy}; {kept}" if error.remedy else kept
            raise
        except KeyboardInterrupt:
            folder = shown(journal.folder)
            what = f"stopped; the answers so far are kept in {folder}: the same command goes on from there"
            typer.echo(what, err=True)
            raise
    _tell_outcome(outcome, wish, task)
    return ExitCode.FAILED_JOBS if left or made.refused else ExitCode.OK


# ── answering ──


def _answer(
    made: Plan, journal: Journal, server: Server, task: int, wish: Wish, settings: Settings, engine_of: MakeEngine
) -> int:
    """Have every object's answer in the journal. How many objects have none; they have been told."""
    done, files = set() if wish.again else journal.noted(DONE), journal.frames()
    wanted = []
    for frame, items in made.by_frame():
        known = _known(journal, files.get(frame.number, ()))
        # Without its answer nobody can tell which shapes stand for a box that is to be deleted.
        needed = [item for item in items if wish.replace or item.done not in done]
        fresh = {item.key: item.asked for item in needed if item.key not in known}
        if fresh:
            wanted.append(door.Wanted(frame, tuple(fresh.items())))
    if not wanted:
        return 0
    lost = 0
    lock = threading.Lock()
    with app.stop_on_signals() as stop:
        engine = engine_of(settings)
        with progress() as bar:
            row = bar.add_task("pictures", total=len(wanted))

            def ended(one: door.Wanted, error: SamPollError | None) -> None:
                nonlocal lost
                with lock:
                    bar.advance(row)
                    if error:
                        lost += len(one.objects)
                        _refused(one.frame.name, error)

            fetch = door.from_folder(wish.images) if wish.images else door.from_server(server, task)
            sizes = replace(app.sizes_of(settings), pixels=False, cover=0)
            source = door.TaskDoor(wanted, fetch, journal, max_pixels=sizes.max_pixels, on_end=ended)
            Pipeline(engine, [door.answers], sizes=sizes).run(source, stop)
        if source.failure:
            raise source.failure
        if stop.is_set():
            raise KeyboardInterrupt
    return lost


def _known(journal: Journal, files: Sequence[Path]) -> dict[str, Any]:
    """The answers that the journal has for a frame, as far as they can be understood."""
    return {key: answer for key, answer in journal.answers(files).items() if door.sound(answer)}


# ── writing ──


def _write(
    made: Plan,
    journal: Journal,
    server: Server,
    task: int,
    wish: Wish,
    settings: Settings,
    annotations: Mapping[str, Any],
) -> Outcome:
    """Have every answer's shapes on the server, and the boxes deleted if that is wished. `annotations` is what the
    task held at the start."""
    outcome = Outcome()
    done = set() if wish.again else journal.noted(DONE)
    signs: dict[str, list[Sign]] = {}
    fresh: list[Item] = []

    def objects() -> Iterator[list[dict[str, Any]]]:
        for item, entries in _entries(made, journal, wish, settings):
            signs[item.done] = [shapes.sign(entry) for entry in entries]
            if not entries:
                outcome.empty.append(item)
            elif item.done in done:
                outcome.before += 1
            else:
                fresh.append(item)
                yield entries

    upload = Upload(server, task, journal)
    upload.put(objects(), len(made.items))
    outcome.made = upload.made
    before = None if fresh or (wish.replace and made.items) else annotations
    wanted = [name for item in fresh for name in signs[item.done]]
    outcome.there = len(set(wanted)) - upload.made
    written = {bytes.fromhex(line) for line in journal.noted(WRITTEN) if len(line) == 32}
    now = upload.prove(wanted, written, before)
    journal.note(DONE, (item.done for item in fresh if item.done not in done))
    if wish.replace:
        journal.note(WRITTEN, _replace(made, signs, now, upload, outcome))
    return outcome


def _entries(
    made: Plan, journal: Journal, wish: Wish, settings: Settings
) -> Iterator[tuple[Item, list[dict[str, Any]]]]:
    """Each answered object with its shapes, frame by frame. None: nothing was found."""
    files = journal.frames()
    contours = settings.contours
    for frame, items in made.by_frame():
        known = _known(journal, files.get(frame.number, ()))
        found = [(item, known[item.key]) for item in items if item.key in known]
        masks = [_mask(item, answer) for item, answer in found]
        layers = iter(z_orders([mask for mask in masks if mask]))
        for (item, answer), mask in zip(found, masks, strict=True):
            if mask is None:
                yield item, []
                continue
            layer = next(layers)
            lists = shapes.points_of(
                mask, wish.form, answer["mask"], tolerance_px=contours.tolerance_px, min_area_px=contours.min_area_px
            )
            entries = [
                shapes.entry(frame.number, item.label, wish.form, points, mask.score, item.like) for points in lists
            ]
            yield item, [{**one, "z_order": one["z_order"] + layer} for one in entries]


def _mask(item: Item, answer: Mapping[str, Any]) -> Any:
    return shapes.unflat(answer["mask"], item.label.name, float(answer["score"])) if answer["mask"] else None


def _replace(
    made: Plan, signs: Mapping[str, list[Sign]], annotations: Mapping[str, Any], upload: Upload, outcome: Outcome
) -> set[str]:
    """Delete the shapes that asked for what is on the server now, if they are still what they were when we asked.

    The signs of those that stay because they are their own answer, and count as ours from now on.
    """
    now = {int(entry["id"]): entry for entry in annotations["shapes"]}
    placed = Placed(annotations["shapes"])
    answers = {name for names in signs.values() for name in names}
    gone: dict[int, Mapping[str, Any]] = {}
    own: set[str] = set()
    for item in made.items:
        names = signs.get(item.done)
        if not names:
            continue
        if any(name not in placed for name in names):
            outcome.kept += 1  # answered in an earlier run, and changed or deleted by somebody since
            continue
        for shape in item.asked.shapes:
            number, name = int(shape.key["id"]), shapes.sign(shape.key)
            if name in answers:  # a rectangle that was tight already
                own.add(name.hex())
                continue
            if number in now and shapes.sign(now[number]) == name:
                gone[number] = now[number]
    if gone:
        upload.delete(list(gone.values()))
    outcome.deleted = len(gone)
    return own


# ── words ──


def _tell_plan(made: Plan, annotations: Mapping[str, Any], wish: Wish, task: int) -> None:
    for name, error in made.refused:
        _refused(name, error)
    pictures = count(sum(1 for _ in made.by_frame()), "picture")
    what = f"{count(len(made.items), 'object')} ({plan.counts(made)})" if made.items else "no objects"
    left = ", ".join(f"{number} {kind}" for kind, number in sorted(shapes.counted(annotations).items()))
    ours = f"; {count(made.ours, 'rectangle')} of our own not asked for" if made.ours else ""
    typer.echo(f"task {task}: {what} on {pictures}{f'; not asked for: {left}' if left else ''}{ours}", err=True)
    unscored = sorted({item.label.name for item in made.items if item.label.score is None})
    if unscored:
        typer.echo(f"without scores, for want of an attribute `{shapes.SCORE}`: {', '.join(unscored)}", err=True)
    if wish.dry_run:
        boxes = f", and {count(sum(len(i.asked.shapes) for i in made.items), 'shape')} deleted" if wish.replace else ""
        typer.echo(f"dry run: they would be answered with shapes of type {wish.form}{boxes}; nothing was written")


def _tell_outcome(outcome: Outcome, wish: Wish, task: int) -> None:
    for (_, name, label), number in Counter(
        (i.frame.number, i.frame.name, i.label.name) for i in outcome.empty
    ).items():
        kept = "what asked for it is kept" if wish.replace else "nothing is written"
        what = "the mask is empty" if number == 1 else f"{number} masks are empty"
        typer.echo(f"{shown(name)}: {label!r}: {what}; {kept}", err=True)
    parts = [f"{count(outcome.made, wish.form)} written"]
    parts += [f"{outcome.there} there already"] if outcome.there else []
    parts += [f"{count(outcome.before, 'object')} done before (--again writes them anew)"] if outcome.before else []
    parts += [f"{len(outcome.empty)} empty"] if outcome.empty else []
    parts += [f"{count(outcome.deleted, 'asking shape')} deleted"] if wish.replace else []
    parts += [f"{outcome.kept} kept, whose answer somebody has changed or deleted"] if outcome.kept else []
    typer.echo(f"task {task}: {', '.join(parts)}")


def _refused(name: str, error: SamPollError) -> None:
    place = shown(name) if not error.place or name in error.place else f"{shown(name)}: {error.place}"
    say(InputError(error.reason, place=place, remedy=error.remedy))
