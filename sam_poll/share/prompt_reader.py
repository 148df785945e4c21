"""Reading the prompt of a pending job or of a claim; whether the job can be claimed yet."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from sam_poll.core.errors import IncompleteFileError, PromptError, SamPollError
from sam_poll.core.text import shown
from sam_poll.core.types import Mosaic
from sam_poll.prompts import mask_files, parser
from sam_poll.share.claims.model import Claim
from sam_poll.share.context import ShareContext
from sam_poll.share.intake.pairing import nfc_path
from sam_poll.share.mask_search import MaskSearch
from sam_poll.share.pending_job import PendingJob


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A parsed prompt, or the error that its job is rejected with, or both.

    Both None: a picture without a prompt. `pending`: the pending job that the prompt belongs to;
    None when it was read from a claim.
    """

    pending: PendingJob | None
    parsed: parser.PromptFile | None
    error: SamPollError | None

    @property
    def is_mosaic(self) -> bool:
        """Return whether the prompt requests a mosaic."""
        return self.parsed is not None and isinstance(self.parsed.prompts, Mosaic)


class PromptReader:
    """Reads prompts for the scan's thread."""

    def __init__(self, context: ShareContext) -> None:
        self._layout = context.layout
        self._options = context.options
        self._scanner = context.scanner
        self._masks = MaskSearch(context)

    def read(self, pending: PendingJob, claim: Claim | None = None) -> ReadPrompt | None:
        """Read the prompt of a pending job in `in/`.

        `claim`: the one that has its picture, if this daemon has it.

        Returns None when the job must not be claimed now: a file changed since the scan, the
        prompt, the picture or a mask file is incomplete or unreadable, or the prompt names another
        picture. The scanner then knows when to offer the job again.
        """
        try:
            if not self._scanner.still(pending):
                return None
            if pending.error or not pending.prompt:
                return ReadPrompt(pending, self._with_mask_files(pending), pending.error)
            parsed = self._scanner.read(self._layout.input / pending.prompt)
        except PromptError as error:
            grows = self._scanner.hold_if_incomplete(
                pending.prompt or "", pending.signatures, error
            )
            return None if grows else ReadPrompt(pending, None, error)
        except OSError as error:
            self._scanner.hold_unread(pending.prompt or "", pending.signatures, error)
            return None
        picture = os.path.basename(pending.picture or "")
        if parsed.image and picture and nfc_path(picture) != nfc_path(parsed.image):
            # The prompt was paired by its name, but its text names another picture: the next scan
            # pairs it by the text.
            self._scanner.learn(pending.prompt, parsed.image)
            return None
        if self._picture_grows(pending, parsed.image_bytes):
            return None
        try:
            mask_files.check_names(parsed.prompts, picture)
            if not self._masks.are_ready(pending, parsed.prompts, claim):
                return None
        except PromptError as error:
            return ReadPrompt(pending, None, error)
        return ReadPrompt(pending, parsed, None)

    def _with_mask_files(self, pending: PendingJob) -> parser.PromptFile | None:
        """Return a prompt that is to be rejected if it names mask files, which go along with it."""
        if not pending.prompt or self._layout.is_annotations(pending.prompt):
            return None
        with suppress(PromptError, OSError):
            parsed = self._scanner.read(self._layout.input / pending.prompt)
            mask_files.check_names(parsed.prompts, os.path.basename(pending.picture or ""))
            return parsed if mask_files.names_in(parsed.prompts) else None
        return None

    def _picture_grows(self, pending: PendingJob, nbytes: int | None) -> bool:
        """Return whether the picture is smaller than its prompt says.

        The job is then held until the picture changes.
        """
        seen = pending.signatures.get(pending.picture or "")
        if not seen or nbytes is None or seen.size >= nbytes:
            return False
        error = IncompleteFileError(
            f"has {seen.size:,} bytes, but the prompt's image_bytes says {nbytes:,}",
            place=shown(os.path.basename(pending.picture or "")),
            remedy="copy the picture again, or correct the prompt",
        )
        self._scanner.hold(pending.prompt or "", pending.signatures, self._options.patience, error)
        return True

    def read_claimed(self, claim: Claim, name: str | None) -> ReadPrompt:
        """Read a prompt of a claim that was taken over; `name` None: a picture without a prompt."""
        if name is None:
            return ReadPrompt(None, None, self._scanner.no_prompt_fault(claim.picture or ""))
        try:
            parsed = self._scanner.read(claim.path / name)
            picture = os.path.basename(claim.picture or claim.borrowed or "")
            mask_files.check_names(parsed.prompts, picture)
            return ReadPrompt(None, parsed, None)
        except PromptError as error:
            return ReadPrompt(None, None, error)
