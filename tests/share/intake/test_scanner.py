"""The scan of a crowd: files are listed, looked at and read rarely, and none is missed for that."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import crowd
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import Job, OutputFile
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake import directory_index, done_lookup, ready_pairs
from sam_poll.share.intake.directory_index import OLD_S, TRUTH_S, DirectoryIndex
from sam_poll.share.intake.scanner import Scanner
from sam_poll.share.intake.stability import FileEvent
from sam_poll.share.source import FolderSource
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.scans import Clock, scanner_of
from tests.support.scans import clock as clock
from tests.support.scans import quiet as quiet


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Count the calls of the file system: `lstat`, `scandir` of folders, `open` of prompts."""
    counted: Counter[str] = Counter()

    def count(name: str) -> None:
        really = getattr(SafePath, name)

        def call(*args: object, **more: object) -> object:
            counted[name] += 1
            return really(*args, **more)

        monkeypatch.setattr(SafePath, name, call)

    for name in ("lstat", "scandir", "open"):
        count(name)
    yield counted
    monkeypatch.undo()


def offered(scanner: Scanner, clock: Clock) -> list[str | None]:
    return [ready.prompt for ready in scanner.scan(clock(), [])]


def drain(source: FolderSource) -> None:
    for job in source.jobs(threading.Event()):
        source.deliver(job, [OutputFile(".txt", "text/plain", b"answer")])


# ── names ──


class Steps:
    """Times of folders as a coarse file system keeps them: in steps, by its own clock."""

    def __init__(self, root: Path, clock: Clock, step_s: float) -> None:
        self.root = root
        self.clock = clock
        self.step_s = step_s
        self.changed: dict[str, int] = {}

    def touch(self, folder: Path) -> None:
        self.changed[str(folder)] = int((self.clock.now + 12345.6) // self.step_s)

    def stamp(self, path: SafePath) -> tuple[int, ...]:
        return (path.lstat().st_ino, self.changed.get(str(path), 0))


ACTS = st.tuples(
    st.sampled_from(["add", "remove", "look"]),
    st.sampled_from(["", "cam1", "cam2"]),
    st.sampled_from(["a.jpg", "a.json", "b.png", "c.txt", "x.part"]),
    st.sampled_from([0.0, 0.3, 1.0, 2.5, 4.0, 400.0]),
)


@given(acts=st.lists(ACTS, max_size=40))
@settings(deadline=None, max_examples=60)
def test_a_kept_listing_is_what_a_fresh_one_would_be_however_coarse_the_file_systems_times(
    acts: list[tuple[str, str, str, float]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    share, clock = Share(tmp_path_factory.mktemp("kept")), Clock()
    steps = Steps(share.input, clock, 2.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory_index, "_stamp", steps.stamp)
        kept = DirectoryIndex(share.layout, keep=True, clock=clock)
        for act, folder, name, pause in [*acts, ("look", "", "", 0.0)]:
            clock.now += pause
            path = share.input / folder / name
            if act == "add" and not path.exists():
                if not path.parent.exists():
                    path.parent.mkdir()
                    steps.touch(share.input)
                path.write_bytes(b"")
                steps.touch(path.parent)
            elif act == "remove" and path.is_file():
                path.unlink()
                steps.touch(path.parent)
            elif act == "look":
                before = (set(kept.pictures), set(kept.prompts))
                changed = kept.refresh()
                fresh = DirectoryIndex(share.layout, keep=False, clock=clock)
                fresh.refresh()
                assert (kept.pictures, set(kept.prompts)) == (fresh.pictures, set(fresh.prompts))
                assert changed or before == (kept.pictures, set(kept.prompts))


def test_an_unchanged_folder_is_not_listed_again_before_nothing_is_believed_any_more(
    share: Share, clock: Clock, calls: Counter[str]
) -> None:
    share.pair("cam1/dog")
    kept = DirectoryIndex(share.layout, keep=True, clock=clock)
    for pause in (0.0, OLD_S, 1.0):
        clock.now += pause
        kept.refresh()
    calls.clear()
    assert not kept.refresh()
    assert calls["scandir"] == 0
    clock.now += TRUTH_S
    assert not kept.refresh()
    assert calls["scandir"] == 2


def test_where_other_machines_write_every_look_lists_all(
    share: Share, clock: Clock, calls: Counter[str]
) -> None:
    share.pair("dog")
    polled = DirectoryIndex(share.layout, keep=False, clock=clock)
    for _ in range(4):
        clock.now += OLD_S
        calls.clear()
        polled.refresh()
        assert calls["scandir"] == 1


def test_a_folder_with_a_pictures_name_is_looked_into(share: Share, clock: Clock) -> None:
    share.pair("odd.jpg/dog")
    found = DirectoryIndex(share.layout, keep=True, clock=clock)
    found.refresh()
    assert found.pictures == {"odd.jpg/dog.jpg"}
    assert found.below == {"odd.jpg"}


@pytest.mark.parametrize("odd", [".json", ".jpg", "..jpg"])
def test_a_file_that_is_called_as_an_ending_hides_no_other(
    share: Share, clock: Clock, odd: str
) -> None:
    share.drop(odd, b"")
    found = DirectoryIndex(share.layout, keep=False, clock=clock)
    found.refresh()
    assert not found.pictures
    share.pair("dog")
    found.refresh()
    assert (found.pictures, found.prompts) == ({"dog.jpg"}, ["dog.json"])


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_a_folder_that_is_replaced_by_another_of_its_name_is_watched_again(
    share: Share, how: str
) -> None:
    folder = share.input / "cam1"
    folder.mkdir()
    clock = Clock()
    scanner = scanner_of(share, clock)
    try:
        offered(scanner, clock)
        folder.rename(share.root / "away") if how == "renamed" else folder.rmdir()
        folder.mkdir()
        wait_until(lambda: scanner._watcher.stale)
        offered(scanner, clock)
        scanner._files.take_events()
        share.move_in("cam1/dog.jpg", picture_bytes())
        wait_until(
            lambda: any(path.endswith("cam1/dog.jpg") for path, *_ in list(scanner._files._events)),
            5,
        )
    finally:
        scanner.close()


def test_a_job_that_is_held_and_never_comes_back_does_not_keep_the_scan_from_resting(
    share: Share, clock: Clock, quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.now = time.monotonic()
    share.drop("told.json", BOX)
    scanner = scanner_of(share, clock, lone_s=0.0)
    scanner.hold("gone.json", {}, 1.0)
    for _ in range(30):
        offered(scanner, clock)
        clock.now += 4.0
    gone_through = []
    monkeypatch.setattr(scanner._ready_pairs, "find", lambda *_: gone_through.append(1) or [])
    assert offered(scanner, clock) == []
    assert not gone_through


# ── looking at files ──


def test_a_scan_where_nothing_has_happened_looks_at_nothing(
    share: Share, clock: Clock, calls: Counter[str], quiet: None
) -> None:
    for n in range(20):
        share.drop(f"seen{n}.jpg", picture_bytes())
        share.drop(f"told{n}.json", BOX)
    scanner = scanner_of(share, clock, lone_s=5.0)
    for _ in range(8):
        assert offered(scanner, clock) == []
        clock.now += 4.0
    calls.clear()
    assert offered(scanner, clock) == []
    assert calls == {"lstat": 2}, "the times of in/ and of done/, no file and no listing"
    share.pair("dog")  # the folder's own times tell
    assert offered(scanner, clock) == []
    clock.now += 2.0
    assert offered(scanner, clock) == ["dog.json"]


def test_a_crowd_is_looked_at_in_spells_and_nobody_is_left_out(share: Share) -> None:
    for n in range(30):
        share.pair(f"dog{n:02}")
    clock = Clock(
        step=0.02
    )  # each look at the clock takes so long, and each file costs a few of them
    scanner = scanner_of(share, clock, settle_s=0.0)
    first = offered(scanner, clock)
    assert 0 < len(first) < 30
    assert scanner.due <= clock()  # at once: not all were looked at
    for _ in range(30):
        last = offered(scanner, clock)
    assert len(last) == 30


def test_of_a_crowd_the_oldest_are_offered_first_and_prompts_of_one_picture_together(
    share: Share, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready_pairs, "_MANY", 2)
    for n in range(5):
        share.pair(f"dog{n}")
        for name in (f"dog{n}.jpg", f"dog{n}.json"):
            os.utime(share.input / name, (5000 - n, 5000 - n))
    os.utime(share.drop("dog4.late.json", BOX), (9000, 9000))
    scanner = scanner_of(share, clock, settle_s=0.0)
    assert offered(scanner, clock) == ["dog4.json", "dog3.json", "dog4.late.json"]
    assert scanner.due <= clock()


def test_a_file_that_changed_after_the_scan_is_not_claimed_and_must_settle_anew(
    share: Share, clock: Clock
) -> None:
    share.pair("dog")
    scanner = scanner_of(share, clock, mode="poll")
    assert offered(scanner, clock) == []
    clock.now += 2.0
    (ready,) = scanner.scan(clock(), [])
    assert scanner.still(ready)
    share.drop("dog.jpg", picture_bytes(".png", seed=7))
    assert not scanner.still(ready)
    assert scanner.due <= clock() + 2.0
    clock.now += 1.9
    assert offered(scanner, clock) == []
    clock.now += 0.2
    (ready,) = scanner.scan(clock(), [])
    assert scanner.still(ready)


def test_a_file_is_looked_at_anew_when_the_watcher_has_seen_something(
    share: Share, clock: Clock, quiet: None
) -> None:
    share.pair("dog")
    scanner = scanner_of(share, clock)
    offered(scanner, clock)
    clock.now += 1.9
    path = share.drop("dog.json", {**BOX, "label": "longer"})
    assert scanner._files.note_event(str(path), FileEvent.WRITING, clock())
    assert offered(scanner, clock) == []
    clock.now += 1.0
    assert offered(scanner, clock) == []
    clock.now += 1.1
    assert offered(scanner, clock) == ["dog.json"]


@pytest.mark.parametrize("name", [".dog.jpg.Ab12Cd", "dog.jpg.part", "notes.txt"])
def test_what_happens_to_files_that_are_no_jobs_wakes_nobody(
    share: Share, clock: Clock, name: str
) -> None:
    scanner = scanner_of(share, clock, mode="poll")
    assert not scanner._files.note_event(str(share.input / name), FileEvent.WRITING, clock())
    assert scanner._files.note_event(str(share.input / "dog.jpg"), FileEvent.WRITING, clock())


# ── prompts that wait alone ──


@pytest.mark.parametrize("mode", ["events", "poll"])
def test_a_prompt_that_waits_alone_and_is_mended_in_place_finds_its_picture(
    share: Share, clock: Clock, quiet: None, mode: str
) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("odd.json", {**BOX, "image": "not-there.jpg"})
    scanner = scanner_of(share, clock, mode=mode)
    for _ in range(4):
        assert offered(scanner, clock) == []
        clock.now += 10.0
    share.drop(
        "odd.json", {**BOX, "image": "dog.jpg"}
    )  # no event tells of it: sooner or later it is seen all the same
    for _ in range(4):
        clock.now += TRUTH_S if mode == "events" else 10.0
        found = offered(scanner, clock)
    assert found == ["odd.json"]


def test_prompts_that_wait_alone_are_read_in_spells_and_once_each(
    share: Share, calls: Counter[str]
) -> None:
    for n in range(30):
        share.drop(f"told{n}.json", BOX)
    clock = Clock(step=0.02)
    scanner = scanner_of(share, clock, mode="poll", settle_s=0.0, lone_s=10**6, rescan_s=10**6)
    offered(scanner, clock)
    assert 0 < calls["open"] < 30
    for _ in range(60):
        offered(scanner, clock)
    assert calls["open"] == 30


def test_many_prompts_that_wait_alone_find_theirs_in_done_by_one_listing(
    share: Share, clock: Clock, quiet: None, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(done_lookup, "_FEW", 3)
    done = share.done
    done.mkdir()
    for n in range(20):
        share.drop(f"told{n}.left.json", BOX)
    share.drop("by-name.json", {**BOX, "image": "Odd.PNG"})
    scanner = scanner_of(share, clock, lone_s=5.0)
    for _ in range(6):
        assert offered(scanner, clock) == []
        clock.now += 4.0
    calls.clear()
    (done / "told7.JPG").write_bytes(picture_bytes())
    (done / "Odd.PNG").write_bytes(picture_bytes(".png"))
    ready = {r.prompt: r.picture for r in scanner.scan(clock(), [])}
    assert ready == {"told7.left.json": "told7.JPG", "by-name.json": "Odd.PNG"}
    assert calls["scandir"] == 1
    assert calls["lstat"] < 100  # 20 prompts with all spellings would be more than 600


def test_a_picture_that_comes_to_done_later_is_found_by_a_prompt_that_has_looked_before(
    share: Share, clock: Clock, quiet: None
) -> None:
    share.drop("dog.json", BOX)
    scanner = scanner_of(share, clock, lone_s=5.0)
    for _ in range(6):
        assert offered(scanner, clock) == []
        clock.now += 4.0
    share.done.mkdir()
    (share.done / "dog.jpg").write_bytes(picture_bytes())
    (ready,) = scanner.scan(clock(), [])
    assert (ready.prompt, ready.picture, ready.suffix) == ("dog.json", "dog.jpg", "")


@pytest.mark.parametrize("few", [64, 0])
def test_a_prompt_whose_picture_is_found_in_done_is_offered_until_it_is_claimed(
    share: Share, clock: Clock, quiet: None, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr(done_lookup, "_FEW", few)
    share.done.mkdir()
    (share.done / "dog.jpg").write_bytes(picture_bytes())
    share.drop("dog.json", BOX)
    share.drop("cat.json", BOX)
    scanner = scanner_of(share, clock, lone_s=5.0)
    for _ in range(6):
        offered(scanner, clock)
        clock.now += 4.0
    for _ in range(3):  # others were claimed first
        assert offered(scanner, clock) == ["dog.json"]
        clock.now += 4.0


# ── the prescan ──


def test_files_settle_from_the_first_glance_on_and_the_first_scan_lists_nothing(
    share: Share, clock: Clock, quiet: None, calls: Counter[str]
) -> None:
    share.pair("dog")
    scanner = scanner_of(share, clock)
    scanner.prescan()
    clock.now += 2.0
    calls.clear()
    share.pair("cat")
    assert offered(scanner, clock) == ["dog.json"]
    assert calls["scandir"] == 0
    assert scanner.due <= clock()  # and then it looks for itself
    offered(scanner, clock)
    clock.now += 2.0
    assert set(offered(scanner, clock)) == {"dog.json", "cat.json"}


@pytest.mark.parametrize("pause", [2.0, 11.0])
def test_a_glance_at_a_crowd_goes_through_some_of_it_and_the_scans_after_it_through_all(
    share: Share, quiet: None, pause: float
) -> None:
    for n in range(30):
        share.pair(f"dog{n:02}")
    clock = Clock(step=0.02)
    scanner = scanner_of(share, clock, rescan_s=10.0)
    scanner.prescan()
    clock.now += pause
    first = offered(scanner, clock)
    assert 0 < len(first) < 30
    for _ in range(30):
        clock.now += 2.0
        last = offered(scanner, clock)
    assert len(last) == 30


def test_a_glance_too_long_ago_is_not_believed(share: Share, clock: Clock, quiet: None) -> None:
    scanner = scanner_of(share, clock, settle_s=0.0, rescan_s=10.0)
    scanner.prescan()
    share.pair("cat")
    clock.now += 11.0
    assert offered(scanner, clock) == ["cat.json"]


def test_who_drains_the_share_takes_also_what_came_after_the_glance(share: Share) -> None:
    share.pair("dog")
    with FolderSource(share.layout, FolderOptions(settle_s=0.0, once=True, mode="poll")) as source:
        source.prescan()
        wait_until(lambda: source.scans)
        share.pair("cat")
        drain(source)
    assert share.tree("output") == ["cat.txt", "dog.txt"]


@pytest.mark.parametrize("how", ["requeue", "fail_attempt"])
def test_who_drains_the_share_takes_also_what_comes_back_between_two_looks(
    share: Share, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    share.pair("dog")
    back: list[Job] = []
    with FolderSource(
        share.layout, FolderOptions(settle_s=0.0, once=True, mode="poll", rescan_s=0.1)
    ) as source:
        look = source._recovery.survey

        def looked(now: float) -> set[str]:
            found = look(now)
            if not back and source._active.busy:
                back.append(first)
                getattr(source, how)(first)  # after `in/` and `work/` were listed
                source._wake.clear()  # who gave it back has not come so far as to tell
            return found

        monkeypatch.setattr(source._recovery, "survey", looked)
        jobs = source.jobs(threading.Event())
        first = next(jobs)
        again = next(jobs, None)
        assert back
        assert again
        source.deliver(again, [OutputFile(".txt", "text/plain", b"answer")])
        assert not list(jobs)
    assert share.tree("output") == ["dog.txt"]


def test_what_was_glanced_at_and_is_gone_costs_nothing(share: Share) -> None:
    share.pair("dog")
    share.pair("cat")
    with FolderSource(share.layout, FolderOptions(settle_s=0.0, once=True, mode="poll")) as source:
        source.prescan()
        wait_until(lambda: source.scans)
        (share.input / "dog.jpg").unlink()
        drain(source)
    assert share.tree("output") == ["cat.txt"]
    assert share.tree("input") == ["dog.json"]


def test_a_glance_at_a_share_that_is_away_is_no_end(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = threading.Event()
    really = DirectoryIndex.refresh

    def away(self: DirectoryIndex) -> bool:
        if not looked.is_set():
            looked.set()
            raise OSError(5, "Input/output error")
        return really(self)

    monkeypatch.setattr(DirectoryIndex, "refresh", away)
    share.pair("dog")
    with FolderSource(share.layout, FolderOptions(settle_s=0.0, once=True, mode="poll")) as source:
        source.prescan()
        wait_until(looked.is_set)
        drain(source)
    assert share.tree("output") == ["dog.txt"]


# ── the whole ──


def test_a_pair_among_many_that_wait_is_answered_by_its_events(share: Share) -> None:
    for n in range(300):
        share.drop(f"seen{n}.jpg", b"")
        share.drop(f"told{n}.json", BOX)
    with Daemon(share, rescan_s=60.0) as daemon:
        wait_until(lambda: daemon.source.scans > 1)
        share.move_in("dog.jpg", picture_bytes())
        share.move_in("dog.json", BOX)
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)
    assert len(share.tree("input")) == 600


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_crowds_benchmark_measures_each_goal(tmp_path: Path) -> None:
    windows = crowd.Windows(memory_s=0.5, idle_s=0.5, calm_s=1.0, door_s=0.5, patience_s=120.0)
    lines = crowd.measure(tmp_path, 60, windows, lambda text: None)
    assert len([line for line in lines if line.goal is not None]) == 6
    assert all(line.measured >= 0 for line in lines if "more than" not in line.what)
    assert "reached" in str(lines[0]) or "MISSED" in str(lines[0])
