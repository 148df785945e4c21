"""The files of a folder in memory: only what has changed is read again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.safe_path import SafePath
from sam_poll.share.file_index import FileIndex
from sam_poll.share.intake.directory_index import OLD_S
from sam_poll.share.intake.ignored import Ignored


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def index_of(root: Path, **more: Any) -> FileIndex:
    return FileIndex(SafePath.at(root), kind=lambda name: name.rpartition(".")[2], **more)


def paths(index: FileIndex) -> list[str]:
    return sorted(
        folder.path_of(file.name) for folder in index.folders for file in folder.files.values()
    )


def test_files_of_all_depths_are_found_and_counted_by_kind(tmp_path: Path) -> None:
    for name in ("a.jpg", "cam1/b.jpg", "cam1/deep/c.json", ".hidden/d.jpg", "cam1/.sam_poll-x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a.jpg")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    index = index_of(tmp_path)
    assert index.refresh()
    assert paths(index) == ["a.jpg", "cam1/b.jpg", "cam1/deep/c.json"]
    assert index.kinds() == {"jpg": 2, "json": 1}


def test_ignored_files_and_folders_are_left_out(tmp_path: Path) -> None:
    for name in ("a.jpg", "thumbs/b.jpg", "c_preview.jpg", "@eaDir/d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    index = index_of(tmp_path, ignored=Ignored(("thumbs", "*_preview.jpg")))
    index.refresh()
    assert paths(index) == ["a.jpg"]


def test_refresh_says_whether_anything_has_changed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("x")
    index = index_of(tmp_path)
    assert index.refresh()
    assert not index.refresh()
    (tmp_path / "cam1").mkdir()
    assert index.refresh()
    (tmp_path / "cam1").rmdir()
    assert index.refresh()
    (tmp_path / "a.jpg").unlink()
    assert index.refresh()
    assert paths(index) == []


def test_a_file_that_was_replaced_is_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("x")
    os.utime(tmp_path / "a.jpg", (5, 5))
    index = index_of(tmp_path, times=True)
    index.refresh()
    (tmp_path / "new").write_text("y")
    os.utime(tmp_path / "new", (9, 9))
    (tmp_path / "new").rename(tmp_path / "a.jpg")
    assert index.refresh()
    (folder,) = index.folders
    assert folder.files["a.jpg"].modified == 9


def test_an_unchanged_folder_is_not_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cam1").mkdir()
    (tmp_path / "cam1" / "a.jpg").write_text("x")
    listed: list[str] = []
    original = SafePath.scandir
    monkeypatch.setattr(SafePath, "scandir", lambda self: listed.append(self.rel) or original(self))
    clock = Clock()
    index = index_of(tmp_path, clock=clock)
    index.refresh()
    clock.now += OLD_S + 1
    index.refresh()
    listed.clear()
    index.refresh()
    assert listed == []
    (tmp_path / "cam1" / "b.jpg").write_text("x")
    assert index.refresh()
    assert listed == ["cam1"]
    every_time = index_of(tmp_path, keep=False, clock=clock)
    every_time.refresh()
    clock.now += OLD_S + 1
    every_time.refresh()
    listed.clear()
    every_time.refresh()
    assert sorted(listed) == ["", "cam1"]


def test_a_root_that_is_not_there_has_no_files(tmp_path: Path) -> None:
    index = index_of(tmp_path / "nowhere")
    assert not index.refresh()
    assert paths(index) == []
    (tmp_path / "nowhere").mkdir()
    (tmp_path / "nowhere" / "a.jpg").write_text("x")
    index.refresh()
    assert paths(index) == ["a.jpg"]
