"""A task's frames as a door: pictures come from the share or the server, answers go into the journal.

What can still go wrong here: pictures are held in memory until they are answered, a few at a time.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sam_poll import bytesof, headers
from sam_poll.annotations import Asked
from sam_poll.cvat.journal import Journal
from sam_poll.cvat.server import Server
from sam_poll.cvat.shapes import FramePicture, fills
from sam_poll.errors import CvatError, ExitCode, InputError, PictureError, SamPollError, ShareError
from sam_poll.formats.cvat import flat
from sam_poll.fs import shown
from sam_poll.safe_path import SafePath
from sam_poll.types import Document, Job, Result

_AHEAD = 4  # pictures fetched while others are answered; as many connections as the SDK keeps open
_THIS_ONE_ONLY = (ExitCode.CVAT_NOT_FOUND, ExitCode.CVAT_REFUSED)
_FAILED_IN_A_ROW = 3  # pictures at which a server failed; fewer may be theirs: CVAT fails at one that left its share


@dataclass(frozen=True, slots=True)
class Wanted:
    """A frame, and the objects to ask for on it, each with the key its answer is kept under."""

    frame: FramePicture
    objects: tuple[tuple[str, Asked], ...]


class TaskDoor:
    """Hands out each frame once. A failure that is not one picture's ends it, and is kept in `failure`."""

    def __init__(
        self,
        wanted: Sequence[Wanted],
        fetch: Callable[[FramePicture], bytes],
        journal: Journal,
        *,
        max_pixels: int,
        on_end: Callable[[Wanted, SamPollError | None], None],
    ) -> None:
        self._wanted, self._fetch, self._journal = wanted, fetch, journal
        self._max_pixels, self._on_end = max_pixels, on_end
        self.failure: SamPollError | None = None
        self._broken = threading.Event()
        self._failed = 0  # in a row

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """All frames, until `stop` is set or something fails that all of them need."""
        left = iter(self._wanted)
        with ThreadPoolExecutor(_AHEAD, "fetch") as pool:
            coming = deque((one, pool.submit(self._picture, one)) for one in itertools.islice(left, _AHEAD))
            try:
                while coming and not stop.is_set() and not self._broken.is_set():
                    one, future = coming.popleft()
                    coming.extend((more, pool.submit(self._picture, more)) for more in itertools.islice(left, 1))
                    job = self._job(one, future)
                    if job is None:
                        return
                    yield job
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _picture(self, one: Wanted) -> bytes:
        return b"" if self._broken.is_set() else self._fetch(one.frame)

    def _job(self, one: Wanted, future: Future[bytes]) -> Job | None:
        picture = b""
        fault: InputError | None = None
        try:
            picture = future.result()
            self._failed = 0
            size = headers.read_header(picture, max_pixels=self._max_pixels).size
            if size != one.frame.size:
                fault = PictureError(
                    f"it is {size.width}×{size.height}, the task's frame is "
                    f"{one.frame.size.width}×{one.frame.size.height}",
                    remedy="give the folder that the task was made from, or leave --images out",
                )
        except CvatError as error:
            self._failed += error.kind == ExitCode.CVAT_SERVER
            if error.kind not in (*_THIS_ONE_ONLY, ExitCode.CVAT_SERVER) or self._failed >= _FAILED_IN_A_ROW:
                self._break(error)
                return None
            fault = PictureError(error.reason, place=error.place, remedy=error.remedy)
        except SamPollError as error:
            fault = error if isinstance(error, InputError) else InputError(str(error))
        prompts = tuple(asked.prompt for _, asked in one.objects)
        return Job(f"{one.frame.number:06d}", one.frame.name, picture, prompts, origin=one, fault=fault)

    def _break(self, error: SamPollError) -> None:
        self.failure = self.failure or error
        self._broken.set()

    def deliver(self, job: Job, documents: Sequence[Document]) -> None:
        """Keep the answers, whole."""
        (document,) = documents
        masks = json.loads(document.body)
        keys = [key for key, _ in job.origin.objects]
        try:
            self._journal.keep(job.origin.frame.number, dict(zip(keys, masks, strict=True)))
        except ShareError as error:
            self._break(error)  # so it will be with the next
            raise
        self._on_end(job.origin, None)

    def reject(self, job: Job, error: SamPollError) -> None:
        """Tell, and go on. What ends all of it is told once, by who runs it."""
        if not isinstance(error, ShareError):
            self._on_end(job.origin, error)

    def release(self, job: Job, trouble: OSError | None = None) -> None:
        """Nothing to put back: the next run asks for it again."""

    def abandon(self, job: Job) -> None:
        """Nobody tries again here."""
        self.reject(job, InputError("the process that worked on it has ended", remedy="look at the log"))

    def defer(self, job: Job, error: SamPollError) -> None:
        """Nobody is going to change the picture meanwhile."""
        self.reject(job, error)


def answers(result: Result) -> Sequence[Document]:
    """The format of the journal: for each object its mask in CVAT's flat form, and its predicted IoU as it came. An
    empty mask has an empty list."""
    made = [
        {"score": float(mask.score), "mask": flat(mask) if mask.pixels.size else [], "model": result.model.name}
        for mask in result.masks
    ]
    return [Document(".answers.json", "application/json", json.dumps(made).encode())]


def sound(answer: Any) -> bool:
    """Whether this is what `answers` has written; the disk may have damaged it since."""
    if not isinstance(answer, dict) or not isinstance(answer.get("score"), (int, float)):
        return False
    mask = answer.get("mask")
    return isinstance(mask, list) and all(type(value) is int for value in mask) and (not mask or fills(mask))


def from_folder(root: Path) -> Callable[[FramePicture], bytes]:
    """Pictures by their frames' names below a folder: the share that the task was made from."""

    def fetch(frame: FramePicture) -> bytes:
        try:
            return bytesof.read(SafePath.beside(path_below(root, frame.name)))[0]
        except OSError as error:
            remedy = "give the folder that the names in the task begin in, or leave --images out"
            raise PictureError(f"cannot be read: {error.strerror}", remedy=remedy) from None

    return fetch


def from_server(server: Server, task: int) -> Callable[[FramePicture], bytes]:
    """Pictures from the server, in their original quality."""
    return lambda frame: server.picture(task, frame.number)


def path_below(root: Path, name: str) -> Path:
    """The file of this name below `root`. PictureError for a name that leads out of it."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise PictureError("its name leads out of the folder", place=shown(name))
    return root.joinpath(*parts)
