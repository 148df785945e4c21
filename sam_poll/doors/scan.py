"""The scan: looks at `in/` and says which settled pairs are ready to be claimed, and when to look again.

Names first; only files that could make a job are looked at closer. Nothing is moved here.

What can still go wrong here: a prompt that names its picture in its text (`"image"`) is read once to learn that name,
and again only when the file is seen to have changed.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from loguru import logger

from sam_poll import prompts
from sam_poll.doors.finished import Finished
from sam_poll.doors.held import Held, Holds
from sam_poll.doors.layout import Layout, prompt_bytes
from sam_poll.doors.looks import NEVER, Looks
from sam_poll.doors.manners import LONE_S as LONE_S
from sam_poll.doors.manners import Manners as Manners
from sam_poll.doors.names import TRUTH_S, Names
from sam_poll.doors.partners import ambiguous
from sam_poll.doors.path_holds import PathHolds
from sam_poll.doors.ready import Ready as Ready
from sam_poll.doors.ready import by_picture as by_picture
from sam_poll.doors.settle import Ambiguous, Index, Signature
from sam_poll.doors.waiting import REPORT_AFTER_S, Notices
from sam_poll.doors.watch import Watcher
from sam_poll.errors import IncompletePromptError, InputError, PromptError, SamPollError
from sam_poll.fs import shown
from sam_poll.safe_path import SafePath

_UNREAD_S = 10.0
_MANY = 5000  # so many pictures are offered at a time: more than are claimed before the next scan
_SPELL_S = 0.15  # a scan looks at files for so long; what is left is looked at by the next
_GLANCE_S = 0.1  # beside it the model is loaded, which is what the first job waits for
_REST_S = 0.001  # polling, prompts that wait alone are looked at anew after so long for each of them


class Scanner:
    """Finds ready pairs. Used by one thread; only the watcher's threads reach in, through `wake` and the hints."""

    def __init__(
        self, layout: Layout, manners: Manners, wake: threading.Event, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._layout, self._manners, self._clock = layout, manners, clock
        self._looks = Looks(layout, manners.quiet_s, clock, changed=self._unlearn)
        self._watcher = Watcher(layout.input.path, wake, self._looks.hinted)
        # Where other machines write, nobody promises that a folder's times are those of its last change.
        self._names = Names(layout, keep=manners.events, clock=clock)
        self.finished = Finished(layout, clock)
        self._notices = Notices(self._names, layout, clock)
        self._watched: set[Path] = set()
        self._closed: set[str] = set()
        self._index, self._extra = Index([]), frozenset[str]()
        self._pairs: list[tuple[str, str | Ambiguous | None]] | None = None
        self._named: dict[str, str | None] = {}
        self._first_seen: dict[str, float] = {}
        self._oldest: float | None = None
        self._newest = 0.0
        self._annotated = self._waited = False
        self._holds = Holds(self._looks.known)
        self._glanced: float | None = None
        self._idle = False
        self._doubt_at = 0.0
        self.path_holds = PathHolds(layout, once=manners.once)
        """Paths that cannot be claimed now; they are not offered."""
        self.spreading = False
        """Whether annotations in `work/`, anybody's, are becoming prompts; told by `elsewhere` of `scan`."""
        self.due = 0.0
        """When to look again at the latest, by the monotonic clock."""
        self.waiting = 0
        """Pictures and prompts in `in/` at the last scan."""
        self.siblings: dict[str, list[Ready]] = {}
        """Settled prompts of pictures that are neither in `in/` nor at work here."""
        self.oldest_s = 0.0
        """How long the oldest of them has been seen."""
        self.scans = 0
        """How often `in/` has been looked through."""
        self.last = 0.0
        """When it was last looked through, wall-clock time; for people."""

    def close(self) -> None:
        """End the watcher's threads."""
        self._watcher.close()

    def renew(self) -> None:
        """After the folder was away: watch and list anew."""
        self._watcher.close()
        self._names.forget()
        self._glanced = None
        self._watched = set()

    def glance(self) -> None:
        """A scan before the first one, whose finds nobody takes yet: files settle from now on. OSError as `scan`.

        The first scan after it believes its listing if it is younger than `rescan_s`, and asks for another one at once:
        where very many wait, the first job is not to wait for a second listing.
        """
        now = self._clock()
        self.scan(now, [], glancing=True)
        self._glanced, self._idle, self._waited = now, False, True

    def scan(
        self,
        now: float,
        at_work: Collection[str],
        elsewhere: Callable[[], Collection[str]] = tuple,
        *,
        glancing: bool = False,
    ) -> list[Ready]:
        """Settled pairs, oldest first. `at_work`: pictures now in `work/`, which further prompts may share; `elsewhere`
        tells those that other daemons work on, whose further prompts wait until they are done. It is asked after `in/`
        was listed, because files go from there to `work/`: looking the same way misses none.

        Of a crowd, `_MANY` pictures at a time, and `due` is at once: the oldest of those that were looked at. They are
        looked at in the order of the listing, as many as `_SPELL_S` (or half the time of listing) allows; a `glancing`
        scan goes through no more than these. Where nothing can have become ready since the last scan, its files are not
        gone through again. Raises OSError when the folder itself cannot be read.
        """
        if self._manners.events and not self._watched:
            self._watcher.look_at({self._layout.input.path})  # first watch, then list: nothing falls in between
        # Hints first: one that comes during the listing may be of a file that the listing has missed, and is not to be
        # forgotten with those that are gone. Its event has also set `wake`, so the next scan is close.
        stirred = self._holds.take() | self._looks.take_hints() | self.path_holds.refresh(now)
        started, spell_s = self._clock(), _GLANCE_S if glancing else _SPELL_S
        believed = self._glanced is not None and now - self._glanced < self._manners.rescan_s
        if believed:
            changed, due, spell_s = False, now, 0.0  # the first job first
        else:
            changed, due = self._list(now)
            spell_s = max(spell_s, (self._clock() - started) / 2)
            self._pairs = None if self._glanced is not None else self._pairs
        self._glanced = None
        self._looks.begin(spell_s)
        extra = frozenset((*at_work, *elsewhere()))
        self.scans += 1
        self.last = time.time()
        if changed:
            self._take_stock(now)
        self.oldest_s = 0.0 if self._oldest is None else now - self._oldest
        if not (changed or stirred) and extra == self._extra and self._may_rest(now):
            return []
        if changed or extra != self._extra:
            self._index, self._extra = Index(itertools.chain(self._names.pictures, extra)), extra
            self._pairs = None
        self.due, self.siblings = due, {}
        self._doubt(now)
        if glancing:
            self._pairs = self._first_pairs()
        ready = sorted(self._found(now, set(at_work)) + self._lone_prompts(now), key=lambda r: r.age)
        if not (glancing or self._manners.once):
            self.due = min(self.due, self._notices.report_pictures(self._index, self._spoken_for, self._first_seen))
        self.due = min(self.due, now if self._looks.hurried else self._looks.soonest)
        self._idle = not ready
        if believed:
            self._pairs = None  # it may have been only some
        return ready

    def _may_rest(self, now: float) -> bool:
        """Whether going through the files again would find nothing, their names being the same."""
        nothing_due = self._idle and not self._holds and now < min(self.due, self._doubt_at)
        return nothing_due and not self.finished.stirred()

    @property
    def closed(self) -> set[str]:
        """Folders below `in/` that may not be read, or whose files may not be looked at."""
        return self._names.closed | (self._looks.closed & self._names.below)

    def _list(self, now: float) -> tuple[bool, float]:
        """Whether names have changed, and when to list again at the latest."""
        changed, due = self._names.look(), NEVER
        closed = self.closed
        for folder in closed - self._closed:
            logger.warning("{} may not be read: what lies in it waits", shown(self._layout.input / folder))
        self._closed = closed
        root = self._layout.input.path
        folders = {root, *(root / folder for folder in self._names.below)}
        if self._manners.events and (folders != self._watched or self._watcher.stale):
            if folders - self._watched - {root} or self._watcher.stale:
                due, changed = now, True  # what came between the listing and the new watch is seen by one more look
            self._watcher.look_at(folders)
            self._watched = folders
        return changed, due

    def _take_stock(self, now: float) -> None:
        """Forget what is gone, and note since when the others have been seen."""
        seen = self._names.pictures.union(self._names.prompts)
        self.waiting = len(seen)
        self._looks.forget_all_but(seen)
        self._first_seen = {p: self._first_seen.get(p, now) for p in seen}
        self._oldest = min(self._first_seen.values(), default=None)
        self._newest = max(self._first_seen.values(), default=0.0)
        self._annotated = any(map(self._layout.is_annotations, self._names.prompts))
        self._named = {p: image for p, image in self._named.items() if p in seen}
        self._notices.forget_all_but(seen)

    def hold(
        self, job: str, signatures: dict[str, Signature], seconds: float, error: SamPollError | None = None
    ) -> None:
        """Do not offer a job (its prompt, or a picture without one) for a while, unless one of these files changes;
        with `error`, reject it then. Other prompts of its picture are not held. From any thread."""
        self._holds.add(Held(job, signatures, seconds, error))

    def hold_unread(self, prompt: str, signatures: dict[str, Signature], trouble: OSError) -> None:
        """A prompt that could not be read: one that has gone is forgotten, a bad sector must not stop the others."""
        if not isinstance(trouble, FileNotFoundError):
            logger.warning("prompt {} cannot be read: {}; next try in {:g} s", shown(prompt), trouble, _UNREAD_S)
            self.hold(prompt, signatures, _UNREAD_S)
            self.due = 0.0  # to take the hold in, and learn when to look again

    def hold_if_incomplete(self, prompt: str, signatures: dict[str, Signature], error: PromptError) -> bool:
        """Whether a prompt or an annotation file that cannot be understood may still be being written: it ends too
        early, or its writer has not closed it. It is then held until it changes, and rejected with `error` after the
        patience, as a picture is that is cut off."""
        if self._holds.error(prompt):
            return False  # it has had its time
        if not (isinstance(error, IncompletePromptError) or self._looks.being_written(prompt)):
            return False
        logger.debug("{} is not complete yet: {}", shown(prompt), error.reason)
        self.hold(prompt, signatures, self._manners.patience, error)
        self.due = 0.0  # to take the hold in, and learn when to look again
        return True

    def learn(self, prompt: str, image: str | None) -> None:
        """Remember which picture a prompt's text names; if any, look again at once."""
        self._named[prompt] = image
        if image:
            self._pairs = None
            self.due = 0.0

    def shares_stem(self, picture: str) -> bool:
        """Whether another picture of this stem lay in `in/` or was at work, here or elsewhere, at the last scan."""
        return self._index.shares_stem(picture)

    def still(self, ready: Ready) -> bool:
        """Look at a job's files once more, when they are to be claimed. What has changed since must settle anew."""
        changed = self._looks.changed(ready.signatures)
        for path in changed:
            self.due = min(self.due, self._clock() + max(0.0, self._looks.left(path)))
        return not changed

    def _unlearn(self, path: str) -> None:
        """A file has changed: what a prompt says now, nobody has read yet."""
        if path in self._named:
            del self._named[path]
            self._pairs, self.due = None, 0.0
            self.finished.forget(path)

    def _doubt(self, now: float) -> None:
        """Choose files to be looked at anew: those of jobs that are held until they change; and from time to time all
        prompts that wait alone, because nobody is going to claim these."""
        self._holds.forget_all_but(self._first_seen, now)
        self._looks.doubt(self._holds.files())
        if now >= self._doubt_at:
            lone = [prompt for prompt in self._named if not isinstance(self._picture_of(prompt), str)]
            self._looks.doubt(lone)
            rest = TRUTH_S if self._manners.events else max(self._manners.rescan_s, len(lone) * _REST_S)
            self._doubt_at = now + rest

    def _is_held(self, job: str, now: float) -> bool:
        """Whether a job may not be offered yet, because none of its files has changed."""
        until = self._holds.until(job, now)
        if until is not None:
            self.due = min(self.due, until)
        return until is not None

    # ── what is ready ──

    def _found(self, now: float, at_work: Collection[str]) -> list[Ready]:
        """The pairs, and pictures without a prompt that need not wait for one."""
        pictures, settled = self._names.pictures, self._looks.settled
        offers: list[tuple[int, str, str | None, str]] = []  # age, name, prompt, picture: small, for a crowd
        spoken_for, early = set(), self._awaiting_better_match(now)
        for prompt, picture in self._paired():
            if not isinstance(picture, str):
                continue
            spoken_for.add(picture)
            ready = settled(prompt)
            if picture in pictures:
                if ready or not self._looks.hurried:  # each is asked, because its clock starts with the first look
                    ready = settled(picture) and ready
            elif picture not in at_work:
                self.due = min(self.due, now + self._manners.rescan_s)
                if (
                    ready
                    and prompt not in early
                    and not self._is_held(prompt, now)
                    and not self.path_holds.blocks(prompt, picture)
                ):
                    self.siblings.setdefault(picture, []).append(self._ready(prompt, picture))
                continue
            if (
                ready
                and prompt not in early
                and not (self._holds and self._is_held(prompt, now))
                and not self.path_holds.blocks(prompt, picture)
            ):
                offers.append((self._age(prompt, picture), prompt, prompt, picture))
        for picture in self._lone_pictures(spoken_for, now):
            offers.append((self._age(picture), picture, None, picture))
        if len(offers) > _MANY:
            self.due = now
            oldest = {offer[3] for offer in heapq.nsmallest(_MANY, offers)}
            offers = [offer for offer in offers if offer[3] in oldest]  # all prompts of a picture go together
        return [self._ready(prompt, picture) for _, _, prompt, picture in offers]

    def _awaiting_better_match(self, now: float) -> set[str]:
        """Prompts that are not to be offered yet: a picture may still come that the name of one fits better, as
        `dog.left.jpg` does `dog.left.json`. The other prompts of its picture wait with it, so that they are answered
        together. Not those whose text names their picture."""
        pairs, partial, since = self._paired(), self._index.partial, now - self._manners.partial_match_wait
        if not partial or self._newest <= since:
            return set()
        early, doubtful = set(), set()
        for prompt, picture in pairs:
            if prompt in partial and isinstance(picture, str) and self._may_get_better_match(prompt, picture, since):
                early.add(prompt)
                doubtful.add(picture)
        doubtful &= self._names.pictures  # one that is at work already waits for nobody
        for prompt, picture in pairs if doubtful else ():
            if picture in doubtful and self._may_get_better_match(prompt, str(picture), since):
                early.add(prompt)
        return early

    def _may_get_better_match(self, prompt: str, picture: str, since: float) -> bool:
        """Whether a prompt or its picture has come after `since`, and the prompt's text names none."""
        came = max(self._first_seen[prompt], self._first_seen.get(picture, 0.0))
        if came <= since:
            return False
        if prompt not in self._named and self._looks.settled(prompt):
            self._read_image(prompt)
        if self._named.get(prompt):
            return False
        self.due = min(self.due, came + self._manners.partial_match_wait)
        return True

    def _paired(self) -> list[tuple[str, str | Ambiguous | None]]:
        """All prompts, and the picture that each is for."""
        if self._pairs is None:
            self._pairs = [(prompt, self._picture_of(prompt)) for prompt in self._names.prompts]
        return self._pairs

    def _spoken_for(self) -> set[str]:
        """The pictures that have a prompt."""
        return {picture for _, picture in self._paired() if isinstance(picture, str)}

    def _first_pairs(self) -> list[tuple[str, str | Ambiguous | None]]:
        """As many of the pairs as there is time to look at now. Beside a glance a model is loaded, and Python lets only
        one of the two run: what need not be done yet makes the first job wait."""
        pairs: list[tuple[str, str | Ambiguous | None]] = []
        for prompt in self._names.prompts:
            picture = self._picture_of(prompt)
            pairs.append((prompt, picture))
            if isinstance(picture, str):
                self._looks.settled(prompt)
                self._looks.settled(picture)
            if self._looks.hurried:
                break
        return pairs

    def _picture_of(self, prompt: str) -> str | Ambiguous | None:
        if self._layout.is_annotations(prompt):
            return None
        image = self._named.get(prompt)
        return self._index.named(prompt, image) if image else self._index.find(prompt)

    def _age(self, *files: str) -> int:
        return max(seen.mtime_ns for file in files if (seen := self._looks.known(file)))

    def _ready(self, prompt: str | None, picture: str | None, fault: SamPollError | None = None) -> Ready:
        files = [f for f in (prompt, picture) if f and (f == prompt or f in self._names.pictures)]
        signatures = {file: seen for file in files if (seen := self._looks.known(file))}
        if prompt is None:
            fault = self.no_prompt_fault(picture or "")
        return Ready(prompt, picture, signatures, self._holds.error(prompt or picture or "") or fault)

    def _lone_pictures(self, spoken_for: set[str], now: float) -> Iterator[str]:
        policy, limit = self._manners.missing_prompt, self._manners.pair_timeout_s
        if policy == "wait" and limit is None:
            return
        waited, self._waited = self._waited, self._annotated or self.spreading
        if waited or self._waited:  # their prompts may be among the annotations, or have come since `in/` was listed
            if not self._annotated:
                self.due = min(self.due, now + self._manners.rescan_s * self.spreading)
            return
        for picture in self._names.pictures - spoken_for:
            over = limit is None or self._over(limit, now - self._first_seen[picture], now)
            free = not (self._is_held(picture, now) or self.path_holds.blocks(picture))
            if over and free and self._looks.settled(picture):
                yield picture

    def _lone_prompts(self, now: float) -> list[Ready]:
        ready: list[Ready] = []
        waiting: dict[str, dict[str, str | None]] = {}
        timed_out: list[str] = []
        unmatched: dict[str, str | None] = {}
        limit, report_after = self._manners.pair_timeout_s, max(REPORT_AFTER_S, 1.5 * self._manners.lone_wait)
        for prompt, found in self._paired():
            if isinstance(found, str) or not self._looks.settled(prompt) or self._is_held(prompt, now):
                continue
            if self.path_holds.blocks(prompt):
                continue
            if self._layout.is_annotations(prompt):
                ready.append(self._ready(prompt, None))
                continue
            known = prompt in self._named
            fault = None if known else self._read_image(prompt)
            image, waited = self._named.get(prompt), now - self._first_seen[prompt]
            if not known and (image or (prompt not in self._named and not fault)):
                continue  # which picture that is, the next scan says; or it could not be read
            if not fault and found and not image:
                if prompt in self._index.partial and not self._over(self._manners.partial_match_wait, waited, now):
                    continue
                fault = ambiguous(prompt, found)
            if fault:
                ready.append(self._ready(prompt, None, fault))
                continue
            if self._over(self._manners.lone_wait, waited, now):
                waiting.setdefault(os.path.dirname(prompt), {})[prompt] = image
            if limit is not None and self._over(limit, waited, now):
                timed_out.append(prompt)
            if not (self._manners.once or self._notices.reported(prompt)) and self._over(report_after, waited, now):
                unmatched[prompt] = image
        found_late = self._without_picture(waiting, timed_out)
        for other in found_late if unmatched else ():
            unmatched.pop(other.prompt or "", None)
        self.due = min(self.due, self._notices.report_prompts(self._index, unmatched))
        return ready + found_late

    def _read_image(self, prompt: str) -> PromptError | None:
        """Learn which picture a prompt's text names, if there is time for it in this scan."""
        if self._looks.out_of_time():
            return None
        try:
            with self._looks.spending():
                parsed = self.read(self._layout.input / prompt)
            self.learn(prompt, parsed.image)
        except PromptError as error:
            if not self.hold_if_incomplete(prompt, self._ready(prompt, None).signatures, error):
                return error  # nobody can say which picture it wants, so waiting for one would be for ever
        except OSError as error:
            self.hold_unread(prompt, self._ready(prompt, None).signatures, error)
        return None

    def _without_picture(self, waiting: dict[str, dict[str, str | None]], timed_out: list[str]) -> list[Ready]:
        """Prompts whose picture lies in `done/`, and those for which none has come in time."""
        ready: dict[str, Ready] = {}
        chosen, again = self.finished.worth_asking(waiting)
        self.due = min(self.due, again)
        for prompt in chosen:
            found = self.finished.find(prompt, waiting[os.path.dirname(prompt)][prompt])
            if found:
                self.finished.forget(prompt)  # until it is claimed, it has not looked in vain
                ready[prompt] = self._ready(prompt, found[0])
                ready[prompt].suffix = found[1]
        for prompt in timed_out if again == NEVER else ():
            if prompt not in ready:
                error = PromptError(
                    f"its picture did not come within {self._manners.pair_timeout_s:g} s",
                    place=os.path.basename(prompt),
                    remedy="drop the picture, then `sam-poll retry`",
                )
                ready[prompt] = self._ready(prompt, None, error)
        return list(ready.values())

    def no_prompt_fault(self, picture: str) -> InputError | None:
        """What to say of a picture whose prompt has not come; None: segment everything in it."""
        limit = self._manners.pair_timeout_s
        if self._manners.missing_prompt == "everything":
            return None
        name = os.path.basename(picture)
        return InputError(
            "no prompt came" + (f" within {limit:g} s" if limit is not None else " with it"),
            place=name,
            remedy=f"drop {os.path.splitext(name)[0]}.json into the input folder, then `sam-poll retry`",
        )

    def _over(self, limit: float, waited: float, now: float) -> bool:
        """Whether a wait is over; if not, it is a reason to look again, unless we only drain what is there."""
        if waited < limit and not self._manners.once:
            self.due = min(self.due, now + limit - waited)
        return waited >= limit

    def read(self, prompt: SafePath) -> prompts.PromptFile:
        """The prompt file, understood; PromptError."""
        return self._manners.parse(prompt_bytes(prompt, self._manners.prompt_bytes))
