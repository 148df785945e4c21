"""A stream's worker in a process of its own: `python -m tests.redis_worker URL LEASE_S`.

A prompt's label may be a trap: `crash` ends the process as `kill -9` does, `hold` keeps the device busy for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from sam_poll import formats
from sam_poll.doors.redis_link import Link, of
from sam_poll.doors.redis_stream import Names, StreamDoor
from sam_poll.engines.fake import FakeEngine
from sam_poll.pipeline import Pipeline
from sam_poll.prompts import parse
from sam_poll.types import Embedding, Prompt


class Trapped(FakeEngine):
    """Does what a label says."""

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Any]:
        if prompts[0].label == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompts[0].label == "hold":
            threading.Event().wait()
        return super().decode(embedding, prompts)


def main() -> None:
    door = StreamDoor(Link(of(sys.argv[1], "test")), Names(), parse=parse, lease_s=float(sys.argv[2]))
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    made = formats.load(["mask", "opex"], formats.FormatOptions())
    with door:
        Pipeline(Trapped(), made).run(door, stop)


if __name__ == "__main__":
    main()
