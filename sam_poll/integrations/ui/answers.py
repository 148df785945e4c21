"""Answers for the page: their objects, and the lists by folder, label, score and date.

Folder and date of an answer are known from its name and time. Labels and scores are in its files:
these are read, on a thread and newest first, once a page is filtered by label or score.

Limitations: an answer in the formats `yolo` and `overlay` alone is shown without its objects.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from sam_poll.core.errors import InputError
from sam_poll.core.files import NOT_THERE, exists
from sam_poll.core.safe_path import SafePath
from sam_poll.formats import answer_reader, registry
from sam_poll.formats.answer_reader import Answer, AnswerObject
from sam_poll.integrations.ui import names
from sam_poll.integrations.ui.share_index import AnswerEntry, ShareIndex
from sam_poll.share.intake.done_lookup import usual_names
from sam_poll.share.layout import Layout

_MAX_BYTES = 64 << 20  # of an answer's file that is shown
_MAX_FACT_BYTES = 4 << 20  # of one that is read for its labels only
_WORK_S = 0.05  # the thread reads for this time, then rests as long
_IDLE_S = 30.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What the filters need to know of an answer; `score` is the lowest of its objects."""

    labels: frozenset[str]
    score: float | None


@dataclass(frozen=True, slots=True)
class AnswerFilter:
    """Which answers are listed; None and "" leave a condition out.

    `below`: answers with an object whose score is lower. `since` and `until` are times in seconds.
    """

    folder: str | None = None
    label: str = ""
    below: float | None = None
    since: float | None = None
    until: float | None = None

    @property
    def needs_facts(self) -> bool:
        """Whether the answers' files must be read."""
        return bool(self.label) or self.below is not None

    def matches(self, entry: AnswerEntry, facts: Callable[[AnswerEntry], Facts | None]) -> bool:
        """Return whether an answer is listed. One whose file was not read yet is not."""
        if self.folder is not None and entry.folder != self.folder:
            return False
        if self.since is not None and entry.modified < self.since:
            return False
        if self.until is not None and entry.modified >= self.until:
            return False
        if not self.needs_facts:
            return True
        known = facts(entry)
        if known is None or (self.label and self.label not in known.labels):
            return False
        return self.below is None or (known.score is not None and known.score < self.below)


class AnswerFacts:
    """Labels and scores of all answers, read on a thread while a page is filtered by them."""

    def __init__(self, index: ShareIndex, clock: Callable[[], float] = time.monotonic) -> None:
        self._index = index
        self._clock = clock
        self._known: dict[AnswerEntry, Facts] = {}
        self._labels: set[str] = set()
        self._wanted = threading.Event()
        self._stop = threading.Event()
        self._looked = 0.0
        self._thread = threading.Thread(target=self._run, name="answer-facts", daemon=True)
        self._started = False

    def want(self) -> None:
        """Read what was not read yet; called for each page that is filtered."""
        self._looked = self._clock()
        self._wanted.set()
        if not self._started:
            self._started = True
            self._thread.start()

    def of(self, entry: AnswerEntry) -> Facts | None:
        """Return an answer's facts; None if it was not read yet."""
        return self._known.get(entry)

    @property
    def labels(self) -> list[str]:
        """The labels found so far, sorted."""
        return sorted(self._labels)

    def missing(self) -> int:
        """Return how many answers were not read yet."""
        return sum(entry not in self._known for entry in self._index.view().answers)

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._wanted.set()

    def _run(self) -> None:
        while self._wanted.wait() and not self._stop.is_set():
            self._wanted.clear()
            for _ in self._read_missing():
                if self._stop.wait(_WORK_S) or self._clock() - self._looked > _IDLE_S:
                    break

    def _read_missing(self) -> Iterator[None]:
        """Read the answers that were not read yet; yields after each `_WORK_S` of work."""
        entries = self._index.view().answers
        known = {entry: facts for entry in entries if (facts := self._known.get(entry))}
        self._known = known
        until = self._clock() + _WORK_S
        for entry in entries:
            if entry in known:
                continue
            known[entry] = facts = read_facts(self._index.layout, entry)
            self._labels |= facts.labels
            if self._clock() >= until:
                yield
                until = self._clock() + _WORK_S


def read_facts(layout: Layout, entry: AnswerEntry) -> Facts:
    """Read labels and scores of an answer; there are none where no file of it can be read."""
    try:
        found = read_answer(layout, entry, max_bytes=_MAX_FACT_BYTES)
    except (InputError, OSError):
        return Facts(frozenset(), None)
    scores = [one.score for one in found.objects if one.score is not None]
    return Facts(frozenset(one.label for one in found.objects), min(scores, default=None))


def read_answer(layout: Layout, entry: AnswerEntry, *, max_bytes: int = _MAX_BYTES) -> Answer:
    """Read an answer's objects from the file that says most.

    Without such a file it has no objects. Raises InputError for a file that is not what its name
    says, and OSError.
    """
    for format in answer_reader.READERS:
        for suffix in registry.suffixes(format):
            if suffix in entry.suffixes:
                body = _bytes(file_of(layout, entry, suffix), max_bytes)
                return answer_reader.read(format, body)
    return Answer(tuple(_single_masks(layout, entry, max_bytes)))


def _single_masks(layout: Layout, entry: AnswerEntry, max_bytes: int) -> Iterator[AnswerObject]:
    """Yield the objects of an answer with `mask: per-object`, a PNG each."""
    numbered = [
        (int(suffix.split(".")[2]), suffix)
        for suffix in entry.suffixes
        if suffix.startswith(".mask.") and suffix.endswith(".png")
    ]
    for number, suffix in sorted(numbered)[: answer_reader.MAX_OBJECTS]:
        body = _bytes(file_of(layout, entry, suffix), max_bytes)
        for one in answer_reader.read("mask", body).objects:
            yield AnswerObject(number, one.label, one.score, one.parts)


def _bytes(path: SafePath, max_bytes: int) -> bytes:
    body = path.read_bytes(max_bytes + 1)
    if len(body) > max_bytes:
        raise InputError(f"the answer has more than {max_bytes >> 20} MiB, which is not shown")
    return body


def file_of(layout: Layout, entry: AnswerEntry, suffix: str) -> SafePath:
    """Return the path of one of an answer's files."""
    return names.below(layout.output, entry.id + suffix)


def picture_of(layout: Layout, entry: AnswerEntry, answer: Answer | None) -> SafePath | None:
    """Return the picture in `done/` that an answer belongs to; None if it is not found.

    The answer names it; where it does not, it has the answer's name.
    """
    if answer and answer.image:
        prefix = layout.share_name(layout.done) + "/"
        if answer.image.startswith(prefix) and layout.is_picture(answer.image):
            return _existing(layout.done, answer.image[len(prefix) :])
    folder = PurePosixPath(entry.folder)
    stem = PurePosixPath(entry.id).name
    while stem:
        for name in (stem, *usual_names(stem)):
            if layout.is_picture(name):
                found = _existing(layout.done, (folder / name).as_posix())
                if found:
                    return found
        stem = stem.rpartition(".")[0]
    return None


def _existing(folder: SafePath, path: str) -> SafePath | None:
    try:
        found = names.below(folder, path)
        return found if exists(found) else None
    except names.NotFoundError:
        return None
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
