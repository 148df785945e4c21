"""The pages in Portuguese say what those in English say: the same headings, commands and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAIRS = {
    "README.md": "README.pt-BR.md",
    "docs/getting-started.md": "docs/pt-BR/primeiros-passos.md",
}
pairs = pytest.mark.parametrize(("english", "translated"), PAIRS.items())


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def headings(text: str) -> list[int]:
    """The levels of the headings, in their order."""
    return [len(marks) for marks in re.findall(r"^(#+) ", prose(text), re.MULTILINE)]


def commands(text: str) -> list[list[str]]:
    """The lines of each shell or output block, without comments and the room before them."""
    return [
        [re.sub(r"\s+#.*", "", line) for line in block.splitlines()]
        for block in re.findall(r"```(?:bash|text|json)\n(.*?)```", text, re.DOTALL)
    ]


def first_cells(text: str) -> list[str]:
    """The first cells of tables' rows, if they are code or numbers: commands, exit codes."""
    return re.findall(r"^\| (`.*?`|\d+) \|", prose(text), re.MULTILINE)


def links(name: str) -> set[str]:
    """The files that a page links to, from the root of the checkout."""
    targets = re.findall(r"\]\((?![a-z]+:)([^)\s#]+)", prose(text_of(name)))
    return {
        (ROOT / name).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        for target in targets
    }


@pairs
def test_a_translation_has_the_same_headings(english: str, translated: str) -> None:
    assert headings(text_of(english)) == headings(text_of(translated))


@pairs
def test_a_translation_has_the_same_commands(english: str, translated: str) -> None:
    assert commands(text_of(english)) == commands(text_of(translated))
    assert commands(text_of(english))


@pairs
def test_a_translation_has_the_same_rows_of_commands_and_codes(
    english: str, translated: str
) -> None:
    assert first_cells(text_of(english)) == first_cells(text_of(translated))


@pairs
def test_a_translation_links_to_the_same_pages_and_pictures(english: str, translated: str) -> None:
    own = {*PAIRS, *PAIRS.values()}
    assert links(english) - own == links(translated) - own


@pairs
def test_both_link_to_each_other_at_the_top(english: str, translated: str) -> None:
    for one, other in ((english, translated), (translated, english)):
        top = text_of(one).split("\n")[2]
        found = re.findall(r"\]\(([^)]+)\)", top)
        assert [Path(ROOT / one).parent.joinpath(found[0]).resolve()] == [ROOT / other]
