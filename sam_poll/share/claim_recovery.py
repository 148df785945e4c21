"""Surveying `work/`: which claims other daemons work on, and which were abandoned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sam_poll.core.safe_path import SafePath
from sam_poll.share.claims.cleanup import Janitor
from sam_poll.share.claims.liveness import LivenessTracker
from sam_poll.share.claims.model import ClaimEntry
from sam_poll.share.context import ShareContext
from sam_poll.share.intake.stat_cache import NEVER


@dataclass(slots=True)
class _SortedClaims:
    """Claims that no daemon works on, and those of other live daemons."""

    abandoned: list[ClaimEntry] = field(default_factory=list)
    elsewhere: list[ClaimEntry] = field(default_factory=list)


class ClaimRecovery:
    """Surveys `work/` during a scan, sweeps it, and keeps the abandoned claims.

    For the scan's thread. `wake` requests another scan. `own_claims_listed` is called during a
    survey with the paths of all claims that bear this daemon's name.
    """

    def __init__(
        self,
        context: ShareContext,
        liveness: LivenessTracker,
        *,
        wake: Callable[[], None],
        own_claims_listed: Callable[[set[SafePath]], None],
    ) -> None:
        self._layout = context.layout
        self._options = context.options
        self._scanner = context.scanner
        self._store = context.store
        self._active = context.active
        self._workspace = context.workspace
        self._holds = context.holds
        self._liveness = liveness
        self._janitor = Janitor(
            context.layout, context.store, liveness, context.options.lease_s, context.holds
        )
        self._wake = wake
        self._own_claims_listed = own_claims_listed
        self.abandoned: list[ClaimEntry] = []
        """Claims to take over, as of the last survey."""
        self.orphans = 0
        """Abandoned claims and stray files in `work/`, as of the last survey."""
        self.due = NEVER
        """When the lease of another daemon may expire, by the monotonic clock."""

    def survey(self, now: float) -> set[str]:
        """List `work/` and sweep it; return the pictures in claims that are not active here.

        Further prompts of these pictures must wait for their claims. Raises OSError.
        """
        listing = self._store.list_work()
        entries = listing.claims
        worker = self._store.worker
        self._own_claims_listed({e.path for e in entries if e.hold and e.hold.worker == worker})
        claims = self._sort(entries, now)
        self.abandoned = [e for e in claims.abandoned if not self._holds.blocks_claim(e)]
        self.orphans = len(claims.abandoned) + len(listing.strays)
        for folder in listing.closed:
            self._holds.closed(self._layout.work / folder, now)
        if self._janitor.tidy(listing, now):
            self._wake()
        self._workspace.sweep(listing, now, self._options.lease_s)
        self._scanner.spreading = any(
            self._layout.is_annotations(e.label) for e in (*claims.elsewhere, *self.abandoned)
        )
        # An abandoned claim is soon active here, and its picture's further prompts join it then. A
        # claim of a prompt alone is not one of a picture.
        return {
            e.label
            for e in (*claims.elsewhere, *claims.abandoned)
            if self._layout.is_picture(e.outer.name)
        }

    def _sort(self, entries: list[ClaimEntry], now: float) -> _SortedClaims:
        """Sort claims by whether their daemons work on them, and set `due`."""
        own = self._store.worker
        self.due = NEVER
        holders = {entry.hold.worker for entry in entries if entry.hold}
        dead = {worker for worker in holders - {own} if self._liveness.dead(worker, now)}
        claims = _SortedClaims()
        for entry in entries:
            if entry.hold is None:
                continue
            worker = entry.hold.worker
            if worker == own:
                if not self._active.has(entry):
                    claims.abandoned.append(entry)
            elif worker in dead:
                claims.abandoned.append(entry)
            else:
                claims.elsewhere.append(entry)
                # With `once`, claims of daemons that are alive are left to them.
                if not self._options.once or self._liveness.unsure(worker):
                    self.due = min(self.due, self._liveness.expires(worker))
        return claims
