"""`sam-poll check`: prompts, annotation files, pictures and settings checked without a network.

Limitations: only the header of a picture is read; errors in its pixels show when it is decoded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sam_poll.config import settings as settings_
from sam_poll.core.errors import (
    InputError,
    PromptError,
    SamPollError,
    SettingsError,
)
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import ConceptRequest, Mosaic, Request, Size
from sam_poll.imaging import decode, source_file
from sam_poll.imaging.sidecars import is_aux
from sam_poll.pipeline.rough_masks import with_masks
from sam_poll.prompts import mask_files, parser
from sam_poll.prompts.importers import prompt_files
from sam_poll.prompts.importers.common import image_place
from sam_poll.prompts.importers.shapes import Annotated, PromptObject
from sam_poll.share.annotation_reader import read_requests
from sam_poll.share.file_kinds import PROMPT_ENDINGS, is_temporary
from sam_poll.share.intake.pairing import Ambiguous, PictureIndex
from sam_poll.share.intake.waiting import without_partner
from sam_poll.share.layout import ANNOTATION_ENDINGS, Layout, walk

_MOST_LONE = 1000


@dataclass(frozen=True)
class Finding:
    """One file looked at; `error` None: it is fine."""

    path: Path
    error: SamPollError | None = None


def check(paths: Iterable[Path]) -> Iterator[Finding]:
    """Check prompts, pictures' headers and settings files, and all of these in folders."""
    for path in paths:
        if path.is_dir():
            yield from _folder(path)
        elif path.exists() and not path.is_file():  # a pipe, which may never be written to
            yield Finding(path, InputError("cannot be read: it is not a file"))
        elif path.suffix.lower() in (".yaml", ".yml"):
            yield _settings(path)
        elif _is_annotations(path.name):
            yield _annotations(path)
        elif decode.is_picture(path.name) or _is_prompt(path.name):
            yield _file(path)
        else:
            kinds = (
                "a prompt (.json, .prompt), CVAT's .xml, a picture, a settings file "
                "(.yaml) or a folder"
            )
            yield Finding(
                path,
                InputError(
                    "cannot be checked" if path.exists() else "does not exist",
                    remedy=f"give {kinds}",
                ),
            )


def _folder(folder: Path) -> Iterator[Finding]:
    closed: list[str] = []
    found = walk(SafePath.at(folder), closed=closed.append)
    names = sorted(name for name, entry in found if not is_temporary(entry.name))
    for name in sorted(closed):
        remedy = "let the daemon's user read and write there"
        yield Finding(folder / name, InputError("is not readable", remedy=remedy))
    index = PictureIndex(name for name in names if _is_picture(name))
    tiled = _tiled(folder, names, index)
    lone = _without_partner(folder)
    for name in names:
        if name in lone:
            yield Finding(folder / name, lone[name])
        elif _is_annotations(name):
            yield _annotations(folder / name)
        elif folder / name in tiled:
            yield _open(folder / name)
        elif decode.is_picture(name) or _is_prompt(name):
            yield _look(folder / name, _partner(folder, name, index))


def _file(path: Path) -> Finding:
    beside = sorted(p.name for p in path.parent.iterdir()) if path.exists() else []
    index = PictureIndex(name for name in beside if _is_picture(name))
    near = [name for name in beside if name.startswith(path.stem)]
    if path in _tiled(path.parent, near, index):
        return _open(path)
    return _look(path, _partner(path.parent, path.name, index))


def _without_partner(folder: Path) -> Mapping[str, SamPollError]:
    """Return the files without a partner if the folder is the input of a share.

    A folder of prompts alone has none.
    """
    beside = settings_.absolute(folder).parent
    share = Layout.at(
        input=folder,
        work=beside / "work",
        output=beside / "out",
        done=beside / "done",
        failed=beside / "failed",
    )
    waiting = without_partner(share, most=_MOST_LONE)
    for error in waiting.explained.values():
        error.place = None  # the finding names the file
    return waiting.explained if waiting.any_picture else {}


def _is_picture(name: str) -> bool:
    return decode.is_picture(name) and not mask_files.is_mask_file(name)


def _is_prompt(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in PROMPT_ENDINGS


def _is_annotations(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in ANNOTATION_ENDINGS and not is_aux(name)


def _annotations(path: Path) -> Finding:
    """Check an annotation file.

    All its pictures must get a prompt file, each of their objects an answer, and have the stated
    size.
    """
    try:
        for annotated, chosen in read_requests(_content(path), path.name, decode.is_picture)[0]:
            _check_asked(annotated, chosen, _lies_near(path, annotated.name))
    except OSError as error:
        return Finding(path, InputError(f"cannot be read: {error.strerror}"))
    except SamPollError as error:
        return Finding(path, error)
    return Finding(path)


def _check_asked(
    annotated: Annotated, chosen: Sequence[PromptObject], picture: Path | None
) -> None:
    """Raise PromptError or PictureError if a picture's prompt or one of its objects is invalid."""
    size = annotated.size
    try:
        if picture is not None:
            header = source_file.header(SafePath.beside(picture))
            parser.check_size(size, header.size, lambda: header.stored)
            size = header.size
        refused = prompt_files.split(chosen, size).refused
        if refused:
            raise refused[0]
    except InputError as error:
        place = image_place(annotated.name)
        error.place = f"{place}, {error.place}" if error.place else place
        raise


def _lies_near(annotations: Path, name: str) -> Path | None:
    """Return the picture that an annotation file names, if there is one.

    It is searched beside the file, with the leading folders of the name removed one by one, and
    below the share whose `in` contains the file.
    """
    parts = name.split("/")
    tried = [annotations.parent.joinpath(*parts[start:]) for start in range(len(parts))]
    return next(
        (path for path in (*tried, annotations.parent.parent / name) if path.is_file()), None
    )


def _partner(folder: Path, name: str, index: PictureIndex) -> Path | None:
    found = index.find(name) if _is_prompt(name) else None
    return folder / found if isinstance(found, str) and not isinstance(found, Ambiguous) else None


def _tiled(folder: Path, names: Iterable[str], index: PictureIndex) -> set[Path]:
    """Return the pictures that a prompt requests as a mosaic; they may be larger than others."""
    found = set()
    for name in filter(_is_prompt, names):
        try:
            read = parser.parse(_content(folder / name, parser.MAX_BYTES + 1), mask_files=True)
        except (OSError, PromptError):
            continue  # said where it is looked at itself
        picture = (
            (folder / name).with_name(read.image) if read.image else _partner(folder, name, index)
        )
        if picture and isinstance(read.prompts, Mosaic):
            found.add(picture)
    return found


def _content(path: Path, most: int = -1) -> bytes:
    """Read a regular file without waiting. Raises OSError.

    It may have become a pipe since it was listed.
    """
    return SafePath.beside(path.resolve()).read_bytes(most)


def _open(path: Path) -> Finding:
    """Check that a picture can be read in windows.

    Without the extra `geo`: that it can be read at all.
    """
    try:
        try:
            from sam_poll.mosaic.raster import opened
        except ModuleNotFoundError:
            path.open("rb").close()
            return Finding(path)
        with opened(SafePath.beside(path)):
            return Finding(path)
    except OSError as error:
        return Finding(path, InputError(f"cannot be read: {error.strerror}"))
    except SamPollError as error:
        error.place = None if error.place == str(path) else error.place
        return Finding(path, error)


def _look(path: Path, picture: Path | None) -> Finding:
    try:
        data = _content(path)
        if not _is_prompt(path.name):
            decode.read_header(data)
            return Finding(path)
        read = parser.parse(data, mask_files=True)
        picture = path.with_name(read.image) if read.image else picture
        has_coordinates = isinstance(read.prompts, tuple | ConceptRequest)
        if picture and picture.is_file() and has_coordinates:
            header = source_file.header(SafePath.beside(picture))
            parser.check_size(read.image_size, header.size, lambda: header.stored)
            mask_files.check_names(read.prompts, picture.name)
            parser.fit_request(_with_masks(path, read.prompts, header.size), header.size)
    except OSError as error:
        return Finding(path, InputError(f"cannot be read: {error.strerror}"))
    except SamPollError as error:
        return Finding(path, error)
    return Finding(path)


def _with_masks(prompt: Path, request: Request, size: Size) -> Request:
    """Return the request of a prompt file with the masks of the mask files beside it."""
    paths = {name: prompt.with_name(name) for name in mask_files.names_in(request)}
    for name, path in paths.items():
        if not path.is_file() or path.is_symlink():
            raise PromptError(
                f"{shown(name)} is not beside the prompt",
                place=mask_files.place_of_name(request, name),
                remedy="put the file itself there",
            )
    found = {name: SafePath.beside(path) for name, path in paths.items()}
    return with_masks(mask_files.located(request, found), size, decode.DEFAULT_MAX_PIXELS)


def _settings(path: Path) -> Finding:
    try:
        settings_.load(path, env={})
    except SettingsError as error:
        return Finding(path, error)
    return Finding(path)
