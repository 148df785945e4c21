"""A mask file that a prompt names: it is no picture, is waited for, and goes with its picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_poll.core.types import Job
from sam_poll.pipeline import rough_masks
from sam_poll.prompts import mask_files
from sam_poll.share.claims.model import claims_in
from sam_poll.share.intake.waiting import without_partner
from sam_poll.share.status import retry, status
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.rough_masks import mask_bytes
from tests.support.share_sources import claim_left_by, next_job_of, open_source

MASKED = {"mask": "dog.rough.png"}


@pytest.fixture
def share(tmp_path: Path) -> Share:
    return Share(tmp_path / "share")


def answer(share: Share, name: str) -> np.ndarray:
    """The mask of an answer, as the columns that have one."""
    read = cv2.imread(str(share.output / name), cv2.IMREAD_UNCHANGED)
    columns: np.ndarray = np.flatnonzero(read.any(axis=0))
    return columns


def dropped(share: Share, prompt: Any = MASKED, mask: bytes | None = None) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.rough.png", mask or mask_bytes())
    share.drop("dog.json", prompt)


def test_a_mask_file_is_read_beside_its_picture_and_goes_to_done_with_it(share: Share) -> None:
    dropped(share)
    assert share.run_once().answered == 1
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog.rough.png"]
    assert share.tree("output") == ["dog.mask.png"]
    assert share.tree("input") == share.tree("work") == share.tree("failed") == []
    columns = answer(share, "dog.mask.png")
    assert abs(int(columns[0]) - 10) <= 2
    assert abs(int(columns[-1]) - 49) <= 2


def test_the_mask_in_the_file_is_the_same_as_its_run_lengths_in_the_prompt(share: Share) -> None:
    dropped(share)
    runs = [48 * 10, *[10, 30, 8] * 40, 48 * 14]
    merged = [runs[0] + 10, *[30, 18] * 39, 30, 8 + 48 * 14]
    assert sum(merged) == 64 * 48
    share.drop("same.jpg", picture_bytes())
    share.drop("same.json", {"mask": {"size": [48, 64], "counts": merged}})
    assert share.run_once().answered == 2
    outputs = [(share.output / f"{name}.mask.png").read_bytes() for name in ("dog", "same")]
    assert outputs[0] == outputs[1]


def test_several_prompts_share_a_mask_file_or_have_their_own(share: Share) -> None:
    dropped(share)
    share.drop("dog.again.json", MASKED)
    share.drop("dog.left.rough.png", mask_bytes(2, 20))
    two = [MASKED, {"mask": "dog.left.rough.png", "label": "left"}]
    share.drop("dog.left.json", {"objects": two})
    assert share.run_once().answered == 3
    assert share.tree("done") == [
        *("dog.again.json", "dog.jpg", "dog.json", "dog.left.json"),
        *("dog.left.rough.png", "dog.rough.png"),
    ]
    first, again = ((share.output / f"{n}.mask.png").read_bytes() for n in ("dog", "dog.again"))
    assert first == again


def test_a_mask_file_is_neither_a_picture_nor_reported(share: Share) -> None:
    share.drop("dog.rough.png", mask_bytes())
    share.drop("cat.jpg", picture_bytes())
    for missing_prompt in ("wait", "everything", "reject"):
        share.run_once(missing_prompt=missing_prompt)
        assert share.tree("input")[-1] == "dog.rough.png"
    waiting = without_partner(share.layout)
    assert (waiting.pictures, waiting.prompts, waiting.explained) == (0, 0, {})
    assert status(share.layout)["input"] == {"pictures": 0, "prompts": 0, "other": 1}


def test_a_prompt_named_as_a_mask_file_is_for_the_picture(share: Share) -> None:
    dropped(share)
    (share.input / "dog.json").rename(share.input / "dog.rough.json")
    assert share.run_once().answered == 1
    assert share.tree("output") == ["dog.rough.mask.png"]


def test_a_prompt_waits_until_its_mask_file_is_there_and_complete(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", MASKED)
    with Daemon(share, settle_s=0.2, rescan_s=0.05, patience_s=60) as daemon:
        wait_until(lambda: daemon.source.scans > 20)
        assert share.tree("input") == ["dog.jpg", "dog.json"]
        share.move_in("dog.rough.png", mask_bytes())
        wait_until(lambda: share.tree("done") == ["dog.jpg", "dog.json", "dog.rough.png"])
    assert not daemon.error


def test_a_mask_file_that_is_cut_off_is_waited_for(share: Share) -> None:
    dropped(share, mask=mask_bytes()[:-20])
    with Daemon(share, settle_s=0.05, rescan_s=0.05, patience_s=60) as daemon:
        wait_until(lambda: daemon.pipeline.stats.now().released)
        wait_until(lambda: "dog.rough.png" in share.tree("input"))
        assert not share.tree("failed")
        share.drop("dog.rough.png", mask_bytes())
        wait_until(lambda: share.tree("done") == ["dog.jpg", "dog.json", "dog.rough.png"])
    assert not daemon.error


def refused(share: Share) -> dict[str, Any]:
    assert share.run_once().rejected == 1
    assert not share.tree("work")
    assert not share.tree("output")
    return share.error("dog")


def test_a_missing_mask_file_refuses_the_prompt_which_can_be_retried_with_it(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", {"objects": [{"points": [{"x": 5, "y": 5, "label": 1}]}, MASKED]})
    error = refused(share)
    assert error["place"] == "objects[1].mask"
    assert error["reason"] == "dog.rough.png is not beside the picture"
    assert "drop dog.rough.png into the input folder" in error["remedy"]
    share.drop("dog.rough.png", mask_bytes())
    assert retry(share.layout) == 1
    assert share.run_once().answered == 1
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog.rough.png"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (mask_bytes(size=(50, 50)), "the mask is 50×50, but the picture is 64×48"),
        (mask_bytes(9, 9), "is empty: all pixels are black"),
        (b"no picture", "the file is not a picture"),
        (picture_bytes(".jpg"), "is a JPEG, whose black is not exactly black"),
        (mask_bytes()[:-20], "needs"),
    ],
    ids=["size", "empty", "text", "jpeg", "cut off"],
)
def test_a_mask_file_that_cannot_be_used_refuses_its_prompt(
    share: Share, body: bytes, reason: str
) -> None:
    dropped(share, mask=body)
    error = refused(share)
    assert error["place"] == "mask, dog.rough.png"
    assert reason in error["reason"]
    assert error["remedy"]
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json", "dog.rough.png"]
    (share.failed / "dog.rough.png").write_bytes(mask_bytes())
    assert retry(share.layout) == 1
    assert share.run_once().answered == 1
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog.rough.png"]


def test_the_masks_of_a_prompt_have_a_limit_together(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rough_masks, "MAX_RUNS_TOGETHER", 150)  # a mask of 40 columns has 81
    share.drop("dog.left.rough.png", mask_bytes())
    dropped(share, {"objects": [MASKED, MASKED, {"mask": "dog.left.rough.png"}]})
    error = refused(share)
    assert error["place"] == "objects[2].mask, dog.left.rough.png"
    assert "more than 150 run lengths" in error["reason"]


def test_a_mask_file_of_another_picture_is_refused(share: Share) -> None:
    dropped(share, prompt={"mask": "cat.rough.png"})
    share.drop("cat.rough.png", mask_bytes())
    error = refused(share)
    assert (error["place"], error["reason"]) == (
        "mask",
        "cat.rough.png is not named after its picture, dog.jpg",
    )
    assert "dog.rough.png" in error["remedy"]
    assert share.tree("input") == ["cat.rough.png", "dog.rough.png"]


@pytest.mark.parametrize("name", ["../dog.rough.png", "/etc/dog.rough.png", "a\\dog.rough.png"])
def test_a_path_is_no_mask_file(share: Share, name: str) -> None:
    dropped(share, prompt={"mask": name})
    error = refused(share)
    assert error["place"] == "mask"
    assert "ends in .rough.png, without /" in error["remedy"]


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_mask_file_must_be_a_file(share: Share, tmp_path: Path, kind: str) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(mask_bytes())
    dropped(share)
    planted = share.input / "dog.rough.png"
    planted.unlink()
    match kind:
        case "link":
            planted.symlink_to(secret)
        case "pipe":
            os.mkfifo(planted)
        case _:
            planted.mkdir()
    assert "is a link or no file" in refused(share)["reason"]
    assert planted.exists()
    assert secret.read_bytes() == mask_bytes()


def test_a_link_in_the_claim_is_not_followed(share: Share, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(mask_bytes())
    dropped(share)
    with open_source(share) as source, next_job_of(source) as next_job:
        job = next_job()
        (planted,) = [path for name, path in share.at_work().items() if "rough" in name]
        planted.unlink()
        planted.symlink_to(secret)
        source.requeue(job)
    assert (share.input / "dog.rough.png").is_symlink()
    assert "is a link or no file" in refused(share)["reason"]


def masks_of(job: Job) -> list[Path]:
    assert isinstance(job.prompts, tuple)
    return [one.mask_file.path.path for one in job.prompts if one.mask_file and one.mask_file.path]


def test_a_mask_file_is_in_the_claim_and_comes_back_with_it(share: Share) -> None:
    dropped(share)
    with open_source(share) as source, next_job_of(source) as next_job:
        job = next_job()
        assert sorted(share.at_work()) == ["dog.jpg", "dog.json", "dog.rough.png"]
        assert masks_of(job) == [share.at_work()["dog.rough.png"]]
        source.requeue(job)
        assert share.tree("input") == ["dog.jpg", "dog.json", "dog.rough.png"]


@pytest.mark.parametrize("in_claim", [True, False], ids=["in the claim", "still in in"])
def test_a_claim_that_is_taken_over_has_its_mask_file(share: Share, in_claim: bool) -> None:
    dropped(share)
    files = ("dog.json", "dog.rough.png") if in_claim else ("dog.json",)
    claim_left_by(share, "dead-1-abc-0", "dog.jpg", *files)
    assert share.run_once(lease_s=0.0).answered == 1
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog.rough.png"]
    assert share.tree("input") == share.tree("work") == []


def test_a_mask_file_that_has_gone_from_a_claim_is_waited_for_in_the_input(share: Share) -> None:
    dropped(share)
    claim_left_by(share, "dead-1-abc-0", "dog.jpg", "dog.json")
    (share.input / "dog.rough.png").rename(share.root / "aside.png")
    with Daemon(share, lease_s=0.0, settle_s=0.05, rescan_s=0.05, patience_s=60) as daemon:
        wait_until(lambda: share.tree("input") == ["dog.jpg", "dog.json"])
        (share.root / "aside.png").rename(share.input / "dog.rough.png")
        wait_until(lambda: share.tree("done") == ["dog.jpg", "dog.json", "dog.rough.png"])
    assert not daemon.error
    assert not share.tree("failed")


def test_a_further_prompt_finds_the_mask_file_in_the_claim_and_in_done(share: Share) -> None:
    dropped(share)
    with open_source(share) as source, next_job_of(source) as next_job:
        first = next_job()
        share.drop("dog.again.json", MASKED)
        again = next_job()
        assert masks_of(again) == masks_of(first)
        source.deliver(first, [])
        assert share.tree("done") == ["dog.json"]  # the picture and its mask wait for the other
        source.deliver(again, [])
    assert share.tree("done") == ["dog.again.json", "dog.jpg", "dog.json", "dog.rough.png"]
    share.drop("dog.late.json", MASKED)
    assert share.run_once().answered == 1
    assert "dog.rough.png" in share.tree("done")


def test_a_new_mask_file_for_a_picture_in_done_goes_there_beside_the_old_one(share: Share) -> None:
    dropped(share)
    share.run_once()
    share.drop("dog.rough.png", mask_bytes(2, 20))
    share.drop("dog.right.json", MASKED)
    assert share.run_once().answered == 1
    assert answer(share, "dog.right.mask.png").max() <= 22
    assert share.tree("done") == [
        *("dog.jpg", "dog.json", "dog.right.json", "dog.rough.png", "dog~2.rough.png"),
    ]


def test_a_new_mask_file_waits_until_the_old_one_of_its_name_is_not_in_use(share: Share) -> None:
    dropped(share)
    with open_source(share, lone_s=0.05) as source, next_job_of(source) as next_job:
        first = next_job()
        share.drop("dog.rough.png", mask_bytes(2, 20))
        share.drop("dog.right.json", MASKED)
        share.pair("other")
        assert next_job().id == "other"  # after a scan that has left the prompt alone
        assert "dog.right.json" in share.tree("input")
        source.deliver(first, [])
        right = next_job()
        assert right.id == "dog.right"
        assert masks_of(right)[0].read_bytes() == mask_bytes(2, 20)
        source.requeue(right)


def test_a_refused_prompt_beside_an_answered_one_leaves_the_mask_file_with_the_picture(
    share: Share,
) -> None:
    dropped(share)
    share.drop("dog.bad.json", {**MASKED, "points": [{"x": 500, "y": 5, "label": 1}]})
    snapshot = share.run_once()
    assert (snapshot.answered, snapshot.rejected) == (1, 1)
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog.rough.png"]
    assert share.tree("failed") == ["dog.bad.error.json", "dog.bad.json"]
    (share.failed / "dog.bad.json").write_text('{"mask": "dog.rough.png"}')
    assert retry(share.layout) == 1
    assert share.run_once().answered == 1


def test_names_that_are_taken_get_one_number_that_the_prompt_need_not_know(share: Share) -> None:
    for x1 in (50, 30):
        dropped(share, mask=mask_bytes(10, x1))
        share.run_once()
    assert share.tree("done") == [
        *("dog.jpg", "dog.json", "dog.rough.png", "dog~2.jpg", "dog~2.json", "dog~2.rough.png"),
    ]
    for name in ("dog~2.jpg", "dog~2.json", "dog~2.rough.png"):
        (share.done / name).rename(share.input / name)
    share.drop("dog.rough.png", mask_bytes(2, 8))
    assert share.run_once().answered == 1
    assert answer(share, "dog~2.mask.png").max() <= 32
    share.drop("dog.new.json", MASKED)  # for the newest picture of the name
    (share.input / "dog.rough.png").unlink()
    assert share.run_once().answered == 1
    assert answer(share, "dog.new~2.mask.png").max() <= 32


def test_a_number_in_the_pictures_own_name_is_not_taken_for_one_that_was_appended(
    share: Share,
) -> None:
    for stem, x1 in (("IMG~2", 50), ("IMG~2~2", 30)):  # the second one came back from `failed/`
        share.drop(f"{stem}.jpg", picture_bytes())
        share.drop(f"{stem}.rough.png", mask_bytes(10, x1))
        share.drop(f"{stem}.json", {"mask": "IMG~2.rough.png"})
    assert share.run_once().answered == 2
    assert abs(int(answer(share, "IMG~2.mask.png").max()) - 49) <= 2
    assert abs(int(answer(share, "IMG~2~2.mask.png").max()) - 29) <= 2


@pytest.mark.parametrize(
    ("mask", "prompt", "names"),
    [
        ("dog.rough.png", "dog.json", ["dog.rough.png"]),
        ("dog.rough.png", "dog~2.json", ["dog~2.rough.png", "dog.rough.png"]),
        ("dog~2.rough.png", "dog~2.json", ["dog~2.rough.png", "dog~2~2.rough.png"]),
        (
            *("dog~2.rough.png", "dog~2~3.json"),
            ["dog~2~3.rough.png", "dog~2~2~3.rough.png", "dog~2.rough.png"],
        ),
        ("dog~2.left.rough.png", "dog~2.json", ["dog~2.left.rough.png", "dog~2.left~2.rough.png"]),
        ("dog~2.rough.png", "dog~2.again~3.json", ["dog~2~3.rough.png", "dog~2.rough.png"]),
        (
            *("dog.rough.png", "dog~2~3.json"),
            ["dog~2~3.rough.png", "dog~3.rough.png", "dog.rough.png"],
        ),
    ],
)
def test_the_number_that_a_prompt_was_given_is_looked_for_first(
    mask: str, prompt: str, names: list[str]
) -> None:
    assert mask_files.forms(mask, prompt) == names


def test_answered_mask_files_are_deleted_with_their_inputs(share: Share) -> None:
    share.layout = type(share.layout).below(share.root, delete_input=True)
    dropped(share)
    assert share.run_once().answered == 1
    assert share.tree("done") == share.tree("input") == share.tree("work") == []


def test_a_claim_that_has_ended_the_daemon_too_often_takes_its_mask_file_to_failed(
    share: Share,
) -> None:
    dropped(share)
    claim_left_by(share, "dead-1-abc-0", "dog.jpg", "dog.json", "dog.rough.png", hold="g3.a3.n1")
    assert share.run_once(lease_s=0.0).rejected == 1
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json", "dog.rough.png"]
    assert not list(claims_in("", share.layout.work / ".dog.jpg"))


def test_a_mask_file_is_claimed_only_as_it_was_seen(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped(share)
    with open_source(share, settle_s=0.0) as source, next_job_of(source) as next_job:
        take = source._store.take
        changed: list[int] = []

        def change_first(*args: Any) -> Any:
            if not changed:
                changed.append(share.drop("dog.rough.png", mask_bytes(2, 20)).stat().st_size)
                (share.input / "dog.rough.png").touch()
            return take(*args)

        monkeypatch.setattr(source._store, "take", change_first)
        job = next_job()
        assert changed
        assert masks_of(job)[0].read_bytes() == mask_bytes(2, 20)
        source.requeue(job)


def test_a_box_beside_the_mask_file_counts(share: Share) -> None:
    dropped(share, prompt={**MASKED, **BOX})
    assert share.run_once().answered == 1


def test_a_picture_that_is_named_as_a_mask_file_is_explained(share: Share) -> None:
    share.drop("dog.rough.png", picture_bytes(".png"))
    share.drop("dog.rough.json", BOX)
    (error,) = without_partner(share.layout).explained.values()
    assert "dog.rough.png is a mask file by its name, and no picture" in error.reason
    assert error.remedy == "rename the picture"
