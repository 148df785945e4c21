"""`sam-poll cvat warm`: encode a task's frames ahead, so that a first click costs the decoder only.

The embeddings go to the disk cache (`pipeline.disk_cache`), where a function, or `sam-poll serve`,
finds them: CVAT sends it the same bytes that this command downloads. The journal has the digest of
each frame's picture, so that a frame that is in the cache is not downloaded again.

Limitations: an agent (`sam_poll.cvat.interactor`) gets pixels from the SDK, not the picture's file;
it fills the cache itself, and finds nothing of what this command has written.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import typer

from sam_poll.config.settings import Settings
from sam_poll.core.errors import CvatError, ExitCode, SettingsError, ShareError
from sam_poll.core.protocols import Engine
from sam_poll.core.text import shown
from sam_poll.core.types import Job, ModelInfo, OutputFile, Result
from sam_poll.imaging import decode
from sam_poll.integrations.cvat import frame_runner, task_source
from sam_poll.integrations.cvat import scope as scopes
from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.frame_runner import FrameRunner, MakeEngine
from sam_poll.integrations.cvat.journal import Journal, folder_of
from sam_poll.integrations.cvat.scope import Scope
from sam_poll.integrations.cvat.shapes import FramePicture
from sam_poll.pipeline.disk_cache import DiskCache
from sam_poll.runtime import builders, signals
from sam_poll.runtime.console import count

# The journal's list of frames, each with the digest of its picture.
PICTURES = "pictures"


class WarmSource(task_source.CvatTaskSource):
    """Offers frames without prompts, whose embeddings are to be kept."""

    def _make_job(self, request: task_source.FrameRequest, future: Future[bytes]) -> Job | None:
        job = super()._make_job(request, future)
        return job and replace(job, keep=True)

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        """Note the digest of a frame's picture. Raises ShareError if its embedding is not kept."""
        assert isinstance(job.picture, bytes)
        frame: FramePicture = job.source_ref.frame
        try:
            if not documents:
                raise ShareError(
                    "the embedding cannot be written",
                    place="cache.folder",
                    remedy="the warning above names the cause",
                )
            self._journal.append(PICTURES, [_line(frame, decode.digest_of(job.picture))])
        except ShareError as error:
            self._abort(error)  # every further one would fail in the same way
            raise
        self._on_end(job.source_ref, None)


def kept_format(result: Result) -> Sequence[OutputFile]:
    """Return the name of the embedding's file; nothing where it could not be written."""
    return [OutputFile(".txt", "text/plain", result.kept.encode())] if result.kept else []


def cache_of(settings: Settings) -> DiskCache:
    """Return the disk cache of these settings. Raises SettingsError where there is none."""
    cache = builders.disk_cache_of(settings)
    if cache is None:
        raise SettingsError(
            "embeddings are not kept on a disk",
            place="cache.disk_mib",
            remedy="set it, in config.yaml or as SAM_POLL_CACHE__DISK_MIB, here and for the "
            "function or server that is to use them",
        )
    return cache


def run(
    client: CvatClient,
    task: int,
    jobs: Sequence[int],
    settings: Settings,
    cache: DiskCache,
    state: Path,
    *,
    dry_run: bool = False,
    engine_of: MakeEngine = builders.engine_of,
) -> ExitCode:
    """Encode the frames of a task, or of these of its jobs, and print what was done.

    `state` is the folder for journals. With `dry_run` nothing is encoded. Returns FAILED_JOBS if
    some pictures could not be encoded, or the cache is too small for all of them. Raises
    CvatError, ModelError and the other errors that end the whole command.
    """
    scope = scopes.of(client, task, jobs)
    frames = scope.covered_frames()
    if not frames:
        typer.echo(f"task {task}: no frames")
        return ExitCode.OK
    journal = Journal(folder_of(state, client.host, f"warm-{task}"))
    if dry_run:
        cold = _cold(cache, journal, engine_of(settings).info, frames)
        typer.echo(
            f"dry run: {count(len(cold), 'picture')} of {len(frames)} would be encoded; "
            "nothing was written"
        )
        return ExitCode.OK
    with journal, signals.stop_on_signals() as stop:
        engine = engine_of(settings)
        cold = _cold(cache, journal, engine.info, frames)
        command = _WarmRun(client, task, scope, settings, journal)
        try:
            if cold:
                command.encode(engine, cache, cold, stop)
        except CvatError as error:
            resume = "the same command continues"
            error.remedy = f"{error.remedy}; {resume}" if error.remedy else resume
            raise
        if stop.is_set():
            typer.echo("interrupted: the same command continues from there", err=True)
            raise KeyboardInterrupt
        lost = len(_cold(cache, journal, engine.info, frames)) - command.failed
    done = len(cold) - command.failed
    info = engine.info
    typer.echo(
        f"task {task}: {count(done, 'picture')} encoded, {len(frames) - len(cold)} before "
        f"({info.name}, {info.precision}, side {info.side})"
    )
    if lost > 0:
        typer.echo(
            f"{count(lost, 'picture')} had to leave the cache again: raise cache.disk_mib", err=True
        )
    return ExitCode.FAILED_JOBS if command.failed or lost > 0 else ExitCode.OK


class _WarmRun:
    """One run of the command on one task, with the journal locked."""

    def __init__(
        self, client: CvatClient, task: int, scope: Scope, settings: Settings, journal: Journal
    ) -> None:
        self.failed = 0
        self._client = client
        self._task = task
        self._scope = scope
        self._settings = settings
        self._journal = journal

    def encode(
        self,
        engine: Engine,
        cache: DiskCache,
        frames: Sequence[FramePicture],
        stop: threading.Event,
    ) -> None:
        """Run the pipeline on these frames; those that fail are printed and counted."""
        fetch = task_source.ServerPictures(self._client, self._task, self._scope.job_of_frame())
        requests = [task_source.FrameRequest(frame, ()) for frame in frames]
        runner = FrameRunner(self._settings, self._journal, source=WarmSource, output=kept_format)
        self.failed = len(runner.run(engine, requests, fetch, stop, cache))
        frame_runner.print_missing(fetch.missing_on_share(frames))


def _cold(
    cache: DiskCache, journal: Journal, info: ModelInfo, frames: Sequence[FramePicture]
) -> list[FramePicture]:
    """Return the frames whose embeddings are not in the cache, as far as their pictures are known.

    Raises ShareError where the cache cannot be read.
    """
    pictures = dict(line.split(" ", 1) for line in journal.lines(PICTURES) if " " in line)

    def is_warm(frame: FramePicture) -> bool:
        digest = pictures.get(str(frame.number))
        if digest is None:
            return False
        return cache.has(cache.key(digest, info).name)

    try:
        return [frame for frame in frames if not is_warm(frame)]
    except OSError as error:
        reason = f"the cache cannot be read: {error.strerror or error}"
        raise ShareError(reason, place=shown(str(cache.folder))) from None


def _line(frame: FramePicture, digest: str) -> str:
    return f"{frame.number} {digest}"
