"""Upload of shapes to a task or a job: each shape arrives once, whatever fails on the way.

Shapes that are on the server already are left out. After a write that failed, or whose answer was
lost, the annotations are read again and only what is missing is sent again. At the end they are
read once more: nothing that was sent may be missing, and duplicates that a late write has made are
deleted. A request that is too large for a proxy before the server is divided.

Limitations: a write that the server finishes only after all this leaves duplicates; running the
same command again deletes them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

from loguru import logger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sam_poll.core.errors import CvatError, ExitCode
from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.journal import Journal
from sam_poll.integrations.cvat.shapes import Fingerprint, ServerShapes, fingerprint
from sam_poll.integrations.cvat.transport import RequestFailedError
from sam_poll.runtime.console import error_console

MAX_SHAPES = 200  # in one request
# Coordinates and run lengths in one request: it stays below 1 MiB, nginx's default limit.
MAX_NUMBERS = 100_000
WRITTEN = "written"  # the journal's list of fingerprints of the shapes that were sent
DONE = "done"  # the journal's list of the objects whose shapes are known to be on the server
_CONCURRENT_EDIT = (
    "check whether a user is saving the same job in a browser, and run the same command again"
)
Entry = dict[str, Any]


class Upload:
    """Writes shapes to a task, or to one of its jobs.

    `created` is the number of shapes that this run has added, `already_there` that of the shapes
    that the server had, `done_before` the number of objects of earlier runs. `written` is the name
    of the journal's list of the fingerprints (hex) of all shapes that were sent there, `done` that
    of the list of objects.
    """

    def __init__(
        self, client: CvatClient, task: int, journal: Journal, *, job: int | None = None
    ) -> None:
        self.created = 0
        self.already_there = 0
        self.done_before = 0
        self.written = WRITTEN if job is None else job_list(WRITTEN, job)
        self.done = DONE if job is None else job_list(DONE, job)
        self._client = client
        self._task = task
        self._job = job
        self._place = f"task {task}" if job is None else f"task {task}, job {job}"
        self._journal = journal
        self._sent: set[Fingerprint] = set()
        self._too_large = sys.maxsize  # characters of the smallest request that was refused as such

    def put_once(
        self,
        objects: Iterable[tuple[str, Sequence[Entry]]],
        total: int | None,
        done: Container[str],
        annotations: Mapping[str, Any] | None,
    ) -> Mapping[str, Any]:
        """Create and verify the shapes of those objects whose keys are not in `done`.

        The keys of the others are added to the journal's list of objects. `annotations` is what the
        server held at the start, if that is enough where there is nothing to create.

        Returns what the server holds then. Raises CvatError as `put` and `verify` do.
        """
        expected: list[Fingerprint] = []
        keys: list[str] = []

        def new_objects() -> Iterator[Sequence[Entry]]:
            for key, entries in objects:
                if key in done:
                    self.done_before += 1
                    continue
                keys.append(key)
                expected.extend(fingerprint(entry) for entry in entries)
                yield entries

        self.put(new_objects(), total)
        self.already_there += len(set(expected)) - self.created
        lines = self._journal.lines(self.written)
        earlier = {bytes.fromhex(line) for line in lines if len(line) == 32}
        now = self.verify(expected, earlier, None if keys else annotations)
        self._journal.append(self.done, keys)
        return now

    def put(self, objects: Iterable[Sequence[Entry]], total: int | None) -> None:
        """Create the shapes of these objects, as far as the server does not have them.

        `total` is the maximum number of objects, if known, for the progress bar. Several shapes of
        one object are sent in one request and become one group.

        Raises CvatError if the server refuses shapes, or fails too often.
        """
        with progress() as bar:
            row = bar.add_task("upload", total=total)
            for batch in batches(self._missing(bar.track(objects, task_id=row))):
                self._journal.append(self.written, (fingerprint(shape).hex() for shape in batch))
                self._create(batch)

    def _missing(self, objects: Iterable[Sequence[Entry]]) -> Iterator[list[Entry]]:
        """Yield the shapes of each object that the server does not have, grouped."""
        on_server: ServerShapes | None = None
        group = 0
        for shapes in objects:
            if on_server is None:  # read only when needed: a large task takes seconds to read
                on_server = self._read_shapes()
                group = on_server.last_group
            keyed = [(fingerprint(shape), shape) for shape in shapes]
            missing = [
                (key, shape)
                for key, shape in keyed
                if key not in on_server and key not in self._sent
            ]
            if not missing:
                continue
            if len(shapes) > 1:
                # An earlier run may have sent some of them.
                existing = max(on_server.group_of(key) for key, _ in keyed)
                if not existing:
                    group += 1
                missing = [(key, {**shape, "group": existing or group}) for key, shape in missing]
            self._sent |= {key for key, _ in missing}
            yield [shape for _, shape in missing]

    def _create(self, batch: list[Entry]) -> None:
        retries = 0
        while batch:
            try:
                self._send("create", batch)
                self.created += len(batch)
                return
            except RequestFailedError as failure:
                if not self._client.wait_before_retry(retries, failure):
                    raise
                logger.warning("{}; only missing shapes are sent again", failure.reason)
            retries += 1
            on_server = self._read_shapes()
            missing = [shape for shape in batch if fingerprint(shape) not in on_server]
            self.created += len(batch) - len(missing)
            batch = missing

    def verify(
        self,
        expected: Iterable[Fingerprint],
        earlier: Iterable[Fingerprint] = (),
        annotations: Mapping[str, Any] | None = None,
    ) -> Mapping[str, Any]:
        """Check that the server has all expected shapes, and delete duplicates.

        `earlier` are shapes that earlier runs have sent: their duplicates are deleted too.
        `annotations` is what the server held a moment ago, if nothing has been sent since.

        Returns what the server holds then. Raises CvatError if expected shapes are missing.
        """
        wanted = set(expected)
        annotations = annotations or self._client.annotations(self._task, job=self._job)
        on_server = ServerShapes(annotations["shapes"])
        lost = sum(key not in on_server for key in wanted)
        if lost:
            raise CvatError(
                f"the server has accepted {len(wanted)} shapes and does not have {lost} of them",
                ExitCode.CVAT_REFUSED,
                place=self._place,
                remedy=_CONCURRENT_EDIT,
            )
        duplicates = on_server.duplicates([*wanted, *earlier])
        if duplicates:
            logger.warning(
                "{} shapes are on the server twice; the duplicates are deleted", len(duplicates)
            )
            return self.delete(
                [shape for shape in annotations["shapes"] if shape.get("id") in duplicates]
            )
        return annotations

    def delete(self, shapes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Delete these shapes of the server. Returns what is left. Raises CvatError."""
        remaining = {int(shape["id"]) for shape in shapes}
        retries = 0
        while True:
            failure: RequestFailedError | None = None
            for batch in batches(
                [dict(shape)] for shape in shapes if int(shape["id"]) in remaining
            ):
                try:
                    self._send("delete", batch)
                except RequestFailedError as error:
                    failure = error
                    break
            if failure and not self._client.wait_before_retry(retries, failure):
                raise failure
            retries += 1
            annotations = self._client.annotations(self._task, job=self._job)
            remaining &= {int(shape["id"]) for shape in annotations["shapes"]}
            if not remaining:
                return annotations
            if failure is None:
                raise CvatError(
                    f"the server has accepted to delete {len(shapes)} shapes and still has "
                    f"{len(remaining)} of them",
                    ExitCode.CVAT_REFUSED,
                    place=self._place,
                    remedy=_CONCURRENT_EDIT,
                )

    def _send(self, action: str, batch: list[Entry]) -> None:
        """Send a batch; what is too large for one request is sent in two halves.

        Raises RequestFailedError. A part of the batch may have been carried out then.
        """
        size = len(json.dumps(batch))
        if size < self._too_large or len(batch) == 1:
            try:
                self._client.change_shapes(self._task, action, batch, job=self._job)
                return
            except RequestFailedError as failure:
                if not failure.too_large:
                    raise
                if len(batch) == 1:
                    failure.place = f"{self._place}: frame {batch[0]['frame']}"
                    raise
                self._too_large = min(self._too_large, size)
        middle = len(batch) // 2
        self._send(action, batch[:middle])
        self._send(action, batch[middle:])

    def _read_shapes(self) -> ServerShapes:
        return ServerShapes(self._client.annotations(self._task, job=self._job)["shapes"])


def job_list(name: str, job: int) -> str:
    """Return the name of a journal's list that is kept for each job."""
    return f"{name}-{job}"


def progress() -> Progress:
    """Return a progress bar on stderr; it is shown only if stderr is a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = error_console()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def batches(objects: Iterable[list[Entry]]) -> Iterator[list[Entry]]:
    """Yield the shapes of as many objects as fit into one request.

    An object's shapes are never divided: one that exceeds the limits has a request of its own.
    """
    batch: list[Entry] = []
    numbers = 0
    for shapes in objects:
        added = sum(len(shape["points"]) for shape in shapes)
        is_full = len(batch) + len(shapes) > MAX_SHAPES or numbers + added > MAX_NUMBERS
        if batch and is_full:
            yield batch
            batch = []
            numbers = 0
        batch += shapes
        numbers += added
    if batch:
        yield batch
