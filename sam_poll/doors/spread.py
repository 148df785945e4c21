"""An annotation file dropped into `in/` becomes prompts: one file for each of its pictures, beside that picture.

    work/.annotations.xml/g1.a1.n1@box-77-3fa1/    the claim of the file; in it
        .making/cam1/dog.annotations.json          prompts being written: nothing has left yet
        .prompts/cam1/dog.annotations.json         all are written; each moves to in/ by rename

Whoever takes the claim over begins anew as long as `.prompts` is not there, and from then on only goes on moving: each
prompt comes to `in/` once. The annotation file itself goes to `done/` when the last has.

What can still go wrong here: a name that fits no picture on the share gives a prompt that waits for one, where the name
says. Pictures' sizes are not compared with those the file tells: whether boxes fit is seen when they are answered.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import posixpath
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from loguru import logger

from sam_poll.annotations import Annotated, cvat_xml, files
from sam_poll.doors.claims import Claim
from sam_poll.doors.layout import Layout, walk
from sam_poll.doors.settle import is_temporary
from sam_poll.errors import PromptError
from sam_poll.fs import NAME_MAX, NO_FILE, cut, exists, move_new, open_plain, shown, sync_folder, with_suffix

MAX_BYTES = 512 * 1024 * 1024
_MAKING, _PROMPTS = ".making", ".prompts"
_MANY = 64
_MOST_BYTES = 220  # of a prompt's stem: outputs append their own endings to it


class Spreader:
    """Works on claims of annotation files, for one daemon, on its scan thread."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def spread(self, claim: Claim, name: str) -> None:
        """Everything but the end of the claim, which is the caller's. PromptError: the file is to be rejected, and
        nothing has left the claim. OSError: call again, or leave it to whoever takes the claim over."""
        ready = claim.path / _PROMPTS
        if not exists(ready):
            self._make(claim, name, ready)
        moved = 0
        for rel in sorted(path for path, _ in walk(ready)):
            self._move_out(ready / rel, claim.folder, rel)
            moved += 1
        # What is left of the folder stays until the claim ends: without it, all would be made and moved once more.
        logger.info("{}: {} prompts are in {}", shown(claim.below(name)), moved, self._layout.input)

    def _make(self, claim: Claim, name: str, ready: Path) -> None:
        asked = self._asked(claim.path / name)
        making = claim.path / _MAKING
        if exists(making):
            shutil.rmtree(making)
        making.mkdir()
        used: set[str] = set()
        for annotated in asked:
            picture = self._picture(claim.folder, annotated.name)
            rel = self._prompt_name(picture, name, used)
            _make_folders(making, posixpath.dirname(rel))
            (making / rel).write_bytes(self._body(annotated, picture))
        _flush([making / rel for rel in used])
        making.rename(ready)
        sync_folder(claim.path)

    def _asked(self, path: Path) -> list[Annotated]:
        """The pictures that the file asks something of."""
        read = cvat_xml.read(_bytes(path))
        asked = [annotated for annotated in read if files.asks(annotated)]
        left_out: Counter[str] = Counter()
        for annotated in read:
            left_out.update(dict(annotated.left_out))
        others = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        if not asked:
            raise PromptError(
                "no box and no points are drawn in it" + (f" (only {others})" if others else ""),
                place=shown(path.name),
                remedy="draw a box around each object, or points on it, and export it again as CVAT for images 1.1",
            )
        if others:
            logger.info("{}: left out, because SAM cannot be asked with them: {}", shown(path.name), others)
        return asked

    def _picture(self, folder: str, name: str) -> str:
        """Which picture is meant, as a path below `in/`. One that lies in `in/` comes first, then one in `done/`; of
        the names tried, the longest: the file's folder may be part of the name or not, and so may the share's."""
        plain = _plain(name, self._layout)
        tried = list(dict.fromkeys(self._readings(folder, plain)))
        for root in (self._layout.input, self._layout.done):
            for rel in tried:
                if exists(root / rel):
                    return rel
        return tried[0]

    def _readings(self, folder: str, name: str) -> Iterator[str]:
        for root in (self._layout.done, self._layout.input):
            prefix = self._layout.share_name(root) + "/"
            if name.startswith(prefix):
                yield name.removeprefix(prefix)
        if folder and name.startswith(folder + "/"):
            yield name
        parts = name.split("/")
        yield posixpath.join(folder, name)
        yield name
        for start in range(1, len(parts)):
            yield posixpath.join(folder, *parts[start:])

    def _prompt_name(self, picture: str, annotations: str, used: set[str]) -> str:
        """The prompt's path below `in/`, beside its picture: `dog.annotations.json`, so that its answer is not taken
        for that of another prompt, and is replaced when the same file is dropped again."""
        folder, file = posixpath.split(picture)
        origin = posixpath.splitext(annotations)[0]
        stems = (f"{posixpath.splitext(file)[0]}.{origin}", f"{file}.{origin}")
        numbered = (f"{file}.{origin}~{number}" for number in itertools.count(2))
        for stem in itertools.chain(stems, numbered):
            name = _short(stem)
            rel = posixpath.join(folder, name)
            if rel not in used and not exists(self._layout.input / rel):
                used.add(rel)
                return rel
        raise AssertionError("unreachable")

    def _body(self, annotated: Annotated, picture: str) -> bytes:
        body = files.prompt_file(annotated, posixpath.basename(picture))
        done = self._layout.done / picture
        if exists(self._layout.input / picture) or not exists(with_suffix(done, "~2")) or not exists(done):
            return body
        # A prompt alone takes the newest picture of its name. This one names the first: another must not pass for it.
        with done.open("rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        return json.dumps({**json.loads(body), "image_sha256": digest}, ensure_ascii=False).encode()

    def _move_out(self, source: Path, folder: str, rel: str) -> None:
        """A name that was taken meanwhile gets a number. Where a file is in the way of a folder, the prompt goes beside
        its annotation file, and waits for its picture there."""
        target, number = self._layout.input / rel, 1
        while True:
            try:
                move_new(source, with_suffix(target, f"~{number}" if number > 1 else ""))
                break
            except FileExistsError:
                number += 1
            except NotADirectoryError:
                beside = self._layout.input / folder / target.name
                if target == beside:
                    raise
                logger.warning("{} is no folder: {} waits beside its annotations", shown(target.parent), shown(rel))
                target, number = beside, 1


def _short(stem: str) -> str:
    """A prompt's file name; a long stem is cut, and told apart by a hash."""
    if len(os.fsencode(stem)) > _MOST_BYTES:
        stem = f"{cut(stem, _MOST_BYTES - 17)}#{hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]}"
    return f"{stem}.json"


def _make_folders(root: Path, rel: str) -> None:
    """Folders below `root`, which must be there: where it has gone, the claim is not ours any more."""
    for part in filter(None, rel.split("/")):
        root = root / part
        with contextlib.suppress(FileExistsError):
            root.mkdir()


def _flush(paths: list[Path]) -> None:
    """To the disk before it is said that all are there. Many at once: one by one, a hundred thousand take minutes."""
    if len(paths) > _MANY and hasattr(os, "sync"):
        os.sync()
        return
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _bytes(path: Path) -> bytes:
    try:
        file = open_plain(path)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        remedy = "let the daemon's user read it, then `sam-poll retry`"
        raise PromptError(f"cannot be read: {error.strerror}", place=shown(path.name), remedy=remedy) from error
    with file:
        body = file.read(MAX_BYTES + 1)
    if len(body) > MAX_BYTES:
        remedy = "export fewer jobs of the task at a time"
        raise PromptError(f"is larger than {MAX_BYTES >> 20} MiB", place=shown(path.name), remedy=remedy)
    return body


def _plain(name: str, layout: Layout) -> str:
    """A picture's name as a path that cannot leave its folder, and that the scan does not pass over."""
    *folders, file = name.split("/")
    odd = any(part == "" or part.startswith(".") for part in folders) or is_temporary(file) or not file
    if odd or "\\" in name or not name.isprintable():
        raise PromptError(
            "is no picture's name below a folder",
            place=f"image {shown(name)!r}",
            remedy="name pictures as CVAT does, relative to the share and with /",
        )
    if not layout.is_picture(file):
        remedy = "SAM is asked about pictures: make the task of them, not of a video"
        raise PromptError("has no picture's ending", place=f"image {shown(name)!r}", remedy=remedy)
    if any(len(os.fsencode(part)) > NAME_MAX for part in (*folders, file)):
        raise PromptError("is longer than a file name can be", place=f"image {shown(name[:40])!r}…")
    return name
