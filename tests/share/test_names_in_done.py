"""Outputs of two pictures never have the same names, whatever their owners call them."""

from __future__ import annotations

import pytest

from tests.conftest import BOX, Share, picture_bytes
from tests.support.share_sources import next_job_of, open_source
from tests.support.source_contract import DOCUMENTS


def finish(share: Share, *names: str) -> None:
    """Drop pairs in one go, and let a daemon answer them."""
    for seed, name in enumerate(names):
        stem, _, ending = name.rpartition(".")
        share.drop(name, picture_bytes(f".{ending}", seed=seed))
        share.drop(f"{stem}.json", BOX)
    assert share.run_once().answered == len(names)


def masks(share: Share) -> set[str]:
    return {name.removesuffix(".mask.png") for name in share.tree("output") if "mask" in name}


def pictures(share: Share) -> set[str]:
    return {name for name in share.tree("done") if not name.endswith(".json")}


@pytest.mark.parametrize("numbered", ["dog~2.jpg", "dog~2.png"])
def test_a_second_picture_is_not_called_as_one_that_waits_beside_it(
    share: Share, numbered: str
) -> None:
    finish(share, "dog.jpg")
    finish(share, "dog.jpg", numbered)
    assert pictures(share) == {"dog.jpg", numbered, "dog~3.jpg"}
    assert masks(share) == {"dog", "dog~2", "dog~3"}


def test_a_second_picture_is_not_called_as_one_of_another_ending_in_done(share: Share) -> None:
    finish(share, "dog.jpg", "dog~2.png")
    finish(share, "dog.jpg")
    assert pictures(share) == {"dog.jpg", "dog~2.png", "dog~3.jpg"}
    assert masks(share) == {"dog", "dog~2", "dog~3"}


def test_a_numbered_picture_leaves_its_name_to_a_second_one_that_another_daemon_has_claimed(
    share: Share,
) -> None:
    finish(share, "dog.jpg")
    share.pair("dog", seed=1)
    with open_source(share) as other, next_job_of(other) as next_job:
        job = next_job()
        assert job.id == "dog~2"
        finish(share, "dog~2.jpg")
        other.deliver(job, DOCUMENTS)
    assert pictures(share) == {"dog.jpg", "dog~2.jpg", "dog~2~2.jpg"}
    assert masks(share) == {"dog", "dog~2", "dog~2~2"}


def test_numbered_pictures_keep_their_names_beside_one_that_is_new(share: Share) -> None:
    finish(share, "dog.jpg", "dog~2.jpg", "dog~3.jpg")
    assert pictures(share) == {"dog.jpg", "dog~2.jpg", "dog~3.jpg"}
    assert masks(share) == {"dog", "dog~2", "dog~3"}
