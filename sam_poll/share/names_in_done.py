"""Choose the names that the files of a claim get in `done/`, and its outputs in `out/`.

A second `dog.jpg` becomes `dog~2.jpg`, and its outputs `dog~2.*`. A picture that is called
`dog~2.jpg` by its owner has outputs of the same names: the two must not meet, also where several
daemons name their claims at the same moment. Each daemon looks after it has made its claim, so at
least one of the two sees the other.

Limitations: pictures of the usual endings count, in lower or upper case. A prompt that comes alone
means the last picture of its name whose numbers in `done/` have no gap.
"""

from __future__ import annotations

import os
import re

from sam_poll.core.files import exists, suffixed
from sam_poll.share.claims.model import Claim, claim_name
from sam_poll.share.context import ShareContext
from sam_poll.share.intake.done_lookup import usual_names

_NUMBERED = re.compile(r"(?P<stem>.+)(?P<suffix>~\d{1,9})\Z", re.DOTALL)


class NamesInDone:
    """Chooses the suffix of each claim of a picture."""

    def __init__(self, context: ShareContext) -> None:
        self._layout = context.layout
        self._store = context.store
        self._active = context.active

    def suffix(self, claim: Claim) -> str:
        """Return the suffix of a claim's picture, and of what goes with it. Raises OSError."""
        picture = claim.picture or ""

        def is_taken(suffix: str) -> bool:
            stem = os.path.splitext(suffixed(picture, suffix))[0]
            return self._is_known(claim, stem) if suffix else self._is_promised(claim, stem)

        return self._store.free(claim, "done", [picture, *claim.sidecars], is_taken)

    def _is_known(self, claim: Claim, stem: str) -> bool:
        """Return whether a picture of this stem has, or will have, outputs of its own."""
        names = usual_names(stem)
        layout = self._layout
        return (
            (layout.done / claim.folder).holds_any(names)
            or (layout.input / claim.folder).holds_any(names)
            or (layout.work / claim.folder).holds_any([claim_name(name) for name in names])
        )

    def _is_promised(self, claim: Claim, stem: str) -> bool:
        """Return whether a claim of another picture may have been given this stem as its new name.

        That is one of `dog.jpg`, for `dog~2`. Its suffix is known to its own daemon only; others go
        by whether there is another `dog.jpg` in `done/`.
        """
        numbered = _NUMBERED.match(stem)
        if not numbered:
            return False
        for name in usual_names(numbered["stem"]):
            outer = self._layout.work / claim.folder / claim_name(name)
            own = self._active.get(outer)
            if own and own.suffix == numbered["suffix"]:
                return True
            if not own and exists(outer) and exists(self._layout.done / claim.folder / name):
                return True
        return False
