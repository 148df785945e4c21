"""Claims: the directories in `work/` that say who owns a job's files, and how often it was tried.

`model` explains their names. A claim is taken over by renaming its directory to the next
generation. That one rename fences its old owner off: every path that the old owner knows is gone.
A job ends by a rename, too, so that it ends once, however many daemons take it for theirs.

Limitations: a share whose mkdir and rename are not atomic (object stores that look like folders)
does not keep these promises.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Collection
from dataclasses import replace

from loguru import logger

from sam_poll.core.errors import ClaimLostError
from sam_poll.core.files import (
    NO_FILE,
    TEMP_PREFIX,
    exists,
    free_suffix,
    move_new,
    rename,
    sync_folder,
    with_suffix,
    write_new,
    write_synced,
)
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.share.claims.model import (
    Claim,
    ClaimEntry,
    ClaimState,
    WorkListing,
    claim_folder,
    claims_in,
    list_work,
)
from sam_poll.share.error_report import report_name, reported_files
from sam_poll.share.layout import Layout

# Files in a claim's directory; see the package's docstring.
REPORT = ".report"
"""Why the job is rejected. It goes to `failed/` with the job, so that only its owner can say so."""
ANSWERED = ".answered"
"""One of the prompts has been answered: the picture belongs into `done/`, with the suffix behind
this name."""
SHARES_STEM = ".shares_stem"
"""Another picture has this one's stem: the names of the answers must say which is meant."""
DEFERRALS = ".held"
"""What is not to be offered again at once when it is back in `in/`, and why."""
_MAX_NOTE_BYTES = 1 << 20
_DROP_TRIES = 3
_NOT_EMPTY = (errno.ENOTEMPTY, errno.EEXIST)
"""What a system may say where a folder to be removed is not empty (POSIX, rmdir)."""
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
"""Errors that may concern one path alone; all others concern the share as a whole."""


class ClaimStore:
    """Takes, takes over and ends claims for one daemon.

    `check_mounted` raises OSError when the share is away. `runs` is false for a daemon that claims
    jobs so that others may run them: no attempt is counted for its claims. `advanced` is given a
    claim's directory; where part of a long job has been done since the claim was last taken over,
    it returns a function that clears that mark, else None.
    """

    def __init__(
        self,
        layout: Layout,
        worker: str,
        check_mounted: Callable[[], object],
        *,
        runs: bool = True,
        advanced: Callable[[SafePath], Callable[[], None] | None] = lambda outer: None,
    ) -> None:
        self._layout = layout
        self.worker = worker
        self._check_mounted = check_mounted
        self.runs = runs
        self._advanced = advanced

    # ── taking ──

    def take(self, label: str, picture: str | None, prompts: Collection[str]) -> Claim | None:
        """Move files into a new claim named after `label`, the picture first.

        `picture` and `prompts` are paths below `in/`, of one folder. Prompts that have gone are
        left out of the claim.

        Returns None where another claim has the name, or the picture has just gone.

        Raises OSError that names the file that could not be moved, or what is in the place of the
        claim. The files are then back in `in/`, as far as they could be moved.
        """
        folder = label.rpartition("/")[0]
        outer = claim_folder(self._layout.work, label)
        if not _make(outer):
            self._check_place(outer)
            return None
        claim = Claim(
            folder, outer, ClaimState(1, self.worker, attempt=int(self.runs), prompts=len(prompts))
        )
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
        except ClaimLostError:  # moving took so long that others took this daemon for dead
            return None
        except OSError:
            with contextlib.suppress(OSError, ClaimLostError):
                self.close(claim, "input", self.free(claim, "input"))
            raise
        if not (claim.prompts if prompts else claim.picture):
            with contextlib.suppress(ClaimLostError):
                self.close(claim, "input", self.free(claim, "input"))
            return None
        return claim

    @staticmethod
    def _check_place(outer: SafePath) -> None:
        """Raise OSError where what has a claim's name will never be a claim.

        That is a file, a link, a folder that contains something else, or an empty folder that
        cannot be removed.
        """
        try:
            if not outer.names():
                outer.rmdir()  # its maker, if alive, makes it again
                return
            claimed = any(True for _ in claims_in("", outer))
        except FileNotFoundError:  # the claim has just ended
            return
        except (PermissionError, NotADirectoryError):
            claimed = False
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                raise
            return  # its maker was alive
        if not claimed and exists(outer):
            raise FileExistsError(
                errno.EEXIST, "something else has the name of a claim", str(outer)
            )

    def add(self, claim: Claim, prompt: str) -> bool:
        """Move a further prompt into a claim.

        Returns False where the claim has ended or has a prompt of that name, or the prompt is gone.
        """
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

    def take_over(self, found: ClaimEntry, *, ended: bool = False) -> Claim | None:
        """Make a dead daemon's claim this daemon's, and remove what the other was writing.

        The attempt is counted here, before anything is run. Counting begins again at 1 where
        prompts were put away meanwhile, or part of a long job was done. No attempt is counted where
        this daemon runs nothing (the one that takes the claim over from it counts), or where the
        claim was its own already (it was given up because the share could not be used), unless
        `ended` says that one of its processes has ended while it worked on it.

        Returns None where another daemon was quicker. Raises OSError.
        """
        hold = found.hold
        if hold is None:
            return None
        try:
            left = len(self._prompts_in(found.path))
            counts = self.runs and (ended or hold.worker != self.worker)
            advanced = self._advanced(found.outer)
            attempt = int(self.runs) if left < hold.prompts or advanced else hold.attempt + counts
            # A picture whose prompts have all been put away is not one that came without prompts.
            prompts = left or hold.prompts
            mine = replace(
                hold,
                generation=hold.generation + 1,
                worker=self.worker,
                attempt=attempt,
                prompts=prompts,
            )
            rename(found.path, found.outer / str(mine))
        except FileNotFoundError:
            return None
        if advanced:
            advanced()
        claim = Claim(found.folder, found.outer, mine, giver=hold.worker)
        for name in self._names(claim):
            self._note_content(claim, name)
        self._sort_out_report(claim)
        return claim

    def _note_content(self, claim: Claim, name: str) -> None:
        """Note what a file in a claim just taken over says; remove it where it is of no use."""
        not_given_back = claim.hold.place is None
        if self._layout.is_prompt(name):
            claim.prompts.add(name)
        elif name.startswith(ANSWERED):
            claim.answered, claim.suffix = True, name[len(ANSWERED) :]
        elif name == SHARES_STEM:
            claim.shares_stem = True
        elif name.startswith(TEMP_PREFIX) or (name == DEFERRALS and not_given_back):
            (claim.path / name).unlink(missing_ok=True)
        elif self._layout.goes_along(name):
            claim.sidecars.add(name)
        elif not name.startswith("."):
            claim.picture = name

    def _prompts_in(self, path: SafePath) -> list[str]:
        return [name for name in path.names() if self._layout.is_prompt(name)]

    # ── ending ──

    def alive(self, claim: Claim) -> None:
        """Check that a claim is still this daemon's.

        Raises ClaimLostError when another daemon has taken the claim over, OSError when the share
        is away.
        """
        if not exists(claim.path):
            self._check_mounted()
            claim.over = True
            if exists(claim.outer):
                raise ClaimLostError("another daemon has taken it over")
            raise ClaimLostError(
                "another daemon has taken it over and ended it, or its files in work/ were deleted"
            )

    def mark_answered(self, claim: Claim) -> None:
        """Mark a claim, one of whose prompts is answered: its picture goes to `done/` at the end.

        The mark is a file, so that a daemon that takes the claim over knows it, too.
        """
        if not claim.answered and claim.picture:
            self.alive(claim)
            (claim.path / f"{ANSWERED}{claim.suffix}").touch()
        claim.answered = True

    def mark_stem(self, claim: Claim) -> None:
        """Mark a claim, whose picture's stem another picture has, too.

        The mark is a file: a worker that runs the job may not know the picture's neighbours.
        """
        self.alive(claim)
        (claim.path / SHARES_STEM).touch()
        claim.shares_stem = True

    def hand_back(self, claim: Claim, suffix: str, note: bytes) -> bool:
        """Give a claim back to the worker it was taken over from, which moves its files to `in/`.

        That worker reads `note` first. The rename decides: from then on the claim is that worker's,
        or that of a worker that takes it over.

        Returns False where the claim was this worker's own before. Raises OSError: call again.
        """
        if claim.giver in (None, self.worker):
            return False
        with claim.lock:
            ended = replace(claim.hold, place="input", suffix=suffix, worker=claim.giver or "")
            try:
                write_synced(claim.path / DEFERRALS, note)
                rename(claim.path, claim.outer / str(ended))
            except FileNotFoundError:
                self.alive(claim)
                raise
            claim.over = True
        return True

    def note(self, claim: Claim) -> bytes | None:
        """Return the note that `hand_back` has left in a claim; None: there is none."""
        with contextlib.suppress(FileNotFoundError):
            return (claim.path / DEFERRALS).read_bytes(_MAX_NOTE_BYTES)
        return None

    def free(
        self,
        claim: Claim,
        place: str,
        names: Collection[str] | None = None,
        is_taken: Callable[[str], bool] = lambda suffix: False,
    ) -> str:
        """Return the suffix that makes the names of a claim's files free in a folder.

        `place` is the folder's name ("done" …), `names` those of the files; default: all.
        `is_taken` as in `free_suffix`.
        """
        names = self._files(claim) if names is None else names
        root = self._layout.folders[place]
        return free_suffix([root / claim.folder / name for name in names], is_taken)

    def write_report(self, claim: Claim, text: bytes) -> None:
        """Write the report on the files that go to `failed` next into the claim.

        An existing one is replaced only while the claim is this daemon's: it may be that of a
        daemon that has just taken the claim over.
        """
        path = claim.path / REPORT
        try:
            write_new(path, text)
        except FileExistsError:
            self.alive(claim)
            write_synced(path, text)
        except FileNotFoundError:
            self.alive(claim)
            raise

    def _carry_report(self, claim: Claim) -> None:
        source, folder = claim.shared_path / REPORT, self._layout.failed / claim.folder
        name = report_name(folder, _reported_files(source)) if exists(source) else None
        if name:
            with contextlib.suppress(FileNotFoundError):
                rename(source, folder / name)

    def _sort_out_report(self, claim: Claim) -> None:
        """Move or remove the report that a dead daemon has left in a claim.

        It goes to `failed/` where its files are there already; else they have not been rejected.
        """
        source = claim.path / REPORT
        if claim.hold.place or not exists(source):
            return
        names = _reported_files(source)
        if names and exists(self._layout.failed / claim.folder / names[-1]):
            self._carry_report(claim)
        else:
            with contextlib.suppress(FileNotFoundError):
                _remove(source)

    def part(self, claim: Claim, prompt: str, place: str, suffix: str) -> None:
        """Move one prompt out of a claim that goes on; that move ends its job. Raises OSError."""
        with claim.lock:
            self._leave(claim, prompt, place, suffix)
            if place == "failed":
                self._carry_report(claim)
            self._sync(claim, place)
            claim.prompts.discard(prompt)

    def close(self, claim: Claim, place: str, suffix: str) -> None:
        """End a claim: move everything left in it to `place`. Raises OSError: call again.

        Where the claim's name already says a place, its files go there instead.

        Raises ClaimLostError where the claim contains an unknown prompt, which has no answer yet:
        the daemon that it was taken over from was moving it, and has moved it back since
        (`SafePath.rename`). The claim must be taken over once more.
        """
        with claim.lock:
            if claim.over:
                return
            names = self._files(claim)
            if claim.hold.place is None:
                prompts = {name for name in names if self._layout.is_prompt(name)}
                if place != "input" and prompts - claim.prompts:
                    claim.over = True
                    raise ClaimLostError("a prompt has been moved back into it")
                for name in {claim.picture, *claim.prompts} - {None, *names}:
                    _warn_vanished(name)
                if len(names) > 1:
                    self._note_over(claim, place, suffix)
            for name in names:
                self._move_out(claim, name, place, suffix)
            place = claim.hold.place or place
            if place == "failed":  # else a daemon that it was taken over from wrote it, too late
                self._carry_report(claim)
            self._sync(claim, place)
            claim.over = True
            self._drop(claim.outer, claim.path)

    def _move_out(self, claim: Claim, name: str, place: str, suffix: str) -> None:
        """Move one file of a claim that ends."""
        ended = claim.hold.place
        try:
            if ended:
                self._leave(claim, name, ended, claim.hold.suffix)
            else:
                self._leave(claim, name, place, suffix)
        except OSError as error:
            if ended is None and error.errno in PATH_ERRORS:
                # It may stay so for long, and the job is not to be run again.
                self._note_over(claim, place, suffix)
            raise
        claim.prompts.discard(name)
        if name == claim.picture:
            claim.picture = None

    def _note_over(self, claim: Claim, place: str, suffix: str) -> None:
        """Rename a claim so that its name says where the files of the ended job belong."""
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
        """Return the names of a claim's files in the order in which they are moved out.

        Sidecars (they say where a map's picture is on the earth) and mask files come first, then
        the picture: no prompt is ever without its picture.
        """
        layout = self._layout
        names = [n for n in self._names(claim) if not n.startswith(".")]
        return sorted(names, key=lambda name: (layout.is_prompt(name), not layout.goes_along(name)))

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
                _warn_vanished(name)
                return

    def _sync(self, claim: Claim, place: str) -> None:
        # Not there where nothing was moved: the files had vanished, or were deleted.
        with contextlib.suppress(FileNotFoundError):
            sync_folder(self._layout.folders[place] / claim.folder)

    def _drop(self, outer: SafePath, path: SafePath | None) -> None:
        """Remove a claim without files.

        What a share that fails once leaves is tried again; the rest is left to the janitor.
        """
        for _ in range(_DROP_TRIES):
            with contextlib.suppress(OSError):
                if path:
                    _remove_claim(path)
                outer.rmdir()
                return

    # ── listing ──

    def drop_name(self, found: ClaimEntry) -> None:
        """Remove a name without a claim. Its maker, if alive, finds it gone and makes it again."""
        self._drop(found.outer, None)

    def list_work(self) -> WorkListing:
        """List `work/`. Raises OSError."""
        return list_work(self._layout.work)


def _warn_vanished(name: str | None) -> None:
    logger.warning("{} has vanished from work/ while its job was running", shown(name))


def _reported_files(report: SafePath) -> list[str]:
    """Return the files that a report in a claim names.

    Returns nothing where a link, a pipe or a folder has the report's name: it is not the daemon's.
    Nor where the report has just gone: the next step on the claim finds out whether it exists.
    """
    try:
        return reported_files(report)
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno not in NO_FILE or error.errno in (errno.EACCES, errno.EPERM):
            raise
        return []


def _remove_claim(path: SafePath) -> None:
    """Remove a claim's folder, which may be gone already. Raises OSError.

    A daemon that the claim was taken over from may move a file back into it at any time before the
    folder is gone (`SafePath.rename`). The claim then keeps its marks, which say where that file
    belongs.
    """
    with contextlib.suppress(FileNotFoundError):
        try:
            path.rmdir()
        except OSError:  # it is not empty: marks, notes, what remains of annotations
            names = path.names()
            if not all(name.startswith(".") for name in names):
                raise
            for name in names:
                _remove(path / name)
            try:
                path.rmdir()
            except OSError:
                for name in names:
                    if name.startswith(ANSWERED) or name == SHARES_STEM:
                        (path / name).touch()
                raise


def _remove(path: SafePath) -> None:
    """Remove a file, a link, or a folder with all its contents. Raises OSError."""
    if path.is_dir():
        path.remove_tree()
    else:
        path.unlink()


def _make(folder: SafePath, *, parents: bool = True) -> bool:
    """Make a directory of a claim.

    Returns False where it is there already, its name is too long, or (without `parents`) its parent
    has just gone.
    """
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
