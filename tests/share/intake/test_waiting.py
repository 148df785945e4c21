"""Files without a partner are explained once, alike in all places, with the nearest name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sam_poll.core.errors import ExitCode
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.waiting import REPORT_AFTER_S, without_partner
from sam_poll.share.source import FolderSource
from tests.conftest import BOX, Share, picture_bytes
from tests.support.commands import Run, watch_once
from tests.support.commands import elsewhere as elsewhere
from tests.support.rough_masks import mask_bytes
from tests.support.scans import Clock, scanner_of
from tests.support.scans import clock as clock
from tests.support.scans import quiet as quiet

NEAR = [
    # the file there, the prompt, the picture that its text names, what is said
    ("Dog.jpg", "dog.json", None, ("Dog.jpg differs in upper and lower case", "call it Dog.json")),
    (
        "dog.JPG",
        "x.json",
        "dog.jpg",
        ("dog.JPG differs in upper and lower case", 'write "image": "dog.JPG"'),
    ),
    ("dog.png", "x.json", "dog.jpg", ("dog.png has another ending", 'write "image": "dog.png"')),
    (
        "dog.jxl",
        "dog.json",
        None,
        ("dog.jxl is a JPEG XL, which is not read", "save it as JPEG"),
    ),
    (
        "dog.ICO",
        "dog.left.json",
        None,
        ("dog.ICO is an icon, which is not read", "save it as JPEG"),
    ),
    ("dog.jp2", "x.json", "dog.jp2", ("dog.jp2 is a JPEG 2000", "save it as JPEG")),
    (
        "cam1/dog.jpg",
        "dog.json",
        None,
        ("cam1/dog.jpg is in another folder", "put both into one folder"),
    ),
    (
        "dog.jpg",
        "cam1/x.json",
        "dog.jpg",
        ("dog.jpg is in another folder", "put both into one folder"),
    ),
    # The name fits a picture, but the text names another one, which counts more.
    ("cat.png", "cat.json", "cat.jpg", ("its text names cat.jpg", "cat.png has another ending")),
    ("cat.jpg", "cat.left.json", "dog.jpg", ("its text names dog.jpg", "drop the picture")),
    ("kitchen-7.jpg", "kitchn-7.json", None, ("the nearest name is kitchen-7.jpg", "same name")),
    ("bird.jpg", "dog.json", None, ("no picture of its name is beside it", "drop the picture")),
]


def reasons(share: Share) -> dict[str, str]:
    return {name: str(error) for name, error in without_partner(share.layout).explained.items()}


def warned(logged: list[str]) -> list[str]:
    return [line for line in logged if line.startswith("WARNING")]


@pytest.mark.parametrize(("there", "prompt", "image", "said"), NEAR)
def test_a_prompt_without_picture_is_told_the_nearest_name(
    share: Share, there: str, prompt: str, image: str | None, said: tuple[str, str]
) -> None:
    share.drop(there, picture_bytes())
    share.drop(prompt, {**BOX, "image": image} if image else BOX)
    told = reasons(share)
    assert set(told) == {prompt}
    assert without_partner(share.layout).pictures == share.layout.is_picture(there)
    assert all(words in told[prompt] for words in said), told


def test_a_link_beside_a_prompt_is_named(share: Share, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.jpg").write_bytes(picture_bytes())
    (share.input / "dog.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    share.drop("dog.json", BOX)
    assert "dog.jpg is a link, and links are never followed" in reasons(share)["dog.json"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_beside_a_prompt_is_named(
    share: Share, make: Callable[[Path], None]
) -> None:
    make(share.input / "dog.jpg")
    share.drop("dog.json", BOX)
    assert "dog.jpg is not a file (put the picture itself there)" in reasons(share)["dog.json"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_beside_a_picture_is_named(
    share: Share, make: Callable[[Path], None]
) -> None:
    share.drop("dog.jpg", picture_bytes())
    make(share.input / "dog.json")
    assert "dog.json is not a file (put the prompt itself there)" in reasons(share)["dog.jpg"]


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ("dog.txt", "sam-poll cvat prompts"),
        ("dog.yaml", "prompts are JSON"),
        ("dog.json.txt", "call it dog.json"),
        ("dog.jpg.csv", "prompts are JSON"),
    ],
)
def test_a_picture_with_a_file_beside_it_that_is_no_prompt_is_told_so(
    share: Share, beside: str, said: str
) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop(beside, "0 0.5 0.5 0.1 0.1")
    told = reasons(share)
    assert set(told) == {"dog.jpg"}
    assert f"{beside} is of a kind that is not taken" in told["dog.jpg"]
    assert said in told["dog.jpg"]


def test_a_picture_with_a_mask_file_but_no_prompt_is_told_what_the_prompt_says(
    share: Share,
) -> None:
    share.drop("cam1/dog.jpg", picture_bytes())
    share.drop("cam1/dog.left.rough.png", mask_bytes())
    told = reasons(share)
    assert set(told) == {"cam1/dog.jpg"}
    assert "dog.left.rough.png is a mask file, which a prompt must name" in told["cam1/dog.jpg"]
    assert 'add a prompt: {"mask": "dog.left.rough.png"}' in told["cam1/dog.jpg"]
    share.drop("cam1/dog.json", {"mask": "dog.left.rough.png"})
    assert reasons(share) == {}


def test_what_has_a_partner_or_says_its_trouble_elsewhere_is_not_counted(share: Share) -> None:
    share.pair("answered")
    share.run_once()
    for name, body in (
        ("answered.json", BOX),
        ("wrong.json", "{"),
        ("named.json", {**BOX, "image": "cat.jpg"}),
    ):
        share.drop(name, body)
    share.drop("cat.jpg", picture_bytes())
    share.drop("dog.jpg", picture_bytes())
    for name in ("two.jpg", "two.png"):
        share.drop(name, picture_bytes(name[-4:]))
    share.drop("two.json", BOX)
    with FolderSource(share.layout, FolderOptions(settle_s=0.0, once=True, mode="poll")) as source:
        share.pair("busy")
        jobs = source.jobs(threading.Event())
        taken = [next(jobs) for _ in range(4)]
        share.drop("busy.left.json", BOX)
        waiting = without_partner(share.layout)
        for job in taken:
            source.requeue(job)
        jobs.close()
    assert waiting.prompts == 0
    assert waiting.explained == {}


def test_the_daemon_says_it_once_and_not_before_there_was_time_to_drop_both(
    share: Share, clock: Clock, quiet: None, logged: list[str]
) -> None:
    share.drop("Dog.jpg", picture_bytes())
    share.drop("dog.json", BOX)
    share.drop("cat.jpg", picture_bytes())
    share.drop("cat.txt", "")
    scanner = scanner_of(share, clock)
    scanner.scan(clock(), [])
    while clock.now < 1000.0 + REPORT_AFTER_S:
        assert scanner.scan(clock(), []) == []
        assert warned(logged) == []
        assert scanner.due <= 1000.0 + REPORT_AFTER_S
        clock.now += 2.5
    for _ in range(20):
        scanner.scan(clock(), [])
        clock.now += 7.0
    assert len(warned(logged)) == 2
    assert {str(error) for error in without_partner(share.layout).explained.values()} == {
        line.removeprefix("WARNING ").strip() for line in warned(logged)
    }


def test_a_picture_with_nothing_but_a_mask_file_beside_it_is_logged(
    share: Share, clock: Clock, quiet: None, logged: list[str]
) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.rough.png", mask_bytes())
    scanner = scanner_of(share, clock)
    for _ in range(20):
        scanner.scan(clock(), [])
        clock.now += 5.0
    (line,) = warned(logged)
    assert "dog.rough.png is a mask file, which a prompt must name" in line


def test_a_crowd_that_waits_alone_does_not_fill_the_log(
    share: Share, clock: Clock, quiet: None, logged: list[str]
) -> None:
    for n in range(60):
        share.drop(f"told{n:02}.json", BOX)
        share.drop(f"seen{n:02}.jpg", picture_bytes())
        share.drop(f"seen{n:02}.txt", "")
    scanner = scanner_of(share, clock)
    for _ in range(30):
        scanner.scan(clock(), [])
        clock.now += 5.0
    lines = warned(logged)
    assert len(lines) == 2 * 21
    assert sum("40 more" in line for line in lines) == 2
    waiting = without_partner(share.layout)
    assert (waiting.pictures, waiting.prompts, len(waiting.explained)) == (60, 60, 20)


def test_a_prompt_that_is_to_be_answered_on_a_picture_from_done_is_not_told_of(
    share: Share, clock: Clock, quiet: None, logged: list[str]
) -> None:
    share.done.mkdir()
    (share.done / "dog.jpg").write_bytes(picture_bytes())
    share.drop("dog.json", BOX)
    scanner = scanner_of(share, clock, settle_s=10.0)
    for _ in range(30):
        scanner.scan(clock(), [])
        clock.now += 5.0
    assert warned(logged) == []


# ── where one asks ──


def test_status_check_and_once_say_the_same(share: Share) -> None:
    share.drop("Dog.jpg", picture_bytes())
    share.drop("dog.json", BOX)
    share.pair("cat")
    sentence = "Dog.jpg differs in upper and lower case (call it Dog.json)"
    status = Run("status", share.input)
    assert "without a partner: 1 picture, 1 prompt" in status.out
    assert sentence in status.out
    check = Run("check", share.input)
    assert check.code == ExitCode.FAILED_JOBS
    assert sentence in check.out
    assert "3 fine, 1 wrong" in check.text
    once = watch_once(share, "-f", "mask", "--log", "text")
    assert once.code == ExitCode.FAILED_JOBS
    assert sentence in once.err
    assert share.tree("output") == ["cat.mask.png"]


def test_once_ends_with_3_where_what_lies_beside_a_picture_is_no_prompt_that_is_read(
    share: Share,
) -> None:
    share.drop("dog.jpg", picture_bytes())
    assert watch_once(share).code == ExitCode.OK, "it waits for its prompt"
    share.drop("dog.txt", "0 0.5 0.5 0.2 0.2")
    assert watch_once(share).code == ExitCode.FAILED_JOBS
    share.drop("dog.json", BOX)
    assert watch_once(share).code == ExitCode.OK


def test_check_takes_pictures_or_prompts_alone_as_they_are(share: Share, tmp_path: Path) -> None:
    share.drop("pictures/dog.jpg", picture_bytes())
    share.drop("prompts/dog.json", BOX)
    assert Run("check", share.input / "pictures").code == ExitCode.OK
    assert Run("check", share.input / "prompts").code == ExitCode.OK


def test_all_waiting_files_are_listed_although_few_are_explained(share: Share) -> None:
    for number in range(5):
        share.drop(f"p{number}.json", BOX)
        share.drop(f"q{number}.jpg", picture_bytes())
    waiting = without_partner(share.layout, most=2)
    assert len(waiting.explained) == 2
    assert waiting.paths == [*(f"p{n}.json" for n in range(5)), *(f"q{n}.jpg" for n in range(5))]
