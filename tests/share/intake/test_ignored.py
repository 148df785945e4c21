"""What servers and systems keep in `in/` is left alone, and what `watch.ignore` names."""

from __future__ import annotations

import pytest

from sam_poll.config.settings import load
from sam_poll.diagnostics import validate
from sam_poll.runtime import builders
from sam_poll.share.intake.directory_index import DirectoryIndex
from sam_poll.share.intake.events import Watcher
from sam_poll.share.intake.ignored import SYSTEM_FOLDERS, Ignored
from sam_poll.share.layout import Layout
from sam_poll.share.status import status
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.dropped_annotations import BOXED, xml

KEPT = [
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    ".Trash-1000",
    "lost+found",
    ".snapshot",
    "System Volume Information",
]


def ignoring(share: Share, *patterns: str) -> None:
    share.layout = Layout(**share.layout.folders, ignored=Ignored(patterns))


@pytest.mark.parametrize("folder", [*KEPT, "cam1/@eaDir/dog.jpg", *sorted(SYSTEM_FOLDERS)])
def test_folders_of_servers_and_systems_are_left_alone(share: Share, folder: str) -> None:
    share.pair(f"{folder}/dog")
    share.pair("cat")
    assert share.run_once().answered == 1
    assert share.tree("input") == [f"{folder}/dog.jpg", f"{folder}/dog.json"]
    assert status(share.layout)["input"] == {"pictures": 0, "prompts": 0, "other": 0}
    (share.input / folder / "dog.json").write_text("wrong")
    assert not [finding for finding in validate.check([share.input]) if finding.error]


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("thumbs", {"cam1/thumbs/a.jpg", "cam1/thumbs/deep/b.jpg"}),
        ("thumbs/", {"cam1/thumbs/a.jpg", "cam1/thumbs/deep/b.jpg"}),
        ("*_small.*", {"dog_small.jpg", "cam1/[ab]_small.jpg"}),
        ("cam1/*.jpg", {"cam1/[ab]_small.jpg", "cam1/thumbs/a.jpg", "cam1/thumbs/deep/b.jpg"}),
        ("/cam1/thumbs", {"cam1/thumbs/a.jpg", "cam1/thumbs/deep/b.jpg"}),
        ("[ab].jpg", {"cam1/thumbs/a.jpg", "cam1/thumbs/deep/b.jpg"}),
        ("[[]ab[]]*", {"cam1/[ab]_small.jpg"}),
        ("a.jp", set()),
    ],
)
def test_a_pattern_is_of_names_or_of_whole_paths(
    share: Share, pattern: str, left: set[str]
) -> None:
    names = {
        "dog_small.jpg",
        "cam1/[ab]_small.jpg",
        "cam1/thumbs/a.jpg",
        "cam1/thumbs/deep/b.jpg",
        "dog.jpg",
    }
    for name in names:
        share.drop(name, picture_bytes())
    ignoring(share, pattern)
    found = DirectoryIndex(share.layout, keep=False)
    found.refresh()
    assert names - found.pictures == left
    assert {name for name in names if share.layout.ignored.covers(name)} == left
    assert status(share.layout)["input"]["pictures"] == len(names - left)


def test_what_is_left_alone_is_not_watched(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: set[str] = set()
    watch = Watcher.watch
    monkeypatch.setattr(
        Watcher,
        "watch",
        lambda self, folders: (watched.update(map(str, folders)), watch(self, folders)),
    )
    ignoring(share, "raw")
    for folder in ("@eaDir", "raw", "cam1"):
        (share.input / folder).mkdir()
    with Daemon(share, rescan_s=0.05) as daemon:
        wait_until(lambda: daemon.source.scans > 1)
    assert watched == {str(share.input), str(share.input / "cam1")}


def test_annotations_of_a_picture_that_is_left_alone_are_refused(share: Share) -> None:
    share.drop("@eaDir/dog.jpg", picture_bytes())
    share.drop("annotations.xml", xml(("@eaDir/dog.jpg", BOXED)))
    assert share.run_once().rejected == 1
    assert "watch.ignore" in share.error("annotations")["reason"]


def test_patterns_come_from_the_settings_and_reach_the_share() -> None:
    made = load(None, env={"SAM_POLL_WATCH__IGNORE": "[ab]*,thumbs, x[12].[jp]*"})
    assert made.watch.ignore == ("[ab]*", "thumbs", "x[12].[jp]*")
    assert builders.layout_of(made).ignored.covers("cam1/b/dog.jpg")


@pytest.mark.parametrize(
    ("text", "patterns"),
    [
        ("[ab]", ("[ab]",)),
        ("[a, b]", ("a", "b")),
        ("[]", ()),
        ("[ab]*.[xy]", ("[ab]*.[xy]",)),
        ("a", ("a",)),
    ],
)
def test_the_environment_keeps_the_brackets_of_patterns(
    text: str, patterns: tuple[str, ...]
) -> None:
    assert load(None, env={"SAM_POLL_WATCH__IGNORE": text}).watch.ignore == patterns


def test_a_pattern_from_the_environment_leaves_its_pairs_in_place(share: Share) -> None:
    share.pair("a1")
    share.drop("b1.json", BOX)
    ignoring(share, *load(None, env={"SAM_POLL_WATCH__IGNORE": "[ab]*"}).watch.ignore)
    assert share.run_once().answered == 0
