"""Pictures in `in/` without a prompt: what the setting `missing_prompt` does with them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator

from sam_poll.core.errors import InputError
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.directory_index import DirectoryIndex
from sam_poll.share.intake.inventory import Inventory
from sam_poll.share.intake.next_scan import NextScan
from sam_poll.share.intake.offers import Offers
from sam_poll.share.intake.stat_cache import StatCache


class LonePictures:
    """Finds the pictures that need not wait for a prompt any more. Used by one thread."""

    def __init__(
        self,
        options: FolderOptions,
        names: DirectoryIndex,
        files: StatCache,
        inventory: Inventory,
        offers: Offers,
        next_scan: NextScan,
    ) -> None:
        self._options = options
        self._names = names
        self._files = files
        self._inventory = inventory
        self._offers = offers
        self._next_scan = next_scan
        self._prompts_may_come = False
        self.spreading = False
        """Whether annotation files in `work/`, of any daemon, are becoming prompts."""

    def wait_for_listing(self) -> None:
        """Have the pictures wait for the next listing of `in/`: their prompts may be in it."""
        self._prompts_may_come = True

    def find(self, with_prompt: Collection[str], now: float) -> Iterator[str]:
        """Yield the settled pictures that are to be offered. `with_prompt`: those with a prompt."""
        limit_s = self._options.pair_timeout_s
        if self._options.missing_prompt == "wait" and limit_s is None:
            return
        # Prompts for them may be made of the annotations, or have come since `in/` was listed.
        might_come = self._prompts_may_come
        self._prompts_may_come = self._inventory.has_annotations or self.spreading
        if might_come or self._prompts_may_come:
            if not self._inventory.has_annotations:
                self._next_scan.no_later_than(now + self._options.rescan_s * self.spreading)
            return
        for picture in self._names.pictures.difference(with_prompt):
            waited_s = now - self._inventory.first_seen[picture]
            over = limit_s is None or self._next_scan.is_over(limit_s, waited_s, now)
            free = self._offers.may_offer(picture, now, picture)
            if over and free and self._files.settled(picture):
                yield picture

    def error(self, picture: str) -> InputError | None:
        """Return the error for a picture whose prompt has not come.

        Returns None where everything in it is to be segmented.
        """
        if self._options.missing_prompt == "everything":
            return None
        limit_s = self._options.pair_timeout_s
        when = f" within {limit_s:g} s" if limit_s is not None else " with it"
        name = os.path.basename(picture)
        prompt = f"{os.path.splitext(name)[0]}.json"
        return InputError(
            f"no prompt came{when}",
            place=name,
            remedy=f"drop {prompt} into the input folder, then `sam-poll retry`",
        )
