"""What a scan finds: settled pairs of a picture and a prompt, ready to be claimed.

They are of the moment of the scan: their files are checked once more when they are claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sam_poll.core.errors import SamPollError
from sam_poll.share.intake.stability import Signature


@dataclass(slots=True)
class PendingJob:
    """A settled pair that is not yet claimed. Paths are relative to `in/`.

    A picture without a signature is elsewhere: in `done/` under its name with `suffix`, or (None)
    in the claim of another prompt. `error`: the job is claimed only to be rejected with it.
    """

    prompt: str | None
    picture: str | None
    signatures: dict[str, Signature]
    error: SamPollError | None = None
    suffix: str | None = None

    @property
    def age(self) -> tuple[int, str]:
        """Return a sort key: the oldest job first."""
        newest = max(signature.mtime_ns for signature in self.signatures.values())
        return newest, self.prompt or self.picture or ""


def by_picture(pending: Sequence[PendingJob]) -> list[list[PendingJob]]:
    """Group jobs that share a picture, in the order of the first job of each group."""
    groups: dict[str, list[PendingJob]] = {}
    for job in pending:
        groups.setdefault(job.picture or f"\0{job.prompt}", []).append(job)
    return list(groups.values())
