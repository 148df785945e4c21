"""Where the mask files are that a prompt names: in `in/`, in its picture's claim, or in `done/`.

A mask file goes with its picture. So a further prompt of the picture finds it in the claim while
the picture is there, and in `done/` afterwards. One in `in/` counts first, because it is newer.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress

from sam_poll.core.errors import PromptError
from sam_poll.core.files import with_suffix
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import Request
from sam_poll.prompts import mask_files
from sam_poll.share.claims.model import Claim
from sam_poll.share.context import ShareContext
from sam_poll.share.intake.beside import take_along
from sam_poll.share.intake.stat_cache import file_signature
from sam_poll.share.pending_job import PendingJob

_PURPOSE = "is a mask that the prompt names"


class MaskSearch:
    """Finds mask files for the scan's thread."""

    def __init__(self, context: ShareContext) -> None:
        self._layout = context.layout
        self._scanner = context.scanner
        self._store = context.store

    def are_ready(self, pending: PendingJob, request: Request, claim: Claim | None) -> bool:
        """Return whether the mask files of a pending job are complete and can be claimed with it.

        The signatures of those in `in/` are added to the job's. Where one is missing or not
        complete, the job is deferred until it is. `claim`: the one that has the picture, if this
        daemon has it. Raises OSError.
        """
        prompt = pending.prompt or ""
        folder, file = os.path.split(prompt)
        awaited: list[list[str]] = []
        missing: list[str] = []
        complete = True
        before = dict(pending.signatures)
        for name in mask_files.names_in(request):
            forms = mask_files.forms(name, file)
            for form in forms:
                path = os.path.join(folder, form)
                signature, settled = self._scanner.file_in_input(path)
                if signature:
                    if claim and form in claim.sidecars:
                        return False  # an older one is in use; the job waits for the claim's end
                    pending.signatures[path] = signature
                    complete = complete and settled
                    awaited.append([path])
                    break
            else:
                if not self._is_with_picture(pending, claim, forms):
                    missing.append(name)
                    awaited.append([os.path.join(folder, form) for form in forms])
        if complete and not missing:
            return True
        name = (missing or mask_files.names_in(request))[0]
        error = self._missing_error(folder, name, request)
        self._scanner.hold_until_there(prompt, before, awaited, error)
        return False

    def taken(self, claim: Claim, prompt: str, request: Request) -> Request:
        """Move the mask files of a claimed prompt into the claim; return the request with paths.

        One that is not there any more gets the path that it should have: the job is put back when
        it cannot be read. Raises InputError where one may not be moved; OSError, ClaimLostError.
        """
        paths = {
            name: self._path(claim, mask_files.forms(name, prompt))
            for name in mask_files.names_in(request)
        }
        return mask_files.located(request, paths)

    def _path(self, claim: Claim, forms: Sequence[str]) -> SafePath:
        for form in forms:
            if take_along(self._layout, self._store, claim, form, _PURPOSE):
                return claim.path / form
        if claim.borrowed:
            for form in forms:
                path = self._in_done(claim.below(form), claim.suffix)
                if file_signature(path):
                    return path
        return claim.path / forms[0]

    def _is_with_picture(
        self, pending: PendingJob, claim: Claim | None, forms: Sequence[str]
    ) -> bool:
        """Return whether a mask file is where the picture of a pending job is by now."""
        if claim:
            return any(form in claim.sidecars for form in forms)
        if pending.suffix is None:
            return False
        folder = os.path.dirname(pending.prompt or "")
        return any(
            file_signature(self._in_done(os.path.join(folder, form), pending.suffix))
            for form in forms
        )

    def _in_done(self, path: str, suffix: str) -> SafePath:
        return with_suffix(self._layout.done / path, suffix)

    def _missing_error(self, folder: str, name: str, request: Request) -> PromptError:
        """Return the error for a mask file that does not come."""
        reason = f"{shown(name)} is not beside the picture"
        remedy = f"drop {shown(name)} into the input folder, then `sam-poll retry`"
        with suppress(OSError):
            if not stat.S_ISREG((self._layout.input / folder / name).lstat().st_mode):
                reason = f"{shown(name)} is a link or no file, and links are never followed"
                remedy = "put the file itself there, then `sam-poll retry`"
        place = mask_files.place_of_name(request, name)
        return PromptError(reason, place=place, remedy=remedy)
