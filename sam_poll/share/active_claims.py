"""The claims that this daemon works on now, and what happens to their files when a job ends.

A claim in `work/` that bears this daemon's name is active as long as it is registered here. One
that bears the name and is not registered was left by an error or by a worker process that ended;
the next scan takes it over again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sam_poll.core.errors import ClaimLostError
from sam_poll.core.safe_path import SafePath
from sam_poll.share.claims.model import Claim, ClaimEntry
from sam_poll.share.claims.store import ClaimStore


@dataclass(slots=True, eq=False)
class ActiveJob:
    """What the share's job source remembers of a job (`Job.source_ref`).

    `prompt`: name of the prompt file in the claim; None for a picture without a prompt. `suffix`:
    suffix of the job's file names in `failed/`, chosen on the first call of `reject`.
    """

    claim: Claim
    prompt: str | None
    suffix: str | None = None

    @property
    def rel(self) -> str:
        """Return the file that the job is named after, relative to `in/`."""
        return self.claim.below(self.prompt or self.claim.picture or "")


class ActiveClaims:
    """The registered claims of one daemon. Thread-safe.

    `ended` is called with the outer folder of each claim that is not active any more.
    """

    def __init__(
        self, store: ClaimStore, *, ended: Callable[[SafePath], None] = lambda outer: None
    ) -> None:
        self._store = store
        self._ended = ended
        self._lock = threading.Lock()
        self._claims: dict[SafePath, Claim] = {}
        self._failed: set[SafePath] = set()

    # ── queries ──

    @property
    def busy(self) -> bool:
        """Return whether any claim is active."""
        return bool(self._claims)

    def has(self, entry: ClaimEntry) -> bool:
        """Return whether the claim of an entry, which bears this daemon's name, is active."""
        return self.holds(entry.outer)

    def holds(self, outer: SafePath) -> bool:
        """Return whether the claim with this outer folder is active."""
        with self._lock:
            return outer in self._claims

    def left_behind(self, entry: ClaimEntry) -> bool:
        """Return whether a claim bears this daemon's name and is not active."""
        return (
            entry.hold is not None
            and entry.hold.worker == self._store.worker
            and not self.has(entry)
        )

    def get(self, outer: SafePath) -> Claim | None:
        """Return the active claim with this outer folder."""
        return self._claims.get(outer)

    def pictures(self) -> list[str]:
        """Return the pictures of the active claims, relative to `in/`."""
        with self._lock:
            return [c.below(c.picture) for c in self._claims.values() if c.picture]

    def mosaics(self) -> int:
        """Return the number of unfinished mosaics in the active claims."""
        with self._lock:
            return sum(len(c.mosaics & c.prompts) for c in self._claims.values())

    def works_on(self, rel: str) -> bool:
        """Return whether an active claim contains the file with this path relative to `in/`."""
        folder, _, name = rel.rpartition("/")
        with self._lock:
            return any(
                c.folder == folder and (name in c.prompts or name == c.picture)
                for c in self._claims.values()
            )

    def attempt_failed(self, outer: SafePath) -> bool:
        """Return whether a worker process ended while it ran the claim, since its last start."""
        return outer in self._failed

    # ── registration ──

    @contextmanager
    def registered(self, claim: Claim) -> Iterator[None]:
        """Register a claim; unregister it when its jobs cannot be created.

        The next scan then takes the claim over.
        """
        with self._lock:
            self._claims[claim.outer] = claim
            self._failed.discard(claim.outer)
        try:
            yield
        except (OSError, ClaimLostError):
            self.forget(claim)
            raise

    def forget(self, claim: Claim) -> None:
        """Unregister a claim that has ended, or belongs to another daemon now."""
        with self._lock:
            if self._claims.get(claim.outer) is not claim:
                return
            del self._claims[claim.outer]
        self._ended(claim.outer)

    def forget_all_but(self, paths: Collection[SafePath]) -> None:
        """Unregister all claims but those at these paths."""
        with self._lock:
            self._claims = {
                outer: claim for outer, claim in self._claims.items() if claim.path in paths
            }

    def fail_attempt(self, claim: Claim) -> None:
        """Unregister a claim whose worker process ended.

        The next scan takes the claim over as a further attempt.
        """
        with self._lock:
            if self._claims.get(claim.outer) is not claim:
                return
            self._failed.add(claim.outer)
            del self._claims[claim.outer]
        self._ended(claim.outer)

    # ── ends ──

    def leaving(self, job: ActiveJob) -> list[str]:
        """Return the names of the files that leave the claim when this job is rejected or requeued.

        These are the prompt and, with the last prompt, the picture, its sidecars and mask files,
        unless an earlier answer has assigned the picture to `done/`.
        """
        claim = job.claim
        names: list[str] = []
        if claim.prompts <= {job.prompt} and not (claim.picture and claim.answered):
            names = [*sorted(claim.sidecars), *([claim.picture] if claim.picture else [])]
        return [*names, *([job.prompt] if job.prompt in claim.prompts else [])]

    def end(self, job: ActiveJob, place: str, suffix: str | None = None) -> None:
        """Move the files of an ended job to `place` (`done`, `failed`, `input`).

        The caller holds the claim's lock. Raises OSError: call again. ClaimLostError: the claim
        belongs to another daemon.
        """
        claim, prompt = job.claim, job.prompt
        suffix = claim.suffix if suffix is None else suffix
        if prompt in claim.prompts:
            last = claim.prompts == {prompt}
            if place == "done" and not last:
                self._store.mark_answered(claim)
            if not last or (claim.picture and claim.answered and place != "done"):
                self._store.part(claim, prompt, place, suffix)
        if claim.prompts - {prompt}:
            return
        # A picture that was answered for one prompt goes to `done/`, whatever became of its other
        # prompts.
        answered = claim.answered and claim.picture is not None
        self._store.close(
            claim, "done" if answered else place, claim.suffix if answered else suffix
        )
        self.forget(claim)
