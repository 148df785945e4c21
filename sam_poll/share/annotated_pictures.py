"""Finding on the share the pictures that an annotation file names."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from sam_poll.core.errors import PromptError
from sam_poll.core.files import NOT_THERE, exists, same_content
from sam_poll.core.safe_path import SafePath
from sam_poll.prompts.importers.common import image_place
from sam_poll.share.claims.model import claim_folder
from sam_poll.share.layout import Layout


class PictureFinder:
    """Finds pictures by their names in CVAT.

    Each folder is checked once; `forget` has the folders checked again.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._prefixes = [layout.share_name(root) + "/" for root in (layout.done, layout.input)]
        self._reachable: dict[tuple[SafePath, str], bool] = {}

    def forget(self) -> None:
        """Forget which folders are reachable."""
        self._reachable.clear()

    def find(self, folder: str, name: str) -> str:
        """Return the picture that an annotation file in `folder` means by `name`.

        The result is relative to `in/`. A picture in `in/` or in a claim comes first, then one in
        `done/`; of several readings of the name, the longest: the name may contain the file's
        folder and the share's, or not. PromptError: see `_check_meant`.
        """
        readings = list(dict.fromkeys(self._readings(folder, name)))
        for rel in readings:
            waiting = self.waiting(rel)
            if waiting:
                self._check_meant(name, rel, waiting)
                return rel
        in_done = (rel for rel in readings if self.lies_in(self._layout.done, rel))
        return next(in_done, readings[0])

    def _readings(self, folder: str, name: str) -> Iterator[str]:
        for prefix in self._prefixes:
            if name.startswith(prefix):
                yield name.removeprefix(prefix)
        if folder and name.startswith(folder + "/"):
            yield name
        parts = name.split("/")
        yield posixpath.join(folder, name)
        yield name
        for start in range(1, len(parts)):
            yield posixpath.join(folder, *parts[start:])

    def _check_meant(self, name: str, rel: str, waiting: SafePath) -> None:
        """Raise PromptError where `name` is in `done/` and another such picture is unanswered."""
        done = self._layout.done / rel
        if name != self._layout.share_name(done) or not self.lies_in(self._layout.done, rel):
            return
        if not same_content(done, waiting):
            raise PromptError(
                "is in done/, but another picture of its name is not yet answered, "
                "and would be taken for it",
                place=image_place(name),
                remedy="wait until that one is answered, then `sam-poll retry`",
            )

    def waiting(self, rel: str) -> SafePath | None:
        """Return the place of a picture that is not yet answered: in `in/` or in a claim."""
        if self.lies_in(self._layout.input, rel):
            return self._layout.input / rel
        name = posixpath.basename(rel)
        try:
            outer = claim_folder(self._layout.work, rel)
            claims = [outer / inner for inner in outer.names()]
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            return None
        return next((claim / name for claim in claims if exists(claim / name)), None)

    def lies_in(self, root: SafePath, rel: str) -> bool:
        """Return whether a file exists below `root`, where the scan would find it."""
        return self.is_reachable(root, posixpath.dirname(rel)) and exists(root / rel)

    def is_reachable(self, root: SafePath, folder: str) -> bool:
        """Return whether no file and no link is in a folder's way.

        The scan does not follow links.
        """
        if not folder:
            return True
        if (root, folder) not in self._reachable:
            above = self.is_reachable(root, posixpath.dirname(folder))
            self._reachable[root, folder] = above and _is_folder_or_free(root / folder)
        return self._reachable[root, folder]


def _is_folder_or_free(path: SafePath) -> bool:
    return path.is_dir() or not exists(path)
