"""The tables that are made from the code are as the code is now."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tools import reference

PAGES = [
    page
    for page in sorted((ROOT / "docs").rglob("*.md"))
    if reference.MARKED.search(page.read_text("utf-8"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_of_a_page_are_current(page: Path) -> None:
    text = page.read_text("utf-8")
    assert reference.written(text) == text, "run `make reference`"


def test_each_table_is_on_one_page() -> None:
    names = [
        name
        for page in PAGES
        for name in re.findall(r"<!-- reference: ([\w-]+) -->", page.read_text("utf-8"))
    ]
    assert sorted(names) == sorted(reference.BLOCKS)
