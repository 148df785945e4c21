"""What goes into one call of the network together. Pure.

What can still go wrong here: nothing but more groups than need be, for prompts that are all of different shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from sam_poll.errors import PromptError
from sam_poll.types import Prompt

T = TypeVar("T")


def chunks(items: Sequence[T], length: int) -> Iterator[Sequence[T]]:
    """`items` in order, at most `length` of them at a time."""
    return (items[start : start + length] for start in range(0, len(items), length))


def prompt_groups(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The indices of prompts that can share decoder calls: as many points, a box or none, one mask wanted or three.

    So none is padded. PromptError for a prompt that has neither points nor box.
    """
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for index, prompt in enumerate(prompts):
        if not prompt.points and prompt.box is None:
            raise PromptError("a prompt needs a point or a box", place=f"objects[{index}]")
        groups.setdefault((len(prompt.points), prompt.box is not None, prompt.ambiguous), []).append(index)
    return list(groups.values())
