"""How the folder door behaves: what a user may set of it, and the waits that follow from that.

What can still go wrong here: the waits are guesses about the tools that write; a slower one needs a longer `settle_s`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sam_poll import prompts

LONE_S = 10.0  # how long a prompt without picture waits before its picture is looked for in done/


@dataclass(frozen=True)
class Manners:
    """How the folder door behaves; see config.yaml for the meaning of each.

    `patience_s`: how long a picture that is cut off, or not the one its prompt names, may stay as it is before it is
    rejected. None: five times `quiet_s`.
    """

    rescan_s: float = 10.0
    quiet_s: float = 2.0
    events: bool = True
    once: bool = False
    missing_prompt: str = "wait"  # wait | everything | reject
    pair_timeout_s: float | None = None
    lone_s: float = LONE_S
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
