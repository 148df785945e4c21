"""Shapes go to a task, each once, whatever happens on the way.

What the task has already is left out. After a write that failed, or whose answer got lost, the task is read again and
only what is not there is sent again. At the end it is read once more: nothing that was sent may be missing, and what a
late write has made twice is taken away again.

What can still go wrong here: a write that a server ends only after all this leaves shapes twice; running the same
command again takes them away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from loguru import logger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sam_poll.console import error_console
from sam_poll.cvat.calls import FailedError
from sam_poll.cvat.journal import Journal
from sam_poll.cvat.server import Server
from sam_poll.cvat.shapes import Placed, Sign, sign
from sam_poll.errors import CvatError, ExitCode

SHAPES = 200  # in one request
NUMBERS = 100_000  # coordinates and run lengths in one request: below 1 MiB, at which nginx refuses unless it is told
WRITTEN = "written"
Entry = dict[str, Any]


class Upload:
    """Writes shapes into one task."""

    def __init__(self, server: Server, task: int, journal: Journal) -> None:
        self._server, self._task, self._journal = server, task, journal
        self._sent: set[Sign] = set()
        self.made = 0

    def put(self, objects: Iterable[Sequence[Entry]], total: int) -> None:
        """Have the shapes of these objects, `total` at most, on the server; those of one object travel together, as
        one group if they are several. CvatError when it refuses them, or has failed too often."""
        with progress() as bar:
            row = bar.add_task("upload", total=total)
            for piece in _pieces(self._missing(bar.track(objects, task_id=row))):
                self._journal.note(WRITTEN, (sign(one).hex() for one in piece))
                self._create(piece)

    def _missing(self, objects: Iterable[Sequence[Entry]]) -> Iterator[list[Entry]]:
        placed: Placed | None = None
        group = 0
        for shapes in objects:
            if placed is None:  # not before it is needed: a large task takes seconds to read
                placed = self._look()
                group = placed.last_group
            fresh = [(sign(one), one) for one in shapes]
            fresh = [(name, one) for name, one in fresh if name not in placed and name not in self._sent]
            if len(shapes) > 1 and fresh:
                group += 1
                fresh = [(name, {**one, "group": group}) for name, one in fresh]
            self._sent |= {name for name, _ in fresh}
            if fresh:
                yield [one for _, one in fresh]

    def _create(self, piece: list[Entry]) -> None:
        number = 0
        while piece:
            try:
                self._server.change(self._task, "create", piece)
                self.made += len(piece)
                return
            except FailedError as failure:
                if not self._server.pause(number, failure):
                    raise
                logger.warning("{}; what is there is not sent again", failure.reason)
            number += 1
            placed = self._look()
            left = [one for one in piece if sign(one) not in placed]
            self.made += len(piece) - len(left)
            piece = left

    def prove(
        self, signs: Iterable[Sign], ours: Iterable[Sign] = (), annotations: Mapping[str, Any] | None = None
    ) -> Mapping[str, Any]:
        """Read the task: all these shapes must be there, and none of ours twice. What it holds then.

        `annotations`: what it held a moment ago, where nothing has been sent since.
        CvatError when the server has taken shapes and does not have them.
        """
        wanted = set(signs)
        annotations = annotations or self._server.annotations(self._task)
        placed = Placed(annotations["shapes"])
        lost = sum(name not in placed for name in wanted)
        if lost:
            raise CvatError(
                f"the server has accepted {len(wanted)} shapes and does not have {lost} of them",
                ExitCode.CVAT_REFUSED,
                place=f"task {self._task}",
                remedy="look whether somebody is saving the same task in a browser, and run the same command again",
            )
        doubles = placed.doubles([*wanted, *ours])
        if doubles:
            logger.warning("{} shapes came to the server twice; the second ones are deleted", len(doubles))
            return self.delete([one for one in annotations["shapes"] if one.get("id") in doubles])
        return annotations

    def delete(self, shapes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Have these shapes of the server deleted; what the task holds then."""
        left = {int(one["id"]) for one in shapes}
        number = 0
        while True:
            failure: FailedError | None = None
            for piece in _pieces([dict(one)] for one in shapes if int(one["id"]) in left):
                try:
                    self._server.change(self._task, "delete", piece)
                except FailedError as error:
                    failure = error
                    break
            if failure and not self._server.pause(number, failure):
                raise failure
            number += 1
            annotations = self._server.annotations(self._task)
            left &= {int(one["id"]) for one in annotations["shapes"]}
            if not left:
                return annotations
            if failure is None:
                raise CvatError(
                    f"the server has accepted to delete {len(shapes)} shapes and still has {len(left)} of them",
                    ExitCode.CVAT_REFUSED,
                    place=f"task {self._task}",
                    remedy="look whether somebody is saving the same task in a browser, and run the same command again",
                )

    def _look(self) -> Placed:
        return Placed(self._server.annotations(self._task)["shapes"])


def progress() -> Progress:
    """A bar on stderr, where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = error_console()
    return Progress(*columns, console=console, disable=not console.is_terminal)


def _pieces(objects: Iterable[list[Entry]]) -> Iterator[list[Entry]]:
    """Objects together, as many as go into one request; one that is larger goes alone, and whole."""
    piece: list[Entry] = []
    numbers = 0
    for shapes in objects:
        more = sum(len(one["points"]) for one in shapes)
        if piece and (len(piece) + len(shapes) > SHAPES or numbers + more > NUMBERS):
            yield piece
            piece, numbers = [], 0
        piece += shapes
        numbers += more
    if piece:
        yield piece
