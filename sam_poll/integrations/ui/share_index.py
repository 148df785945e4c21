"""One scanner of the share for all viewers: counts, failures, answers, and what waits.

A thread reads the share and publishes a `ShareView`, which never changes; pages show what the last
one says, and cost no access to the share. The thread rests several times as long as it has worked,
and altogether while no page is open.

Limitations: a view is some seconds old, on a share with hundreds of thousands of files up to a
minute.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from loguru import logger

from sam_poll.core.errors import SamPollError
from sam_poll.core.files import remedy_of
from sam_poll.core.text import shown
from sam_poll.formats import registry
from sam_poll.runtime.console import alarms_of
from sam_poll.share.error_report import ErrorReport, read_report
from sam_poll.share.file_index import FileIndex, IndexedFile, IndexedFolder
from sam_poll.share.intake.waiting import Waiting, without_partner
from sam_poll.share.layout import ERROR_ENDING, Layout
from sam_poll.share.status import Counts, count_folder, kind_of, kinds_of, status

EVERY_S = 1.0
"""Least time between two scans."""
REST = 4.0
"""Pause after a scan, as a multiple of the time that it took."""
AGES_S = 5.0
"""Time after which viewers hear that ages have changed, such as that of a heartbeat."""
IDLE_S = 60.0
"""Time without a viewer after which the share is not scanned any more."""
MOST_EXPLAINED = 500
"""So many waiting files are listed with their reason; the others by name."""

_LEAST_WAIT_S = 0.01
_ORDER = ("input", "work", "failed", "output", "done")  # what a viewer looks for first
_SUFFIXES = sorted(
    (suffix for name in registry.names() for suffix in registry.suffixes(name)),
    key=len,
    reverse=True,
)
_PER_OBJECT = re.compile(r"\.mask\.[0-9]{1,9}\.png$")
# What differs between two rejections for one reason: numbers, and what is quoted.
_VARIABLE = re.compile(r"[0-9][0-9.,×]*|'[^']*'|\"[^\"]*\"|`[^`]*`")


@dataclass(frozen=True, slots=True)
class AnswerEntry:
    """An answer: its job's id, the suffixes of its files in `out/`, the time of the newest one."""

    id: str
    suffixes: tuple[str, ...]
    modified: float

    @property
    def folder(self) -> str:
        """The folder of the job, relative to `in/`; "" for the topmost one."""
        return self.id.rpartition("/")[0]


@dataclass(frozen=True, slots=True)
class FailureEntry:
    """A rejected job: its id, its report and the report's time. `kind` groups similar reasons."""

    id: str
    modified: float
    report: ErrorReport
    kind: str


@dataclass(frozen=True, slots=True)
class FailureKind:
    """Failures with similar reasons: how many, and the reason of the newest one."""

    kind: str
    count: int
    example: ErrorReport


@dataclass(frozen=True)
class ShareView:
    """The share as it was at one moment.

    - `version`: grows with each change.
    - `ready`: the share has been read at least once; until then `pending` are the folders that
      were not read yet.
    - `trouble`: why it cannot be read at present.
    - `status`: what `sam-poll status` shows (`share.status.status`).
    - `failures`, `answers`: newest first. `kinds`: failures by kind, most frequent first.
      `folders`: the folders of the answers.
    """

    version: int = 0
    ready: bool = False
    pending: tuple[str, ...] = ()
    trouble: str | None = None
    status: dict[str, Any] = field(default_factory=dict)
    failures: tuple[FailureEntry, ...] = ()
    kinds: tuple[FailureKind, ...] = ()
    answers: tuple[AnswerEntry, ...] = ()
    folders: tuple[str, ...] = ()
    waiting: Waiting = field(default_factory=Waiting)


class ShareIndex:
    """Reads the share on a thread of its own while entered.

    `keep`: see `FileIndex`. `clock` is a monotonic clock, in seconds.
    """

    def __init__(
        self, layout: Layout, *, keep: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.layout = layout
        self._clock = clock
        self._indexes = {
            name: FileIndex(
                folder,
                kind=_kind_of(layout, name),
                keep=keep,
                times=name in ("input", "output", "failed"),
                ignored=layout.ignored if name == "input" else type(layout.ignored)(),
            )
            for name, folder in layout.folders.items()
            if name != "work"
        }
        self._view = ShareView()
        self._changed = threading.Condition()
        self._stop = False
        self._due = False
        self._looked = clock()
        self._published = 0.0
        self._scans = 0
        self._scanning = False
        self._answers: dict[str, tuple[IndexedFolder, list[AnswerEntry]]] = {}
        self._reports: dict[str, tuple[IndexedFile, FailureEntry]] = {}
        self._stale = set(layout.folders)  # folders whose changes are not in the view yet
        self._thread = threading.Thread(target=self._run, name="share-index", daemon=True)

    def __enter__(self) -> ShareIndex:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join(5)  # it may hang in a share that does not answer

    # ── for viewers ──

    def view(self) -> ShareView:
        """Return the newest view. Called by every viewer, so that the thread goes on reading."""
        with self._changed:
            idle = self._clock() - self._looked > IDLE_S
            self._looked = self._clock()
            if idle:
                self._due = True
                self._changed.notify_all()
            return self._view

    def refresh(self, timeout_s: float = 5.0) -> ShareView:
        """Read the share now, after a change that the viewer has made; return the new view.

        Returns the last one where reading takes longer than `timeout_s`.
        """
        with self._changed:
            before = self._scans
            self._looked = self._clock()
            self._due = True
            self._changed.notify_all()
            # A scan that runs already may have begun before the change: wait for the one after it.
            wanted = before + 1 + self._scanning
            self._changed.wait_for(lambda: self._scans >= wanted or self._stop, timeout_s)
            return self._view

    # ── the thread ──

    def _run(self) -> None:
        while not self._stop:
            with self._changed:
                self._due = False
                self._scanning = True
            started = self._clock()
            try:
                self.scan()
            except Exception as error:  # noqa: BLE001  a page that stands still would mislead
                logger.opt(exception=True).error("the share cannot be read")
                trouble = f"unexpected {type(error).__name__}; the log says more"
                self._publish(replace(self._view, trouble=trouble))
            took = self._clock() - started
            self._rest(self._clock() + max(EVERY_S, REST * took))

    def _rest(self, until: float) -> None:
        """Wait until a scan is due: at `until` while a page is open, or when a page needs one."""
        with self._changed:
            self._scans += 1
            self._scanning = False
            self._changed.notify_all()
            while not (self._stop or self._due):
                now = self._clock()
                idle = now - self._looked > IDLE_S
                if now >= until and not idle:
                    return
                self._changed.wait(None if idle else max(until - now, _LEAST_WAIT_S))

    def scan(self) -> None:
        """Read the share and publish what it contains."""
        try:
            view = self._read()
        except (OSError, SamPollError) as error:
            self._publish(replace(self._view, trouble=_trouble(error, self.layout)))
            return
        self._stale.clear()
        self._publish(replace(view, ready=True, trouble=None))

    def _publish(self, view: ShareView) -> None:
        """Make a view the newest one, if it says anything new.

        Ages alone, which change with every scan, are news every `AGES_S` only.
        """
        before = self._view
        now = self._clock()
        is_old = now - self._published >= AGES_S
        if _without_ages(view) == _without_ages(before) and not (is_old and view != before):
            return
        with self._changed:
            self._published = now
            self._view = replace(view, version=before.version + 1)
            self._changed.notify_all()

    def _read(self) -> ShareView:
        """Read what may have changed. The first time, each step is published as it is done."""
        layout = self.layout
        if not layout.input.is_dir():
            raise SamPollError("the input folder does not exist", remedy="mount the share")
        counts = Counts(folders={name: kinds_of(name) for name in layout.folders})
        view = self._view
        pending = [name for name in _ORDER if not view.ready]
        for name in _ORDER:
            if self._count(name, counts):
                self._stale.add(name)
            if name == "failed" and name in self._stale:
                failures = self._read_failures()
                view = replace(view, failures=failures, kinds=_kinds(failures))
            if name == "output" and name in self._stale:
                answers = self._read_answers()
                folders = sorted({entry.folder for entry in answers})
                view = replace(view, answers=answers, folders=tuple(folders))
            if name == "input":
                waiting = without_partner(layout, most=MOST_EXPLAINED)
                view = replace(view, waiting=waiting)
            if pending:
                pending.remove(name)
                report = status(layout, counts=counts, waiting=view.waiting)
                self._publish(replace(view, status=report, pending=tuple(pending)))
        report = status(layout, counts=counts, waiting=view.waiting)
        return replace(view, status=report, pending=())

    def _count(self, name: str, counts: Counts) -> bool:
        """Count the files of one of the five folders; return whether they have changed."""
        if name == "work":
            count_folder(self.layout, name, counts)
            return True
        index = self._indexes[name]
        changed = index.refresh()
        found = index.kinds()
        if name == "output":  # there the kinds are suffixes
            found = Counter(other=found.total())
        counts.folders[name] = kinds_of(name, found)
        if name == "input":
            counts.oldest = min(_dated(index), default=None)
        return changed

    def _read_failures(self) -> tuple[FailureEntry, ...]:
        """Read the reports that were not read before."""
        found: dict[str, tuple[IndexedFile, FailureEntry]] = {}
        for folder in self._indexes["failed"].folders:
            for file in folder.files.values():
                if file.kind != "errors":
                    continue
                path = folder.path_of(file.name)
                known = self._reports.get(path)
                if known and known[0] is file:
                    found[path] = known
                    continue
                try:
                    report = read_report(self.layout.failed / path)
                except OSError as error:
                    reason = f"the error report cannot be read: {error.strerror or error}"
                    report = ErrorReport(reason=reason)
                entry = FailureEntry(
                    path[: -len(ERROR_ENDING)], file.modified, report, kind_of_reason(report)
                )
                found[path] = (file, entry)
        self._reports = found
        entries = (entry for _, entry in found.values())
        return tuple(sorted(entries, key=attrgetter("modified", "id"), reverse=True))

    def _read_answers(self) -> tuple[AnswerEntry, ...]:
        """Group the files in `out/` by job; only folders that have changed are grouped again."""
        before, self._answers = self._answers, {}
        for folder in self._indexes["output"].folders:
            known = before.get(folder.path)
            if known is None or known[0] is not folder:
                known = (folder, list(_answers_in(folder)))
            self._answers[folder.path] = known
        entries = [entry for _, found in self._answers.values() for entry in found]
        return tuple(sorted(entries, key=attrgetter("modified", "id"), reverse=True))


def _kind_of(layout: Layout, folder: str) -> Callable[[str], str]:
    """Return what says the kind of a file; in `out/` that is its format's suffix, or ""."""
    if folder == "output":
        return _suffix_of
    return lambda name: kind_of(layout, name, folder)


def _suffix_of(name: str) -> str:
    for suffix in _SUFFIXES:
        if name.endswith(suffix):
            return suffix
    match = _PER_OBJECT.search(name)
    return match[0] if match else ""


def _answers_in(folder: IndexedFolder) -> Iterator[AnswerEntry]:
    found: dict[str, list[IndexedFile]] = {}
    for file in folder.files.values():
        if file.kind:
            found.setdefault(file.name[: -len(file.kind)], []).append(file)
    for name, files in found.items():
        suffixes = tuple(sorted(file.kind for file in files))
        yield AnswerEntry(folder.path_of(name), suffixes, max(file.modified for file in files))


def _without_ages(view: ShareView) -> ShareView:
    """Return a view without what changes with every scan."""
    workers = [
        {key: value for key, value in worker.items() if key not in ("beat_s", "alarms")}
        | {"alarms": [alarm["kind"] for alarm in alarms_of(worker)]}
        for worker in view.status.get("workers", [])
    ]
    oldest = view.status.get("oldest")
    status = {**view.status, "workers": workers, "oldest": oldest and oldest["name"]}
    return replace(view, version=0, status=status)


def _dated(index: FileIndex) -> Iterator[tuple[float, str]]:
    """Yield time and path of each picture and prompt."""
    for folder in index.folders:
        for file in folder.files.values():
            if file.kind in ("pictures", "prompts"):
                yield file.modified, folder.path_of(file.name)


def kind_of_reason(report: ErrorReport) -> str:
    """Return what similar reasons have in common: the code, and the reason without numbers."""
    return f"{report.code}: {_VARIABLE.sub('…', report.reason)}"


def _kinds(failures: tuple[FailureEntry, ...]) -> tuple[FailureKind, ...]:
    counts = Counter(failure.kind for failure in failures)
    examples = {failure.kind: failure.report for failure in reversed(failures)}
    return tuple(FailureKind(kind, count, examples[kind]) for kind, count in counts.most_common())


def _trouble(error: OSError | SamPollError, layout: Layout) -> str:
    if isinstance(error, SamPollError):
        return f"{shown(layout.input)}: {error.reason} ({error.remedy})"
    place = shown(error.filename or layout.input)
    return f"{place}: {error.strerror or error} ({remedy_of(error)})"
