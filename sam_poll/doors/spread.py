"""An annotation file dropped into `in/` becomes prompts: one file for each of its pictures, beside that picture.

    work/.annotations.xml/g1.a1.n1@box-77-3fa1/    the claim of the file; in it
        .making/cam1/dog.annotations.json          prompts being written: nothing has left yet
        .prompts/cam1/dog.annotations.json         all are written; each moves to in/ by rename

Whoever takes the claim over begins anew as long as `.prompts` is not there, and from then on only goes on moving: each
prompt comes to `in/` once. The annotation file itself goes to `done/` when the last has.

What can still go wrong here: a name that fits no picture on the share gives a prompt that waits for one, where the name
says. The size that the file tells of a picture is written into its prompt, and compared when that is answered.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from loguru import logger

from sam_poll.annotations import Annotated, Asked, cvat_xml, files
from sam_poll.annotations.reading import image_place
from sam_poll.doors.claims import Claim, outer_name
from sam_poll.doors.layout import Layout, prompt_bytes, walk
from sam_poll.doors.settle import is_temporary
from sam_poll.errors import PromptError
from sam_poll.fs import NAME_MAX, NOT_THERE, cut, exists, move_new, same, shown, sync_folder, with_suffix
from sam_poll.safe_path import SafePath

MAX_BYTES = 512 * 1024 * 1024
_MAKING, _PROMPTS = ".making", ".prompts"
_MANY = 64
_TAIL = 256
_MOST_BYTES = 220  # of a prompt's stem: outputs append their own endings to it


class Spreader:
    """Works on claims of annotation files, for one daemon, on its scan thread. `going` is asked again and again: a file
    of a hundred thousand pictures takes minutes. False ends the making of prompts, not their moving."""

    def __init__(self, layout: Layout, going: Callable[[], bool] = lambda: True) -> None:
        self._layout, self._going = layout, going
        self._prefixes = [layout.share_name(root) + "/" for root in (layout.done, layout.input)]
        self._ways: dict[tuple[SafePath, str], bool] = {}

    def spread(self, claim: Claim, name: str) -> bool:
        """Everything but the end of the claim, which is the caller's. False: it was ended before anything had left the
        claim. PromptError: the file is to be rejected, and nothing has left the claim. OSError: call again, or leave it
        to whoever takes the claim over."""
        ready = claim.path / _PROMPTS
        if not exists(ready) and not self._make(claim, name, ready):
            return False
        self._ways.clear()
        moved = 0
        for rel in sorted(path for path, _ in walk(ready)):
            self._move_out(ready / rel, claim.folder, rel)
            self._going()
            moved += 1
        # What is left of the folder stays until the claim ends: without it, all would be made and moved once more.
        logger.info("{}: {} prompts are in {}", shown(claim.below(name)), moved, self._layout.input)
        return True

    def _make(self, claim: Claim, name: str, ready: SafePath) -> bool:
        making = claim.path / _MAKING
        if exists(making):
            making.remove_tree()
        making.mkdir()
        self._ways.clear()
        pictures: dict[str, tuple[Annotated, list[Asked]]] = {}
        asking, others = asked(prompt_bytes(claim.path / name, MAX_BYTES), name, self._layout.is_picture)
        if others:
            logger.info("{}: left out, because SAM cannot be asked with them: {}", shown(name), others)
        for annotated, chosen in asking:
            picture = self._picture(claim.folder, annotated.name)
            if self._layout.ignored.covers(picture):
                remedy = "delete its boxes in CVAT, or take the pattern out of `watch.ignore`"
                raise PromptError("lies where all is left alone", place=image_place(annotated.name), remedy=remedy)
            if picture in pictures:
                raise PromptError(
                    f"fits {shown(picture)!r}, and so does {image_place(pictures[picture][0].name)}",
                    place=image_place(annotated.name),
                    remedy="drop pictures and annotations below one folder each, so that each name fits one picture",
                )
            pictures[picture] = annotated, chosen
            if not self._going():
                return False
        used: set[str] = set()
        folders = {folder for picture in pictures for folder in _folders(posixpath.dirname(picture))}
        for picture, (annotated, chosen) in pictures.items():
            rel = self._prompt_name(picture, name, used, folders)
            try:
                _make_folders(making, posixpath.dirname(rel))
                with (making / rel).create() as file:
                    file.write(self._body(annotated, chosen, picture))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                raise PromptError("is longer than a path can be", place=image_place(annotated.name)) from None
            if not self._going():
                return False
        _flush([making / rel for rel in used])
        making.rename(ready)
        sync_folder(claim.path)
        return True

    def _picture(self, folder: str, name: str) -> str:
        """Which picture is meant, as a path below `in/`. One that lies in `in/` or is at work comes first, then one in
        `done/`; of the names tried, the longest: the file's folder may be part of the name or not, and so may the
        share's."""
        tried = list(dict.fromkeys(self._readings(folder, name)))
        for rel in tried:
            waiting = self._waiting(rel)
            if waiting:
                self._check_meant(name, rel, waiting)
                return rel
        return next((rel for rel in tried if self._lies(self._layout.done, rel)), tried[0])

    def _readings(self, folder: str, name: str) -> Iterator[str]:
        for prefix in self._prefixes:
            if name.startswith(prefix):
                yield name.removeprefix(prefix)
        if folder and name.startswith(folder + "/"):
            yield name
        parts = name.split("/")
        yield posixpath.join(folder, name)
        yield name
        for start in range(1, len(parts)):
            yield posixpath.join(folder, *parts[start:])

    def _check_meant(self, name: str, rel: str, waiting: SafePath) -> None:
        """PromptError where a picture in `done/` is named, and another one that waits would pass for it."""
        done = self._layout.done / rel
        if name != self._layout.share_name(done) or not self._lies(self._layout.done, rel):
            return
        if not same(done, waiting):
            raise PromptError(
                "lies in done/, but another picture of its name waits or is at work, and would be taken for it",
                place=image_place(name),
                remedy="wait until that one is answered, then `sam-poll retry`",
            )

    def _waiting(self, rel: str) -> SafePath | None:
        """Where a picture lies that is not answered yet, in `in/` or in a claim; None: there is none of this name."""
        if self._lies(self._layout.input, rel):
            return self._layout.input / rel
        folder, name = posixpath.split(rel)
        try:
            outer = self._layout.work / folder / outer_name(name)
            claims = [outer / inner for inner in outer.names()]
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            return None
        return next((claim / name for claim in claims if exists(claim / name)), None)

    def _lies(self, root: SafePath, rel: str) -> bool:
        return self._leads(root, posixpath.dirname(rel)) and exists(root / rel)

    def _leads(self, root: SafePath, folder: str) -> bool:
        """Whether nothing is in a folder's way: no file, and no link, because nobody looks through these for jobs."""
        if not folder:
            return True
        if (root, folder) not in self._ways:
            self._ways[root, folder] = self._leads(root, posixpath.dirname(folder)) and _is_folder(root / folder)
        return self._ways[root, folder]

    def _prompt_name(self, picture: str, annotations: str, used: set[str], folders: Collection[str]) -> str:
        """The prompt's path below `in/`, beside its picture: `dog.annotations.json`, so that its answer is not taken
        for that of another prompt, and is replaced when the same file is dropped again. None of `folders`."""
        folder, file = posixpath.split(picture)
        origin = posixpath.splitext(annotations)[0]
        stems = (f"{posixpath.splitext(file)[0]}.{origin}", f"{file}.{origin}")
        numbered = (f"{file}.{origin}~{number}" for number in itertools.count(2))
        for stem in itertools.chain(stems, numbered):
            name = _short(stem)
            rel = posixpath.join(folder, name)
            if rel not in used and rel not in folders and not self._lies(self._layout.input, rel):
                used.add(rel)
                return rel
        raise AssertionError("unreachable")

    def _body(self, annotated: Annotated, chosen: Sequence[Asked], picture: str) -> bytes:
        body = files.document(chosen, posixpath.basename(picture), annotated.size)
        done = self._layout.done / picture
        if self._waiting(picture) or not exists(with_suffix(done, "~2")) or not self._lies(self._layout.done, picture):
            return body
        # A prompt alone takes the newest picture of its name. This one names the first: another must not pass for it.
        with done.open() as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        return json.dumps({**json.loads(body), "image_sha256": digest}, ensure_ascii=False).encode()

    def _move_out(self, source: SafePath, folder: str, rel: str) -> None:
        """A name that was taken meanwhile gets a number. Where something is in the way of a folder, the prompt goes
        beside its annotation file, and waits for its picture there."""
        target, number = self._layout.input / rel, 1
        if not self._leads(self._layout.input, posixpath.dirname(rel)):
            logger.warning("{} is no folder: {} waits beside its annotations", shown(target.parent), shown(rel))
            target = self._layout.input / folder / target.name
        while True:
            try:
                move_new(source, with_suffix(target, f"~{number}" if number > 1 else ""))
                break
            except FileExistsError:
                if not exists(with_suffix(target, f"~{number}" if number > 1 else "")):
                    raise  # something has just come into the folder's way: the next try sees it
                number += 1


def asked(data: bytes, name: str, is_picture: Callable[[str], bool]) -> tuple[list[tuple[Annotated, list[Asked]]], str]:
    """The pictures of an annotation file that it asks something of, and what; and what is left out, in words.

    PromptError where the file called `name` is to be refused whole: it cannot be understood, asks nothing, or names a
    picture that cannot lie below a folder."""
    if len(data) > MAX_BYTES:
        remedy = "export fewer jobs of the task at a time"
        raise PromptError(f"is larger than {MAX_BYTES >> 20} MiB", place=shown(name), remedy=remedy)
    left_out: Counter[str] = Counter()
    asking: list[tuple[Annotated, list[Asked]]] = []
    for annotated in cvat_xml.read(data):
        left_out.update(dict(annotated.left_out))
        chosen = files.asked(annotated)
        if chosen:
            _check_plain(annotated.name, is_picture)
            asking.append((annotated, chosen))
    others = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
    if not asking:
        raise PromptError(
            "no box and no points are drawn in it" + (f" (only {others})" if others else ""),
            place=shown(name),
            remedy="draw a box around each object, or points on it, and export it again as CVAT for images 1.1",
        )
    return asking, others


def check_complete(path: SafePath) -> None:
    """Raise PromptError where the end of an annotation file is not that of a whole one, and OSError. What else may be
    wrong with it is found when it is spread."""
    data = prompt_bytes(path, MAX_BYTES)
    if len(data) > MAX_BYTES:
        return
    tail = data[-_TAIL:].replace(b"\0", b"").rstrip()  # of UTF-16, too
    if data.endswith(bytes(4)) or not tail.endswith(b"</annotations>"):  # else it is not parsed twice
        cvat_xml.read(data)


def _is_folder(path: SafePath) -> bool:
    """Also where there is nothing yet."""
    return path.is_dir() or not exists(path)


def _folders(folder: str) -> Iterator[str]:
    """A folder and those that it lies in."""
    while folder:
        yield folder
        folder = posixpath.dirname(folder)


def _short(stem: str) -> str:
    """A prompt's file name; a long stem is cut, and told apart by a hash."""
    if len(os.fsencode(stem)) > _MOST_BYTES:
        stem = f"{cut(stem, _MOST_BYTES - 17)}#{hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]}"
    return f"{stem}.json"


def _make_folders(root: SafePath, rel: str) -> None:
    """Folders below `root`, which must be there: where it has gone, the claim is not ours any more."""
    for part in filter(None, rel.split("/")):
        root = root / part
        with contextlib.suppress(FileExistsError):
            root.mkdir()


def _flush(paths: list[SafePath]) -> None:
    """To the disk before it is said that all are there. Many at once: one by one, a hundred thousand take minutes."""
    if len(paths) > _MANY and hasattr(os, "sync"):
        os.sync()
        return
    for path in paths:
        with path.open() as file:
            os.fsync(file.fileno())


def _check_plain(name: str, is_picture: Callable[[str], bool]) -> None:
    """PromptError where a picture's name could leave its folder, or is one that the scan passes over."""
    *folders, file = name.split("/")
    odd = any(part == "" or part.startswith(".") for part in folders) or is_temporary(file) or not file
    if odd or "\\" in name or not name.isprintable():
        raise PromptError(
            "is no picture's name below a folder",
            place=image_place(name),
            remedy="name pictures as CVAT does, relative to the share and with /",
        )
    if not is_picture(file):
        remedy = "SAM is asked about pictures: make the task of them, not of a video"
        raise PromptError("has no picture's ending", place=image_place(name), remedy=remedy)
    if any(len(os.fsencode(part)) > NAME_MAX for part in (*folders, file)):
        raise PromptError("is longer than a file name can be", place=image_place(name))
