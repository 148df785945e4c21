"""Annotation files of other tools, used as prompts, are named with the command that reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.core.errors import PromptError
from sam_poll.prompts import foreign_formats, parser
from sam_poll.prompts.importers import cvat_xml
from tests.support.coco_files import COCO
from tests.support.foreign_files import LABELME, STUDIO

COMMAND = "`sam-poll cvat prompts FILE --images DIR -o IN`"

OPEX = {
    "timestamp": "",
    "id": "1",
    "objects": [{"label": "dog", "bbox": {"top": 1, "left": 2, "bottom": 3, "right": 4}}],
}
RESULTS = [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.9}]
STUDIO_MIN = [
    {"image": "/data/upload/dog.jpg", "id": 1, "annotator": 1, "annotation_id": 1, "lead_time": 2.5}
]
DATUMARO = {"info": {}, "categories": {"label": {"labels": []}}, "items": []}
VOC = b"<annotation><folder>pics</folder><filename>dog.jpg</filename></annotation>"

JSON = {
    "a labelme file": LABELME,
    "a COCO file": COCO,
    "an OPEX file": OPEX,
    "a list of COCO results": RESULTS,
    "a Label Studio export": STUDIO,
    "a Datumaro file": DATUMARO,
}


def refusal(data: bytes, **limits: int) -> PromptError:
    with pytest.raises(PromptError) as caught:
        parser.parse(data, **limits)
    assert COMMAND in (caught.value.remedy or "")
    assert caught.value.place
    return caught.value


@pytest.mark.parametrize("name", JSON)
def test_foreign_json_is_named_with_the_command_that_reads_it(name: str) -> None:
    assert f"this is {name}, not a prompt file" in refusal(json.dumps(JSON[name]).encode()).reason


def test_the_short_form_of_label_studio_is_named_too() -> None:
    assert "Label Studio" in refusal(json.dumps(STUDIO_MIN).encode()).reason


@pytest.mark.parametrize("name", JSON)
def test_foreign_json_that_is_too_large_for_a_prompt_is_named_by_its_beginning(name: str) -> None:
    """labelme puts the picture itself into its files; a COCO file of a data set has megabytes."""
    whole: Any = copied(JSON[name])
    (whole[0] if isinstance(whole, list) else whole)["zzz"] = "x" * 1_000_000
    assert name in refusal(json.dumps(whole).encode(), max_bytes=10_000).reason


def copied(document: Any) -> Any:
    return json.loads(json.dumps(document))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (VOC, "a Pascal VOC file"),
        (b"<?xml version='1.0' encoding='utf-8'?>\n" + VOC, "a Pascal VOC file"),
        (b"<annotations><version>1.1</version></annotations>", "a `CVAT for images` file"),
        (b"<kml/>", "XML with the root <kml>"),
    ],
)
def test_foreign_xml_is_named_with_the_command_that_reads_it(data: bytes, name: str) -> None:
    assert f"this is {name}, not a prompt file" in refusal(data).reason


def test_a_pascal_voc_file_dropped_as_annotations_is_named_with_the_command_that_reads_it() -> None:
    with pytest.raises(PromptError) as caught:
        cvat_xml.read(VOC)
    assert "a Pascal VOC file" in caught.value.reason
    assert COMMAND in (caught.value.remedy or "")


@pytest.mark.parametrize(
    "document",
    [
        {"objects": [{"bbox": {"x0": 1, "y0": 2, "x1": 3, "y1": 4}}]},
        {"box": {"x0": 1, "y0": 2, "x1": 3, "y1": "4"}},
        {"shapes": []},
        {"images": []},
        {"objects": [], "id": 1},
        [],
        [1],
        [{}],
    ],
)
def test_a_mistake_in_a_prompt_is_no_foreign_file(document: Any) -> None:
    with pytest.raises(PromptError) as caught:
        parser.parse(json.dumps(document).encode())
    assert "this is" not in caught.value.reason


@given(st.text(max_size=80) | st.text(st.sampled_from('[]{}":,ab\\'), max_size=40))
def test_whatever_a_text_holds_it_is_looked_at(text: str) -> None:
    foreign_formats.of_text(text)
    foreign_formats.of_xml(text.encode("utf-8", "surrogatepass"))
