"""The queue in front of the device thread, from which it takes its batches."""

from __future__ import annotations

import queue
import threading
import time

from sam_poll.pipeline.task import Task


class DeviceQueue:
    """Tasks that wait for the device. Any thread puts; the device thread takes."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._decoding = 0

    def put(self, task: Task) -> None:
        """Append a task."""
        self._tasks.put(task)

    def close(self) -> None:
        """Append the mark that ends the device loop."""
        self._tasks.put(None)

    def get(self, timeout: float) -> Task | None:
        """Return the next task; None at the end. Raises `queue.Empty` after `timeout` seconds."""
        return self._tasks.get(timeout=timeout)

    def qsize(self) -> int:
        """Return how many tasks wait."""
        return self._tasks.qsize()

    def decoding_started(self) -> None:
        """Count a picture that is being decoded, for which a batch may wait."""
        with self._lock:
            self._decoding += 1

    def decoding_ended(self) -> None:
        """Count a picture that is decoded, or will not come."""
        with self._lock:
            self._decoding -= 1

    def batch(self, first: Task, size: int, wait_s: float) -> list[Task]:
        """Return `first` and what else is ready, at most `size` tasks.

        Waits at most `wait_s` seconds, and only while pictures are being decoded.
        """
        batch = [first]
        deadline = time.monotonic() + wait_s
        while len(batch) < size:
            left = deadline - time.monotonic()
            try:
                if self._decoding and left > 0:
                    task = self._tasks.get(timeout=left)
                else:
                    task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is None:
                self._tasks.put(None)
                break
            batch.append(task)
        return batch
