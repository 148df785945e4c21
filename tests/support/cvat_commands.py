"""The commands on the tasks of a CVAT stand-in: `cvat masks`, `cvat find`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from sam_poll.config import settings
from sam_poll.core.errors import ExitCode
from sam_poll.core.types import Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.cvat import client, credentials
from sam_poll.integrations.cvat.transport import RequestLimits
from tests.support.cvat_server import TOKEN, Task

QUICK = RequestLimits(connect_s=2.0, read_s=5.0, retry_delays_s=(0.0, 0.0, 0.0), poll_s=0.0)
ONCE = RequestLimits(connect_s=2.0, read_s=5.0, retry_delays_s=(), poll_s=0.0)
SIZE = Size(64, 48)


class CommandRun:
    """A command on one machine: every call uses the same journal.

    `make` makes its engines, which are kept in `engines`. A subclass has the command and its
    options.
    """

    command: ClassVar[Callable[..., ExitCode]]
    options: ClassVar[Callable[..., Any]]
    flags: ClassVar[dict[str, str]] = {"model": "fake"}

    def __init__(
        self,
        host: str,
        state: Path,
        make: Callable[[], FakeEngine] = FakeEngine,
        token: str = TOKEN,
    ) -> None:
        self.host = host
        self.state = state
        self.make = make
        self.token = token
        self.engines: list[FakeEngine] = []

    def __call__(self, task: Task, *, limits: RequestLimits = QUICK, **options: Any) -> ExitCode:
        who = credentials.Credentials(token=self.token)
        connection = client.connect(self.host, who, limits=limits)
        chosen = settings.load(None, env={}, flags=self.flags)
        kind = type(self)
        return kind.command(
            connection,
            task.id,
            kind.options(**options),
            chosen,
            self.state,
            engine_of=self._engine_of,
        )

    def _engine_of(self, _: Any) -> FakeEngine:
        self.engines.append(self.make())
        return self.engines[-1]

    def calls(self, name: str) -> int:
        """Calls of the network by all engines."""
        return sum(engine.calls[name] for engine in self.engines)
