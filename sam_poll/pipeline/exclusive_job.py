"""Running one suspect job alone.

A job that was in progress when a process died may be the cause. It is run with nothing else in
progress: if it kills this process too, no other job is blamed. Tiled jobs pause meanwhile.
"""

from __future__ import annotations

import threading

from sam_poll.pipeline.task import Task


class ExclusiveJob:
    """The job that runs alone now, if any, and the tiled jobs that pause for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._task: Task | None = None
        self._paused: set[Task] = set()

    @property
    def paused_count(self) -> int:
        """How many tiled jobs pause."""
        return len(self._paused)

    def begin(self, task: Task) -> None:
        """Make all tiled jobs but `task` pause."""
        with self._lock:
            self._task = task

    def end(self) -> None:
        """Let the tiled jobs go on."""
        self._task = None

    def must_pause(self, task: Task) -> bool:
        """Return whether the tiled job `task` has to pause, and count it accordingly."""
        with self._lock:
            pause = self._task is not None and self._task is not task
            if pause:
                self._paused.add(task)
            else:
                self._paused.discard(task)
        return pause
