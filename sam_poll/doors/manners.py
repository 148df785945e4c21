"""How the folder door behaves: what a user may set of it, and the waits that follow from that.

What can still go wrong here: the waits are guesses about the tools that write; a slower one needs a longer `settle_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sam_poll import prompts

LONE_S = 10.0


@dataclass(frozen=True)
class Manners:
    """How the folder door behaves; see config.yaml for the meaning of each.

    `patience_s`: how long a picture that is cut off, or not the one its prompt names, may stay as it is before it is
    rejected. None: five times `quiet_s`. `lone_s`: how long a prompt without picture waits before its picture is looked
    for in `done/`. None: `LONE_S`, or the patience where that is longer: a new picture of the name has so long to come.
    """

    rescan_s: float = 10.0
    quiet_s: float = 2.0
    events: bool = True
    once: bool = False
    missing_prompt: str = "wait"  # wait | everything | reject
    pair_timeout_s: float | None = None
    lone_s: float | None = None
    parse: Callable[[bytes], prompts.PromptFile] = prompts.parse
    prompt_bytes: int = prompts.MAX_BYTES
    lease_s: float = 60.0
    attempts: int = 3
    sentinel: Path | None = None
    patience_s: float | None = None

    @property
    def patience(self) -> float:
        """See `patience_s`; who only drains what is there waits for nothing."""
        return 0.0 if self.once else 5 * self.quiet_s if self.patience_s is None else self.patience_s

    @property
    def partial_match_wait(self) -> float:
        """How long `dog.left.json` waits for a `dog.left.jpg` before it is for `dog.jpg`, in seconds since the later of
        the two has come. Files that belong together seldom come further apart; and the several prompts of one picture
        that are called so all wait."""
        return 0.0 if self.once else 2.5 * self.quiet_s

    @property
    def lone_wait(self) -> float:
        """See `lone_s`; who only drains what is there expects no picture to come any more."""
        if self.once:
            return 0.0
        return max(LONE_S, self.patience) if self.lone_s is None else self.lone_s
