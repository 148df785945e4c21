"""Pictures that could not be read: the pause before the next try, and the alarm `read`."""

from __future__ import annotations

from dataclasses import dataclass

from loguru import logger

from sam_poll.core.alarms import Alarms
from sam_poll.core.backoff import Backoff
from sam_poll.core.text import shown
from sam_poll.share.active_claims import ActiveClaims, ActiveJob
from sam_poll.share.intake.stat_cache import file_signature
from sam_poll.share.layout import Layout

_FIRST_PAUSE_S = 2.0
_LONGEST_PAUSE_S = 60.0


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """One picture, relative to `in/`; None where it is in `done/`."""

    backoff: Backoff
    picture: str | None


class UnreadablePictures:
    """The jobs whose pictures cannot be read; the alarm lasts until none is left. Thread-safe."""

    def __init__(self, layout: Layout, active: ActiveClaims, alarms: Alarms) -> None:
        self._layout = layout
        self._active = active
        self._alarms = alarms
        self._entries: dict[str, _Unreadable] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def failed(self, active_job: ActiveJob, error: OSError) -> float:
        """Record a read error; return the seconds until the next try, which double each time."""
        claim, rel = active_job.claim, active_job.rel
        before = self._entries.get(rel)
        backoff = before.backoff if before else Backoff(_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
        pause_s = backoff.next_s()
        picture = claim.below(claim.picture) if claim.picture else None
        self._entries[rel] = _Unreadable(backoff, picture)
        logger.warning(
            "the picture of {} cannot be read: {}; next try in {:g} s", shown(rel), error, pause_s
        )
        self._alarms.raise_(
            "read", f"pictures cannot be read ({error.strerror}); reading is retried"
        )
        return pause_s

    def ended(self, rel: str) -> None:
        """Forget the job with this name: it has ended."""
        if self._entries.pop(rel, None) and not self._entries:
            self._alarms.clear("read")

    def forget_removed(self) -> None:
        """Forget jobs one of whose files was removed: not in `in/`, nor in an active claim."""
        removed = [
            rel
            for rel, entry in list(self._entries.items())
            if any(self._is_gone(file) for file in (rel, entry.picture) if file)
        ]
        for rel in removed:
            self._entries.pop(rel, None)
        if removed and not self._entries:
            self._alarms.clear("read")

    def _is_gone(self, file: str) -> bool:
        return file_signature(self._layout.input / file) is None and not self._active.works_on(file)
