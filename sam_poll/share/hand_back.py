"""Putting deferred jobs back by way of the dispatcher that the worker took their claims from.

The worker does not scan `in/`: the dispatcher must read the deferral before it finds the files in
`in/`, or it would offer the job again at once.
"""

from __future__ import annotations

from typing import Any

from sam_poll.share.active_claims import ActiveJob
from sam_poll.share.claims.deferrals import Deferral, encode_note
from sam_poll.share.claims.model import Claim
from sam_poll.share.job_finisher import JobFinisher


class HandBackFinisher(JobFinisher):
    """Ends jobs of a worker; writes deferrals into the claims that go back to the dispatcher."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._deferrals: dict[Claim, list[Deferral]] = {}

    def forget_ended(self) -> None:
        """Drop the deferrals of claims that have ended."""
        for claim in [claim for claim in list(self._deferrals) if claim.over]:
            self._deferrals.pop(claim, None)

    def _end_deferred(self, active_job: ActiveJob, suffix: str, deferral: Deferral) -> None:
        claim = active_job.claim
        if claim.giver in (None, self._store.worker):
            super()._end_deferred(active_job, suffix, deferral)
            return
        deferrals = self._deferrals.setdefault(claim, [])
        deferrals.append(deferral)
        if claim.prompts - {active_job.prompt} or claim.answered:
            self._active.end(active_job, "input", suffix)
        else:
            self._store.hand_back(claim, suffix, encode_note(deferrals))
            self._active.forget(claim)
        if claim.over:
            self._deferrals.pop(claim, None)

    def _put_back_held(self, active_job: ActiveJob) -> None:
        # The dispatcher does not know the holds of this daemon: it gets the length of the pause.
        self.put_back(active_job, self._holds.pause(active_job.rel))
