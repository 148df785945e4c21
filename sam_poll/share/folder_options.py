"""The options of a folder source: what the settings say of it, and the waits that follow from that.

Limitations: the waits are guesses about the tools that write; a slower tool needs a longer
`settle_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sam_poll.prompts import parser

LONE_S = 10.0
"""Shortest default of `FolderOptions.lone_s`, in seconds."""


def _parse(data: bytes) -> parser.PromptFile:
    return parser.parse(data, mask_files=True)


@dataclass(frozen=True)
class FolderOptions:
    """The options of a folder source. config.yaml explains those that are settings.

    `settle_s` and `mode` are the settings `watch.settle_s` and `watch.mode`, with "auto" replaced
    by what fits the file system. `once`: answer what is there, and end.

    `patience_s`: seconds for which a picture that is cut off, or not the one that its prompt names,
    may stay as it is before it is rejected. None: five times `settle_s`.

    `lone_s`: seconds for which a prompt waits for its picture before the picture is looked for in
    `done/`. None: `LONE_S`, or the patience where that is longer, as a new picture of that name may
    take so long to come.
    """

    rescan_s: float = 10.0
    settle_s: float = 2.0
    mode: Literal["events", "poll"] = "events"
    once: bool = False
    missing_prompt: str = "wait"  # wait | everything | reject
    pair_timeout_s: float | None = None
    lone_s: float | None = None
    parse: Callable[[bytes], parser.PromptFile] = _parse
    prompt_bytes: int = parser.MAX_BYTES
    lease_s: float = 60.0
    attempts: int = 3
    sentinel: Path | None = None
    patience_s: float | None = None

    @property
    def patience(self) -> float:
        """Return `patience_s` or its default; with `once` nothing is waited for."""
        if self.once:
            return 0.0
        return 5 * self.settle_s if self.patience_s is None else self.patience_s

    @property
    def partial_match_wait(self) -> float:
        """Return how long `dog.left.json` waits for a `dog.left.jpg` before it is for `dog.jpg`.

        In seconds since the later of the two has come. Files that belong together seldom come
        further apart, and several prompts of one picture that are named in this way all wait.
        """
        return 0.0 if self.once else 2.5 * self.settle_s

    @property
    def lone_wait(self) -> float:
        """Return `lone_s` or its default; with `once` no picture is expected to come any more."""
        if self.once:
            return 0.0
        return max(LONE_S, self.patience) if self.lone_s is None else self.lone_s
