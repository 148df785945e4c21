"""What a claim is: the name of its directory, and the list of all claims in `work/`.

    work/cam1/.dog.jpg/                      the claim's name: made by mkdir, so that there is one
                                             claim of a file at a time on the whole share
    work/cam1/.dog.jpg/g1.a1.n2@box-3f-77/   the claim: generation 1, attempt 1, 2 prompts at its
                                             beginning, its worker
    work/cam1/.dog.jpg/g2.done~2@box-3f-77/  the job has ended: what is left in the directory only
                                             has to be moved to `done/`, with the suffix `~2`

The package's docstring lists everything that a claim's directory may contain.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sam_poll.core.files import NAME_MAX, TEMP_PREFIX
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import cut

_MAX_PATH = 4096  # characters
_LONGEST = 230  # bytes of a file's name that are part of its claim's name as they are

_STATE_NAME = re.compile(
    r"g(?P<generation>\d{1,9})\."
    r"(?:a(?P<attempt>\d{1,9})\.n(?P<prompts>\d{1,9})"
    r"|(?P<place>done|failed|input)(?P<suffix>~\d{1,9})?)"
    r"@(?P<worker>[\w-]{1,100})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class ClaimState:
    """The state of a claim, as its directory's name says it.

    `attempt` counts the runs begun; 0 means that the claim waits for its first run, held by a
    daemon that runs nothing itself. `prompts` is their number when the claim was made or taken
    over. `place` is None until the job has ended; then it says where the claim's files belong
    ("done", "failed" or "input"), and `suffix` what is put behind their stems.
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
    def parse(name: str) -> ClaimState | None:
        """Return the state that a directory's name says; None where it is not a claim's name."""
        match = _STATE_NAME.fullmatch(name)
        if not match:
            return None
        text = match.groupdict()
        numbers = {k: int(text[k] or 0) for k in ("generation", "attempt", "prompts")}
        return ClaimState(
            worker=text["worker"], place=text["place"], suffix=text["suffix"] or "", **numbers
        )


@dataclass(frozen=True, slots=True)
class ClaimEntry:
    """A claim seen in `work/`, of any daemon.

    `folder` is the one of its files below `in/`, `outer` the directory with the claim's name.
    `hold` is None for a name without a claim, left by a daemon that died between the two mkdirs.
    """

    folder: str
    outer: SafePath
    hold: ClaimState | None = None

    @property
    def path(self) -> SafePath:
        """Return the directory that contains the claim's files."""
        return self.outer.fenced(str(self.hold))

    def has_files(self) -> bool:
        """Return whether files of jobs are in the claim. Raises OSError but for "not there"."""
        try:
            return any(not name.startswith(".") for name in self.path.names())
        except FileNotFoundError:
            return False

    @property
    def label(self) -> str:
        """Return the picture (or lone prompt) it was made for, relative to `in/`.

        The label of a name of more than 230 bytes is cut.
        """
        name = self.outer.name[1:]
        return f"{self.folder}/{name}" if self.folder else name


@dataclass(slots=True, eq=False)
class Claim:
    """A claim that this daemon holds.

    `picture` and `prompts` are the names of files in it that have not been moved out yet, and
    `sidecars` those of files that go with them: a mosaic's sidecars, and mask files. `suffix` is
    put behind the picture's stem in `done/`. `borrowed` is a picture that already is in `done/` and
    stays there, by its path as it was in `in/`. `answered`: one of the prompts has been answered,
    so the picture belongs into `done/`. `shares_stem`: another picture has this one's stem.
    `mosaics` are the prompts that ask for one. `giver` is the worker that held the claim before it
    was taken over. `over`: the claim has ended, or belongs to another daemon.
    """

    folder: str
    outer: SafePath
    hold: ClaimState
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
        """Return the directory that contains its files now."""
        return self.outer.fenced(str(self.hold), exclusive=self.hold.place is None)

    @property
    def shared_path(self) -> SafePath:
        """Return the same directory, for files that a former owner may move out of it as well.

        What that owner has moved just after the claim was taken over is not moved back
        (`SafePath.rename`): its heir, which might miss it, has no other use for it.
        """
        return self.outer.fenced(str(self.hold))

    def below(self, name: str) -> str:
        """Return a file's path relative to `in/`, `done/` and the other folders."""
        return f"{self.folder}/{name}" if self.folder else name


class WorkListing(NamedTuple):
    """What was in `work/` when it was listed. Paths are relative to `work/`."""

    claims: list[ClaimEntry]
    """All claims of all daemons, and names without a claim."""
    strays: list[str]
    """Regular files outside of any claim."""
    empty: list[str]
    """Folders that contain nothing."""
    ours: list[str]
    """The daemons' own files, which are at the top."""
    closed: list[str]
    """Folders that may not be read."""


class _Entry(NamedTuple):
    """One name in a folder. A link is neither a directory nor a file."""

    name: str
    is_dir: bool
    is_file: bool


def list_work(work: SafePath) -> WorkListing:
    """List `work/` in one walk, without following links. Raises OSError."""
    listing = WorkListing([], [], [], [], [])
    pending = [""]
    while pending:
        folder = pending.pop()
        entries = _entries_of(work, folder, listing)
        if folder and entries == []:
            listing.empty.append(folder)
        for entry in entries or ():
            path = f"{folder}/{entry.name}" if folder else entry.name
            if not entry.is_dir:
                _list_file(path, entry, listing)
            elif entry.name.startswith("."):
                try:
                    listing.claims.extend(_claims_in(folder, work / path))
                except PermissionError:
                    listing.closed.append(path)
            else:
                pending.append(path)
    return listing


def _entries_of(work: SafePath, folder: str, listing: WorkListing) -> list[_Entry] | None:
    """Return the names in a folder; None where it is gone or closed.

    Raises OSError for `work/` itself.
    """
    try:
        with (work / folder).scandir() as scan:
            return [
                _Entry(e.name, e.is_dir(follow_symlinks=False), e.is_file(follow_symlinks=False))
                for e in scan
            ]
    except (FileNotFoundError, NotADirectoryError):
        if not folder:
            raise
        return None
    except PermissionError:
        if not folder:
            raise
        listing.closed.append(folder)
        return None


def _list_file(path: str, entry: _Entry, listing: WorkListing) -> None:
    """Put what is no directory where it belongs in the listing."""
    if not entry.name.startswith("."):
        # A link or a pipe was no job; in `in/` it would only be in the way of one.
        if entry.is_file:
            listing.strays.append(path)
    elif path == entry.name and path.startswith(TEMP_PREFIX):
        listing.ours.append(path)


def claims_in(folder: str, outer: SafePath) -> Iterator[ClaimEntry]:
    """Yield the claims of one name, and for a name without a claim one whose `hold` is None.

    Yields nothing where the name's directory may not be read.
    """
    with contextlib.suppress(PermissionError):
        yield from _claims_in(folder, outer)


def _claims_in(folder: str, outer: SafePath) -> Iterator[ClaimEntry]:
    try:
        with outer.scandir() as entries:
            names = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    except (FileNotFoundError, NotADirectoryError):
        return
    # A link or a file with a claim's name is no claim.
    states = [
        state for name, is_dir in names.items() if is_dir and (state := ClaimState.parse(name))
    ]
    yield from (ClaimEntry(folder, outer, state) for state in states)
    if not names:
        yield ClaimEntry(folder, outer)


def is_claim_path(path: str) -> bool:
    """Return whether a path relative to `work/` may be a claim's. It may come from anybody."""
    parts = path.split("/")
    if len(path) > _MAX_PATH or not all(map(_is_file_name, parts)):
        return False
    return parts[-1].startswith(".") and not any(part.startswith(".") for part in parts[:-1])


def _is_file_name(part: str) -> bool:
    try:
        length = len(os.fsencode(part))
    except UnicodeEncodeError:  # half a surrogate pair, which no file name decodes to
        return False
    return 0 < length <= NAME_MAX and part not in (".", "..") and "\0" not in part


def claim_folder(work: SafePath, rel: str) -> SafePath:
    """Return the directory with the name of the claim that is made for a file below `in/`."""
    folder, _, name = rel.rpartition("/")
    return work / folder / claim_name(name)


def claim_name(name: str) -> str:
    """Return the name of the claim directory for a file's name.

    A long name is cut, and a hash of the whole name makes the result unique.
    """
    raw = os.fsencode(name)
    if len(raw) > _LONGEST:
        name = f"{cut(name, _LONGEST - 20)}#{hashlib.sha256(raw).hexdigest()[:16]}"
    return f".{name}"
