"""A picture's bytes are read with care: no link, no pipe, no half-written file is taken for the
picture meant.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.errors import FileChangedError, IncompleteFileError, PictureError
from sam_poll.core.files import move_new, rename
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import AutomaticMaskRequest, Job
from sam_poll.imaging import source_file


def job(picture: Path | bytes = b"", **more: Any) -> Job:
    return Job("dog", "dog.jpg", picture, AutomaticMaskRequest(), **more)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dog.jpg"
    path.write_bytes(b"picture")
    return path


def test_a_pictures_bytes_come_with_what_its_file_was(picture: Path) -> None:
    data, seen = source_file.read(SafePath.beside(picture))
    assert data == b"picture"
    source_file.check_unchanged(SafePath.beside(picture), seen)


def test_no_link_is_followed(tmp_path: Path, picture: Path) -> None:
    (tmp_path / "link.jpg").symlink_to(picture)
    with pytest.raises(PictureError, match="cannot be read") as raised:
        source_file.read(SafePath.at(tmp_path) / "link.jpg")
    assert raised.value.place == "link.jpg"


def test_a_folder_and_a_socket_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(tmp_path / "socket.jpg"))
    for name in ("folder.jpg", "socket.jpg"):
        with pytest.raises(PictureError, match="cannot be read"):
            source_file.read(SafePath.at(tmp_path) / name)


def test_a_pipe_that_nobody_writes_into_holds_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(PictureError):
        source_file.read(SafePath.at(tmp_path) / "pipe.jpg")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.ETIMEDOUT])
def test_a_sick_share_is_not_the_pictures_fault(
    picture: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def sick(*args: Any, **more: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", sick)
    with pytest.raises(OSError, match=os.strerror(number)):
        source_file.read(SafePath.beside(picture))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_a_picture_that_may_not_be_read_ends_in_a_reason_and_a_remedy(
    picture: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def forbidden(*args: Any, **more: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", forbidden)
    with pytest.raises(PictureError) as raised:
        source_file.read(SafePath.beside(picture))
    assert raised.value.place == "dog.jpg"
    assert raised.value.remedy


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate((2 << 30) + 1)  # a hole: it takes no room
    with pytest.raises(PictureError, match="2048 MiB"):
        source_file.read(SafePath.beside(path))


@pytest.mark.parametrize("how", ["longer", "shorter", "same size", "replaced"])
def test_a_write_into_a_picture_after_it_was_opened_is_detected(picture: Path, how: str) -> None:
    writer = picture.open("r+b")
    _, seen = source_file.read(SafePath.beside(picture))
    if how == "longer":
        writer.seek(0, os.SEEK_END)
        writer.write(b"!")
    elif how == "shorter":
        writer.truncate(3)
    elif how == "same size":
        writer.write(b"PICTURE")
    writer.close()
    if how == "same size":
        os.utime(
            picture, ns=(0, picture.stat().st_mtime_ns + 1)
        )  # the clock of a file system may be coarse
    if how == "replaced":
        other = picture.with_name("other")
        other.write_bytes(b"picture")
        os.utime(other, ns=(0, seen[2]))
        other.replace(picture)
    with pytest.raises(FileChangedError) as raised:
        source_file.check_unchanged(SafePath.beside(picture), seen)
    assert (raised.value.place, raised.value.remedy) == ("dog.jpg", "copy it again")


def test_a_picture_that_disappeared_is_left_to_its_source_to_report(picture: Path) -> None:
    _, seen = source_file.read(SafePath.beside(picture))
    picture.unlink()
    source_file.check_unchanged(SafePath.beside(picture), seen)


def test_reading_a_picture_does_not_change_it(picture: Path) -> None:
    _, first = source_file.read(SafePath.beside(picture))
    _, second = source_file.read(SafePath.beside(picture))
    assert first == second


GOOD = hashlib.sha256(b"picture").hexdigest()


@pytest.mark.parametrize(
    "said", [{}, {"nbytes": 7}, {"sha256": GOOD}, {"nbytes": 7, "sha256": GOOD}]
)
def test_the_picture_that_is_meant_is_taken(said: dict[str, Any]) -> None:
    source_file.check(job(b"picture", **said), b"picture")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"nbytes": 1234}, "has 7 bytes, but the prompt's image_bytes says 1,234"),
        ({"nbytes": 0}, "image_bytes says 0"),
        ({"sha256": "0" * 64}, "image_sha256"),
        ({"nbytes": 7, "sha256": "0" * 64}, "image_sha256"),
        ({"nbytes": 8, "sha256": GOOD}, "image_bytes"),
    ],
)
def test_another_picture_than_the_one_that_is_meant_may_still_be_arriving(
    picture: Path, said: dict[str, Any], reason: str
) -> None:
    with pytest.raises(IncompleteFileError) as raised:
        source_file.check(job(SafePath.beside(picture), **said), b"picture")
    assert reason in raised.value.reason
    assert raised.value.place == "dog.jpg"
    assert "correct the prompt" in (raised.value.remedy or "")


def test_names_are_shown_with_odd_characters_escaped() -> None:
    assert source_file.name(job(SafePath.beside(Path("a\nb.jpg")))) == "a\\nb.jpg"
    assert source_file.name(job(b"picture")) is None


# ── renames whose answer is lost ──


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("folder", [False, True])
def test_a_rename_that_has_happened_counts_whatever_the_server_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, folder: bool
) -> None:
    root = SafePath.at(tmp_path)
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir() if folder else source.write_bytes(b"x")
    really = SafePath.rename

    def answer_lost(self: SafePath, to: SafePath) -> None:
        really(self, to)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(SafePath, "rename", answer_lost)
    rename(root / "a", root / "b")
    assert target.exists()
    assert not source.exists()


@pytest.mark.parametrize("taken", ["", "by another file", "by the same file"])
def test_a_rename_that_has_not_happened_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    root = SafePath.at(tmp_path)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x")
    if taken == "by another file":
        target.write_bytes(b"somebody else's")
    elif taken:
        target.hardlink_to(source)

    def refused(self: SafePath, to: SafePath) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(SafePath, "rename", refused)
    with pytest.raises(OSError, match="Input/output"):
        rename(root / "a", root / "b")
    assert source.read_bytes() == b"x"


@pytest.mark.parametrize("taken", [False, True])
def test_a_rename_of_what_somebody_else_has_moved_is_not_counted_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    root = SafePath.at(tmp_path)
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"x")
    if taken:
        target.write_bytes(b"somebody else's")
    really = SafePath.rename

    def too_late(self: SafePath, to: SafePath) -> None:
        really(self, root / "c")
        really(self, to)

    monkeypatch.setattr(SafePath, "rename", too_late)
    with pytest.raises(FileNotFoundError):
        rename(root / "a", root / "b")


def test_a_move_never_overwrites_and_makes_its_folder(tmp_path: Path) -> None:
    root = SafePath.at(tmp_path)
    source, target = tmp_path / "a", tmp_path / "new" / "deep" / "b"
    source.write_bytes(b"x")
    move_new(root / "a", root / "new/deep/b")
    source.write_bytes(b"y")
    with pytest.raises(FileExistsError):
        move_new(root / "a", root / "new/deep/b")
    assert (source.read_bytes(), target.read_bytes()) == (b"y", b"x")
    with pytest.raises(FileNotFoundError):
        move_new(root / "gone", root / "elsewhere/b")
