"""Prose in Markdown pages wraps at 100 columns, without a change of what is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.support.paths import ROOT
from tools.wrap_docs import WIDTH, pages, wrapped

LONG = "word " * 30


def rendered(text: str) -> str:
    return re.sub(r"\s+", " ", MarkdownIt("commonmark").enable("table").render(text))


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_prose_wraps_at_100_columns(page: Path) -> None:
    text = page.read_text("utf-8")
    assert wrapped(text) == text, "run `make format`"


@pytest.mark.parametrize(
    "text",
    [
        LONG,
        f"- {LONG}\n- {LONG}",
        f"1. {LONG}\n\n   {LONG}",
        f"> {LONG}",
        f"{'a' * 96} - b {LONG}",  # a line that began with `- ` would be a list
        f"{'a' * 95} 1024. {LONG}",
        f"{'a' * 95} # b {LONG}",
        f"{LONG} `code with spaces that stays in one piece` {LONG}",
        f"{LONG} [a link {LONG}](page.md#anchor) {LONG}",
    ],
)
def test_a_wrapped_page_reads_the_same_and_is_wrapped_once(text: str) -> None:
    made = wrapped(text)
    assert rendered(made) == rendered(text)
    assert wrapped(made) == made
    assert max(map(len, made.split("\n"))) <= WIDTH + 5  # a sign that stays with the word before it


@pytest.mark.parametrize(
    "text",
    [
        f"```text\n{LONG}\n```",
        f"| a | b |\n|---|---|\n| {LONG} | x |",
        f"# {LONG}",
        f"![{LONG}](picture.png)",
        f"{LONG}  \n{LONG}",  # two spaces are a line break that is meant
        "short\nlines\nstay",
    ],
)
def test_what_may_be_longer_is_left_alone(text: str) -> None:
    assert wrapped(text) == text
