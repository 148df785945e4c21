"""Annotation files in a folder or in a ZIP.

A ZIP is never unpacked to disk; a member's name is never used as a path. Symbolic links in the
user's folder are followed, because data sets are often made of them, except those that another
user has made: on a share that others write to, such a link could lead to a file that they may
not read.

Limitations: a file that changes while it is read is not detected.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from sam_poll.core.errors import PromptError
from sam_poll.prompts.importers.common import MAX_IMAGES
from sam_poll.share.file_kinds import is_temporary

MAX_BYTES = 2 << 30  # of one file, and of all that is read from one ZIP
_ZIP_BEGIN = b"PK\x03\x04"
_TOO_LARGE = "export fewer pictures at once"


@dataclass
class FolderListing:
    """The files below a folder: for each path relative to it, with `/`, the real file.

    `foreign_links` counts the links of other users, which are not followed.
    """

    files: dict[str, Path] = field(default_factory=dict)
    foreign_links: int = 0


def list_files(root: Path, no_links_below: Collection[Path] = ()) -> FolderListing:
    """List the regular files below a folder, following links.

    Hidden folders, links below one of `no_links_below` and unreadable folders are skipped.

    Raises OSError if `root` cannot be read.
    """
    walk = _Walk(root, no_links_below)
    while walk.pending or walk.linked:
        name, folder = walk.pending.pop() if walk.pending else walk.linked.pop(0)
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            if not name:
                raise
            continue
        walk.visit(name, status, entries)
    return walk.listing


class _Walk:
    """The state of `list_files`; a folder is visited once, even if several links lead to it.

    `linked` are the folders behind links. They come last, so that one that is also below the root
    keeps its own path.
    """

    def __init__(self, root: Path, no_links_below: Collection[Path]) -> None:
        self.listing = FolderListing()
        self.pending = [("", root)]
        self.linked: list[tuple[str, Path]] = []
        self._no_links_below = no_links_below
        self._owners = {os.geteuid(), 0, root.stat().st_uid}
        self._seen: set[tuple[int, int]] = set()

    def visit(self, name: str, status: os.stat_result, entries: list[os.DirEntry[str]]) -> None:
        """Add a folder's files to the listing, and its folders to those to visit."""
        if (status.st_dev, status.st_ino) in self._seen:
            return
        self._seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = f"{name}/{entry.name}" if name else entry.name
            if entry.is_symlink():
                self._follow(path, entry)
            elif entry.is_file():
                self.listing.files[path] = Path(entry.path)
            elif entry.is_dir() and not entry.name.startswith("."):
                self.pending.append((path, Path(entry.path)))

    def _follow(self, path: str, entry: os.DirEntry[str]) -> None:
        if any(Path(entry.path).is_relative_to(other) for other in self._no_links_below):
            return
        if entry.stat(follow_symlinks=False).st_uid not in self._owners:
            self.listing.foreign_links += 1
            return
        target = Path(os.path.realpath(entry.path))
        if target.is_file():
            self.listing.files[path] = target
        elif target.is_dir() and not entry.name.startswith("."):
            self.linked.append((path, target))


def read(path: Path) -> bytes:
    """Return a file's bytes. Raises PromptError if it is too large, and OSError."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise PromptError(
            f"has {size >> 20:,} MiB; at most {MAX_BYTES >> 20:,} are read", remedy=_TOO_LARGE
        )
    return path.read_bytes()


def is_zip(path: Path) -> bool:
    """Return whether a file is a ZIP, or the beginning of one that was cut off."""
    with path.open("rb") as file:
        return file.read(len(_ZIP_BEGIN)) == _ZIP_BEGIN or zipfile.is_zipfile(file)


class Folder:
    """The annotation files below a folder."""

    kind = "folder"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = list_files(root).files
        self.names = sorted(
            name for name in self._files if not is_temporary(name.rpartition("/")[2])
        )

    def read(self, name: str) -> bytes:
        """Return a file's bytes, by its name. Raises PromptError if it is too large."""
        return read(self._files[name])


class Archive:
    """The annotation files in a ZIP, which stays open inside the `with` block.

    Raises PromptError if the ZIP cannot be read.
    """

    kind = "ZIP"
    root: Path | None = None

    def __init__(self, path: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile:  # whose text for a ZIP that was cut off is "not a zip file"
            raise _damaged("it is incomplete or damaged") from None
        except (NotImplementedError, OSError) as error:
            raise _damaged(error) from None
        self._bytes_left = MAX_BYTES
        members = {info.filename: info for info in self._archive.infolist() if not info.is_dir()}
        if len(members) > MAX_IMAGES:
            self._archive.close()
            raise PromptError(f"is a ZIP of more than {MAX_IMAGES:,} files", remedy=_TOO_LARGE)
        self._members = {name: info for name, info in members.items() if _is_plain(name)}
        self.names = sorted(self._members)

    def read(self, name: str) -> bytes:
        """Return a member's bytes.

        Raises PromptError if the member is encrypted or damaged, or if more than `MAX_BYTES` in all
        are read from this ZIP.
        """
        info = self._members[name]
        if info.flag_bits & 1:
            raise PromptError(
                "is an encrypted ZIP", remedy="unpack it with its password, and give the folder"
            )
        try:
            with self._archive.open(info) as file:
                # The size that the ZIP states may be wrong, so the read itself is limited too.
                is_too_large = info.file_size > self._bytes_left
                data = b"" if is_too_large else file.read(self._bytes_left + 1)
        except Exception as error:  # noqa: BLE001  zipfile, zlib, lzma and bz2 raise many kinds
            raise _damaged(error) from None
        if is_too_large or len(data) > self._bytes_left:
            limit = f"at most {MAX_BYTES >> 20:,} MiB are read"
            raise PromptError(
                f"is a ZIP whose annotations are too large: {limit}", remedy=_TOO_LARGE
            )
        self._bytes_left -= len(data)
        return data

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc: object) -> None:
        self._archive.close()


def _damaged(reason: object) -> PromptError:
    return PromptError(
        f"is a ZIP that cannot be read: {reason}", remedy="download or export it again"
    )


def _is_plain(name: str) -> bool:
    """Return whether a member is neither hidden, nor temporary, nor one that macOS adds."""
    *folders, file = name.split("/")
    return not is_temporary(file) and not any(
        part.startswith(".") or part == "__MACOSX" for part in folders
    )
