"""Tests of which picture a name in an annotation file refers to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.core.errors import PictureError
from sam_poll.integrations.cvat.image_lookup import Pictures


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["cam1/dog.jpg"], "cam1/dog.jpg"),
        (["done/cam1/dog.jpg"], "cam1/dog.jpg"),
        (["/mnt/share/done/cam1/dog.jpg"], "cam1/dog.jpg"),
        (["done\\cam1\\dog.jpg"], "cam1/dog.jpg"),
        (["./cam1//dog.jpg"], "cam1/dog.jpg"),
        (["x/cat.png"], "cat.png"),
        (["deep.jpg"], "a/b/deep.jpg"),
        (["b/deep.jpg"], "a/b/deep.jpg"),
        (["cam1/dog"], "cam1/dog.jpg"),
        (["labels/train/cat"], "cat.png"),
        (["deep"], "a/b/deep.jpg"),
        (["v1.2"], "v1.2.jpg"),
        (["2024-05-06 07:08:09", "cam1/dog"], "cam1/dog.jpg"),
    ],
)
def test_find_matches_the_path_then_path_endings_then_names_without_leading_folders(
    names: list[str], found: str
) -> None:
    assert (
        Pictures(["cam1/dog.jpg", "cat.png", "a/b/deep.jpg", "v1.2.jpg", "a/cam1/dog.jpg"]).find(
            names
        )
        == found
    )


@pytest.mark.parametrize("name", ["dog.jpg", "cam3/dog.jpg", "CAT.png", "og.jpg", "cat.jpg", "dog"])
def test_find_refuses_ambiguous_and_unknown_names(name: str) -> None:
    with pytest.raises(PictureError):
        Pictures(["cam1/dog.jpg", "cam2/dog.jpg", "cat.png"]).find([name])


def test_find_prefers_originals_to_copies_of_an_earlier_run() -> None:
    assert (
        Pictures(["raw/cam1/dog.jpg", "in/raw/cam1/dog.jpg"], "in/").find(["dog.jpg"])
        == "raw/cam1/dog.jpg"
    )


@given(st.text(max_size=30) | st.text(st.sampled_from("./\\ab"), max_size=12))
def test_find_returns_only_listed_pictures(name: str) -> None:
    listed = ["a.jpg", "a/b.jpg", "b/a.jpg", "a/b/a.png"]
    try:
        assert Pictures(listed).find([name]) in listed
    except PictureError as error:
        assert error.remedy  # noqa: PT017  a refusal is the other right answer
