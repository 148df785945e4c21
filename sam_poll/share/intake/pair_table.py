"""Which picture each prompt in `in/` is for, by its name or by what its text names."""

from __future__ import annotations

import itertools
from collections.abc import Collection

from sam_poll.share.intake.directory_index import DirectoryIndex
from sam_poll.share.intake.pairing import Ambiguous, PictureIndex
from sam_poll.share.intake.stat_cache import StatCache
from sam_poll.share.layout import Layout

Match = str | Ambiguous | None
"""The picture that a prompt is for; several that its name fits; none."""


class PairTable:
    """The prompts in `in/`, each with its match. Used by one thread.

    The table is computed when it is first needed, and again after something has changed. Callers
    that go through `pairs` keep the list that they have got, although it may be outdated meanwhile.
    """

    def __init__(self, layout: Layout, names: DirectoryIndex) -> None:
        self._layout, self._names = layout, names
        self._pairs: list[tuple[str, Match]] | None = None
        self._images: dict[str, str | None] = {}
        self.index = PictureIndex([])
        """The pictures in `in/`, and those in `work/`."""
        self.in_work = frozenset[str]()
        """The pictures in `work/`, by the paths that they had in `in/`."""

    # ── the table ──

    def update(self, in_work: frozenset[str]) -> None:
        """Take over the pictures that are in `in/` and `work/` now."""
        pictures = itertools.chain(self._names.pictures, in_work)
        self.index, self.in_work = PictureIndex(pictures), in_work
        self.invalidate()

    def invalidate(self) -> None:
        """Compute the table again when it is next needed."""
        self._pairs = None

    def pairs(self) -> list[tuple[str, Match]]:
        """Return all prompts with their matches."""
        if self._pairs is None:
            self._pairs = [(prompt, self.match(prompt)) for prompt in self._names.prompts]
        return self._pairs

    def limit(self, files: StatCache) -> None:
        """Reduce the table to as many prompts as there is time to look at in this scan.

        This is for the scan beside which a model is loaded. Python lets only one of the two run:
        what need not be done yet makes the first job wait.
        """
        pairs: list[tuple[str, Match]] = []
        for prompt in self._names.prompts:
            picture = self.match(prompt)
            pairs.append((prompt, picture))
            if isinstance(picture, str):
                files.settled(prompt)
                files.settled(picture)
            if files.out_of_time:
                break
        self._pairs = pairs

    def match(self, prompt: str) -> Match:
        """Return the picture that a prompt is for. Its text counts more than its name."""
        if self._layout.is_annotations(prompt):
            return None
        image = self._images.get(prompt)
        return self.index.named(prompt, image) if image else self.index.find(prompt)

    def pictures_with_prompt(self) -> set[str]:
        """Return the pictures that have a prompt."""
        return {picture for _, picture in self.pairs() if isinstance(picture, str)}

    # ── what the prompts' texts name ──

    def text_known(self, prompt: str) -> bool:
        """Return whether a prompt's text has been read, as it is now."""
        return prompt in self._images

    def image_of(self, prompt: str) -> str | None:
        """Return the picture that a prompt's text names; None where none, or it was not read."""
        return self._images.get(prompt)

    def learn(self, prompt: str, image: str | None) -> None:
        """Note which picture a prompt's text names."""
        self._images[prompt] = image
        if image:
            self.invalidate()

    def unlearn(self, prompt: str) -> bool:
        """Forget what a prompt's text names, and return whether it was known."""
        if prompt not in self._images:
            return False
        del self._images[prompt]
        self.invalidate()
        return True

    def forget_all_but(self, paths: Collection[str]) -> None:
        """Forget what the texts of prompts named that are gone."""
        self._images = {path: image for path, image in self._images.items() if path in paths}

    def read_without_picture(self) -> list[str]:
        """Return the prompts whose text has been read and that have no picture yet."""
        return [prompt for prompt in self._images if not isinstance(self.match(prompt), str)]
