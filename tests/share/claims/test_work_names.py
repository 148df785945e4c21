"""The table of everything in `work/`, in the docstring of `sam_poll.share.claims`."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import Any

import pytest

from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import ADVANCED
from sam_poll.share import claims as package
from sam_poll.share import mosaic_workspace, mount_check
from sam_poll.share.claims import heartbeat, store
from sam_poll.share.claims.model import ClaimState, list_work
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.path_holds import PathHolds
from tests.conftest import BOX, Share, picture_bytes
from tests.support.dropped_annotations import BOXED, xml
from tests.support.mosaic_jobs import Eyes, drain, drop_mosaic
from tests.support.mosaic_jobs import eyes as eyes

TABLE = (package.__doc__ or "").partition("At the top:")[2]
ROWS = re.findall(r"^- `([^`]+)`", TABLE, re.MULTILINE)
PLACEHOLDERS = {
    "folder": r"(?!\.)[^/]+(?:/(?!\.)[^/]+)*",
    "name": r"(?!sam_poll-)[^/]+",
    "claim": r"g\d+\.[^/]+@[\w-]+",
    "file": r"(?!\.)[^/]+",
    "suffix": r"(?:~\d+)?",
    "number": r"[0-9a-f-]+",
    "worker": r"\w+-\d+-[0-9a-f]{6}(?:-[0-9a-f]{1,8})?",
    "mosaic": r"\.sam_poll-mosaic/[0-9a-f]{16}-[0-9a-f]{16}",
    "kind": r"[0-9a-f]{16}",
}


def matcher(row: str) -> re.Pattern[str]:
    """Return a pattern for the paths that a row of the table is about."""
    whole = "(?:/.+)?" if row.endswith("/") else ""
    parts = re.split(r"<(\w+)>", row.rstrip("/"))
    words = [PLACEHOLDERS[part] if n % 2 else re.escape(part) for n, part in enumerate(parts)]
    if row.startswith("<folder>/"):  # of a file at the top of `in/` there is no folder
        words[:2] = ["", f"(?:{words[1]}/)?"]
        words[2] = words[2].removeprefix("/")
    return re.compile("".join(words) + whole)


MATCHERS = {row: matcher(row) for row in ROWS}


def rows_of(path: str) -> list[str]:
    return [row for row, pattern in MATCHERS.items() if pattern.fullmatch(path)]


@pytest.fixture
def made(share: Share, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Collects the path below `work/` of each file and folder that is made there."""
    names: set[str] = set()
    work = f"{share.layout.work}/"

    def note(path: SafePath) -> None:
        if str(path).startswith(work):
            names.add(str(path).removeprefix(work))

    def noting(method: str, target: Callable[..., SafePath | None]) -> None:
        really = getattr(SafePath, method)

        def call(self: SafePath, *args: Any, **more: Any) -> Any:
            result = really(self, *args, **more)
            path = target(self, *args)
            if path is not None:
                note(path)
            return result

        monkeypatch.setattr(SafePath, method, call)

    noting("open_file", lambda path, flags: path if flags & os.O_CREAT else None)
    noting("mkdir", lambda path: path)
    noting("rename", lambda path, target: target)
    noting("link", lambda path, target: target)
    return names


def run_jobs(share: Share) -> None:
    """Answer and reject jobs of all kinds but mosaics."""
    share.pair("dog")
    share.pair("cam1/cat")
    share.drop("cam1/cat.left.json", BOX)
    share.drop("broken.jpg", picture_bytes()[:100])
    share.drop("broken.json", BOX)
    share.drop("cam2/cow.jpg", picture_bytes())
    share.drop("annotations.xml", xml(("cam2/cow.jpg", BOXED)))
    counts = share.run_once()
    assert (counts.answered, counts.rejected) == (4, 1)


def give_back(share: Share) -> None:
    """Mark a claim, take it over and give it back, as a cluster's watcher and worker do."""
    share.pair("hen")
    watcher = ClaimStore(share.layout, "watcher-1", lambda: None, runs=False)
    worker = ClaimStore(share.layout, "worker-1", lambda: None)
    claim = watcher.take("hen.jpg", "hen.jpg", ["hen.json"])
    assert claim
    watcher.mark_stem(claim)
    (entry,) = [entry for entry in list_work(share.layout.work).claims if entry.hold]
    claim = worker.take_over(entry)
    assert claim
    assert worker.hand_back(claim, "", b"[]")


def prove_folders(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove the folders where the probe's usual name is taken, and after a path has failed."""
    (share.input / mount_check.PROBE).mkdir()
    mount_check.check_folders(share.layout)
    share.drop("locked.jpg", b"picture")
    error = OSError(errno.EPERM, "Operation not permitted", str(share.input / "locked.jpg"))
    monkeypatch.setattr(SafePath, "create_unnamed", lambda folder: False)
    assert PathHolds(share.layout).failed_to_take(error, ["locked.jpg"], 0.0)


def test_work_contains_only_what_the_table_lists_and_all_of_it(
    share: Share, made: set[str], eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rasterio", exc_type=ImportError)
    run_jobs(share)
    drop_mosaic(share)
    assert drain(share).stats.now().answered == 1
    give_back(share)
    prove_folders(share, monkeypatch)
    unlisted = sorted(path for path in made if not rows_of(path))
    assert not unlisted
    unused = set(ROWS) - {row for path in made for row in rows_of(path)}
    assert not unused


@pytest.mark.parametrize(
    "name",
    [
        mount_check.SENTINEL,
        mount_check.PROBE,
        heartbeat.PREFIX,
        mosaic_workspace.FOLDER,
        store.REPORT,
        store.ANSWERED,
        store.SHARES_STEM,
        store.DEFERRALS,
        ADVANCED,
    ],
)
def test_the_table_has_the_names_in_the_code(name: str) -> None:
    assert any(row.split("/")[-1].startswith(name) for row in ROWS)


def test_a_claim_in_the_table_is_what_a_claim_is_called() -> None:
    state = ClaimState(2, "box-3f-77", attempt=1, prompts=2)
    for name in (str(state), str(ClaimState(3, "box-3f-77", place="done", suffix="~2"))):
        assert rows_of(f"cam1/.dog.jpg/{name}") == ["<folder>/.<name>/<claim>"]


def test_each_row_says_who_writes_reads_and_deletes() -> None:
    entries = re.split(r"^- `", TABLE, flags=re.MULTILINE)[1:]
    assert len(entries) == len(ROWS)
    for entry in entries:
        text = entry.partition("\n\n")[0]
        assert re.search(r"\bW: .+\bR: .+\bD: ", text, re.DOTALL), text
