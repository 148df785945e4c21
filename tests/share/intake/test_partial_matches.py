"""`dog.left.json` is for `dog.jpg` only where no `dog.left.jpg` comes; reused and similar names."""

from __future__ import annotations

import json
import threading
import unicodedata

import pytest

from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.pairing import PictureIndex
from sam_poll.share.source import FolderSource
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.dropped_annotations import BOXED, xml
from tests.support.scans import Clock, Quiet, scanner_of  # noqa: F401
from tests.support.scans import clock as clock
from tests.support.scans import quiet as quiet

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "új képe") for form in ("NFC", "NFD"))


def pairs(scanner: object, clock: Clock) -> dict[str | None, str | None]:
    return {ready.prompt: ready.picture for ready in scanner.scan(clock(), [])}  # type: ignore[attr-defined]


# ── a name that was cut to fit ──


def test_a_picture_of_the_prompts_whole_name_may_come_after_another_that_its_name_fits(
    share: Share, clock: Clock, quiet: None
) -> None:
    scanner = scanner_of(share, clock, settle_s=2.0)
    for name in ("photo.json", "photo.left.json"):
        share.drop(name, BOX)
    for _ in range(4):
        assert pairs(scanner, clock) == {}
        clock.now += 10.0
    share.drop("photo.jpg", picture_bytes())
    for _ in range(2):
        assert pairs(scanner, clock) == {}
        clock.now += 2.4
    share.drop("photo.left.jpg", picture_bytes())
    assert pairs(scanner, clock) == {"photo.json": "photo.jpg"}
    clock.now += 2.0
    assert pairs(scanner, clock) == {"photo.json": "photo.jpg", "photo.left.json": "photo.left.jpg"}


def test_several_prompts_of_one_picture_are_offered_together_when_no_better_picture_has_come(
    share: Share, clock: Clock, quiet: None
) -> None:
    share.drop("dog.jpg", picture_bytes())
    for name in ("dog.json", "dog.left.json", "dog.right.json"):
        share.drop(name, BOX)
    scanner = scanner_of(share, clock)
    assert pairs(scanner, clock) == {}
    clock.now += 4.9
    assert pairs(scanner, clock) == {}
    assert scanner.due == pytest.approx(clock.now + 0.1)
    clock.now += 0.1
    assert pairs(scanner, clock) == dict.fromkeys(
        ("dog.json", "dog.left.json", "dog.right.json"), "dog.jpg"
    )


def test_further_prompts_do_not_hold_up_for_ever_those_that_came_before_them(
    share: Share, clock: Clock, quiet: None
) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", BOX)
    scanner = scanner_of(share, clock)
    for n in range(4):
        share.drop(f"dog.{n}.json", BOX)
        found = pairs(scanner, clock)
        clock.now += 2.0
    assert set(found) == {"dog.json", "dog.0.json"}


@pytest.mark.parametrize("name", ["dog.jpg.left.json", "dog.json"])
def test_a_prompt_whose_name_says_its_picture_does_not_wait(
    share: Share, clock: Clock, quiet: None, name: str
) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop(name, BOX)
    scanner = scanner_of(share, clock)
    pairs(scanner, clock)
    clock.now += 2.0
    assert pairs(scanner, clock) == {name: "dog.jpg"}


def test_a_prompt_whose_text_says_its_picture_does_not_wait(
    share: Share, clock: Clock, quiet: None
) -> None:
    share.drop("dog.jpg", picture_bytes())
    for n in range(3):
        share.drop(f"dog.{n}.json", {**BOX, "image": "dog.jpg"})
    scanner = scanner_of(share, clock)
    pairs(scanner, clock)
    clock.now += 2.0
    assert pairs(scanner, clock) == {f"dog.{n}.json": "dog.jpg" for n in range(3)}


def test_what_is_drawn_in_cvat_does_not_wait(share: Share) -> None:
    with Daemon(share, settle_s=3600.0, rescan_s=0.05) as daemon:
        wait_until(lambda: daemon.source.scans > 0)
        share.move_in("dog.jpg", picture_bytes())
        share.move_in("annotations.xml", xml(("dog.jpg", BOXED)))
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)


def test_a_cut_name_that_fits_two_pictures_waits_for_one_that_it_fits_whole(
    share: Share, clock: Clock, quiet: None
) -> None:
    for name in ("dog.jpg", "dog.png"):
        share.drop(name, picture_bytes(name[-4:]))
    share.drop("dog.left.json", BOX)
    scanner = scanner_of(share, clock)
    for _ in range(2):
        assert pairs(scanner, clock) == {}
        clock.now += 2.4
    share.drop("dog.left.jpg", picture_bytes())
    pairs(scanner, clock)
    clock.now += 2.0
    assert pairs(scanner, clock) == {"dog.left.json": "dog.left.jpg"}


def test_who_drains_the_share_waits_for_no_better_picture(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.left.json", BOX)
    assert share.run_once(settle_s=0.1).answered == 1


# ── a name that is used again ──


def test_an_answer_on_a_picture_from_done_says_so_in_its_notes_and_in_the_log(
    share: Share, logged: list[str]
) -> None:
    share.pair("latest")
    share.run_once()
    assert not any("in done/" in line for line in logged)
    share.drop("latest.json", BOX)
    with FolderSource(share.layout, FolderOptions(settle_s=0.0, once=True, mode="poll")) as source:
        jobs = source.jobs(threading.Event())
        job = next(jobs)
        assert "latest.jpg in done/" in job.notes[0]
        source.requeue(job)
        jobs.close()
    share.run_once()
    assert any("latest.jpg in done/" in line for line in logged)


def test_a_new_picture_of_an_old_name_may_take_as_long_as_the_patience(
    share: Share, clock: Clock, quiet: None
) -> None:
    share.done.mkdir()
    (share.done / "latest.jpg").write_bytes(picture_bytes())
    share.drop("latest.json", BOX)
    scanner = scanner_of(share, clock, patience_s=50.0)
    for _ in range(7):
        assert pairs(scanner, clock) == {}
        clock.now += 7.0
    share.drop("latest.jpg", picture_bytes(seed=1))
    pairs(scanner, clock)
    clock.now += 2.0
    (ready,) = scanner.scan(clock(), [])
    assert (ready.picture, ready.suffix) == ("latest.jpg", None)


# ── the same name, written otherwise ──


@pytest.mark.parametrize(("prompt", "picture"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
@pytest.mark.parametrize("named", [False, True])
def test_names_that_look_the_same_pair_and_are_kept_as_they_are(
    share: Share, prompt: str, picture: str, named: bool
) -> None:
    share.drop(f"{picture}.jpg", picture_bytes())
    share.drop(
        "other.json" if named else f"{prompt}.json", json.dumps({**BOX, "image": f"{prompt}.jpg"})
    )
    assert share.run_once().answered == 1
    assert share.tree("done") == sorted(
        [f"{picture}.jpg", "other.json" if named else f"{prompt}.json"]
    )
    share.drop("later.json", json.dumps({**BOX, "image": f"{prompt}.jpg"}))
    assert share.run_once().answered == 1, "its picture lies in done/"


def test_a_name_that_is_the_very_same_comes_first() -> None:
    for form in (COMPOSED, DECOMPOSED):
        assert (
            PictureIndex([f"{COMPOSED}.jpg", f"{DECOMPOSED}.jpg"]).find(f"{form}.json")
            == f"{form}.jpg"
        )


def test_names_in_folders_that_look_the_same_do_not_pair() -> None:
    assert PictureIndex([f"{COMPOSED}/dög.jpg"]).find(f"{DECOMPOSED}/dög.json") is None


def test_a_picture_whose_name_begins_with_a_number_sign_is_answered(share: Share) -> None:
    share.pair("#12 kitchen")
    assert share.run_once().answered == 1
