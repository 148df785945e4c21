"""Building a `Job` from a claim and one of its prompts.

Limitations: a job's name may depend on its neighbours (`dog.jpg` beside `dog.png`). When these
change between two runs of one job, the second run writes its answer under another name, and the
first run's answer stays in `out/`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from loguru import logger

from sam_poll.core.errors import InputError, SamPollError
from sam_poll.core.files import NAME_MAX, exists, with_suffix
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import AutomaticMaskRequest, Job, Mosaic
from sam_poll.share.active_claims import ActiveJob
from sam_poll.share.claims.model import Claim
from sam_poll.share.context import ShareContext
from sam_poll.share.intake.beside import claim_sidecars
from sam_poll.share.intake.done_lookup import usual_names
from sam_poll.share.intake.pairing import job_id
from sam_poll.share.mask_search import MaskSearch
from sam_poll.share.prompt_reader import ReadPrompt

_LONGEST_SUFFIX = 24  # bytes of `.overlay.jpg`, `.mask.10000.png`, `.error.json`, `~2`


class JobBuilder:
    """Builds jobs for the scan's thread."""

    def __init__(self, context: ShareContext) -> None:
        self._layout = context.layout
        self._scanner = context.scanner
        self._store = context.store
        self._workspace = context.workspace
        self._masks = MaskSearch(context)

    def build(self, claim: Claim, prompt: str | None, read: ReadPrompt) -> Job:
        """Return the job of one prompt in a claim.

        `prompt`: None for a picture without a prompt. Raises OSError, ClaimLostError.
        """
        error = read.error
        active_job = ActiveJob(claim, prompt)
        named = claim.below(claim.picture) if claim.picture else claim.borrowed or active_job.rel
        in_done = with_suffix(self._layout.done / named, claim.suffix)
        picture = _picture_source(claim, in_done)
        if read.is_mosaic:
            try:
                claim_sidecars(self._layout, self._store, claim)
            except InputError as sidecar_error:
                error = error or sidecar_error
        if not self._store.runs and not claim.shares_stem and self._scanner.shares_stem(named):
            self._store.mark_stem(claim)
        identity = self._identity(active_job, named) + claim.suffix
        error = error or _name_error(identity, active_job)
        logger.debug("claimed {}", shown(active_job.rel))
        parsed = read.parsed
        request = parsed.prompts if parsed else AutomaticMaskRequest()
        try:
            request = self._masks.taken(claim, prompt or "", request)
        except InputError as mask_error:
            error = error or mask_error
        job = Job(
            id=identity,
            name=self._layout.share_name(in_done),
            picture=picture,
            prompts=request,
            source_ref=active_job,
            error=error,
            sha256=parsed.image_sha256 if parsed else None,
            nbytes=parsed.image_bytes if parsed else None,
            image_size=parsed.image_size if parsed else None,
            generation=claim.hold.generation,
            attempt=claim.hold.attempt,
            notes=(_reuse_note(in_done),) if claim.borrowed else (),
        )
        if not self._needs_workspace(job):
            return job
        claim.mosaics.add(prompt)
        return self._workspace.prepare(claim, prompt, job)

    def take_along(self, claim: Claim, reads: Mapping[str, ReadPrompt]) -> None:
        """Move mask files, and a mosaic's sidecars, into their claim, where possible.

        `reads`: the claim's prompts. Called before the claim's names in `done/` are chosen. Raises
        OSError, ClaimLostError.
        """
        for name, read in reads.items():
            with suppress(InputError):  # `build` sets it as the job's error
                if read.is_mosaic:
                    claim_sidecars(self._layout, self._store, claim)
                elif read.parsed and name in claim.prompts:
                    self._masks.taken(claim, name, read.parsed.prompts)

    def _needs_workspace(self, job: Job) -> bool:
        return (
            self._store.runs
            and not job.error
            and isinstance(job.prompts, Mosaic)
            and isinstance(job.picture, SafePath)
        )

    def _identity(self, active_job: ActiveJob, named: str) -> str:
        """Return the path of a job's outputs below `out/`, before the suffix.

        `named`: the job's picture, relative to `in/`, or the prompt where there is no picture.
        """
        claim = active_job.claim
        folder, _, name = named.rpartition("/")
        # The scan has seen which other pictures are in `in/` or in claims. A picture that has come
        # since then will see this one in its claim.
        shares_stem = claim.shares_stem or self._scanner.shares_stem(named)
        others = [other for other in usual_names(os.path.splitext(name)[0]) if other != name]
        return job_id(
            active_job.rel,
            named,
            shares_stem=shares_stem or (self._layout.done / folder).holds_any(others),
            twin=self._has_twin(active_job),
        )

    def _has_twin(self, active_job: ActiveJob) -> bool:
        """Return whether `dog.json` is beside the job's prompt, which has another ending."""
        claim, twin = active_job.claim, os.path.splitext(active_job.rel)[0] + ".json"
        if active_job.prompt is None or twin == active_job.rel or not self._layout.is_prompt(twin):
            return False
        folders = (self._layout.input, self._layout.done)
        return os.path.basename(twin) in claim.prompts or any(
            exists(folder / twin) for folder in folders
        )


def _picture_source(claim: Claim, in_done: SafePath) -> SafePath | bytes:
    """Return where the picture is: in the claim, or in `done/`; no bytes where there is none."""
    if claim.picture:
        return claim.path / claim.picture
    return in_done if claim.borrowed else b""


def _name_error(identity: str, active_job: ActiveJob) -> SamPollError | None:
    if len(os.fsencode(os.path.basename(identity))) + _LONGEST_SUFFIX <= NAME_MAX:
        return None
    return InputError(
        "the name is too long to append the outputs' endings to it",
        place=shown(os.path.basename(active_job.rel)),
        remedy=f"use names of at most {NAME_MAX - _LONGEST_SUFFIX} bytes",
    )


def _reuse_note(place: SafePath) -> str:
    """Return the note for a result whose picture was taken from `done/`."""
    return (
        f"no picture came with the prompt: it was answered on {place.name} in done/, "
        "from an earlier job"
    )
