"""Tests of text for messages."""

from __future__ import annotations

from sam_poll.core.text import listed


def test_a_long_list_of_names_is_shortened_and_made_printable() -> None:
    assert listed([]) == ""
    assert listed(["a\nb", "c"]) == "a\\nb, c"
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
