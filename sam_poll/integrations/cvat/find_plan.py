"""The plan of `cvat find`: what is searched for on which frames of a job. No I/O but file times.

Each label of the task is a search: its name is the text, unless another is given. With exemplars,
the shapes that a job has of the label on a frame show, on this frame, what to find. Shapes that the
command has written itself are no exemplars, so that a second run searches for the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sam_poll.config.settings import Settings
from sam_poll.core.errors import PromptError, SamPollError, UsageError
from sam_poll.core.types import ConceptRequest, Exemplar, Request
from sam_poll.integrations.cvat.journal import digest
from sam_poll.integrations.cvat.plan import check_forms, check_names, model_key, picture_key
from sam_poll.integrations.cvat.scope import Job, Scope
from sam_poll.integrations.cvat.shapes import Form, FramePicture, Label, box_around, fingerprint
from sam_poll.integrations.cvat.task_source import FrameRequest, is_valid_answer
from sam_poll.prompts import parser
from sam_poll.prompts.importers.shapes import is_negative_label

_DEFAULT = ConceptRequest()


@dataclass(frozen=True, slots=True)
class FindOptions:
    """The options of `cvat find`; each is the flag of its name (`form` is `--as`).

    `texts` and `thresholds` are those of single labels, by name.
    """

    form: Form = "mask"
    jobs: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    threshold: float = _DEFAULT.threshold
    thresholds: Mapping[str, float] = field(default_factory=dict)
    max_objects: int = _DEFAULT.max_objects
    like_existing: bool = False
    images: Path | None = None
    again: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Search:
    """What is searched for: the label that objects get, and the request, without exemplars.

    A request without a text needs exemplars: frames without one are not searched.
    """

    label: Label
    request: ConceptRequest

    @property
    def text(self) -> str:
        """The text; empty for exemplars alone."""
        return "".join(self.request.texts)

    def __str__(self) -> str:
        name = repr(self.label.name)
        if not self.text:
            return f"{name} by its shapes alone"
        return name if self.text == self.label.name else f"{name} as {self.text!r}"


@dataclass(frozen=True, slots=True)
class FindItem:
    """A search on a frame; its answer is stored in the journal under `key`.

    Searches that are equal in two jobs, or for two labels, have the same key.
    """

    frame: FramePicture
    search: Search
    request: ConceptRequest
    key: str


@dataclass(slots=True)
class FindPlan:
    """The searches of a job, in the order of the frames.

    `refused`: pairs of a picture's name and why a shape on it cannot be an exemplar.
    """

    items: list[FindItem] = field(default_factory=list)
    refused: list[tuple[str, SamPollError]] = field(default_factory=list)

    def by_frame(self) -> Iterator[tuple[FramePicture, list[FindItem]]]:
        """Yield each frame with its items, in the order of the frames."""
        frames: dict[FramePicture, list[FindItem]] = {}
        for item in self.items:
            frames.setdefault(item.frame, []).append(item)
        yield from frames.items()


@dataclass(frozen=True, slots=True)
class FindRequest(FrameRequest):
    """A frame, and a request whose answers are stored under `keys`, pairs of a key and a label.

    A label is that of the network's answers: a text, or the one that objects of exemplars get.
    """

    concept: ConceptRequest
    keys: tuple[tuple[str, str], ...]

    @property
    def prompts(self) -> Request:
        """What the network is to do on the frame."""
        return self.concept

    def answers_by_key(self, answers: Sequence[Any]) -> dict[str, Any]:
        """Return what the journal stores: a list of objects for each key, which may be empty."""
        return {
            key: {"objects": [one for one in answers if one["label"] == label]}
            for key, label in self.keys
        }


def is_valid_find(answer: Any) -> bool:
    """Return whether this is an answer of `FindRequest`; the file may have been damaged since."""
    objects = answer.get("objects") if isinstance(answer, dict) else None
    return isinstance(objects, list) and all(map(is_valid_answer, objects))


# ── flags ──


def texts_of(values: Sequence[str]) -> dict[str, str]:
    """Read `LABEL=TEXT` flags; an empty text stands for exemplars alone. Raises UsageError."""
    texts = {}
    for value in values:
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise UsageError(
                "not a label and a text", place=f"--text {value}", remedy='write dog="brown dog"'
            )
        texts[name] = text.strip()
    return texts


def thresholds_of(values: Sequence[str]) -> tuple[float, dict[str, float]]:
    """Read `NUMBER` and `LABEL=NUMBER` flags. Raises UsageError.

    Returns the threshold of all labels, and those of single ones.
    """
    of_all = _DEFAULT.threshold
    of_labels = {}
    for value in values:
        name, _, text = value.rpartition("=")
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            raise UsageError(
                "not a number from 0 to 1",
                place=f"--threshold {value}",
                remedy="write 0.5, or dog=0.7",
            )
        if name:
            of_labels[name] = number
        else:
            of_all = number
    return of_all, of_labels


# ── what is searched for ──


def searches(labels: Mapping[int, Label], options: FindOptions) -> list[Search]:
    """Return a search for each label that is chosen, in the order of the task's labels.

    By default these are all whose type allows the form, without those of negative points. Raises
    UsageError (a label that the task does not have, a text that is refused) and CvatError (a label
    that does not allow the form).
    """
    chosen = _chosen(list(labels.values()), options)
    names = [label.name for label in chosen]
    everything = {label.name: label for label in labels.values()}
    for flag, given in (("--text", options.texts), ("--threshold", options.thresholds)):
        check_names(flag, given, everything)
        left_out = [name for name in given if name not in names]
        if left_out:
            raise UsageError(
                f"{left_out[0]!r} is not among the labels to find, which are {', '.join(names)}",
                place=flag,
                remedy="name it with --labels, or leave the flag out",
            )
    return [Search(label, _request(label, options)) for label in chosen]


def _chosen(labels: Sequence[Label], options: FindOptions) -> list[Label]:
    by_name = {label.name: label for label in labels}
    names: list[str] = []
    for value in options.labels:
        # The name of a label may contain a comma.
        names += [value] if value in by_name else [part.strip() for part in value.split(",")]
    if names:
        check_names("--labels", names, by_name)
        check_forms((by_name[name] for name in names), options.form)
        return [label for label in labels if label.name in names]
    if not labels:
        raise UsageError("the task has no labels, which say what to find", remedy="add them")
    chosen = [
        label
        for label in labels
        if label.allows(options.form) and not is_negative_label(label.name)
    ]
    if not chosen:
        check_forms(labels, options.form)
        raise UsageError(
            "all labels of the task are those of negative points", remedy="name one with --labels"
        )
    return chosen


def _request(label: Label, options: FindOptions) -> ConceptRequest:
    """Return a label's request, checked by the rules of prompt files."""
    text = options.texts.get(label.name, label.name)
    limits = ConceptRequest(
        threshold=options.thresholds.get(label.name, options.threshold),
        max_objects=options.max_objects,
    )
    if not text:
        if options.like_existing:
            return limits
        raise UsageError(
            "the text is empty, and shapes are not used either",
            place=f"--text {label.name}=",
            remedy="give a text, or add --like-existing to find what is like the label's shapes",
        )
    try:
        return replace(limits, texts=parser.concept_of([text]).texts)
    except PromptError as error:
        raise UsageError(
            f"cannot be the text for label {label.name!r}: {error.reason}",
            place=f"--text {label.name}={text}",
            remedy=f"name what to find with --text {label.name}=…",
        ) from None


def make_plan(
    job: Job,
    entries: Sequence[Mapping[str, Any]],
    scope: Scope,
    wanted: Sequence[Search],
    options: FindOptions,
    settings: Settings,
    written: set[str],
) -> FindPlan:
    """Return the plan for a job.

    `entries` are the API's shapes of the job; `written` are the fingerprints (hex) of the shapes
    that earlier runs have written to it.
    """
    plan = FindPlan()
    model = model_key(settings)
    shapes: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    if options.like_existing:
        for entry in entries:
            shapes.setdefault((int(entry["frame"]), int(entry["label_id"])), []).append(entry)
    for number in range(job.first, job.last + 1):
        frame = scope.frames.get(number)
        if frame is None or number in scope.honeypots:
            continue
        picture = picture_key(frame, options.images)
        for search in wanted:
            examples = [
                entry
                for entry in shapes.get((number, search.label.id), ())
                if fingerprint(entry).hex() not in written
            ]
            exemplars = _exemplars(examples, frame, search.label, plan)
            request = replace(search.request, exemplars=exemplars)
            if request.texts or request.exemplars:
                key = digest([model, picture, parser.as_document(request)])
                plan.items.append(FindItem(frame, search, request, key))
    return plan


def _exemplars(
    entries: Sequence[Mapping[str, Any]], frame: FramePicture, label: Label, plan: FindPlan
) -> tuple[Exemplar, ...]:
    """Return the boxes of shapes as exemplars, in an order that does not depend on the server's.

    Shapes that do not fit the picture are added to `plan.refused`.
    """
    exemplars: set[Exemplar] = set()
    for entry in entries:
        box = box_around(entry)
        if box is None:
            continue
        try:
            fitted = parser.fit_request(ConceptRequest(exemplars=(Exemplar(box),)), frame.size)
        except PromptError as error:
            error.place = f"{entry['type']} {label.name!r}"
            plan.refused.append((frame.name, error))
            continue
        assert isinstance(fitted, ConceptRequest)
        exemplars |= set(fitted.exemplars)
    return tuple(
        sorted(exemplars, key=lambda one: (one.box.x0, one.box.y0, one.box.x1, one.box.y1))
    )


def requests_of(items: Sequence[FindItem]) -> list[FindRequest]:
    """Return the requests for the searches on one frame.

    Searches by text alone that share their limits are one request: the picture is prepared once.
    """
    groups: dict[Any, list[FindItem]] = {}
    for item in items:
        limits = item.request.threshold, item.request.max_objects
        groups.setdefault(item.key if item.request.exemplars else limits, []).append(item)
    requests = []
    for group in groups.values():
        first = group[0].request
        texts = tuple(dict.fromkeys(text for item in group for text in item.request.texts))
        keys = {item.key: "".join(item.request.texts) or first.label for item in group}
        concept = replace(first, texts=texts)
        requests.append(FindRequest(group[0].frame, (), concept, tuple(keys.items())))
    return requests
