"""When a file counts as complete, and which picture a prompt is for by its name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_poll.share.file_kinds import is_temporary
from sam_poll.share.intake.pairing import Ambiguous, PictureIndex, job_id
from sam_poll.share.intake.stability import FileEvent, Signature, StabilityTracker

A, B = Signature(1, 10, 100), Signature(1, 20, 200)


def test_file_without_an_event_settles_after_the_settling_time() -> None:
    tracker = StabilityTracker(2.0)
    assert tracker.note_signature("a", A, now=0) == 2.0
    assert tracker.note_signature("a", A, now=1.5) == 0.5
    assert tracker.note_signature("a", A, now=2.0) <= 0


def test_change_starts_the_settling_time_again() -> None:
    tracker = StabilityTracker(2.0)
    tracker.note_signature("a", A, now=0)
    assert tracker.note_signature("a", B, now=1.9) == 2.0
    assert tracker.note_signature("a", B, now=3.9) <= 0


@pytest.mark.parametrize(
    "change", [Signature(2, 10, 100), Signature(1, 11, 100), Signature(1, 10, 101)]
)
def test_inode_size_and_mtime_each_count_as_a_change(change: Signature) -> None:
    tracker = StabilityTracker(2.0)
    tracker.note_signature("a", A, now=0)
    assert tracker.note_signature("a", change, now=2.0) > 0


def test_a_file_renamed_into_place_settles_within_100_ms() -> None:
    tracker = StabilityTracker(2.0)
    tracker.note_event("a", FileEvent.RENAMED, now=5.0)
    assert tracker.note_signature("a", A, now=5.0) < 0.1
    assert tracker.note_signature("a", A, now=5.1) <= 0


def test_created_file_that_is_not_opened_settles_like_a_renamed_one() -> None:
    tracker = StabilityTracker(2.0)
    tracker.note_event("a", FileEvent.CREATED, now=5.0)
    assert tracker.note_signature("a", A, now=5.1) <= 0


def test_created_file_that_is_opened_is_being_written() -> None:
    tracker = StabilityTracker(2.0)
    tracker.note_event("a", FileEvent.CREATED, now=5.0)
    tracker.note_event("a", FileEvent.OPENED, now=5.001)
    assert tracker.note_signature("a", A, now=5.1) == pytest.approx(2.0)


def test_renamed_file_that_is_read_settles_as_before() -> None:
    tracker = StabilityTracker(2.0)
    tracker.note_event("a", FileEvent.RENAMED, now=5.0)
    tracker.note_event("a", FileEvent.OPENED, now=5.01)
    assert tracker.note_signature("a", A, now=5.1) <= 0


def test_renamed_file_that_is_written_is_being_written() -> None:
    tracker = StabilityTracker(2.0)
    tracker.note_event("a", FileEvent.RENAMED, now=5.0)
    tracker.note_event("a", FileEvent.WRITING, now=5.05)
    assert tracker.note_signature("a", A, now=5.2) > 1


def test_a_closed_file_settles_sooner_than_a_quiet_one() -> None:
    tracker = StabilityTracker(2.0)
    tracker.note_event("a", FileEvent.WRITING, now=1.0)
    tracker.note_event("a", FileEvent.CLOSED, now=1.1)
    assert tracker.note_signature("a", A, now=1.1) == pytest.approx(0.3)


def test_no_event_waits_longer_than_the_settling_time() -> None:
    tracker = StabilityTracker(0.1)
    tracker.note_event("a", FileEvent.CLOSED, now=1.0)
    assert tracker.note_signature("a", A, now=1.0) == pytest.approx(0.1)


def test_forget_all_but_forgets_other_files() -> None:
    tracker = StabilityTracker(2.0)
    tracker.note_signature("a", A, now=0)
    tracker.note_event("a", FileEvent.RENAMED, now=0)
    tracker.forget_all_but(set())
    assert tracker.note_signature("a", A, now=9) == 2.0


@given(changes=st.lists(st.tuples(st.floats(0, 5), st.integers(0, 3)), min_size=1, max_size=20))
@settings(deadline=None, max_examples=200)
def test_file_never_settles_before_it_was_unchanged_for_the_settling_time(
    changes: list[tuple[float, int]],
) -> None:
    tracker = StabilityTracker(2.0)
    now = 0.0
    changed_at = 0.0
    before = None
    for pause, size in changes:
        now += pause
        if size != before:
            before, changed_at = size, now
        unchanged_s = now - changed_at
        if tracker.note_signature("a", Signature(1, size, 1), now) <= 0:
            assert unchanged_s >= 2.0 - 1e-9
        else:  # the sums of a float clock may differ in their last digit
            assert unchanged_s <= 2.0 + 1e-9


@pytest.mark.parametrize(
    "name",
    [
        *(
            "dog.jpg.part",
            "dog.tmp",
            "dog.jpg.crdownload",
            "~$dog.json",
            ".~lock.dog.json#",
            ".dog.jpg",
            ".DS_Store",
        ),
        *(
            ".dog.jpg.Ab12Cd",
            "~syncthing~dog.jpg.tmp",
            ".syncthing.dog.jpg.tmp",
            "dog.jpg~",
            "dog.json.swp",
            "DOG.PART",
        ),
        *("DOG.PART", "dog.jpg.filepart", "._dog.jpg", "#dog.json#"),
    ],
)
def test_names_that_copying_tools_use_are_temporary(name: str) -> None:
    assert is_temporary(name)


@pytest.mark.parametrize(
    "name",
    [
        "dog.jpg",
        "part.jpg",
        "tmp.json",
        "dog~2.jpg",
        "a~b.png",
        "dog.part.jpg",
        "~dog.jpg",
        "#12 kitchen.jpg",
    ],
)
def test_names_that_merely_look_like_it_are_not(name: str) -> None:
    assert not is_temporary(name)


@pytest.mark.parametrize(
    ("prompt", "picture"),
    [
        ("dog.json", "dog.jpg"),
        ("dog.prompt", "dog.jpg"),
        ("dog.jpg.json", "dog.jpg"),
        ("dog.left.json", "dog.jpg"),
        ("dog.left.eye.json", "dog.jpg"),
        ("dog.jpg.left.json", "dog.jpg"),
        ("cat.v2.json", "cat.v2.png"),
        ("cam1/dog.json", "cam1/dog.png"),
        ("two.png.json", "two.png"),
        ("two.png.left.json", "two.png"),
    ],
)
def test_a_prompt_finds_its_picture_by_name(prompt: str, picture: str) -> None:
    index = PictureIndex(["dog.jpg", "cat.jpg", "cat.v2.png", "cam1/dog.png", "two.jpg", "two.png"])
    assert index.find(prompt) == picture


@pytest.mark.parametrize("prompt", ["bird.json", "cam2/dog.json", "do.json", "dogs.json"])
def test_a_prompt_without_picture_finds_none(prompt: str) -> None:
    assert PictureIndex(["dog.jpg", "cam1/dog.png"]).find(prompt) is None


def test_a_prompt_that_fits_two_pictures_is_ambiguous() -> None:
    assert PictureIndex(["two.jpg", "two.png"]).find("two.json") == Ambiguous(
        ("two.jpg", "two.png")
    )


def test_a_prompt_may_name_its_picture_but_only_beside_it() -> None:
    index = PictureIndex(["two.jpg", "two.png", "cam1/x.jpg"])
    assert index.named("any.json", "two.png") == "two.png"
    assert index.named("any.json", "x.jpg") is None
    assert index.named("cam1/any.json", "x.jpg") == "cam1/x.jpg"


@pytest.mark.parametrize(
    ("prompt", "picture", "shares", "twin", "expected"),
    [
        ("dog.json", "dog.jpg", False, False, "dog"),
        ("cam1/dog.json", "cam1/dog.jpg", False, False, "cam1/dog"),
        ("dog.json", "dog.png", True, False, "dog.png"),
        ("dog.png.json", "dog.png", True, False, "dog.png"),
        ("dog.left.json", "dog.png", True, False, "dog.left"),
        ("dog.prompt", "dog.jpg", False, True, "dog.prompt"),
        ("dog.prompt", "dog.png", True, True, "dog.png.prompt"),
    ],
)
def test_a_jobs_name_tells_it_from_its_siblings(
    prompt: str, picture: str, shares: bool, twin: bool, expected: str
) -> None:
    assert job_id(prompt, picture, shares_stem=shares, twin=twin) == expected
