"""The pictures and prompts in `in/`, and since when each has been there."""

from __future__ import annotations

from sam_poll.share.intake.directory_index import DirectoryIndex
from sam_poll.share.layout import Layout


class Inventory:
    """What a scanner has seen in `in/`, by a monotonic clock. Used by one thread."""

    def __init__(self, layout: Layout, names: DirectoryIndex) -> None:
        self._layout, self._names = layout, names
        self._oldest: float | None = None
        self.first_seen: dict[str, float] = {}
        """When each picture and prompt was first seen."""
        self.newest = 0.0
        """When the last of them was first seen."""
        self.has_annotations = False
        """Whether any of them is an annotation file."""

    @property
    def count(self) -> int:
        """Return the number of pictures and prompts."""
        return len(self.first_seen)

    def update(self, now: float) -> set[str]:
        """Take over the names that the directory index has now, and return them."""
        seen = self._names.pictures.union(self._names.prompts)
        self.first_seen = {path: self.first_seen.get(path, now) for path in seen}
        self._oldest = min(self.first_seen.values(), default=None)
        self.newest = max(self.first_seen.values(), default=0.0)
        self.has_annotations = any(map(self._layout.is_annotations, self._names.prompts))
        return seen

    def oldest_s(self, now: float) -> float:
        """Return how long the oldest of them has been seen, in seconds."""
        return 0.0 if self._oldest is None else now - self._oldest
