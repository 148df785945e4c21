"""Any data that comes through Redis becomes a job or a refusal with a reason."""

from __future__ import annotations

import base64
import io
import json
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from sam_poll.core.errors import InputError, SamPollError
from sam_poll.core.types import Box, OutputFile, Prompt
from sam_poll.integrations.redis import messages
from sam_poll.prompts.parser import parse

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
BOX = {"box": {"x0": 1, "y0": 2, "x1": 30, "y1": 40}}


def check_request(request: messages.RedisRequest) -> None:
    """Check that a request has a picture, or an error that can be sent."""
    if request.error is None:
        assert request.picture
        return
    assert isinstance(request.error, SamPollError)
    assert request.error.reason
    assert request.error.remedy
    assert request.picture == b""
    assert (
        json.loads(messages.encode_refusal(request, request.error, {}))["error"]["reason"]
        == request.error.reason
    )


@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b'{"image": "QUJD", "prompt": ' + b"9" * 5000 + b"}")
def test_message_of_any_bytes_becomes_a_job_or_a_refusal(data: bytes) -> None:
    check_request(messages.parse_message(data, parse))


@given(
    st.fixed_dictionaries({}, optional={"image": JSON, "prompt": JSON, "id": JSON, "formats": JSON})
)
@example({"image": "QUJD", "prompt": {"box": float("nan")}})
@example({"image": "QUJD", "prompt": BOX, "id": "\ud800"})
def test_message_of_any_json_object_becomes_a_job_or_a_refusal(message: dict[str, Any]) -> None:
    check_request(messages.parse_message(json.dumps(message).encode(), parse))


@given(
    st.dictionaries(
        st.sampled_from([b"id", b"image", b"prompt", b"formats", b"message"])
        | st.binary(max_size=4),
        st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()),
    )
)
@example({b"image": b"x", b"prompt": json.dumps(BOX).encode(), b"formats": b"[" * 100_000})
def test_entry_of_any_fields_becomes_a_job_or_a_refusal(fields: dict[bytes, bytes]) -> None:
    check_request(messages.parse_fields(fields, parse))


@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])
def test_message_may_have_line_breaks_in_base64(encode: Any) -> None:
    message = {"image": encode(b"picture" * 50).decode(), "prompt": BOX}
    request = messages.parse_message(json.dumps(message).encode(), parse)
    assert request.picture == b"picture" * 50
    assert request.file.prompts == (Prompt(box=Box(1, 2, 30, 40)),)


def test_message_and_entry_of_the_same_content_make_the_same_request() -> None:
    message = {
        "image": base64.b64encode(b"x").decode(),
        "prompt": {**BOX, "image": "dog.jpg"},
        "id": "a",
    }
    one = messages.parse_message(json.dumps(message).encode(), parse)
    two = messages.parse_fields(
        {b"image": b"x", b"prompt": json.dumps(message["prompt"]).encode(), b"id": b"a"}, parse
    )
    assert (one.picture, one.file, one.sender) == (two.picture, two.file, two.sender)
    assert (one.job("n", None).id, one.job("n", None).name) == ("a", "dog.jpg")
    assert messages.RedisRequest().job("n", None).id == "n"


def test_request_carries_the_size_and_digest_that_the_prompt_demands() -> None:
    message = {
        "image": base64.b64encode(b"x").decode(),
        "prompt": {**BOX, "image_bytes": 5, "image_sha256": "AB" * 32},
    }
    job = messages.parse_message(json.dumps(message).encode(), parse).job("n", None)
    assert (job.nbytes, job.sha256) == (5, "ab" * 32)


def test_id_of_more_than_a_kilobyte_is_refused() -> None:
    assert messages.parse_fields({b"id": b"x" * 1024}, parse).sender == "x" * 1024
    request = messages.parse_fields({b"id": b"x" * 1025}, parse)
    assert (request.sender, request.error and request.error.place) == (None, "id")


def test_refusal_has_a_mask_that_can_be_opened() -> None:
    with Image.open(io.BytesIO(base64.b64decode(messages.BLANK))) as blank:
        assert (blank.size, blank.mode, blank.getpixel((0, 0))) == ((1, 1), "L", 0)


def test_prompt_of_any_depth_is_refused_with_an_answer() -> None:
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 10):
        nested = "[" * depth + "]" * depth
        text = f'{{"id": "a", "image": "aGk=", "prompt": {{"polygon": {nested}}}}}'
        request = messages.parse_message(text.encode(), parse)
        assert request.error
        answer = json.loads(messages.encode_refusal(request, request.error, {}))
        assert "nested" in answer["error"]["reason"]


def test_select_outputs_finds_the_format_in_the_suffix() -> None:
    made = [
        OutputFile(suffix, "", b"")
        for suffix in (".mask.1.png", ".mask.2.png", ".yolo.txt", ".yolo.yaml")
    ]
    chosen = messages.select_outputs(messages.RedisRequest(formats=("yolo",)), made)
    assert [messages.file_name(document) for document in chosen] == ["yolo.txt", "yolo.yaml"]
    with pytest.raises(InputError, match="'cvat'") as refused:
        messages.select_outputs(messages.RedisRequest(formats=("yolo", "cvat")), made)
    assert refused.value.place == "formats"


def test_select_outputs_accepts_a_format_that_made_no_file() -> None:
    made = [
        OutputFile(".opex.json", "", b"{}")
    ]  # `mask: per-object`, where everything has found nothing
    assert (
        messages.select_outputs(messages.RedisRequest(formats=("mask",)), made, ("mask", "opex"))
        == []
    )
