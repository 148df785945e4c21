"""Ends a command of `integrations.cvat` around any of its writes, to the journal or the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.journal import Journal


class Killed(BaseException):
    """Stands for the end of the process."""


class LethalWrites:
    """Ends a run before or after one of its writes; `count` are those that it got to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._end = 0, False
        for kind, name in ((Journal, "append"), (CvatClient, "change_shapes")):
            monkeypatch.setattr(kind, name, self._lethal(getattr(kind, name)))

    def _lethal(self, real: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            if not self._end[0]:
                return real(*args, **more)
            self.count += 1
            number = self.count
            if self._end == (number, False):
                raise Killed
            value = real(*args, **more)
            if self._end == (number, True):
                raise Killed
            return value

        return call

    def numbers(self) -> Iterator[int]:
        """Yield the number of each write, until a run has ended before it."""
        number = 1
        while True:
            yield number
            if self.count < number:
                return
            number += 1

    @contextmanager
    def killing(self, number: int, *, after: bool) -> Iterator[None]:
        """End the run in this context around its write `number`, if it gets that far."""
        self.count, self._end = 0, (number, after)
        try:
            yield
        except Killed:
            pass
        finally:
            self._end = 0, False
