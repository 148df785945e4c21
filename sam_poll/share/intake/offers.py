"""The jobs that a scan offers to be claimed."""

from __future__ import annotations

from sam_poll.core.errors import SamPollError
from sam_poll.share.intake.deferred_jobs import DeferredJobs
from sam_poll.share.intake.directory_index import DirectoryIndex
from sam_poll.share.intake.stat_cache import StatCache
from sam_poll.share.path_holds import PathHolds
from sam_poll.share.pending_job import PendingJob


class Offers:
    """Says what may be offered, and makes the offers. Used by one thread."""

    def __init__(
        self,
        names: DirectoryIndex,
        files: StatCache,
        deferred: DeferredJobs,
        path_holds: PathHolds,
    ) -> None:
        self._names, self._files = names, files
        self._deferred, self._path_holds = deferred, path_holds

    def may_offer(self, job: str, now: float, *paths: str) -> bool:
        """Return whether a job is not deferred, and its paths can be used.

        `job` is its prompt, or a picture without one.
        """
        return not self._deferred.defers(job, now) and not self._path_holds.blocks(*paths)

    def awaits_claim(self, picture: str) -> bool:
        """Return whether the prompts of a picture that is claimed elsewhere may soon be offered.

        Not as long as its claim cannot be used: the end of that hold causes a scan.
        """
        return not self._path_holds.blocks_claim_of(picture)

    def pair(self, prompt: str, picture: str, suffix: str | None = None) -> PendingJob:
        """Offer a prompt and its picture; see `PendingJob` for one that is not in `in/`."""
        files = [prompt, picture] if picture in self._names.pictures else [prompt]
        signatures = self._files.all_known(files)
        return PendingJob(prompt, picture, signatures, self._deferred.error(prompt), suffix)

    def prompt(self, prompt: str, error: SamPollError | None = None) -> PendingJob:
        """Offer an annotation file, or a prompt that is to be rejected with `error`."""
        signatures = self._files.all_known([prompt])
        return PendingJob(prompt, None, signatures, self._deferred.error(prompt) or error)

    def picture(self, picture: str, error: SamPollError | None) -> PendingJob:
        """Offer a picture without a prompt; with `error` it is to be rejected."""
        signatures = self._files.all_known([picture])
        return PendingJob(None, picture, signatures, self._deferred.error(picture) or error)
