"""Whatever comes through Redis becomes a job or a refusal with a reason; nothing raises."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sam_poll.doors import redis_messages as messages
from sam_poll.errors import InputError, SamPollError
from sam_poll.prompts import parse
from sam_poll.types import Box, Document, Prompt

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
BOX = {"box": {"x0": 1, "y0": 2, "x1": 30, "y1": 40}}


def told(asked: messages.Asked) -> None:
    """A refusal has all that its reader needs, and can be sent."""
    if asked.fault is None:
        assert asked.picture
        return
    assert isinstance(asked.fault, SamPollError)
    assert asked.fault.reason
    assert asked.fault.remedy
    assert asked.picture == b""
    assert json.loads(messages.refusal(asked, asked.fault, {}))["error"]["reason"] == asked.fault.reason


@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b'{"image": "QUJD", "prompt": ' + b"9" * 5000 + b"}")
def test_any_bytes_are_a_job_or_a_refusal(data: bytes) -> None:
    told(messages.of_message(data, parse))


@given(st.fixed_dictionaries({}, optional={"image": JSON, "prompt": JSON, "id": JSON, "formats": JSON}))
@example({"image": "QUJD", "prompt": {"box": float("nan")}})
@example({"image": "QUJD", "prompt": BOX, "id": "\ud800"})
def test_any_json_object_is_a_job_or_a_refusal(said: dict[str, Any]) -> None:
    told(messages.of_message(json.dumps(said).encode(), parse))


@given(
    st.dictionaries(
        st.sampled_from([b"id", b"image", b"prompt", b"formats", b"message"]) | st.binary(max_size=4),
        st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()),
    )
)
@example({b"image": b"x", b"prompt": json.dumps(BOX).encode(), b"formats": b"[" * 100_000})
def test_any_entry_is_a_job_or_a_refusal(fields: dict[bytes, bytes]) -> None:
    told(messages.of_fields(fields, parse))


@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_base64_may_have_line_ends(encode: Any) -> None:
    said = {"image": encode(b"picture" * 50).decode(), "prompt": BOX}
    read = messages.of_message(json.dumps(said).encode(), parse)
    assert read.picture == b"picture" * 50
    assert read.file.prompts == (Prompt(box=Box(1, 2, 30, 40)),)


def test_a_message_and_an_entry_say_the_same() -> None:
    said = {"image": base64.b64encode(b"x").decode(), "prompt": {**BOX, "image": "dog.jpg"}, "id": "a"}
    one = messages.of_message(json.dumps(said).encode(), parse)
    two = messages.of_fields({b"image": b"x", b"prompt": json.dumps(said["prompt"]).encode(), b"id": b"a"}, parse)
    assert (one.picture, one.file, one.sender) == (two.picture, two.file, two.sender)
    assert (one.job("n", None).id, one.job("n", None).name) == ("a", "dog.jpg")
    assert messages.Asked().job("n", None).id == "n"


def test_what_the_prompt_says_of_its_picture_is_held_against_it() -> None:
    said = {"image": base64.b64encode(b"x").decode(), "prompt": {**BOX, "image_bytes": 5, "image_sha256": "AB" * 32}}
    job = messages.of_message(json.dumps(said).encode(), parse).job("n", None)
    assert (job.nbytes, job.sha256) == (5, "ab" * 32)


def test_an_id_may_have_a_kilobyte_and_no_more() -> None:
    assert messages.of_fields({b"id": b"x" * 1024}, parse).sender == "x" * 1024
    read = messages.of_fields({b"id": b"x" * 1025}, parse)
    assert (read.sender, read.fault and read.fault.place) == (None, "id")


def test_a_refusal_holds_a_mask_that_readers_can_open() -> None:
    with Image.open(io.BytesIO(base64.b64decode(messages.BLANK))) as blank:
        assert (blank.size, blank.mode, blank.getpixel((0, 0))) == ((1, 1), "L", 0)


def test_documents_are_chosen_by_the_format_in_their_ending() -> None:
    made = [Document(suffix, "", b"") for suffix in (".mask.1.png", ".mask.2.png", ".yolo.txt", ".yolo.yaml")]
    chosen = messages.wanted(messages.Asked(formats=("yolo",)), made)
    assert [messages.name_of(document) for document in chosen] == ["yolo.txt", "yolo.yaml"]
    with pytest.raises(InputError, match="'cvat' is not made here"):
        messages.wanted(messages.Asked(formats=("yolo", "cvat")), made)


def test_a_format_may_have_made_no_document() -> None:
    made = [Document(".opex.json", "", b"{}")]  # `mask: per-object`, where everything has found nothing
    assert messages.wanted(messages.Asked(formats=("mask",)), made, ("mask", "opex")) == []
