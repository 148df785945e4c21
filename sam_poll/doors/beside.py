"""A mosaic's sidecars: world files and `.aux.xml` beside its picture go into its claim, and with it to `done/`.

They are taken once the picture is claimed. What can still go wrong here: one that comes later stays in `in/`; where two
pictures of one stem share a world file, it goes with the one that is claimed first.
"""

from __future__ import annotations

import errno

from sam_poll.doors.claims import Claim, Claims
from sam_poll.doors.layout import Layout
from sam_poll.errors import InputError
from sam_poll.fs import rename, shown
from sam_poll.sidecars import names_of

_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV}


def take_along(layout: Layout, claims: Claims, claim: Claim) -> None:
    """Move the sidecars of a claim's picture into the claim; links and folders stay. Raises InputError where one may
    not be moved: without it the labels would lie somewhere else; OSError, LostError."""
    if not claim.picture:
        return
    folder = layout.input / claim.folder if claim.folder else layout.input
    with claim.lock:
        if claim.over or claim.hold.place:
            return
        for name in names_of(claim.picture):
            source = folder / name
            if name in claim.sidecars or not source.is_file():
                continue
            try:
                rename(source, claim.path / name)
            except FileNotFoundError:
                claims.alive(claim)
                continue
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                raise InputError(
                    f"it says where the picture lies, and cannot be taken along: {error.strerror}",
                    place=shown(name),
                    remedy="let the daemon's user move it, then `sam-poll retry`; or remove it",
                ) from error
            claim.sidecars.add(name)
