"""A picture comes as base64, bare or as a data URL, through every way in that takes text."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.core.base64_text import picture_file
from sam_poll.core.errors import InputError, PictureError
from sam_poll.integrations.http import requests as asked
from sam_poll.integrations.nuclio import requests
from sam_poll.integrations.redis import messages
from sam_poll.prompts.parser import parse

DATA = bytes(range(256))
TEXT = base64.b64encode(DATA).decode()
BOX = {"box": {"x0": 1, "y0": 2, "x1": 30, "y1": 40}}
read_prompt = partial(parse, max_bytes=1 << 16)
HEADS = [
    "",
    "data:image/png;base64,",
    "data:image/jpeg;base64,",
    "DATA:Image/SVG+XML;charset=utf-8;BASE64,",
    "data:image/vnd.microsoft.icon;name=dog 1.ico;base64,",
    "data:application/octet-stream;base64,",
    "data:;base64,",
    " \n data:image/webp;base64,\n",
]
FAULTS = [
    (f"data:image/png,{TEXT}", "not in base64"),
    (f"data:image/png;base64=,{TEXT}", "not in base64"),
    (f"data:image/png;charset=base64,{TEXT}", "not in base64"),
    ("data:image/svg+xml;utf8,<svg/>", "not a data URL"),
    (f"data:text/html;base64,{TEXT}", "not a picture"),
    (f"data:image/png;base64{TEXT}", "not a data URL"),
    (f"data:image;base64,{TEXT}", "not a data URL"),
    (f"data:image/p ng;base64,{TEXT}", "not a data URL"),
    (f"data:{'x' * 300}/y;base64,{TEXT}", "not a data URL"),
    (f"data:{TEXT}", "not a data URL"),
    ("data:image/png;base64,", "there is no picture"),
    (f"data:image/png;base64,data:image/png;base64,{TEXT}", "not base64"),
    (f"image/png;base64,{TEXT}", "not base64"),
    (f"blob:http://here/{TEXT}", "not base64"),
]


@pytest.mark.parametrize("head", HEADS)
def test_a_picture_is_taken_with_the_head_of_a_data_url_and_without(head: str) -> None:
    assert picture_file(head + TEXT, "picture") == DATA


@pytest.mark.parametrize(("text", "words"), FAULTS)
def test_base64_of_another_kind_of_file_is_refused_by_its_kind(text: str, words: str) -> None:
    with pytest.raises(PictureError, match=words) as told:
        picture_file(text, "picture")
    assert told.value.place == "picture"
    assert told.value.remedy
    assert len(str(told.value)) < 500


@given(st.text() | st.from_regex(r"\A[dD]ata:[^,]{0,30},?[A-Za-z0-9+/=;]{0,30}\Z"))
def test_any_text_is_bytes_or_a_refusal(text: str) -> None:
    with contextlib.suppress(PictureError):
        assert picture_file(text, "picture")


def over_predict(text: str) -> bytes:
    body = json.dumps({"picture": text, "prompt": BOX}).encode()
    return asked.parse_predict("application/json", body, parse=read_prompt).picture


def over_interact(text: str) -> bytes:
    return asked.parse_interact("application/json", json.dumps({"image": text}).encode()).picture


def over_nuclio(text: str) -> bytes:
    return requests.parse_request({"image": text}).picture


def over_redis(text: str) -> bytes:
    return of_redis(messages.parse_message(message(text), read_prompt))


def over_a_stream(text: str) -> bytes:
    return of_redis(messages.parse_fields({b"message": message(text)}, read_prompt))


def message(text: str) -> bytes:
    return json.dumps({"image": text, "prompt": BOX}).encode()


def of_redis(found: Any) -> bytes:
    if found.error:
        raise found.error
    return bytes(found.picture)


@pytest.mark.parametrize(
    "way", [over_predict, over_interact, over_nuclio, over_redis, over_a_stream]
)
def test_every_way_in_takes_data_urls(way: Callable[[str], bytes]) -> None:
    for head in HEADS:
        assert way(head + TEXT) == DATA
    with pytest.raises(InputError, match="not in base64"):
        way(f"data:image/png,{TEXT}")
