"""Ending jobs of a share: answers to `out/`, rejected inputs to `failed/`, the rest to `in/`.

Every method may be called from any thread. OSError means that the share as a whole cannot be used
now; ClaimLostError that the claim belongs to another daemon; PutOffError that one path cannot be
used and the job waits for it.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from loguru import logger

from sam_poll.core.errors import (
    ClaimLostError,
    FileChangedError,
    InputError,
    PutOffError,
    SamPollError,
)
from sam_poll.core.files import AtomicFiles, exists, suffixed, sync_folder
from sam_poll.core.text import shown
from sam_poll.core.types import Job, OutputFile
from sam_poll.share.active_claims import ActiveJob
from sam_poll.share.claims.deferrals import Deferral
from sam_poll.share.context import ShareContext
from sam_poll.share.error_report import encode_report
from sam_poll.share.intake.stat_cache import file_signature
from sam_poll.share.unreadable_pictures import UnreadablePictures


class JobFinisher:
    """Ends the active jobs of one daemon.

    `wake` requests a scan. `claim_left` is called when a claim that bears this daemon's name stays
    in `work/` and must be taken over again: before and after the claim is unregistered, so that a
    scan with `once` does not end in between.

    A subclass may override `_end_deferred` and `_put_back_held`.
    """

    def __init__(
        self,
        context: ShareContext,
        unreadable: UnreadablePictures,
        *,
        wake: Callable[[], None],
        claim_left: Callable[[], None],
    ) -> None:
        self._layout = context.layout
        self._options = context.options
        self._scanner = context.scanner
        self._store = context.store
        self._active = context.active
        self._workspace = context.workspace
        self._holds = context.holds
        self._unreadable = unreadable
        self._wake = wake
        self._claim_left = claim_left

    # ── answered, rejected ──

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        """Write the outputs, then move the inputs to `done/`. OSError: call again.

        Where outputs that are files have been removed, the job is put back to begin again.
        """
        active_job: ActiveJob = job.source_ref
        claim = active_job.claim
        self._check_files(active_job, documents)
        base = self._layout.output / job.id
        # The outputs are written in the claim: only its owner can rename them from there to `out/`,
        # and an interrupted write leaves nothing behind.
        with (
            self._held_on_error(active_job),
            self._owned(active_job),
            AtomicFiles(claim.path) as outputs,
        ):
            for document in documents:
                suffix = self._layout.suffixes.get(document.suffix, document.suffix)
                path = base.with_name(base.name + suffix)
                if document.file:
                    outputs.take(path, document.file)
                else:
                    outputs.write(path, document.body)
            with claim.lock:
                self._store.alive(claim)
                if not base.parent.is_dir():
                    base.parent.mkdir(parents=True, exist_ok=True)
                outputs.show()
                sync_folder(base.parent)
                self._active.end(active_job, "done")
        self._workspace.remove(job)
        self._ended(active_job)

    def _check_files(self, active_job: ActiveJob, documents: Sequence[OutputFile]) -> None:
        """Put a job back, and raise PutOffError, where one of its output files is missing.

        By hand, or by a daemon that does not know yet that it has lost the job: calling again would
        not help.
        """
        gone = [document.file for document in documents if document.file]
        gone = [file for file in gone if not exists(file)]
        if gone:
            self.put_back(active_job)
            raise PutOffError(
                "its outputs were removed before they could be delivered; the job begins again",
                place=shown(gone[0]),
            )

    def reject(self, job: Job, error: SamPollError) -> None:
        """Move the unchanged inputs to `failed/`, with `<id>.error.json` beside them.

        OSError: call again.
        """
        active_job: ActiveJob = job.source_ref
        claim = active_job.claim
        with self._held_on_error(active_job), self._owned(active_job), claim.lock:
            self._store.alive(claim)
            if active_job.suffix is None:
                active_job.suffix = self._store.free(
                    claim, "failed", self._active.leaving(active_job)
                )
            # On a second call, files that were moved by the first one are in its report already.
            names = [
                suffixed(name, active_job.suffix)
                for name in self._active.leaving(active_job)
                if exists(claim.path / name)
            ]
            if names and claim.hold.place is None:
                self._store.write_report(claim, encode_report(names, job, error))
            self._active.end(active_job, "failed", active_job.suffix)
        self._workspace.remove(job)
        self._ended(active_job)

    def _ended(self, active_job: ActiveJob) -> None:
        self._unreadable.ended(active_job.rel)
        self._holds.ended(active_job.claim.outer, active_job.rel)
        self._wake()

    # ── put back ──

    def requeue(self, job: Job, trouble: OSError | None = None) -> None:
        """Put a job back into `in/`.

        After `trouble` reading its picture, it is offered again after a pause. OSError: it stays in
        `work/` and is taken over again.
        """
        if job.is_helper:
            self._workspace.helper_ended(job)
            return
        active_job: ActiveJob = job.source_ref
        with self._left_on_error(active_job):
            if trouble is None:
                self.put_back(active_job)
            elif isinstance(trouble, FileNotFoundError):
                error = InputError(
                    "the picture vanished while the job was processed",
                    remedy="drop the picture again",
                )
                self.reject(job, error)
            else:
                with self._owned(active_job):  # what another daemon has ended is no read error
                    self._store.alive(active_job.claim)
                self.put_back(active_job, self._unreadable.failed(active_job, trouble))

    def fail_attempt(self, job: Job) -> None:
        """Leave a job whose worker process ended to the next scan, as a further attempt."""
        if job.is_helper:
            self._workspace.helper_ended(job)
            return
        active_job: ActiveJob = job.source_ref
        self._claim_left()
        self._active.fail_attempt(active_job.claim)
        self._claim_left()

    def defer(self, job: Job, error: SamPollError) -> None:
        """Put a job back whose picture is incomplete, or is not the one that the prompt names.

        OSError: as `requeue`.
        """
        active_job: ActiveJob = job.source_ref
        with self._left_on_error(active_job):
            claim = active_job.claim
            if claim.picture is None and not claim.sidecars:
                # All that it was answered from is in `done/` and will not change.
                self.reject(job, error)
            elif isinstance(error, FileChangedError):  # its present content was not read yet
                self.put_back(active_job)
            else:
                self.put_back(active_job, self._options.patience, error)

    def put_back(
        self, active_job: ActiveJob, seconds: float = 0.0, error: SamPollError | None = None
    ) -> None:
        """Move a job's files to `in/`.

        The job is not offered again for `seconds`, and then rejected with `error`, unless one of
        its files changes.
        """
        deferred = bool(seconds or error)
        claim = active_job.claim
        with self._owned(active_job), claim.lock:
            suffix = self._store.free(claim, "input", self._active.leaving(active_job))
            if deferred:
                self._end_deferred(
                    active_job, suffix, _deferral(active_job, suffix, seconds, error)
                )
            else:
                self._active.end(active_job, "input", suffix)
        if not deferred:
            self._ended(active_job)
        self._wake()

    def _end_deferred(self, active_job: ActiveJob, suffix: str, deferral: Deferral) -> None:
        """Make the deferral known to the scanner of `in/`, then move them to `in/`.

        The claim's lock is held. OSError, ClaimLostError.
        """
        self._scanner.hold(deferral.job, deferral.seen, deferral.seconds, deferral.error)
        self._active.end(active_job, "input", suffix)

    def _put_back_held(self, active_job: ActiveJob) -> None:
        """Put back a job that `PathHolds` keeps from being claimed again. As `_end_deferred`."""
        suffix = self._store.free(active_job.claim, "input", self._active.leaving(active_job))
        self._active.end(active_job, "input", suffix)

    # ── errors ──

    @contextmanager
    def _held_on_error(self, active_job: ActiveJob) -> Iterator[None]:
        """Hold the path that an error is about, put the job back, and raise PutOffError.

        The job then waits without occupying a place in the pipeline: in `work/` if it has ended and
        only its files must be moved, else in `in/`. OSError: the error is about the share.
        """
        claim = active_job.claim
        try:
            yield
        except OSError as error:
            files = [active_job.rel]
            if claim.picture:
                files.append(claim.below(claim.picture))
            if not self._holds.failed_to_deliver(error, claim.outer, files, time.monotonic()):
                if error.errno in (errno.ENOTDIR, errno.EEXIST):
                    # A whole folder of the share is missing. These numbers would blame the job's
                    # name for it.
                    raise OSError(errno.ESTALE, error.strerror, error.filename) from error
                raise
            self._release_held(active_job)
            raise PutOffError(
                f"cannot be put away ({error.strerror}), and waits",
                place=shown(error.filename2 or error.filename or ""),
            ) from error

    def _release_held(self, active_job: ActiveJob) -> None:
        claim = active_job.claim
        try:
            with claim.lock:
                if claim.hold.place is None:
                    self._put_back_held(active_job)
        except (OSError, ClaimLostError) as error:
            logger.debug("{} stays in work/: {}", shown(active_job.rel), error)
            self._active.forget(claim)
        if claim.over:
            self._holds.ended(claim.outer)
        elif claim.hold.place is not None:
            self._active.forget(claim)
        self._wake()

    @contextmanager
    def _owned(self, active_job: ActiveJob) -> Iterator[None]:
        """Unregister the claim when it turns out to belong to another daemon."""
        try:
            try:
                yield
            except FileNotFoundError:
                self._store.alive(active_job.claim)
                raise
        except ClaimLostError:
            self._active.forget(active_job.claim)
            self._wake()
            raise

    @contextmanager
    def _left_on_error(self, active_job: ActiveJob) -> Iterator[None]:
        """Leave a claim that cannot be ended now to the next scan.

        The caller of `requeue` and `defer` does not call again.
        """
        try:
            yield
        except OSError as error:
            self._claim_left()
            self._holds.failed_claim(error, active_job.claim.outer, time.monotonic())
            self._active.forget(active_job.claim)
            self._claim_left()
            raise


def _deferral(
    active_job: ActiveJob, suffix: str, seconds: float, error: SamPollError | None
) -> Deferral:
    """Return the deferral of a job whose files will have this suffix in `in/`."""
    claim = active_job.claim
    names = [name for name in (*claim.sidecars, claim.picture, active_job.prompt) if name]
    files = {claim.below(suffixed(name, suffix)): name for name in names}
    seen = {
        file: signature
        for file, name in files.items()
        if (signature := file_signature(claim.path / name))
    }
    return Deferral(list(files)[-1], seen, seconds, error)
