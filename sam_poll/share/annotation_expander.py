"""Expanding an annotation file in `in/`: one prompt for each picture, beside that picture.

    work/.annotations.xml/g1.a1.n1@box-77-3fa1/    the claim of the file; in it
        .making/cam1/dog.annotations.json          prompts being written: none has left yet
        .prompts/cam1/dog.annotations.json         all are written; each moves to in/ by rename

The daemon that takes the claim over begins again as long as `.prompts` does not exist, and from
then on only goes on moving: each prompt comes to `in/` once. The annotation file itself goes to
`done/` after the last prompt.

Limitations: a name that fits no picture on the share gives a prompt that waits for a picture at
that place. The size of a picture in the annotation file is written into its prompt, and compared
when the prompt is answered.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Sequence

from loguru import logger

from sam_poll.core.errors import PromptError
from sam_poll.core.files import exists, move_new, sync_folder, with_suffix
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import cut, shown
from sam_poll.prompts.importers import prompt_files
from sam_poll.prompts.importers.common import image_place
from sam_poll.prompts.importers.shapes import Annotated, PromptObject
from sam_poll.share.annotated_pictures import PictureFinder
from sam_poll.share.annotation_reader import MAX_BYTES, PictureRequest, read_requests
from sam_poll.share.claims.model import Claim
from sam_poll.share.layout import Layout, prompt_bytes, walk

_MAKING = ".making"
_PROMPTS = ".prompts"
_MANY_FILES = 64  # more are flushed by one sync of the system
_MAX_STEM_BYTES = 220  # outputs append their own endings to a prompt's stem


class AnnotationExpander:
    """Expands claims of annotation files, for one daemon, on its scan thread.

    `should_continue` is called often, because a file of a hundred thousand pictures takes minutes.
    False stops the writing of prompts, not their moving.
    """

    def __init__(self, layout: Layout, should_continue: Callable[[], bool] = lambda: True) -> None:
        self._layout = layout
        self._should_continue = should_continue
        self._finder = PictureFinder(layout)

    def expand(self, claim: Claim, name: str) -> bool:
        """Write the prompts of the annotation file `name` and move them to `in/`.

        The caller ends the claim. False: stopped before anything had left the claim. Raises
        PromptError: the file is to be rejected, and nothing has left the claim. OSError: call
        again, or leave it to the daemon that takes the claim over.
        """
        written = claim.path / _PROMPTS
        if not exists(written) and not self._write_prompts(claim, name, written):
            return False
        self._finder.forget()
        written = claim.shared_path / _PROMPTS
        moved = 0
        for rel in sorted(path for path, _ in walk(written)):
            try:
                self._move_out(written / rel, claim.folder, rel)
            except FileNotFoundError:
                if exists(written / rel) or not exists(written):
                    raise
                continue  # the daemon that the claim was taken over from has moved it
            self._should_continue()
            moved += 1
        # The empty folders stay until the claim ends: without them, all prompts would be written
        # and moved again.
        logger.info("{}: {} prompts are in {}", shown(claim.below(name)), moved, self._layout.input)
        return True

    # ── writing ──

    def _write_prompts(self, claim: Claim, name: str, written: SafePath) -> bool:
        """Write all prompts, then give their folder its final name. False: stopped before that."""
        making = claim.path / _MAKING
        if exists(making):
            making.remove_tree()
        making.mkdir()
        self._finder.forget()
        requests = self._read_requests(claim, name)
        if requests is None:
            return False
        used: set[str] = set()
        folders = {
            folder for picture in requests for folder in _folders(posixpath.dirname(picture))
        }
        for picture, request in requests.items():
            rel = self._prompt_name(picture, name, used, folders)
            try:
                _make_folders(making, posixpath.dirname(rel))
                with (making / rel).create() as file:
                    file.write(self._body(request.annotated, request.objects, picture))
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                raise PromptError(
                    "is longer than a path can be", place=image_place(request.annotated.name)
                ) from None
            if not self._should_continue():
                return False
        _flush([making / rel for rel in used])
        making.rename(written)
        sync_folder(claim.path)
        return True

    def _read_requests(self, claim: Claim, name: str) -> dict[str, PictureRequest] | None:
        """Return the requests of an annotation file by picture, relative to `in/`.

        None: stopped.
        """
        pictures, left_out = read_requests(
            prompt_bytes(claim.path / name, MAX_BYTES), name, self._layout.is_picture
        )
        if left_out:
            logger.info("{}: left out, because they are no prompts: {}", shown(name), left_out)
        requests: dict[str, PictureRequest] = {}
        for request in pictures:
            picture = self._finder.find(claim.folder, request.annotated.name)
            if self._layout.ignored.covers(picture):
                raise PromptError(
                    "is where `watch.ignore` applies",
                    place=image_place(request.annotated.name),
                    remedy="delete its boxes in CVAT, or take the pattern out of `watch.ignore`",
                )
            if picture in requests:
                other = image_place(requests[picture].annotated.name)
                raise PromptError(
                    f"fits {shown(picture)!r}, and so does {other}",
                    place=image_place(request.annotated.name),
                    remedy="drop pictures and annotations below one folder each, "
                    "so that each name fits one picture",
                )
            requests[picture] = request
            if not self._should_continue():
                return None
        return requests

    def _prompt_name(
        self, picture: str, annotations: str, used: set[str], folders: Collection[str]
    ) -> str:
        """Return the prompt's path below `in/`, beside its picture: `dog.annotations.json`.

        The annotation file's name is part of it, so that the answer is not taken for that of
        another prompt, and is replaced when the same file is dropped again. No path in `used`, to
        which it is added, and none in `folders`.
        """
        folder, file = posixpath.split(picture)
        annotation_stem = posixpath.splitext(annotations)[0]
        stems = (f"{posixpath.splitext(file)[0]}.{annotation_stem}", f"{file}.{annotation_stem}")
        numbered = (f"{file}.{annotation_stem}~{number}" for number in itertools.count(2))
        for stem in itertools.chain(stems, numbered):
            rel = posixpath.join(folder, _file_name(stem))
            if (
                rel not in used
                and rel not in folders
                and not self._finder.lies_in(self._layout.input, rel)
            ):
                used.add(rel)
                return rel
        raise AssertionError("unreachable")

    def _body(self, annotated: Annotated, objects: Sequence[PromptObject], picture: str) -> bytes:
        body = prompt_files.document(objects, posixpath.basename(picture), annotated.size)
        done = self._layout.done / picture
        if (
            self._finder.waiting(picture)
            or not exists(with_suffix(done, "~2"))
            or not self._finder.lies_in(self._layout.done, picture)
        ):
            return body
        # A prompt alone takes the newest picture of its name in `done/`. This one means the first,
        # which its hash says.
        with done.open() as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        return json.dumps({**json.loads(body), "image_sha256": digest}, ensure_ascii=False).encode()

    # ── moving ──

    def _move_out(self, source: SafePath, folder: str, rel: str) -> None:
        """Move a prompt to `in/`; add a number if its name was taken meanwhile.

        Where something is in the way of a folder, the prompt goes beside its annotation file and
        waits there.
        """
        target, number = self._layout.input / rel, 1
        if not self._finder.is_reachable(self._layout.input, posixpath.dirname(rel)):
            logger.warning(
                "{} is not a folder: {} waits beside its annotation file",
                shown(target.parent),
                shown(rel),
            )
            target = self._layout.input / folder / target.name
        while True:
            numbered = with_suffix(target, f"~{number}" if number > 1 else "")
            try:
                move_new(source, numbered)
                break
            except FileExistsError:
                if not exists(numbered):
                    raise  # something has just come into the folder's way: the next try finds it
                number += 1


def _folders(folder: str) -> Iterator[str]:
    """Yield a folder and its parent folders."""
    while folder:
        yield folder
        folder = posixpath.dirname(folder)


def _file_name(stem: str) -> str:
    """Return a prompt's file name; a long stem is cut, and made unique by a hash."""
    if len(os.fsencode(stem)) > _MAX_STEM_BYTES:
        digest = hashlib.sha256(os.fsencode(stem)).hexdigest()[:16]
        stem = f"{cut(stem, _MAX_STEM_BYTES - 17)}#{digest}"
    return f"{stem}.json"


def _make_folders(root: SafePath, rel: str) -> None:
    """Create folders below `root`, which must exist.

    Where it has gone, another daemon has the claim.
    """
    for part in filter(None, rel.split("/")):
        root = root / part
        with contextlib.suppress(FileExistsError):
            root.mkdir()


def _flush(paths: list[SafePath]) -> None:
    """Flush files to the disk, before their folder's name says that all are complete.

    Many at once: one by one, a hundred thousand take minutes.
    """
    if len(paths) > _MANY_FILES and hasattr(os, "sync"):
        os.sync()
        return
    for path in paths:
        with path.open() as file:
            os.fsync(file.fileno())
