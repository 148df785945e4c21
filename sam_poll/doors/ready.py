"""What a scan finds: settled pairs that may be claimed.

What can still go wrong here: they are of the moment of the scan; who claims one looks at its files once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sam_poll.doors.settle import Signature
from sam_poll.errors import SamPollError


@dataclass(slots=True)
class Ready:
    """A settled pair, not yet claimed. Paths are relative to `in/`; a picture without signature lies elsewhere: in
    `done/` under its name with `suffix`, or (None) at work for a sibling. `fault`: claim it only to reject it."""

    prompt: str | None
    picture: str | None
    signatures: dict[str, Signature]
    fault: SamPollError | None = None
    suffix: str | None = None

    @property
    def age(self) -> tuple[int, str]:
        """For sorting: the oldest first."""
        return max(s.mtime_ns for s in self.signatures.values()), self.prompt or self.picture or ""


def by_picture(ready: Sequence[Ready]) -> list[list[Ready]]:
    """Candidates that share a picture together, in the order of the first of each."""
    groups: dict[str, list[Ready]] = {}
    for candidate in ready:
        groups.setdefault(candidate.picture or f"\0{candidate.prompt}", []).append(candidate)
    return list(groups.values())
