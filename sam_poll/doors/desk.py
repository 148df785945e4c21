"""The desk: makes jobs out of settled pairs and of dead daemons' claims, and knows what is claimed here.

What can still go wrong here: a job's name may depend on its neighbours (`dog.jpg` beside `dog.png`). When these change
between two runs of one job, the second writes its answer under another name, and the first one's stays in `out/`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from loguru import logger

from sam_poll import prompts
from sam_poll.doors.beside import take_along
from sam_poll.doors.claims import PATH_ERRORS, Claim, Claims, Found, outer_name
from sam_poll.doors.finished import spellings
from sam_poll.doors.held import noted
from sam_poll.doors.layout import Layout
from sam_poll.doors.looks import look
from sam_poll.doors.scan import Manners, Ready, Scanner
from sam_poll.doors.scratch import Scratch
from sam_poll.doors.settle import composed, job_id
from sam_poll.doors.spread import Spreader, check_complete
from sam_poll.errors import InputError, LostError, PoisonError, PromptError, SamPollError, UnfinishedError
from sam_poll.fs import NAME_MAX, exists, shown, with_suffix
from sam_poll.safe_path import SafePath
from sam_poll.types import Everything, Job, Mosaic

_LONGEST_SUFFIX = 24  # `.overlay.jpg`, `.mask.10000.png`, `.error.json`, `~2`


@dataclass(slots=True, eq=False)
class Ticket:
    """What the door remembers of a job. `suffix` is that of its names in `failed/`, chosen once."""

    claim: Claim
    prompt: str | None
    suffix: str | None = None

    @property
    def rel(self) -> str:
        """The file it is named after, relative to `in/`."""
        return self.claim.below(self.prompt or self.claim.picture or "")


@dataclass(frozen=True, slots=True)
class _Read:
    """A prompt as it was understood, or why it was not; `prompt` None: a picture without one."""

    ready: Ready
    parsed: prompts.PromptFile | None
    fault: SamPollError | None


class Desk:
    """`claim` and `resume` are for the scan's thread, the rest for any. Of fresh mosaics no more than `most` are taken
    at once: each keeps a place in the pipeline for hours, and others that could begin with it would find it taken."""

    def __init__(
        self,
        layout: Layout,
        manners: Manners,
        scanner: Scanner,
        claims: Claims,
        scratch: Scratch,
        going: Callable[[], bool] = lambda: True,
        *,
        most: Callable[[], int] = lambda: 1,
    ) -> None:
        self._layout, self._manners, self._scanner, self._claims = layout, manners, scanner, claims
        self._scratch, self._most_mosaics = scratch, most
        self._spreader = Spreader(layout, going)
        self._lock = threading.Lock()
        self._claimed: dict[SafePath, Claim] = {}
        self._ended: set[SafePath] = set()
        self.recovered = 0

    @property
    def busy(self) -> bool:
        """Whether anything is claimed here."""
        return bool(self._claimed)

    def has(self, found: Found) -> bool:
        """Whether a claim of this daemon's name is really at work here."""
        return self.holds(found.outer)

    def holds(self, outer: SafePath) -> bool:
        """Whether the claim of this name is at work here."""
        with self._lock:
            return outer in self._claimed

    def pictures(self) -> list[str]:
        """The pictures in claims of this daemon, which further prompts may join."""
        with self._lock:
            return [c.below(c.picture) for c in self._claimed.values() if c.picture]

    def works_on(self, rel: str) -> bool:
        """Whether a file of this name in `in/` lies in a claim of this daemon."""
        folder, _, name = rel.rpartition("/")
        with self._lock:
            return any(c.folder == folder and (name in c.prompts or name == c.picture) for c in self._claimed.values())

    # ── fresh ──

    def claim(self, group: list[Ready]) -> list[Job]:
        """Take a picture with all its ready prompts out of `in/`, so that it stays until the last of them has ended.

        What changed, vanished, or has its name still in `work/` is left for a later scan. OSError.
        """
        if self._layout.is_annotations(group[0].prompt or ""):
            return self._take_annotations(group[0])
        read = self._few([found for ready in group if (found := self._read(ready))])
        if not read:
            return []
        picture = group[0].picture
        own = self._claimed.get(self._outer(picture)) if picture else None
        if picture and any(picture in r.ready.signatures for r in read):
            return [] if own else self._take(picture, read)
        jobs: list[Job] = []
        for one in read:
            try:
                if own:
                    jobs += self._joined(own, one)
                elif not one.ready.picture or one.ready.suffix is not None:
                    jobs += self._take_prompt(one)  # else its picture has just ended its work: look anew where it is
            except LostError:
                continue
            except OSError as error:
                if not jobs:
                    raise
                logger.error("{} cannot be claimed: {}", shown(one.ready.prompt), error)
                break
        return jobs

    def _few(self, read: list[_Read]) -> list[_Read]:
        """Without the mosaics for which there is no place now."""
        if not self._claims.runs:
            return read
        with self._lock:
            places = self._most_mosaics() - sum(len(c.mosaics & c.prompts) for c in self._claimed.values())
        mosaics = [one for one in read if one.parsed and isinstance(one.parsed.prompts, Mosaic)]
        return [one for one in read if one not in mosaics[max(0, places) :]]

    def _joined(self, own: Claim, read: _Read) -> list[Job]:
        name = self._join(own, read)
        if name is None:
            return []
        with self._kept(own):
            return [self._job(own, name, read)]

    def _read(self, ready: Ready) -> _Read | None:
        """None: it has changed since it was looked at, or is not what its text says (and is looked at anew)."""
        try:
            if not self._scanner.still(ready):
                return None
            if ready.fault or not ready.prompt:
                return _Read(ready, None, ready.fault)
            parsed = self._scanner.read(self._layout.input / ready.prompt)
        except PromptError as error:
            grows = self._scanner.hold_if_incomplete(ready.prompt or "", ready.signatures, error)
            return None if grows else _Read(ready, None, error)
        except OSError as error:
            self._scanner.hold_unread(ready.prompt or "", ready.signatures, error)
            return None
        picture = os.path.basename(ready.picture or "")
        if parsed.image and picture and composed(picture) != composed(parsed.image):
            # Its name suggests one picture, its text names another: the next scan pairs it by the text.
            self._scanner.learn(ready.prompt, parsed.image)
            return None
        return None if self._still_grows(ready, parsed.image_bytes) else _Read(ready, parsed, None)

    def _still_grows(self, ready: Ready, nbytes: int | None) -> bool:
        """Whether the picture has fewer bytes than its prompt promises; it is then left alone until it changes."""
        seen = ready.signatures.get(ready.picture or "")
        if not seen or nbytes is None or seen.size >= nbytes:
            return False
        error = UnfinishedError(
            f"has {seen.size:,} bytes, but the prompt's image_bytes says {nbytes:,}",
            place=shown(os.path.basename(ready.picture or "")),
            remedy="copy the picture again, or mend the prompt",
        )
        self._scanner.hold(ready.prompt or "", ready.signatures, self._manners.patience, error)
        return True

    def _take(self, picture: str, read: list[_Read]) -> list[Job]:
        by_name = {r.ready.prompt: r for r in read if r.ready.prompt}
        claim = self._claims.take(picture, picture, list(by_name))
        if claim is None:
            return []
        if not self._layout.delete_input:  # chosen now, because the answers will carry the picture's name in done/
            with self._or_back(claim):
                self._take_along(claim, read)
                claim.suffix = self._claims.free(claim, "done", [claim.picture or "", *claim.sidecars])
        seen = {os.path.basename(f): s for r in read for f, s in r.ready.signatures.items()}
        if any(look(claim.path / name) != seen[name] for name in (claim.picture or "", *claim.prompts)):
            self._claims.close(claim, "input", self._claims.free(claim, "input"))  # changed in this very moment
            return []
        with self._or_back(claim), self._kept(claim):
            if not by_name:
                return [self._job(claim, None, read[0])]
            named = {os.path.basename(p): r for p, r in by_name.items()}
            return [self._job(claim, name, r) for name, r in named.items() if name in claim.prompts]

    def _take_along(self, claim: Claim, read: list[_Read]) -> None:
        """Take a mosaic's sidecars, where they can be taken, before the names in `done/` are chosen."""
        if any(r.parsed and isinstance(r.parsed.prompts, Mosaic) for r in read):
            with suppress(InputError):  # told with the job
                take_along(self._layout, self._claims, claim)

    def _join(self, own: Claim, read: _Read) -> str | None:
        prompt = read.ready.prompt or ""
        return os.path.basename(prompt) if self._claims.add(own, prompt) else None

    def _take_prompt(self, read: _Read) -> list[Job]:
        """A prompt alone: its picture lies in `done/`, or it is to be rejected."""
        prompt, picture = read.ready.prompt or "", read.ready.picture
        claim = self._claims.take(prompt, None, [prompt])
        if claim is None:
            return []
        if picture:
            claim.borrowed, claim.suffix = picture, read.ready.suffix or ""
        with self._or_back(claim), self._kept(claim):
            return [self._job(claim, os.path.basename(prompt), read)]

    def _take_annotations(self, ready: Ready) -> list[Job]:
        """An annotation file becomes prompts in `in/`, which the next scan finds; a job only where it is refused."""
        name = ready.prompt or ""
        if not self._scanner.still(ready) or self._annotations_incomplete(ready):
            return []
        claim = self._claims.take(name, None, [name])
        if claim is None:
            return []
        if look(claim.path / os.path.basename(name)) != ready.signatures[name]:  # changed in this very moment
            self._claims.close(claim, "input", self._claims.free(claim, "input"))
            return []
        return self._spread(claim)

    def _annotations_incomplete(self, ready: Ready) -> bool:
        """Whether an annotation file may still be being written. It is looked at where it lies: one that is claimed
        could not be filled by its name any more."""
        name = ready.prompt or ""
        if ready.fault:
            return False  # it has had its time
        try:
            check_complete(self._layout.input / name)
        except PromptError as error:
            return self._scanner.hold_if_incomplete(name, ready.signatures, error)
        except OSError as error:
            self._scanner.hold_unread(name, ready.signatures, error)
            return True
        return False

    def _spread(self, claim: Claim) -> list[Job]:
        (name,) = claim.prompts
        with self._kept(claim):
            try:
                place = "done" if self._spreader.spread(claim, name) else "input"  # there it waits for the next daemon
                self._claims.close(claim, place, self._claims.free(claim, place))
            except PromptError as error:
                return [self._job(claim, name, _Read(Ready(None, None, {}), None, error))]
            except FileNotFoundError:
                self._claims.alive(claim)
                raise
            self.forget(claim)
            self._scanner.due = 0.0
            return []

    @contextmanager
    def _or_back(self, claim: Claim) -> Iterator[None]:
        """Put a fresh claim back where one path's trouble, which may last, keeps jobs from being made of it."""
        try:
            yield
        except OSError as error:
            if error.errno in PATH_ERRORS:
                with suppress(OSError, LostError):
                    self._claims.close(claim, "input", self._claims.free(claim, "input"))
            raise

    @contextmanager
    def _kept(self, claim: Claim) -> Iterator[None]:
        """It is at work here from now on; unless its jobs cannot be made, which leaves it for the next scan to take
        over."""
        with self._lock:
            self._claimed[claim.outer] = claim
            self._ended.discard(claim.outer)
        try:
            yield
        except (OSError, LostError):
            self.forget(claim)
            raise

    # ── what dead daemons left ──

    def resume(self, found: Found, *, handed: bool = False) -> list[Job]:
        """Take a claim over and go on where it was left; no jobs if it only had to be finished. OSError.

        `handed`: its holder lives, and has told us to.
        """
        claim = self._claims.take_over(found, ended=found.outer in self._ended)
        if claim is None:
            return []
        hold = claim.hold
        self.recovered += not handed
        logger.log(
            "DEBUG" if handed or (found.hold and found.hold.worker == self._claims.worker) else "INFO",
            "took over {} from {}: generation {}, attempt {}",
            shown(found.label),
            found.hold.worker if found.hold else "",
            hold.generation,
            hold.attempt,
        )
        fault = None if hold.place else self._poison(claim)  # of which nothing is read any more
        if not hold.place and not fault and any(map(self._layout.is_annotations, claim.prompts)):
            return self._spread(claim)
        joined = {} if hold.place or fault else self._join_waiting(claim, found.label)
        if hold.place or not (claim.prompts if fault and hold.prompts else self._has_work(claim)):
            place = hold.place or ("done" if claim.answered else "input")
            suffix = (
                hold.suffix if hold.place else claim.suffix if claim.answered else self._claims.free(claim, "input")
            )
            self._take_note(claim)
            self._claims.close(claim, place, suffix)
            return []
        if claim.picture and not claim.answered and not self._layout.delete_input:
            claim.suffix = self._claims.free(claim, "done", [claim.picture, *claim.sidecars])
        ready = Ready(None, None, {})
        with self._kept(claim):
            if fault:
                return [self._job(claim, name, _Read(ready, None, fault)) for name in self._names(claim)]
            reread = {name: joined.get(name or "") or self._reread(claim, name, ready) for name in self._names(claim)}
            return [self._job(claim, name, read) for name, read in reread.items()]

    def _take_note(self, claim: Claim) -> None:
        """What whoever gave the claim back wants not to be offered again at once."""
        for held in noted(self._claims.note(claim) or b""):
            self._scanner.hold(held.job, held.seen, held.seconds, held.error)

    def _join_waiting(self, claim: Claim, label: str) -> dict[str, _Read]:
        """Take the prompts along that have come for the claim's picture meanwhile, or were not taken with it."""
        if not claim.picture:
            return {}
        waiting = (r for ready in self._scanner.siblings.get(label, []) if (r := self._read(ready)))
        return {name: r for r in waiting if (name := self._join(claim, r))}

    @staticmethod
    def _names(claim: Claim) -> list[str | None]:
        """One for each job; None for a picture without a prompt."""
        return [*sorted(claim.prompts)] or [None]

    def _has_work(self, claim: Claim) -> bool:
        """Whether there is still something to answer; finds the picture of a prompt that is alone."""
        if claim.picture:
            return bool(claim.prompts) or claim.hold.prompts == 0
        for name in claim.prompts:
            try:
                image = self._scanner.read(claim.path / name).image
            except PromptError:
                image = None
            found = self._scanner.finished.find(claim.below(name), image)
            if found:
                claim.borrowed, claim.suffix = found
                return True
        return False

    def _poison(self, claim: Claim) -> PoisonError | None:
        times = claim.hold.attempt - self._claims.runs
        if times < self._manners.attempts:
            return None
        return PoisonError(
            f"it has ended the daemon {times} times while it was at work",
            place=shown(claim.picture or min(claim.prompts, default="")),
            remedy="look at the picture and at the daemon's log; `sam-poll retry` tries it again",
        )

    def _reread(self, claim: Claim, name: str | None, ready: Ready) -> _Read:
        if name is None:
            return _Read(ready, None, self._scanner.no_prompt_fault(claim.picture or ""))
        try:
            return _Read(ready, self._scanner.read(claim.path / name), None)
        except PromptError as error:
            return _Read(ready, None, error)

    # ── jobs ──

    def _job(self, claim: Claim, prompt: str | None, read: _Read) -> Job:
        parsed, fault = read.parsed, read.fault
        ticket = Ticket(claim, prompt)
        named = claim.below(claim.picture) if claim.picture else claim.borrowed or ticket.rel
        place = with_suffix(self._layout.done / named, claim.suffix)
        picture = claim.path / claim.picture if claim.picture else place if claim.borrowed else b""
        if parsed and isinstance(parsed.prompts, Mosaic):
            try:
                take_along(self._layout, self._claims, claim)
            except InputError as error:
                fault = fault or error
        if not self._claims.runs and not claim.shares_stem and self._scanner.shares_stem(named):
            self._claims.mark_stem(claim)
        identity = self._identity(ticket, named) + claim.suffix
        if len(os.fsencode(os.path.basename(identity))) + _LONGEST_SUFFIX > NAME_MAX:
            fault = fault or InputError(
                "the name is too long to append the outputs' endings to it",
                place=shown(os.path.basename(ticket.rel)),
                remedy=f"use names of at most {NAME_MAX - _LONGEST_SUFFIX} bytes",
            )
        logger.debug("claimed {}", shown(ticket.rel))
        job = Job(
            id=identity,
            name=self._layout.share_name(place),
            picture=picture,
            prompts=parsed.prompts if parsed else Everything(),
            origin=ticket,
            fault=fault,
            sha256=parsed.image_sha256 if parsed else None,
            nbytes=parsed.image_bytes if parsed else None,
            image_size=parsed.image_size if parsed else None,
            generation=claim.hold.generation,
            attempt=claim.hold.attempt,
            notes=(_reuse_note(place),) if claim.borrowed else (),
        )
        kept = self._claims.runs and not fault and isinstance(job.prompts, Mosaic) and isinstance(picture, SafePath)
        if not kept:
            return job
        claim.mosaics.add(prompt)
        return self._scratch.given(claim, prompt, job)

    def _identity(self, ticket: Ticket, named: str) -> str:
        """The path of a job's outputs below `out/`, before the suffix."""
        folders = (self._layout.input, self._layout.done)
        claim_shares = ticket.claim.shares_stem or self._scanner.shares_stem(named)
        # Who else is in `in/` or at work the scan has seen; one that has come since then sees this one at work.
        folder, _, name = named.rpartition("/")
        others = [other for other in spellings(os.path.splitext(name)[0]) if other != name]
        twin = os.path.splitext(ticket.rel)[0] + ".json"
        return job_id(
            ticket.rel,
            named,
            shares_stem=claim_shares or (self._layout.done / folder).holds_any(others),
            twin=ticket.prompt is not None
            and twin != ticket.rel
            and self._layout.is_prompt(twin)
            and (os.path.basename(twin) in ticket.claim.prompts or any(exists(folder / twin) for folder in folders)),
        )

    def _outer(self, rel: str) -> SafePath:
        folder, _, name = rel.rpartition("/")
        return self._layout.work / folder / outer_name(name)

    # ── ends ──

    def leaving(self, ticket: Ticket) -> list[str]:
        """The files that go with this job when it is rejected or released: the prompt, and with the last of them the
        picture, unless that belongs to `done/` already."""
        claim = ticket.claim
        last = claim.prompts <= {ticket.prompt}
        goes = claim.picture and last and not claim.answered
        names = [*sorted(claim.sidecars), claim.picture] if claim.picture and goes else []
        return [*names, *([ticket.prompt] if ticket.prompt in claim.prompts else [])]

    def end(self, ticket: Ticket, place: str, suffix: str | None = None) -> None:
        """The job is over: its files go to `place` (`done`, `failed`, `input`). The claim's lock is held. OSError: call
        again. LostError: it is not ours."""
        claim, prompt = ticket.claim, ticket.prompt
        suffix = claim.suffix if suffix is None else suffix
        if prompt in claim.prompts:
            last = claim.prompts == {prompt}
            if place == "done" and not last:
                self._claims.mark_answered(claim)
            if not last or (claim.picture and claim.answered and place != "done"):
                self._claims.part(claim, prompt, place, suffix)
        if claim.prompts - {prompt}:
            return
        # Answered for one prompt, a picture belongs to the picture tree, whatever became of its other prompts.
        answered = claim.answered and claim.picture is not None
        self._claims.close(claim, "done" if answered else place, claim.suffix if answered else suffix)
        self.forget(claim)

    def abandon(self, claim: Claim) -> None:
        """A process of ours has ended while it worked on it: the next scan takes it over, as a further attempt."""
        with self._lock:
            if self._claimed.get(claim.outer) is claim:
                self._ended.add(claim.outer)
                del self._claimed[claim.outer]

    def forget_all_but(self, paths: Collection[SafePath]) -> None:
        """Of what was claimed here, only these are still ours."""
        with self._lock:
            self._claimed = {outer: claim for outer, claim in self._claimed.items() if claim.path in paths}

    def forget(self, claim: Claim) -> None:
        """It is over, or not ours any more."""
        with self._lock:
            if self._claimed.get(claim.outer) is claim:
                del self._claimed[claim.outer]


def _reuse_note(place: SafePath) -> str:
    """What the reader of an answer should know where no picture has come with the prompt."""
    return f"no picture came with the prompt: it was answered on {place.name} in done/, from an earlier job"
