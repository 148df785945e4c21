"""The registry of formats, their options, and what all formats have in common."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

from sam_poll.cli.options import Formats
from sam_poll.core.errors import SettingsError
from sam_poll.core.types import Box, Point, Prompt, Result, Size
from sam_poll.formats import common
from sam_poll.formats import registry as formats
from sam_poll.formats.registry import FormatOptions
from tests.support.results import disc, grey_picture, rectangle, result_of

SIZE = Size(120, 90)


def full_result(**kwargs: object) -> Result:
    masks = [
        disc(SIZE, 40, 40, 30, hole=10, label="Rad"),
        rectangle(SIZE, 60, 30, 110, 80, label="Tür", score=0.7),
    ]
    prompts = [
        Prompt("Rad", points=(Point(20, 40), Point(40, 40, 0))),
        Prompt("Tür", box=Box(60, 30, 110, 80)),
    ]
    return result_of(SIZE, masks, prompts=prompts, picture=grey_picture(SIZE), **kwargs)


@pytest.mark.parametrize("name", formats.names())
class TestEveryFormat:
    """What holds for every name in the registry."""

    def test_it_writes_the_files_that_the_registry_states(self, name: str) -> None:
        documents = formats.load([name], FormatOptions())[0](full_result())
        written = {document.suffix: document.media_type for document in documents}
        assert written == formats.REGISTRY[name].files
        assert all(f".{name}." in suffix for suffix in written)
        assert all(document.body for document in documents)

    def test_it_writes_several_files_only_where_the_registry_says_so(self, name: str) -> None:
        for choice in ("instances", "per-object"):
            options = FormatOptions(mask=choice)
            documents = formats.load([name], options)[0](full_result())
            assert (len(documents) > 1) == formats.writes_several(name, options)

    def test_it_needs_the_picture_only_where_the_registry_says_so(self, name: str) -> None:
        without = dataclasses.replace(full_result(), picture=None)
        assert bool(formats.load([name], FormatOptions())[0](without)) != formats.draws([name])

    def test_it_is_named_by_the_help_of_every_command_that_takes_formats(self, name: str) -> None:
        assert name in Formats.__metadata__[0].help

    def test_the_same_result_gives_the_same_bytes(self, name: str) -> None:
        first, second = (formats.load([name], FormatOptions())[0](full_result()) for _ in range(2))
        assert [d.body for d in first] == [d.body for d in second]

    def test_the_time_a_job_took_is_in_no_file(self, name: str) -> None:
        make = formats.load([name], FormatOptions())[0]
        one, other = (
            make(full_result(timings={"encode": 12.5})),
            make(full_result(timings={"encode": 99.0})),
        )
        assert [d.body for d in one] == [d.body for d in other]

    def test_a_result_without_objects_is_no_error(self, name: str) -> None:
        assert formats.load([name], FormatOptions())[0](
            result_of(SIZE, [], picture=grey_picture(SIZE))
        )

    def test_an_empty_mask_among_others_is_no_error(self, name: str) -> None:
        empty = rectangle(SIZE, 5, 5, 5, 5, score=math.nan)
        assert formats.load([name], FormatOptions())[0](
            result_of(SIZE, [empty, rectangle(SIZE, 1, 1, 9, 9)], picture=grey_picture(SIZE))
        )

    def test_more_masks_than_prompts_is_no_error(self, name: str) -> None:
        result = dataclasses.replace(full_result(), prompts=())
        assert formats.load([name], FormatOptions())[0](result)

    def test_nothing_is_written_into_the_result(self, name: str) -> None:
        result = full_result()
        assert result.picture is not None
        before = [result.picture.pixels.copy(), *(mask.pixels.copy() for mask in result.masks)]
        formats.load([name], FormatOptions())[0](result)
        after = [result.picture.pixels, *(mask.pixels for mask in result.masks)]
        assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_formats_are_loaded_in_the_requested_order_and_each_once() -> None:
    made = formats.load(["opex", "mask", "opex"], FormatOptions())
    assert [document.suffix for make in made for document in make(full_result())] == [
        ".opex.json",
        ".mask.png",
    ]


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match="overlay") as caught:
        formats.load(["mask", "overlai"], FormatOptions())
    assert caught.value.place == "formats"


def test_an_unknown_name_near_to_none_is_refused_with_all() -> None:
    with pytest.raises(SettingsError, match=", ".join(formats.names())):
        formats.load(["zzz"], FormatOptions())


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ({"mask": "per_object"}, "mask"),
        ({"cvat": "polygons"}, "cvat"),
        ({"coco": "mask"}, "coco"),
        ({"tolerance_px": -1}, "tolerance_px"),
        ({"tolerance_px": math.nan}, "tolerance_px"),
        ({"min_area_px": math.inf}, "min_area_px"),
        ({"overlay_max_side": 0}, "overlay_max_side"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused_with_its_name(
    options: dict[str, object], place: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        FormatOptions(**options)  # type: ignore[arg-type]
    assert caught.value.place == place


@pytest.mark.parametrize(
    ("score", "published"),
    [(0.93126, 0.9313), (1.02, 1.0), (-0.1, 0.0), (math.nan, None), (math.inf, None)],
)
def test_a_score_in_a_file_is_an_iou_or_absent(score: float, published: float | None) -> None:
    assert common.published_score(score) == published


def test_the_settings_say_what_cvat_and_coco_hold() -> None:
    from sam_poll.config.settings import Settings
    from sam_poll.runtime.builders import formats_of

    settings = Settings(formats=("cvat", "coco"), cvat="polygon", coco="polygon")
    (cvat,), (coco,) = (make(full_result()) for make in formats_of(settings))
    assert b"<polygon" in cvat.body
    assert b'"segmentation": [[' in coco.body


def test_asking_for_the_names_imports_nothing_heavy() -> None:
    heavy = "{'cv2', 'torch', 'PIL', 'pycocotools', 'numpy', 'yaml'}"
    code = (
        f"import sys, sam_poll.formats.registry as f; f.names(); print({heavy} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"
