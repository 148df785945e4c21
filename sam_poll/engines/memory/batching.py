"""Grouping of pictures and prompts into calls of the network. Pure.

Limitations: prompts that all differ in shape need one call each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from sam_poll.core.errors import PromptError
from sam_poll.core.types import Prompt

T = TypeVar("T")


def chunks(items: Sequence[T], length: int) -> Iterator[Sequence[T]]:
    """Yield `items` in order, in chunks of at most `length`."""
    return (items[start : start + length] for start in range(0, len(items), length))


def prompt_groups(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the indices of prompts that can share a call of the decoder, as groups.

    The prompts of a group agree in the number of points, in having a box, in having a shape, and in
    being ambiguous (one mask or three), so that none needs padding. Raises PromptError for a prompt
    that has neither points nor a box.
    """
    groups: dict[tuple[int, bool, bool, bool], list[int]] = {}
    for index, prompt in enumerate(prompts):
        if not prompt.points and prompt.box is None:
            raise PromptError("a prompt needs a point or a box", place=f"objects[{index}]")
        has_box, has_shape = prompt.box is not None, prompt.shape is not None
        key = (len(prompt.points), has_box, has_shape, prompt.ambiguous)
        groups.setdefault(key, []).append(index)
    return list(groups.values())
