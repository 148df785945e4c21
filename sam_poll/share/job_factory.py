"""Making jobs out of pending files in `in/` and out of claims in `work/` that are taken over."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from loguru import logger

from sam_poll.core.errors import ClaimLostError, PoisonError, PromptError
from sam_poll.core.text import shown
from sam_poll.core.types import Job
from sam_poll.prompts.mask_files import is_mask_file
from sam_poll.share.annotation_expander import AnnotationExpander
from sam_poll.share.annotation_reader import check_complete
from sam_poll.share.claims.deferrals import decode_note
from sam_poll.share.claims.model import Claim, ClaimEntry, claim_folder
from sam_poll.share.claims.store import PATH_ERRORS
from sam_poll.share.context import ShareContext
from sam_poll.share.intake.stat_cache import file_signature
from sam_poll.share.job_builder import JobBuilder
from sam_poll.share.names_in_done import NamesInDone
from sam_poll.share.pending_job import PendingJob
from sam_poll.share.prompt_reader import PromptReader, ReadPrompt


class JobFactory:
    """Claims pending files and takes claims over; returns their jobs. For the scan's thread.

    `max_mosaics` returns how many mosaics may be active at once: each occupies a place in the
    pipeline for hours, and another daemon could start with it meanwhile. `should_continue`: see
    `AnnotationExpander`.
    """

    def __init__(
        self,
        context: ShareContext,
        *,
        should_continue: Callable[[], bool] = lambda: True,
        max_mosaics: Callable[[], int] = lambda: 1,
    ) -> None:
        self._layout = context.layout
        self._options = context.options
        self._scanner = context.scanner
        self._store = context.store
        self._active = context.active
        self._max_mosaics = max_mosaics
        self._expander = AnnotationExpander(context.layout, should_continue)
        self._reader = PromptReader(context)
        self._builder = JobBuilder(context)
        self._names_in_done = NamesInDone(context)
        self.recovered = 0
        """Claims taken over from daemons that ended without putting them away."""

    # ── pending files ──

    def claim(self, group: list[PendingJob]) -> list[Job]:
        """Claim a picture with all its pending prompts and return their jobs.

        The claim lasts until the last of the jobs has ended. Files that changed or vanished, and
        pictures whose name is claimed already, are left for a later scan. Raises OSError.
        """
        if self._layout.is_annotations(group[0].prompt or ""):
            return self._claim_annotations(group[0])
        picture = group[0].picture
        claim = self._active.get(claim_folder(self._layout.work, picture)) if picture else None
        reads = self._limit_mosaics(
            [read for pending in group if (read := self._reader.read(pending, claim))]
        )
        if not reads:
            return []
        if picture and any(picture in _pending(read).signatures for read in reads):
            return [] if claim else self._claim_picture(picture, reads)
        jobs: list[Job] = []
        for read in reads:
            pending = _pending(read)
            try:
                if claim:
                    jobs += self._join(claim, read)
                elif not pending.picture or pending.suffix is not None:
                    jobs += self._claim_prompt(read)
                # Otherwise the picture's claim has just ended: the next scan looks for the picture
                # again.
            except ClaimLostError:
                continue
            except OSError as error:
                if not jobs:
                    raise
                logger.error("{} cannot be claimed: {}", shown(pending.prompt), error)
                break
        return jobs

    def _limit_mosaics(self, reads: list[ReadPrompt]) -> list[ReadPrompt]:
        """Drop the mosaics that exceed `max_mosaics`."""
        if not self._store.runs:
            return reads
        places = self._max_mosaics() - self._active.mosaics()
        excess = [read for read in reads if read.is_mosaic][max(0, places) :]
        return [read for read in reads if read not in excess]

    def _claim_picture(self, picture: str, reads: list[ReadPrompt]) -> list[Job]:
        by_prompt = {prompt: read for read in reads if (prompt := _pending(read).prompt)}
        claim = self._store.take(picture, picture, list(by_prompt))
        if claim is None:
            return []
        by_name = {os.path.basename(prompt): read for prompt, read in by_prompt.items()}
        with self._or_back(claim):
            self._builder.take_along(claim, by_name)
            if not self._layout.delete_input:
                # The suffix is chosen now, because the answers contain the picture's name in done/.
                claim.suffix = self._names_in_done.suffix(claim)
        if self._has_changed(claim, reads):
            self._put_back_changed(claim)
            return []
        with self._or_back(claim), self._active.registered(claim):
            if not by_prompt:
                return [self._builder.build(claim, None, reads[0])]
            return [
                self._builder.build(claim, name, read)
                for name, read in by_name.items()
                if name in claim.prompts
            ]

    def _has_changed(self, claim: Claim, reads: list[ReadPrompt]) -> bool:
        """Return whether files of a new claim are not those that were offered."""
        seen = {
            os.path.basename(file): signature
            for read in reads
            for file, signature in _pending(read).signatures.items()
        }
        masks = {
            os.path.basename(file)
            for read in reads
            if os.path.basename(_pending(read).prompt or "") in claim.prompts
            for file in _pending(read).signatures
            if is_mask_file(file)
        }
        return any(
            file_signature(claim.path / name) != seen[name]
            for name in (claim.picture or "", *claim.prompts, *masks)
        )

    def _put_back_changed(self, claim: Claim) -> None:
        """Put back a claim whose files changed between the last look at them and the claim."""
        self._store.close(claim, "input", self._store.free(claim, "input"))

    def _join(self, claim: Claim, read: ReadPrompt) -> list[Job]:
        """Add a prompt to the active claim of its picture."""
        name = self._add_prompt(claim, read)
        if name is None:
            return []
        with self._active.registered(claim):
            return [self._builder.build(claim, name, read)]

    def _add_prompt(self, claim: Claim, read: ReadPrompt) -> str | None:
        prompt = _pending(read).prompt or ""
        return os.path.basename(prompt) if self._store.add(claim, prompt) else None

    def _claim_prompt(self, read: ReadPrompt) -> list[Job]:
        """Claim a prompt alone: its picture is in `done/`, or the prompt is to be rejected."""
        pending = _pending(read)
        prompt = pending.prompt or ""
        claim = self._store.take(prompt, None, [prompt])
        if claim is None:
            return []
        if pending.picture:
            claim.borrowed = pending.picture
            claim.suffix = pending.suffix or ""
        with self._or_back(claim), self._active.registered(claim):
            return [self._builder.build(claim, os.path.basename(prompt), read)]

    @contextmanager
    def _or_back(self, claim: Claim) -> Iterator[None]:
        """Put a new claim back when an error of one path prevents the creation of its jobs."""
        try:
            yield
        except OSError as error:
            if error.errno in PATH_ERRORS:
                with suppress(OSError, ClaimLostError):
                    self._store.close(claim, "input", self._store.free(claim, "input"))
            raise

    # ── annotation files ──

    def _claim_annotations(self, pending: PendingJob) -> list[Job]:
        """Claim an annotation file and expand it into prompts in `in/`.

        A job is returned only where the file is rejected.
        """
        name = pending.prompt or ""
        if not self._scanner.still(pending) or self._annotations_incomplete(pending):
            return []
        claim = self._store.take(name, None, [name])
        if claim is None:
            return []
        if file_signature(claim.path / os.path.basename(name)) != pending.signatures[name]:
            self._put_back_changed(claim)
            return []
        return self._expand(claim)

    def _annotations_incomplete(self, pending: PendingJob) -> bool:
        """Return whether an annotation file may still be being written.

        The file is examined in `in/`: its writer could not complete it by its name in a claim.
        """
        name = pending.prompt or ""
        if pending.error:
            return False  # it has had its time
        try:
            check_complete(self._layout.input / name)
        except PromptError as error:
            return self._scanner.hold_if_incomplete(name, pending.signatures, error)
        except OSError as error:
            self._scanner.hold_unread(name, pending.signatures, error)
            return True
        return False

    def _expand(self, claim: Claim) -> list[Job]:
        (name,) = claim.prompts
        with self._active.registered(claim):
            try:
                # An interrupted file goes back to `in/`, where it waits for the next daemon.
                place = "done" if self._expander.expand(claim, name) else "input"
                self._store.close(claim, place, self._store.free(claim, place))
            except PromptError as error:
                return [self._builder.build(claim, name, ReadPrompt(None, None, error))]
            except FileNotFoundError:
                self._store.alive(claim)
                raise
            self._active.forget(claim)
            self._scanner.due = 0.0
            return []

    # ── claims that are taken over ──

    def resume(self, entry: ClaimEntry, *, handed: bool = False) -> list[Job]:
        """Take a claim over and return its jobs; none where its files only had to be moved.

        Raises OSError.

        `handed`: its owner, a dispatcher, is alive and has assigned the claim to this daemon.
        """
        claim = self._store.take_over(entry, ended=self._active.attempt_failed(entry.outer))
        if claim is None:
            return []
        self.recovered += not handed
        self._log_takeover(entry, claim, handed=handed)
        if claim.hold.place:
            self._close_resumed(claim, claim.hold.place, claim.hold.suffix)
            return []
        poison = self._poison(claim)
        if poison:
            # Nothing of a claim that ended the daemon is read again.
            joined: dict[str, ReadPrompt] = {}
            has_work = bool(claim.prompts) if claim.hold.prompts else self._has_work(claim)
        else:
            if any(map(self._layout.is_annotations, claim.prompts)):
                return self._expand(claim)
            joined = self._join_waiting(claim, entry.label)
            has_work = self._has_work(claim)
        if not has_work:
            if claim.answered:
                self._close_resumed(claim, "done", claim.suffix)
            else:
                self._close_resumed(claim, "input", self._store.free(claim, "input"))
            return []
        names: list[str | None] = [*sorted(claim.prompts)] or [None]  # None: a picture alone
        with self._active.registered(claim):
            reads = {
                name: joined.get(name or "") or self._read_resumed(claim, name, poison)
                for name in names
            }
            if claim.picture and not claim.answered and not self._layout.delete_input:
                self._builder.take_along(claim, {name: reads[name] for name in claim.prompts})
                claim.suffix = self._names_in_done.suffix(claim)
            return [self._builder.build(claim, name, read) for name, read in reads.items()]

    def _read_resumed(
        self, claim: Claim, name: str | None, poison: PoisonError | None
    ) -> ReadPrompt:
        if poison:
            return ReadPrompt(None, None, poison)
        return self._reader.read_claimed(claim, name)

    def _log_takeover(self, entry: ClaimEntry, claim: Claim, *, handed: bool) -> None:
        previous = entry.hold.worker if entry.hold else ""
        expected = handed or previous == self._store.worker
        logger.log(
            "DEBUG" if expected else "INFO",
            "took over {} from {}: generation {}, attempt {}",
            shown(entry.label),
            previous,
            claim.hold.generation,
            claim.hold.attempt,
        )

    def _close_resumed(self, claim: Claim, place: str, suffix: str) -> None:
        """End a claim without work left; the scanner gets the deferrals noted in it first."""
        for deferral in decode_note(self._store.note(claim) or b""):
            self._scanner.hold(deferral.job, deferral.seen, deferral.seconds, deferral.error)
        self._store.close(claim, place, suffix)

    def _join_waiting(self, claim: Claim, label: str) -> dict[str, ReadPrompt]:
        """Add the pending prompts of the claim's picture that were not claimed with it."""
        if not claim.picture:
            return {}
        waiting = (
            read
            for pending in self._scanner.siblings.get(label, [])
            if (read := self._reader.read(pending, claim))
        )
        return {name: read for read in waiting if (name := self._add_prompt(claim, read))}

    def _has_work(self, claim: Claim) -> bool:
        """Return whether a job is left in the claim.

        For a prompt alone, its picture is searched in `done/` and set as `claim.borrowed`.
        """
        if claim.picture:
            return bool(claim.prompts) or claim.hold.prompts == 0
        for name in claim.prompts:
            try:
                image = self._scanner.read(claim.path / name).image
            except PromptError:
                image = None
            found = self._scanner.finished.find(claim.below(name), image)
            if found:
                claim.borrowed, claim.suffix = found
                return True
        return False

    def _poison(self, claim: Claim) -> PoisonError | None:
        """Return the error of a claim whose attempts are used up."""
        times = claim.hold.attempt - self._store.runs
        if times < self._options.attempts:
            return None
        return PoisonError(
            f"the daemon ended {times} times while it processed this job",
            place=shown(claim.picture or min(claim.prompts, default="")),
            remedy="check the picture and the daemon's log; `sam-poll retry` runs the job again",
        )


def _pending(read: ReadPrompt) -> PendingJob:
    assert read.pending is not None
    return read.pending
