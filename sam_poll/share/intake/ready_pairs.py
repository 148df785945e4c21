"""Prompts and their pictures that are ready to be claimed together."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable

from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.directory_index import DirectoryIndex
from sam_poll.share.intake.inventory import Inventory
from sam_poll.share.intake.lone_pictures import LonePictures
from sam_poll.share.intake.next_scan import NextScan
from sam_poll.share.intake.offers import Offers
from sam_poll.share.intake.pair_table import PairTable
from sam_poll.share.intake.prompt_texts import PromptTexts
from sam_poll.share.intake.stat_cache import StatCache
from sam_poll.share.pending_job import PendingJob

_MANY = 5000  # so many pictures are offered at a time: more than are claimed before the next scan

# Age, name, prompt, picture: plain tuples, because there may be a hundred thousand.
_Candidate = tuple[int, str, str | None, str]


class ReadyPairs:
    """Finds settled pairs, and pictures that need not wait for a prompt. Used by one thread."""

    def __init__(
        self,
        options: FolderOptions,
        names: DirectoryIndex,
        files: StatCache,
        inventory: Inventory,
        pairs: PairTable,
        texts: PromptTexts,
        offers: Offers,
        lone_pictures: LonePictures,
        next_scan: NextScan,
    ) -> None:
        self._options = options
        self._names = names
        self._files = files
        self._inventory = inventory
        self._pairs = pairs
        self._texts = texts
        self._offers = offers
        self._lone_pictures = lone_pictures
        self._next_scan = next_scan
        self.siblings: dict[str, list[PendingJob]] = {}
        """Settled prompts of pictures that other daemons have claimed, by the picture."""

    def find(self, now: float, at_work: Collection[str]) -> list[PendingJob]:
        """Return what may be claimed. `at_work`: pictures that this daemon has claimed."""
        candidates: list[_Candidate] = []
        with_prompt: set[str] = set()
        self.siblings = {}
        pictures, settled = self._names.pictures, self._files.settled
        early = self._awaiting_better_match(now)
        for prompt, picture in self._pairs.pairs():
            if not isinstance(picture, str):
                continue
            with_prompt.add(picture)
            elsewhere = picture not in pictures and picture not in at_work
            ready = settled(prompt)
            if picture in pictures:
                # Both are requested, because a file's time begins with the first look at it.
                if ready or not self._files.out_of_time:
                    ready = settled(picture) and ready
            elif elsewhere and self._offers.awaits_claim(picture):
                self._next_scan.no_later_than(now + self._options.rescan_s)
            if not ready or prompt in early:
                continue
            if not self._offers.may_offer(prompt, now, prompt, picture):
                continue
            if elsewhere:
                job = self._offers.pair(prompt, picture)
                self.siblings.setdefault(picture, []).append(job)
            else:
                candidates.append((self._age((prompt, picture)), prompt, prompt, picture))
        for picture in self._lone_pictures.find(with_prompt, now):
            candidates.append((self._age((picture,)), picture, None, picture))
        return [self._offer(candidate) for candidate in self._oldest(candidates, now)]

    def _oldest(self, candidates: list[_Candidate], now: float) -> list[_Candidate]:
        """Return the candidates of the oldest `_MANY` pictures, with all prompts of a picture."""
        if len(candidates) <= _MANY:
            return candidates
        self._next_scan.due = now
        oldest = {picture for _, _, _, picture in heapq.nsmallest(_MANY, candidates)}
        return [candidate for candidate in candidates if candidate[3] in oldest]

    def _offer(self, candidate: _Candidate) -> PendingJob:
        _, _, prompt, picture = candidate
        if prompt is None:
            return self._offers.picture(picture, self._lone_pictures.error(picture))
        return self._offers.pair(prompt, picture)

    def _age(self, files: Iterable[str]) -> int:
        """Return the time of change, in ns, of the file that was changed last."""
        return max(seen.mtime_ns for file in files if (seen := self._files.known(file)))

    # ── prompts whose names match only in part ──

    def _awaiting_better_match(self, now: float) -> set[str]:
        """Return the prompts that wait for a picture that the name of one of them fits better.

        `dog.left.json` is for `dog.jpg` only where no `dog.left.jpg` comes. The other prompts of
        its picture wait with it, so that they are answered together. Prompts whose text names their
        picture do not wait.
        """
        pairs, partial = self._pairs.pairs(), self._pairs.index.partial
        since = now - self._options.partial_match_wait
        if not partial or self._inventory.newest <= since:
            return set()
        early: set[str] = set()
        doubtful: set[str] = set()
        for prompt, picture in pairs:
            if (
                prompt in partial
                and isinstance(picture, str)
                and self._may_get_better_match(prompt, picture, since)
            ):
                early.add(prompt)
                doubtful.add(picture)
        doubtful &= self._names.pictures  # one that is claimed already waits for no other prompt
        for prompt, picture in pairs if doubtful else ():
            if picture in doubtful and self._may_get_better_match(prompt, str(picture), since):
                early.add(prompt)
        return early

    def _may_get_better_match(self, prompt: str, picture: str, since: float) -> bool:
        """Return whether a prompt or its picture came after `since`, and its text names none."""
        first_seen = self._inventory.first_seen
        came = max(first_seen[prompt], first_seen.get(picture, 0.0))
        if came <= since:
            return False
        if not self._pairs.text_known(prompt) and self._files.settled(prompt):
            self._texts.learn_image(prompt)
        if self._pairs.image_of(prompt):
            return False
        self._next_scan.no_later_than(came + self._options.partial_match_wait)
        return True
