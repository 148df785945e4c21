"""A stream's worker in a process of its own: `python -m tests.support.redis_worker URL LEASE_S`.

The label of a prompt may change what happens: `crash` ends the process as `kill -9` does, `hold`
keeps the device busy for ever.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from sam_poll.core.protocols import Embedding
from sam_poll.core.types import Prompt
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.integrations.redis.connection import RedisConnection, parse_url
from sam_poll.integrations.redis.stream import RedisStreamSource, StreamNames
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.prompts.parser import parse


class Trapped(FakeEngine):
    """An engine that does what a label says."""

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Any]:
        if prompts[0].label == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompts[0].label == "hold":
            threading.Event().wait()
        return super().decode(embedding, prompts)


def main() -> None:
    source = RedisStreamSource(
        RedisConnection(parse_url(sys.argv[1], "test")),
        StreamNames(),
        parse=parse,
        lease_s=float(sys.argv[2]),
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    made = registry.load(["mask", "opex"], registry.FormatOptions())
    with source:
        Pipeline(Trapped(), made).run(source, stop)


if __name__ == "__main__":
    main()
