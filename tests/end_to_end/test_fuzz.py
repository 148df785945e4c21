"""Whatever comes in, nothing comes out but an answer or a refusal in words: no other exception, no
hang, no flood.

A bounded number of examples, always the same ones; `make fuzz` (tools/fuzz.py) looks further,
guided by coverage."""

from __future__ import annotations

import json
import re
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sam_poll.core.errors import PictureError, PromptError, SamPollError
from sam_poll.core.types import AutomaticMaskRequest, Size
from sam_poll.imaging.decode import decode
from sam_poll.prompts.parser import as_document, fit, parse
from tests.support.bad_inputs import FAMILIES, noise, with_checksums
from tests.support.strategies import encoded, sample

CPU_S = 5.0  # one example; the slowest seen takes 0.1 s
MEMORY_MIB = (
    300  # what all examples together may add to the process; pictures have up to a megapixel
)

examples = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def mebibytes() -> int:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (
        1 if sys.platform == "darwin" else 1024
    )


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory() -> Iterator[None]:
    before = mebibytes()
    yield
    assert mebibytes() - before < MEMORY_MIB


def refusal(act: Callable[[], object], kind: type[SamPollError]) -> SamPollError | None:
    """What an act was refused with, None if it was not; anything but `kind`, and any that says too
    little, fails.
    """
    started = time.process_time()
    error = refusal_of(act, kind)
    assert time.process_time() - started < CPU_S
    if error:
        assert error.reason
        assert error.remedy
        assert str(error).isprintable()
        assert len(str(error)) < 2000
    return error


def refusal_of(act: Callable[[], object], kind: type[SamPollError]) -> SamPollError | None:
    try:
        act()
    except kind as error:
        return error
    return None


# ── prompts ──

VALID: list[dict[str, Any]] = [
    {"points": [{"x": 250, "y": 190, "label": 1}, {"x": 40.5, "y": 40, "label": 0}]},
    {
        "label": "dog",
        "box": {"x0": 150, "y0": 90, "x1": 370, "y1": 310},
        "points": [{"x": 160, "y": 100}],
    },
    {
        "extreme_points": [
            {"x": 40, "y": 25},
            {"x": 48, "y": 19},
            {"x": 56, "y": 26},
            {"x": 47, "y": 30},
        ]
    },
    {
        "objects": [
            {"label": "a", "box": {"x0": 1, "y0": 2, "x1": 3, "y1": 4}},
            {"points": [{"x": 9, "y": 6}]},
        ]
    },
    {
        "everything": {
            "points_per_side": 32,
            "min_area": 100,
            "iou": 0.8,
            "stability": 0.9,
            "crops": 0,
        }
    },
    {"everything": True, "image": "dog.png", "image_bytes": 48213, "image_sha256": "ab" * 32},
]


class Nested:
    """Lists in lists, which `json.dumps` itself could not write."""

    def __init__(self, depth: int) -> None:
        self.depth = depth


ODD_TEXT = st.sampled_from(
    [
        "",
        " ",
        "\n",
        "\0",
        "\x1b[31m",
        "\u202e",
        "\ud800",
        "\udfff\ud800",
        "\ufeff",
        "\u2028",
        "\uffff",
    ]
) | st.sampled_from(
    [
        "🐕\u200d🦺",
        "e\u0301" * 50,
        "../../x",
        "{0}",
        "%s",
        "x" * 300,
        "NaN",
        "1",
        "١٢",
        "box",
        "points",
        "objects",
    ]
)
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), ODD_TEXT, st.text(max_size=4),
    st.sampled_from([[], {}, [[]], [{}], 10**18, 10**400, -0.0, 1e308, 5e-324, 2**53 + 1]),
    st.sampled_from([3, 15, 17, 1100]).map(Nested),
)  # fmt: skip


def places(tree: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield way
    if isinstance(tree, (dict, list)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*way, key))


@st.composite
def mutated_prompts(draw: st.DrawFn) -> bytes:
    """A valid prompt with some of its values swapped, its keys renamed or doubled, its text cut,
    spliced or recoded.
    """
    tree = deepcopy(draw(st.sampled_from(VALID)))
    for times in [(2, 5), (2, 5), (2, 30, 3000)][draw(st.integers(0, 3)) :]:
        ways = [way for way in places(tree) if way]
        if ways:
            change(draw, tree, draw(st.sampled_from(ways)), times)
    text = written(tree, draw(st.booleans()))
    data = text.encode(
        draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig"])), "surrogatepass"
    )
    return draw(damaged(data)) if draw(st.booleans()) else data


def change(draw: st.DrawFn, tree: Any, way: tuple[Any, ...], times: Sequence[int]) -> None:
    """Change what lies at `way` in the tree, or its key, or have it several `times`."""
    for step in way[:-1]:
        tree = tree[step]
    how = draw(st.sampled_from(["swap", "swap", "rename", "drop", "repeat", "copy"]))
    if how == "rename" and isinstance(tree, dict):
        tree[draw(ODD_TEXT)] = tree.pop(way[-1])
    elif how == "drop":
        del tree[way[-1]]
    elif how == "repeat":
        tree[way[-1]] = [tree[way[-1]]] * draw(st.sampled_from(times))
    else:
        tree[way[-1]] = deepcopy(draw(st.sampled_from(VALID) if how == "copy" else ODD))


def written(tree: Any, ascii_only: bool) -> str:
    """JSON with NaN, big numbers and deep nests as they come; surrogates as escapes or as they
    are.
    """
    text = json.dumps(tree, ensure_ascii=ascii_only, default=lambda nest: f"nest {nest.depth}")
    return re.sub(r'"nest (\d+)"', lambda found: "[" * int(found[1]) + "]" * int(found[1]), text)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes flipped, cut off, cut out, put in, zeroed, spliced, doubled."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 600, 5000]))
        how = draw(
            st.sampled_from(["flip", "cut", "drop", "insert", "zero", "splice", "ones", "double"])
        )
        middle = {
            "flip": bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) if data else b"",
            "insert": draw(st.binary(max_size=9)) + data[at : at + 1],
            "zero": bytes(len(data[at : at + length])),
            "ones": b"\xff" * len(data[at : at + length]),
            "splice": data[(other := draw(st.integers(0, max(0, len(data) - 1)))) : other + length],
            "double": data[at : at + length] * 2,
        }
        if how == "cut":
            data = data[:at]
        else:
            skipped = {"flip": 1, "insert": 1}.get(how, length)
            data = data[:at] + middle.get(how, b"") + data[at + skipped :]
    return data


def use_prompt(data: bytes) -> None:
    """All that is done with a prompt file before its picture is decoded, and writing it again."""
    asked = parse(data).prompts
    again = parse(json.dumps(as_document(asked)).encode()).prompts
    if isinstance(asked, AutomaticMaskRequest):
        assert again == asked
    else:
        assert again == tuple(replace(prompt, notes=()) for prompt in asked)
        for prompt in fit(asked, Size(640, 480)):
            assert prompt.box is None or 0 <= prompt.box.x0 < prompt.box.x1 <= 640


@pytest.mark.slow
@given(mutated_prompts())
@settings(examples, max_examples=3000)
def test_a_mutated_prompt_is_understood_or_refused_with_place_and_remedy(data: bytes) -> None:
    error = refusal(lambda: use_prompt(data), PromptError)
    assert error is None or error.place


@given(
    st.sampled_from([2, 17, 18, 900, 1100, 100_000]),
    st.sampled_from(['{"a":', "[", '[{"a":', '{"box":{"x0":']),
)
@settings(examples, max_examples=24)
def test_no_depth_is_too_deep(depth: int, opening: str) -> None:
    closing = {"{": "}", "[": "]"}
    whole = (
        opening * depth
        + "1"
        + "".join(closing[c] for c in reversed(opening) if c in closing) * depth
    )
    for text in (whole, opening * depth):
        assert refusal(lambda text=text: parse(text.encode()), PromptError)


# ── pictures ──

SEEDS: dict[str, list[bytes]] = {
    "JPEG": [
        encoded(sample(), "JPEG", 6),
        encoded(sample(), "JPEG", progressive=True),
        noise("JPEG", 64),
    ],
    "PNG": [encoded(sample(), "PNG", 6), encoded(sample().quantize(9)), noise("PNG", 40)],
    "TIFF": [encoded(sample(), "TIFF", 6)]
    + [
        encoded(sample(), "TIFF", compression=c)
        for c in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    ]
    + [encoded(sample(), "TIFF", big_tiff=True)],
    "BMP": [encoded(sample(), "BMP"), encoded(sample().quantize(9), "BMP")],
    "WEBP": [
        encoded(sample(), "WEBP"),
        encoded(sample(), "WEBP", lossless=False),
        encoded(sample(), "WEBP", 6),
    ],
}
HUGE = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)


@st.composite
def mutated_pictures(draw: st.DrawFn, kind: str) -> bytes:
    """A valid picture, damaged; numbers of its header made huge or nothing; a PNG's checksums put
    right again.
    """
    data = draw(st.sampled_from(SEEDS[kind]))
    if draw(st.booleans()):
        grown = bytearray(data)
        for _ in range(draw(st.integers(1, 3))):
            layout = draw(st.sampled_from(["<H", ">H", "<I", ">I"]))
            at = draw(st.integers(2, min(len(data), 400) - 4))
            value = draw(st.sampled_from(HUGE)) & (0xFFFF if layout[1] == "H" else 0xFFFFFFFF)
            struct.pack_into(layout, grown, at, value)
        data = bytes(grown)
    else:
        data = draw(damaged(data))
    return with_checksums(data) if kind == "PNG" and draw(st.booleans()) else data


def use_picture(data: bytes) -> None:
    """All that is done with a picture before the network."""
    for min_decode_side in (None, 16):
        picture = decode(data, min_decode_side=min_decode_side, max_pixels=10**6)
        if min_decode_side is None:
            assert picture.pixels.shape == (picture.size.height, picture.size.width, 3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEEDS)
@given(data=st.data())
@settings(examples, max_examples=1200)
def test_a_mutated_picture_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    picture = data.draw(mutated_pictures(kind))
    refusal(lambda: use_picture(picture), PictureError)


@given(
    st.sampled_from(
        [begin for kind in SEEDS for begin in (SEEDS[kind][0][:12], SEEDS[kind][0][:40])]
    ),
    st.binary(),
)
@settings(examples, max_examples=300)
def test_a_picture_that_only_begins_like_one_is_refused(begin: bytes, rest: bytes) -> None:
    assert refusal(lambda: use_picture(begin + rest), PictureError)


def test_the_catalogues_own_files_are_read_or_refused() -> None:
    files = [item for family in FAMILIES.values() for case in family for item in case.files.items()]
    for name, body in files:
        if isinstance(body, bytes) and name.endswith(".json"):
            refusal(lambda body=body: use_prompt(body), PromptError)
        elif isinstance(body, bytes):
            refusal(lambda body=body: use_picture(body), PictureError)
