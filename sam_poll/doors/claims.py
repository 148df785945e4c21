"""Claims: the directories in `work/` that say who works on what, since when, and how often it has been tried.

    work/cam1/.dog.jpg/                      the name: made by mkdir, so one claim of it at a time on the whole share
    work/cam1/.dog.jpg/g1.a1.n2@box-3f-77/   the claim: generation, attempt, prompts at its beginning, whose it is
    work/cam1/.dog.jpg/g2.done~2@box-3f-77/  the job is over: what lies in it only has to be carried to `done/`

A claim is taken over by renaming its directory to the next generation. That one rename fences its old owner: every path
it knows is gone. It is also how a job ends, so that a job ends once however many daemons believe it to be theirs.

What can still go wrong here: a share whose mkdir and rename are not atomic (object stores dressed up as folders) gives
no such promise.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from loguru import logger

from sam_poll.doors.failures import files_of, report_name
from sam_poll.doors.layout import Layout
from sam_poll.errors import LostError
from sam_poll.fs import (
    NO_FILE,
    TEMP_PREFIX,
    cut,
    exists,
    free_suffix,
    move_new,
    rename,
    shown,
    sync_folder,
    with_suffix,
    write_synced,
)
from sam_poll.safe_path import SafePath
from sam_poll.sidecars import is_sidecar

_LONGEST = 230  # bytes of a file's name that go into its claim's as they are
_REPORT = ".report"  # in a claim: why its job is rejected; goes to failed/ with it, so that only its owner can say so
_ANSWERED = ".answered"  # in a claim: one of its prompts is answered, so its picture belongs into done/
_SHARES_STEM = ".shares_stem"  # in a claim: another picture has this one's stem, so the answers' names say which
_HELD = ".held"  # in a claim: what is not to be offered again at once when it is back in `in/`, and why
_MAX_NOTE = 1 << 20
PATH_ERRORS = frozenset(
    {
        errno.EACCES,
        errno.EBUSY,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMLINK,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.ENXIO,
        errno.EPERM,
        errno.EROFS,
        errno.ETXTBSY,
        errno.EXDEV,
    }
)
"""Errors that may concern one path alone; all others are of the share as a whole."""
_HOLD = re.compile(
    r"g(?P<generation>\d{1,9})\."
    r"(?:a(?P<attempt>\d{1,9})\.n(?P<prompts>\d{1,9})|(?P<place>done|failed|input)(?P<suffix>~\d{1,9})?)"
    r"@(?P<worker>[\w-]{1,100})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Hold:
    """What a claim's directory says by its name. `place` and `suffix`: the job is over, its files belong there.

    `attempt` counts the runs begun; 0: it waits for its first one, with a daemon that runs nothing itself.
    """

    generation: int
    worker: str
    attempt: int = 1
    prompts: int = 0
    place: str | None = None
    suffix: str = ""

    def __str__(self) -> str:
        state = f"{self.place}{self.suffix}" if self.place else f"a{self.attempt}.n{self.prompts}"
        return f"g{self.generation}.{state}@{self.worker}"

    @staticmethod
    def parse(name: str) -> Hold | None:
        """None where the name is not a claim's."""
        found = _HOLD.fullmatch(name)
        if not found:
            return None
        text = found.groupdict()
        numbers = {k: int(text[k] or 0) for k in ("generation", "attempt", "prompts")}
        return Hold(worker=text["worker"], place=text["place"], suffix=text["suffix"] or "", **numbers)


@dataclass(frozen=True, slots=True)
class Found:
    """A claim seen in `work/`, whoever holds it. `hold` None: a name without a claim, of a daemon that died between."""

    folder: str
    outer: SafePath
    hold: Hold | None = None

    @property
    def path(self) -> SafePath:
        """Where its files lie."""
        return self.outer.fenced(str(self.hold))

    @property
    def label(self) -> str:
        """The picture (or lone prompt) it is of, relative to `in/`; cut for names of more than 230 bytes."""
        name = self.outer.name[1:]
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(slots=True, eq=False)
class Claim:
    """A claim that this daemon holds. `picture` and `prompts` are the names of files in it that are not put away yet.

    `suffix` is that of the picture's name in `done/`; `borrowed` is a picture (as it was called in `in/`) that lies in
    `done/` already and stays there. `giver` is who had it before it was taken over; `shares_stem`: another
    picture has this one's stem; `mosaics`: the prompts that ask for one; `sidecars`: files that go with the picture.
    """

    folder: str
    outer: SafePath
    hold: Hold
    picture: str | None = None
    prompts: set[str] = field(default_factory=set)
    suffix: str = ""
    borrowed: str | None = None
    answered: bool = False
    shares_stem: bool = False
    mosaics: set[str | None] = field(default_factory=set)
    sidecars: set[str] = field(default_factory=set)
    giver: str | None = None
    over: bool = False
    lock: threading.RLock = field(default_factory=threading.RLock)

    @property
    def path(self) -> SafePath:
        """Where its files lie now."""
        return self.outer.fenced(str(self.hold))

    def below(self, name: str) -> str:
        """A file's path relative to `in/`, `done/` …"""
        return f"{self.folder}/{name}" if self.folder else name


class Claims:
    """Takes, ends and takes over claims for one daemon. `still_there` raises OSError when the share is away.

    `runs` is false for a daemon that claims so that others may run: what it holds is not at work, and not tried.
    `advanced` tells of a claim's name whether part of a long job has been done under it, by what to call when that is
    taken note of.
    """

    def __init__(
        self,
        layout: Layout,
        worker: str,
        still_there: Callable[[], object],
        *,
        runs: bool = True,
        advanced: Callable[[SafePath], Callable[[], None] | None] = lambda outer: None,
    ) -> None:
        self._layout, self.worker, self._still_there, self.runs = layout, worker, still_there, runs
        self._advanced = advanced

    # ── taking ──

    def take(self, label: str, picture: str | None, prompts: Collection[str]) -> Claim | None:
        """Move these files (paths below `in/`, of one folder) into a claim named after `label`, the picture first.

        None: the name is at work, or the picture has just gone. Prompts that have gone are not in the claim. OSError:
        all is where it was, as far as that could be; it names the file that could not be moved, or what has the place
        of the claim.
        """
        folder, _, name = label.rpartition("/")
        outer = self._layout.work / folder / outer_name(name)
        if not _make(outer):
            self._check_place(outer)
            return None
        claim = Claim(folder, outer, Hold(1, self.worker, attempt=int(self.runs), prompts=len(prompts)))
        if not _make(claim.path, parents=False):
            return None
        try:
            if picture:
                rename(self._layout.input / picture, claim.path / os.path.basename(picture))
                claim.picture = os.path.basename(picture)
            for prompt in prompts:
                self.add(claim, prompt)
        except FileNotFoundError:
            pass
        except LostError:  # it took so long that others thought us dead
            return None
        except OSError:
            with contextlib.suppress(OSError, LostError):
                self.close(claim, "input", self.free(claim, "input"))
            raise
        if not (claim.prompts if prompts else claim.picture):
            with contextlib.suppress(LostError):
                self.close(claim, "input", self.free(claim, "input"))
            return None
        return claim

    @staticmethod
    def _check_place(outer: SafePath) -> None:
        """OSError where what has a claim's name will never be one: a file, a link, a folder with something else in it,
        or an empty one that cannot be removed."""
        with contextlib.suppress(FileNotFoundError, PermissionError, NotADirectoryError):
            if not outer.names():
                outer.rmdir()  # if its maker lives after all, it makes it anew
                return
        if exists(outer) and not any(True for _ in claims_in("", outer)):
            raise FileExistsError(errno.EEXIST, "something else has the name of a claim", str(outer))

    def add(self, claim: Claim, prompt: str) -> bool:
        """Move a further prompt into a claim. False: the claim is over, has one of that name, or the prompt is gone."""
        name = os.path.basename(prompt)
        with claim.lock:
            if claim.over or claim.hold.place or name in claim.prompts:
                return False
            try:
                rename(self._layout.input / prompt, claim.path / name)
            except FileNotFoundError:
                self.alive(claim)
                return False
            claim.prompts.add(name)
            return True

    def take_over(self, found: Found, *, ended: bool = False) -> Claim | None:
        """Make a dead daemon's claim ours, and drop what it was writing. None: somebody else was quicker.

        The attempt is counted here, before anything is run. It begins anew where prompts were put away meanwhile, or
        part of a long job was done.
        Nothing is counted where the claim was our own: it was given up because the share was sick. Unless it has
        `ended` a process of ours. Nor where we run nothing: whoever runs it counts when taking it over from us.
        """
        hold = found.hold
        if hold is None:
            return None
        try:
            left = len(self._prompts_in(found.path))
            counts = self.runs and (ended or hold.worker != self.worker)
            advanced = self._advanced(found.outer)
            attempt = int(self.runs) if left < hold.prompts or advanced else hold.attempt + counts
            prompts = left or hold.prompts  # none left does not make it a picture that came without any
            mine = replace(hold, generation=hold.generation + 1, worker=self.worker, attempt=attempt, prompts=prompts)
            rename(found.path, found.outer / str(mine))
        except FileNotFoundError:
            return None
        if advanced:
            advanced()
        claim = Claim(found.folder, found.outer, mine, giver=hold.worker)
        for name in self._names(claim):
            if self._layout.is_prompt(name):
                claim.prompts.add(name)
            elif name.startswith(_ANSWERED):
                claim.answered, claim.suffix = True, name[len(_ANSWERED) :]
            elif name == _SHARES_STEM:
                claim.shares_stem = True
            elif name.startswith(TEMP_PREFIX) or (name == _HELD and mine.place is None):  # it was not given back
                (claim.path / name).unlink(missing_ok=True)
            elif is_sidecar(name):
                claim.sidecars.add(name)
            elif not name.startswith("."):
                claim.picture = name
        self._sort_out_report(claim)
        return claim

    def _prompts_in(self, path: SafePath) -> list[str]:
        return [name for name in path.names() if self._layout.is_prompt(name)]

    # ── ending ──

    def alive(self, claim: Claim) -> None:
        """LostError when another daemon has taken the claim over; OSError when the share is away."""
        if not exists(claim.path):
            self._still_there()
            claim.over = True
            if exists(claim.outer):
                raise LostError("another daemon has taken it over")
            raise LostError("another daemon has taken it over and ended it, or its files in work/ were deleted")

    def mark_answered(self, claim: Claim) -> None:
        """Write down that one of several prompts is answered: whoever ends the claim takes the picture to `done/`."""
        if not claim.answered and claim.picture:
            self.alive(claim)
            (claim.path / f"{_ANSWERED}{claim.suffix}").touch()
        claim.answered = True

    def mark_stem(self, claim: Claim) -> None:
        """Write down that another picture has this one's stem: whoever runs the job may not know its neighbours."""
        self.alive(claim)
        (claim.path / _SHARES_STEM).touch()
        claim.shares_stem = True

    def hand_back(self, claim: Claim, suffix: str, note: bytes) -> bool:
        """Have the one it was taken over from put everything left in the claim back into `in/`, and read `note` first.

        False: that was ourselves. The rename is the moment that counts; whoever holds the claim then does the rest,
        or whoever takes it over from that one. OSError: call again.
        """
        if claim.giver in (None, self.worker):
            return False
        with claim.lock:
            ended = replace(claim.hold, place="input", suffix=suffix, worker=claim.giver or "")
            try:
                write_synced(claim.path / _HELD, note)
                rename(claim.path, claim.outer / str(ended))
            except FileNotFoundError:
                self.alive(claim)
                raise
            claim.over = True
        return True

    def note(self, claim: Claim) -> bytes | None:
        """What `hand_back` has noted, if anything."""
        with contextlib.suppress(FileNotFoundError):
            return (claim.path / _HELD).read_bytes(_MAX_NOTE)
        return None

    def free(self, claim: Claim, place: str, names: Collection[str] | None = None) -> str:
        """A suffix under which these files of the claim (default: all) find their names free in a folder."""
        names = self._files(claim) if names is None else names
        root = self._layout.folders[place]
        return free_suffix([root / claim.folder / name for name in names])

    def write_report(self, claim: Claim, text: bytes) -> None:
        """Have a report on what goes to `failed` next lie ready."""
        try:
            write_synced(claim.path / _REPORT, text)
        except FileNotFoundError:
            self.alive(claim)
            raise

    def _carry_report(self, claim: Claim) -> None:
        source, folder = claim.path / _REPORT, self._layout.failed / claim.folder
        name = report_name(folder, _told(source)) if exists(source) else None
        if name:
            with contextlib.suppress(FileNotFoundError):
                rename(source, folder / name)

    def _sort_out_report(self, claim: Claim) -> None:
        """A report in a dead daemon's claim: what it is about lies in `failed/` already, or is not rejected yet."""
        source = claim.path / _REPORT
        if claim.hold.place or not exists(source):
            return
        names = _told(source)
        if names and exists(self._layout.failed / claim.folder / names[-1]):
            self._carry_report(claim)
        else:
            with contextlib.suppress(FileNotFoundError):
                _remove(source)

    def part(self, claim: Claim, prompt: str, place: str, suffix: str) -> None:
        """One prompt is over; the claim goes on. Its move is the moment that counts."""
        with claim.lock:
            self._leave(claim, prompt, place, suffix)
            self._carry_report(claim)
            self._sync(claim, place)
            claim.prompts.discard(prompt)

    def close(self, claim: Claim, place: str, suffix: str) -> None:
        """Everything left in the claim goes to `place`, and the claim is over. OSError: call again."""
        with claim.lock:
            if claim.over:
                return
            names = self._files(claim)
            for name in {claim.picture, *claim.prompts} - {None, *names} if claim.hold.place is None else ():
                logger.warning("{} has vanished from work/ while it was at work", shown(name))
            if claim.hold.place is None and len(names) > 1:
                self._note_over(claim, place, suffix)
            for name in names:
                try:
                    self._leave(
                        claim, name, claim.hold.place or place, claim.hold.suffix if claim.hold.place else suffix
                    )
                except OSError as error:
                    if claim.hold.place is None and error.errno in PATH_ERRORS:
                        self._note_over(claim, place, suffix)  # it may stay so for long, and is not to be run again
                    raise
                claim.prompts.discard(name)
                claim.picture = None if name == claim.picture else claim.picture
            self._carry_report(claim)
            self._sync(claim, claim.hold.place or place)
            claim.over = True
            self._drop(claim.outer, claim.path)

    def _note_over(self, claim: Claim, place: str, suffix: str) -> None:
        """Say by the claim's name that the job is over, and where its files belong."""
        ended = replace(claim.hold, place=place, suffix=suffix)
        try:
            rename(claim.path, claim.outer / str(ended))
        except FileNotFoundError:
            self.alive(claim)
            raise
        claim.hold = ended

    def _names(self, claim: Claim) -> list[str]:
        try:
            return sorted(claim.path.names())
        except FileNotFoundError:
            self.alive(claim)
            raise

    def _files(self, claim: Claim) -> list[str]:
        """The picture first, but for what says where it lies: a prompt must never wait alone."""
        names = [n for n in self._names(claim) if not n.startswith(".")]
        return sorted(names, key=lambda name: (self._layout.is_prompt(name), not is_sidecar(name)))

    def _leave(self, claim: Claim, name: str, place: str, suffix: str) -> None:
        source = claim.path / name
        plain = self._layout.folders[place] / claim.folder / name
        target = with_suffix(plain, suffix)
        while True:
            try:
                if place == "done" and self._layout.delete_input:
                    source.unlink()
                    return
                move_new(source, target)
                break
            except FileExistsError:
                target = with_suffix(plain, free_suffix([plain]))
            except FileNotFoundError:
                self.alive(claim)
                if exists(source):
                    raise
                logger.warning("{} has vanished from work/ while it was at work", shown(name))
                return

    def _sync(self, claim: Claim, place: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # nothing was moved there: it had vanished, or was deleted
            sync_folder(self._layout.folders[place] / claim.folder)

    def _drop(self, outer: SafePath, path: SafePath | None) -> None:
        """Remove an empty claim. What cannot be removed now is an orphan for the janitor."""
        with contextlib.suppress(OSError):
            if path:
                try:
                    path.rmdir()
                except OSError:  # it is not empty
                    for name in path.names():
                        if name.startswith("."):
                            _remove(path / name)
                    path.rmdir()
            outer.rmdir()

    # ── looking ──

    def drop_name(self, found: Found) -> None:
        """Remove a name without a claim. If its maker lives after all, it finds the name gone, and makes it anew."""
        self._drop(found.outer, None)

    def listing(self) -> Listing:
        """What lies in `work/` now."""
        return listing(self._layout.work)


class Listing(NamedTuple):
    """What lies in `work/`: all claims of all daemons; regular files outside of any; folders without anything in them;
    at the top, the daemons' own files; and folders that may not be read. Paths are relative to `work/`."""

    claims: list[Found]
    strays: list[str]
    empty: list[str]
    ours: list[str]
    closed: list[str]


def listing(work: SafePath) -> Listing:
    """One walk through `work/`. Links are not followed. OSError."""
    claims, strays, empty, ours, closed = found = Listing([], [], [], [], [])
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            with (work / folder).scandir() as scan:
                entries = [(e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False)) for e in scan]
        except (FileNotFoundError, NotADirectoryError):
            if not folder:
                raise
            continue
        except PermissionError:
            if not folder:
                raise
            closed.append(folder)
            continue
        if folder and not entries:
            empty.append(folder)
        for name, is_dir, is_file in entries:
            path = f"{folder}/{name}" if folder else name
            if not is_dir:
                if not name.startswith("."):
                    # A link or a pipe was no job: in in/ it would only stand in the way of one.
                    strays.extend([path] if is_file else [])
                elif not folder and name.startswith(TEMP_PREFIX):
                    ours.append(path)
            elif name.startswith("."):
                try:
                    claims.extend(_claims_in(folder, work / path))
                except PermissionError:
                    closed.append(path)
            else:
                pending.append(path)
    return found


def claims_in(folder: str, outer: SafePath) -> Iterator[Found]:
    """The claims of one name; a name without a claim is one without a hold. None of what may not be read."""
    with contextlib.suppress(PermissionError):
        yield from _claims_in(folder, outer)


def _claims_in(folder: str, outer: SafePath) -> Iterator[Found]:
    try:
        with outer.scandir() as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return
    # a link or a file that is called like a claim is none
    holds = [hold for name, is_dir in names.items() if is_dir and (hold := Hold.parse(name))]
    yield from (Found(folder, outer, hold) for hold in holds)
    if not names:
        yield Found(folder, outer)


def _told(report: SafePath) -> list[str]:
    """What a report in a claim names; nothing, where a link, a pipe or a folder has its name: that is none of ours."""
    try:
        return files_of(report)
    except OSError as error:
        if error.errno not in NO_FILE or error.errno in (errno.EACCES, errno.EPERM):
            raise
        return []


def _remove(path: SafePath) -> None:
    """Remove a file, a link, or a folder with all that lies in it. OSError."""
    if path.is_dir():
        path.remove_tree()
    else:
        path.unlink()


def outer_name(name: str) -> str:
    """The claim directory's name for a file's; long ones are cut, and told apart by a hash."""
    raw = os.fsencode(name)
    if len(raw) > _LONGEST:
        name = f"{cut(name, _LONGEST - 20)}#{hashlib.sha256(raw).hexdigest()[:16]}"
    return f".{name}"


def _make(folder: SafePath, *, parents: bool = True) -> bool:
    """mkdir as a claim. False: it is there already, or (without `parents`) what it should lie in has just gone."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    except FileNotFoundError:
        if not parents:
            return False
        folder.parent.mkdir(parents=True, exist_ok=True)
        return _make(folder, parents=False)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise
    return True
