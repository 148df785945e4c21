"""The frames of a CVAT task as a job source; answers go to the journal.

Limitations: a few pictures are held in memory until their jobs are done.
"""

from __future__ import annotations

import itertools
import json
import posixpath
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loguru import logger

from sam_poll.core.errors import (
    CvatError,
    ExitCode,
    InputError,
    PictureError,
    SamPollError,
    ShareError,
)
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import Job, OutputFile, Request, Result
from sam_poll.formats.cvat import flat
from sam_poll.imaging import headers, source_file
from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.journal import Journal
from sam_poll.integrations.cvat.shapes import FramePicture, run_lengths_fit
from sam_poll.prompts.importers.shapes import PromptObject

# Pictures fetched while others are processed; also the number of connections the SDK keeps open.
_PREFETCH = 4
_STOP_POLL_S = 0.2  # seconds between two checks of `stop` while a picture is awaited
# Errors that concern one picture only, so that the other frames are still worth trying.
_ONE_PICTURE_ONLY = (ExitCode.CVAT_NOT_FOUND, ExitCode.CVAT_REFUSED)
_MAYBE_GONE = (
    "check that it is still on the server's share, and the pictures beside it, which CVAT reads "
    "together with it; --images reads pictures from a folder instead"
)

# Returns a frame's picture file. Raises InputError for an error of this picture only, and any other
# SamPollError for one that would meet every frame.
FetchPicture = Callable[[FramePicture], bytes]


@dataclass(frozen=True, slots=True)
class FrameRequest:
    """A frame, and its objects to segment, each with the key that its answer is stored under."""

    frame: FramePicture
    objects: tuple[tuple[str, PromptObject], ...]

    @property
    def prompts(self) -> Request:
        """What the network is to do on the frame."""
        return tuple(prompt_object.prompt for _, prompt_object in self.objects)

    def answers_by_key(self, answers: Sequence[Any]) -> dict[str, Any]:
        """Return what the journal stores of the answers to `prompts`."""
        return dict(zip([key for key, _ in self.objects], answers, strict=True))


class CvatTaskSource:
    """Offers each frame once.

    An error that would meet every frame ends the source; it is then in `failure`. `on_end` is
    called for each finished frame, with the error if it was rejected.
    """

    def __init__(
        self,
        requests: Sequence[FrameRequest],
        fetch: FetchPicture,
        journal: Journal,
        *,
        max_pixels: int,
        on_end: Callable[[FrameRequest, SamPollError | None], None],
    ) -> None:
        self.failure: SamPollError | None = None
        self._requests = requests
        self._fetch = fetch
        self._journal = journal
        self._max_pixels = max_pixels
        self._on_end = on_end
        self._aborted = threading.Event()
        self._last_fetch: tuple[FramePicture, Future[bytes]] | None = None

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Yield a job for each frame until `stop` is set or the source is aborted.

        A picture that is still being fetched then is not waited for: a silent server may take
        minutes.
        """
        remaining = iter(self._requests)
        fetching = deque(
            (request, self._start_fetch(request))
            for request in itertools.islice(remaining, _PREFETCH)
        )
        while fetching:
            request, future = fetching.popleft()
            while not future.done() and not stop.is_set() and not self._aborted.is_set():
                wait([future], timeout=_STOP_POLL_S)
            if stop.is_set() or self._aborted.is_set():
                return
            fetching.extend(
                (following, self._start_fetch(following))
                for following in itertools.islice(remaining, 1)
            )
            job = self._make_job(request, future)
            if job is None:
                return
            yield job

    def _start_fetch(self, request: FrameRequest) -> Future[bytes]:
        """Fetch a picture in a thread of its own, which does not keep the process from ending.

        Requests for one frame that follow each other share its picture.
        """
        if self._last_fetch and self._last_fetch[0] == request.frame:
            return self._last_fetch[1]
        future: Future[bytes] = Future()
        self._last_fetch = request.frame, future

        def fetch() -> None:
            try:
                future.set_result(self._fetch(request.frame))
            except BaseException as error:  # noqa: BLE001  raised again where the result is used
                future.set_exception(error)

        threading.Thread(target=fetch, name="fetch", daemon=True).start()
        return future

    def _make_job(self, request: FrameRequest, future: Future[bytes]) -> Job | None:
        """Return the frame's job, which carries an error if its picture cannot be used.

        Returns None if the error would meet every frame.
        """
        picture = b""
        fault: InputError | None = None
        frame = request.frame
        try:
            picture = future.result()
            size = headers.read_header(picture, max_pixels=self._max_pixels).size
            if size != frame.size:
                fault = PictureError(
                    f"it is {size.width}×{size.height}, the task's frame is "
                    f"{frame.size.width}×{frame.size.height}",
                    remedy="give the folder that the task was made from, or leave --images out",
                )
        except CvatError as error:
            self._abort(error)
            return None
        except SamPollError as error:
            fault = error if isinstance(error, InputError) else InputError(str(error))
        return Job(
            f"{frame.number:06d}",
            frame.name,
            picture,
            request.prompts,
            source_ref=request,
            error=fault,
        )

    def _abort(self, error: SamPollError) -> None:
        self.failure = self.failure or error
        self._aborted.set()

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        """Store the answers of a frame, all or none."""
        (document,) = documents
        answers = json.loads(document.body)
        request: FrameRequest = job.source_ref
        try:
            self._journal.store_answers(request.frame.number, request.answers_by_key(answers))
        except ShareError as error:
            self._abort(error)  # every further answer would fail in the same way
            raise
        self._on_end(request, None)

    def reject(self, job: Job, error: SamPollError) -> None:
        """Report the frame as failed, and go on with the others.

        A ShareError is not reported here: it is `failure`, which the caller reports once.
        """
        if not isinstance(error, ShareError):
            self._on_end(job.source_ref, error)

    def requeue(self, job: Job, trouble: OSError | None = None) -> None:
        """Do nothing: the next run of the command requests the frame again."""

    def fail_attempt(self, job: Job) -> None:
        """Reject the frame: there is no second attempt in this run."""
        self.reject(
            job, InputError("the worker process of this job has ended", remedy="check the log")
        )

    def defer(self, job: Job, error: SamPollError) -> None:
        """Reject the frame: its picture will not change during this run."""
        self.reject(job, error)


def journal_format(result: Result) -> Sequence[OutputFile]:
    """Return a result as the JSON that the journal stores: a list with one entry per object.

    `label` is the object's, `score` the unrounded predicted IoU, or the score of a found object;
    `mask` is in CVAT's flat form, an empty list for an empty mask; `model` is the network's name.
    """
    answers = [
        {
            "label": mask.label,
            "score": float(mask.score),
            "mask": flat(mask) if mask.pixels.size else [],
            "model": result.model.name,
        }
        for mask in result.masks
    ]
    return [OutputFile(".answers.json", "application/json", json.dumps(answers).encode())]


def is_valid_answer(answer: Any) -> bool:
    """Return whether this is an entry of `journal_format`; the file may have been damaged since."""
    if not isinstance(answer, dict) or not isinstance(answer.get("score"), (int, float)):
        return False
    mask = answer.get("mask")
    return (
        isinstance(mask, list)
        and all(type(value) is int for value in mask)
        and (not mask or run_lengths_fit(mask))
    )


def fetch_from(
    images: Path | None, client: CvatClient, task: int, jobs: Mapping[int, int]
) -> FetchPicture:
    """Return a function that reads a frame's picture from the folder `images`, if it is given.

    Otherwise pictures are downloaded: `jobs` is as for `ServerPictures`.
    """
    return fetch_from_folder(images) if images else ServerPictures(client, task, jobs)


def fetch_from_folder(root: Path) -> FetchPicture:
    """Return a function that reads a frame's picture, by its name, from a folder."""

    def fetch(frame: FramePicture) -> bytes:
        try:
            return source_file.read(SafePath.beside(path_below(root, frame.name)))[0]
        except OSError as error:
            remedy = "give the folder that the task's names are relative to, or leave --images out"
            raise PictureError(f"cannot be read: {error.strerror}", remedy=remedy) from None

    return fetch


class ServerPictures:
    """Downloads the frames of jobs in their original quality; calling it is a FetchPicture.

    CVAT reads pictures of a share in chunks. If one is missing there, the server answers
    "internal error" for every frame of its chunk. Such a frame fails alone, as long as the server
    answers another request; the following ones are tried only once, until one succeeds.
    """

    def __init__(self, client: CvatClient, task: int, jobs: Mapping[int, int]) -> None:
        """Use `jobs`, the number of a job by frame number, of one that covers the frame."""
        self._client = client
        self._task = task
        self._jobs = jobs
        self._is_failing = False  # set by several threads: a wrong value costs some retries only
        self._failed_folders: set[str] = set()

    def __call__(self, frame: FramePicture) -> bytes:
        """Return a frame's picture file. Raises PictureError, or CvatError if the server failed."""
        job = self._jobs.get(frame.number)
        if job is None:
            raise PictureError("is in no job of the task", remedy="look at the task's jobs in CVAT")
        tries = 1 if self._is_failing else None
        try:
            picture = self._client.picture(self._task, frame.number, job=job, tries=tries)
        except CvatError as error:
            if error.kind == ExitCode.CVAT_SERVER:
                self._is_failing = True
                self._client.job(job)
                self._failed_folders.add(posixpath.dirname(frame.name))
            elif error.kind not in _ONE_PICTURE_ONLY:
                raise
            remedy = error.remedy if error.kind == ExitCode.CVAT_REFUSED else _MAYBE_GONE
            raise PictureError(error.reason, remedy=remedy) from None
        self._is_failing = False
        return picture

    def missing_on_share(self, frames: Iterable[FramePicture]) -> list[str]:
        """Return the names of those frames that have left the server's share, sorted.

        Only the folders of pictures that the server failed to send are looked at. A folder without
        any of the frames is passed over: the task's pictures may not be of the share.
        """
        expected: dict[str, set[str]] = {folder: set() for folder in self._failed_folders}
        for frame in frames:
            folder = posixpath.dirname(frame.name)
            if folder in expected:
                expected[folder].add(frame.name)
        missing: list[str] = []
        for folder, names in expected.items():
            try:
                files = self._client.share_names(folder) or ()
            except CvatError as error:
                logger.debug("{}", error)
                continue
            absent = names - {posixpath.join(folder, file) for file in files}
            if len(absent) < len(names):
                missing += absent
        return sorted(missing)


def path_below(root: Path, name: str) -> Path:
    """Return the path of the file `name` below `root`.

    Raises PictureError for a name that leads out of `root`.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise PictureError("its name leads out of the folder", place=shown(name))
    return root.joinpath(*parts)
