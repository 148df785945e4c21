"""What the parts of a share's job source have in common."""

from __future__ import annotations

from dataclasses import dataclass

from sam_poll.share.active_claims import ActiveClaims
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.scanner import Scanner
from sam_poll.share.layout import Layout
from sam_poll.share.mosaic_workspace import MosaicWorkspace
from sam_poll.share.path_holds import PathHolds


@dataclass(frozen=True, slots=True)
class ShareContext:
    """The folders and options of one share, and one daemon's access to them."""

    layout: Layout
    options: FolderOptions
    scanner: Scanner
    store: ClaimStore
    active: ActiveClaims
    workspace: MosaicWorkspace

    @property
    def holds(self) -> PathHolds:
        """Return the paths that cannot be used now."""
        return self.scanner.path_holds
