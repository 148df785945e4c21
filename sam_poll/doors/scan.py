"""The scan: looks at `in/` and says which settled pairs are ready to be claimed, and when to look again.

Names first; only files that could make a job are looked at closer. Nothing is moved here.

What can still go wrong here: a prompt that names its picture in its text (`"image"`) is read once to learn that name,
and again only when the file changes.
"""

from __future__ import annotations

import itertools
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from sam_poll import prompts
from sam_poll.doors.layout import Layout, walk
from sam_poll.doors.settle import Ambiguous, Hint, Index, Settler, Signature, is_temporary, stems
from sam_poll.doors.watch import Watcher
from sam_poll.errors import InputError, PromptError, SamPollError
from sam_poll.fs import NO_FILE, NOT_THERE, open_plain, shown, with_suffix
from sam_poll.images import ENDINGS

LONE_S = 10.0  # how long a prompt without picture waits before its picture is looked for in done/
NEVER = float("inf")
_UNREAD_S = 10.0
_FORGET_S = 60.0  # a file that is held comes back into `in/` a little later


@dataclass(frozen=True)
class Manners:
    """How the folder door behaves; see config.yaml for the meaning of each.

    `patience_s`: how long a picture that is cut off, or not the one its prompt names, may stay as it is before it is
    rejected. None: five times `quiet_s`.
    """

    rescan_s: float = 10.0
    quiet_s: float = 2.0
    events: bool = True
    once: bool = False
    missing_prompt: str = "wait"  # wait | everything | reject
    pair_timeout_s: float | None = None
    lone_s: float = LONE_S
    parse: Callable[[bytes], prompts.PromptFile] = prompts.parse
    prompt_bytes: int = prompts.MAX_BYTES
    lease_s: float = 60.0
    attempts: int = 3
    sentinel: Path | None = None
    patience_s: float | None = None

    @property
    def patience(self) -> float:
        """See `patience_s`; who only drains what is there waits for nothing."""
        return 0.0 if self.once else 5 * self.quiet_s if self.patience_s is None else self.patience_s


@dataclass(slots=True)
class Ready:
    """A settled pair, not yet claimed. Paths are relative to `in/`; a picture without signature lies elsewhere: in
    `done/` under its name with `suffix`, or (None) at work for a sibling. `fault`: claim it only to reject it."""

    prompt: str | None
    picture: str | None
    signatures: dict[str, Signature]
    fault: SamPollError | None = None
    suffix: str | None = None

    @property
    def age(self) -> tuple[int, str]:
        """For sorting: the oldest first."""
        return max(s.mtime_ns for s in self.signatures.values()), self.prompt or self.picture or ""


@dataclass(frozen=True, slots=True)
class _Held:
    """A job that is not offered before `until`, unless one of these files changes. With `error` it is then rejected."""

    signatures: dict[str, Signature]
    until: float
    error: SamPollError | None


class Scanner:
    """Finds ready pairs. Used by one thread; only the watcher's threads reach in, through `wake` and the hints."""

    def __init__(self, layout: Layout, manners: Manners, wake: threading.Event) -> None:
        self._layout, self._manners = layout, manners
        self._hints: deque[tuple[Path, Hint, float]] = deque(maxlen=100_000)
        self._settler = Settler(manners.quiet_s)
        self._watcher = Watcher(layout.input, wake, lambda *hint: self._hints.append(hint))
        self._folders: set[Path] = set()
        self._closed: set[str] = set()
        self._named: dict[str, tuple[Signature, str | None]] = {}
        self._first_seen: dict[str, float] = {}
        self._held: dict[str, _Held] = {}
        self._to_hold: deque[tuple[str, _Held]] = deque()
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
        """After the folder was away: watch anew."""
        self._watcher.close()
        self._folders = set()

    def scan(
        self, now: float, at_work: Collection[str], elsewhere: Callable[[], Collection[str]] = tuple
    ) -> list[Ready]:
        """All settled pairs, oldest first. `at_work`: pictures now in `work/`, which further prompts may share;
        `elsewhere` tells those that other daemons work on, whose further prompts wait until they are done. It is asked
        after `in/` was listed, because files go from there to `work/`: looking the same way misses none.

        Raises OSError when the folder itself cannot be read.
        """
        self.due = NEVER
        self.siblings = {}
        if self._manners.events and not self._folders:
            self._watcher.look_at({self._layout.input})  # first watch, then list: nothing falls in between
        # Hints first: one that comes during the listing may be of a file that the listing has missed, and is not to be
        # forgotten with those that are gone. Its event has also set `wake`, so the next scan is close.
        self._take_hints()
        pictures, waiting = self._list(now)
        index = Index({*pictures, *at_work, *elsewhere()})
        seen = pictures | waiting
        self.waiting = len(seen)
        self.scans += 1
        self.last = time.time()
        self._settler.forget_all_but(seen)
        self._first_seen = {p: self._first_seen.get(p, now) for p in seen}
        self.oldest_s = now - min(self._first_seen.values(), default=now)
        self._named = {p: n for p, n in self._named.items() if p in waiting}
        self._held = {p: h for p, h in self._held.items() if p in seen or now < h.until + _FORGET_S}
        ready, spoken_for = [], set()
        for prompt in waiting:
            picture = self._picture_of(prompt, index)
            if isinstance(picture, str):
                spoken_for.add(picture)
                if picture not in pictures and picture not in at_work:
                    self.due = min(self.due, now + self._manners.rescan_s)
                    sibling = self._when_settled([prompt], now, prompt, picture)
                    if sibling:
                        self.siblings.setdefault(picture, []).append(sibling)
                    continue
                files = [prompt, picture] if picture in pictures else [prompt]
                ready.append(self._when_settled(files, now, prompt, picture))
            else:
                ready.append(self._lone_prompt(prompt, picture, now))
        ready += [self._lone_picture(picture, now) for picture in pictures - spoken_for]
        return sorted((r for r in ready if r), key=lambda r: r.age)

    def hold(
        self, job: str, signatures: dict[str, Signature], seconds: float, error: SamPollError | None = None
    ) -> None:
        """Do not offer a job (its prompt, or a picture without one) for a while, unless one of these files changes;
        with `error`, reject it then. Other prompts of its picture are not held. From any thread."""
        self._to_hold.append((job, _Held(signatures, time.monotonic() + seconds, error)))

    def hold_unread(self, prompt: str, signatures: dict[str, Signature], trouble: OSError) -> None:
        """A prompt that could not be read: one that has gone is forgotten, a bad sector must not stop the others."""
        if not isinstance(trouble, FileNotFoundError):
            logger.warning("prompt {} cannot be read: {}; next try in {:g} s", shown(prompt), trouble, _UNREAD_S)
            self.hold(prompt, signatures, _UNREAD_S)
            self.due = 0.0  # to take the hold in, and learn when to look again

    def learn(self, prompt: str, signature: Signature, image: str | None) -> None:
        """Remember which picture a prompt's text names, and look again at once."""
        self._named[prompt] = (signature, image)
        self.due = 0.0

    def _take_hints(self) -> None:
        while self._hints:
            path, hint, seen = self._hints.popleft()
            self._settler.hint(os.path.relpath(path, self._layout.input).replace(os.sep, "/"), hint, seen)
        while self._to_hold:
            job, held = self._to_hold.popleft()
            self._held[job] = held

    def _list(self, now: float) -> tuple[set[str], set[str]]:
        pictures, waiting, below, closed = set(), set(), set[str](), set[str]()
        for path, entry in walk(self._layout.input, below.add, closed.add):
            if is_temporary(entry.name):
                continue
            if self._layout.is_prompt(entry.name):
                waiting.add(path)
            elif self._layout.is_picture(entry.name):
                pictures.add(path)
        for folder in closed - self._closed:
            logger.warning("{} may not be read: what lies in it waits", shown(self._layout.input / folder))
        self._closed = closed
        folders = {self._layout.input, *(self._layout.input / folder for folder in below)}
        if self._manners.events and folders != self._folders:
            if folders - self._folders - {self._layout.input}:
                self.due = now  # what came between the listing and the new watch is seen by one more look
            self._watcher.look_at(folders)
            self._folders = folders
        return pictures, waiting

    def _picture_of(self, prompt: str, index: Index) -> str | Ambiguous | None:
        _, image = self._named.get(prompt, (None, None))
        return index.named(prompt, image) if image else index.find(prompt)

    def _when_settled(self, files: list[str], now: float, prompt: str | None, picture: str | None) -> Ready | None:
        signatures, longest = {}, 0.0
        for file in files:
            signature = look(self._layout.input / file)
            if signature is None:
                return None
            signatures[file] = signature
            longest = max(longest, self._settler.settled_in(file, signature, now))
        if longest > 0:
            self.due = min(self.due, now + longest)
            return None
        held = self._held.get(prompt or picture or "")
        if held is None or any(held.signatures.get(file, seen) != seen for file, seen in signatures.items()):
            return Ready(prompt, picture, signatures)
        if now < held.until:
            self.due = min(self.due, held.until)
            return None
        return Ready(prompt, picture, signatures, held.error)

    def _lone_prompt(self, prompt: str, found: Ambiguous | None, now: float) -> Ready | None:
        ready = self._when_settled([prompt], now, prompt, None)
        if ready is None:
            return None
        signature = ready.signatures[prompt]
        known = self._named.get(prompt)
        if known is None or known[0] != signature:
            try:
                known = (signature, self.read(self._layout.input / prompt).image)
            except PromptError as error:
                # Nobody can say which picture it wants, so waiting for one would be for ever.
                ready.fault = error
                return ready
            except OSError as error:
                self.hold_unread(prompt, ready.signatures, error)
                return None
            self._named[prompt] = known
            if known[1]:
                self.due = now
                return None
        if found and not known[1]:
            ready.fault = _ambiguous(prompt, found)
            return ready
        return self._without_picture(ready, prompt, known[1], now)

    def _without_picture(self, ready: Ready, prompt: str, image: str | None, now: float) -> Ready | None:
        waited = now - self._first_seen[prompt]
        # Who only drains what is there expects no picture to come any more.
        if self._over(0.0 if self._manners.once else self._manners.lone_s, waited, now):
            found = self.find_done(prompt, image)
            if found:
                ready.picture, ready.suffix = found
                return ready
        limit = self._manners.pair_timeout_s
        if limit is not None and self._over(limit, waited, now):
            ready.fault = PromptError(
                f"its picture did not come within {limit:g} s",
                place=os.path.basename(prompt),
                remedy="drop the picture, then `sam-poll retry`",
            )
            return ready
        return None

    def _lone_picture(self, picture: str, now: float) -> Ready | None:
        policy, limit = self._manners.missing_prompt, self._manners.pair_timeout_s
        if policy == "wait" and limit is None:
            return None
        if limit is not None and not self._over(limit, now - self._first_seen[picture], now):
            return None
        ready = self._when_settled([picture], now, None, picture)
        if ready:
            ready.fault = ready.fault or self.no_prompt_fault(picture)
        return ready

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

    def read(self, prompt: Path) -> prompts.PromptFile:
        """The prompt file, understood; PromptError. Reads at most one byte more than is allowed, never through a link,
        and never waits for a pipe: what was a file when it was listed may be something else by now."""
        try:
            file = open_plain(prompt)
        except OSError as error:
            if error.errno not in NO_FILE:
                raise
            remedy = "let the daemon's user read it, then `sam-poll retry`"
            name = shown(prompt.name)
            raise PromptError(f"cannot be read: {error.strerror}", place=name, remedy=remedy) from error
        with file:
            return self._manners.parse(file.read(self._manners.prompt_bytes + 1))

    def find_done(self, prompt: str, image: str | None) -> tuple[str, str] | None:
        """The picture in `done/` that a lone prompt means: its path as in `in/`, and the suffix of the newest one."""
        folder = os.path.dirname(prompt)
        names = [image] if image else [name for stem in stems(prompt) for name in (stem, *spellings(stem))]
        for name in names:
            path = os.path.join(folder, name)
            if self._layout.is_picture(name) and look(self._layout.done / path):
                return path, self._newest(path)
        return None

    def _newest(self, picture: str) -> str:
        """The suffix of the last picture of this name in `done/`: the one a prompt without picture means."""
        numbers = itertools.takewhile(
            lambda n: look(with_suffix(self._layout.done / picture, f"~{n}")), itertools.count(2)
        )
        return max((f"~{n}" for n in numbers), key=lambda suffix: int(suffix[1:]), default="")


def by_picture(ready: Sequence[Ready]) -> list[list[Ready]]:
    """Candidates that share a picture together, in the order of the first of each."""
    groups: dict[str, list[Ready]] = {}
    for candidate in ready:
        groups.setdefault(candidate.picture or f"\0{candidate.prompt}", []).append(candidate)
    return list(groups.values())


def look(path: Path) -> Signature | None:
    """A regular file's signature; None if it is not there or something else."""
    try:
        found = path.lstat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
    return Signature(found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def spellings(stem: str) -> list[str]:
    """The names a picture with this stem usually has: every ending, small and large."""
    return [stem + e for ending in sorted(ENDINGS) for e in (ending, ending.upper())]


def _ambiguous(prompt: str, found: Ambiguous) -> PromptError:
    names = [os.path.basename(p) for p in found.pictures]
    return PromptError(
        f"fits {' and '.join(names)}",
        place=os.path.basename(prompt),
        remedy=f'say which in the prompt, `"image": "{names[0]}"`, or call it {names[0]}.json',
    )
