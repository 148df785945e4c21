"""Files beside a picture that go into its claim with it: a mosaic's sidecars, and mask files.

World files and `.aux.xml` say where on the earth a mosaic is; mask files are rough masks that the
prompts name. They go into the claim when the job is made, and leave it with the picture: to
`done/`, `failed/` or back to `in/`.

Limitations: a sidecar that comes later stays in `in/`. Where two pictures of one stem share a world
file or a mask file, it goes with the one that is claimed first.
"""

from __future__ import annotations

import errno

from sam_poll.core.errors import InputError
from sam_poll.core.files import rename
from sam_poll.core.text import shown
from sam_poll.imaging.sidecars import names_of
from sam_poll.share.claims.model import Claim
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.layout import Layout

_NOT_PERMITTED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV}


def claim_sidecars(layout: Layout, claims: ClaimStore, claim: Claim) -> None:
    """Move the sidecars of a claim's picture into the claim; links and folders stay in `in/`.

    Raises InputError where one may not be moved: without it the labels would be at a wrong place on
    the earth. Raises OSError, ClaimLostError.
    """
    for name in names_of(claim.picture) if claim.picture else ():
        take_along(layout, claims, claim, name, "gives the picture's place on the earth")


def take_along(layout: Layout, claims: ClaimStore, claim: Claim, name: str, purpose: str) -> bool:
    """Move a file beside a claim's files in `in/` into the claim; links and folders stay there.

    Returns whether the claim has the file. `purpose` says in an error what the file is for.

    Raises InputError where it may not be moved. Raises OSError, ClaimLostError.
    """
    with claim.lock:
        if name in claim.sidecars:
            return True
        source = layout.input / claim.folder / name
        if claim.over or claim.hold.place or not source.is_file():
            return False
        try:
            rename(source, claim.path / name)
        except FileNotFoundError:
            claims.alive(claim)
            return False
        except OSError as error:
            if error.errno not in _NOT_PERMITTED:
                raise
            raise InputError(
                f"{purpose}, and cannot be taken along: {error.strerror}",
                place=shown(name),
                remedy="let the daemon's user move it, then `sam-poll retry`; or remove it",
            ) from error
        claim.sidecars.add(name)
        return True
