"""The device's queue: what a batch takes, and when it waits."""

from __future__ import annotations

import queue
import threading

import pytest

from sam_poll.pipeline.device_queue import DeviceQueue
from sam_poll.pipeline.task import Task
from tests.support.pipelines import job


def tasks(count: int) -> list[Task]:
    return [Task(job(f"j{number}")) for number in range(count)]


def test_batch_takes_ready_tasks_in_order_up_to_its_size() -> None:
    waiting = DeviceQueue()
    first, *others = tasks(5)
    for task in others:
        waiting.put(task)
    assert waiting.batch(first, 3, wait_s=0.0) == [first, *others[:2]]
    assert waiting.qsize() == 2


def test_batch_does_not_wait_while_no_picture_is_being_decoded() -> None:
    waiting = DeviceQueue()
    (first,) = tasks(1)
    waiting.decoding_started()
    waiting.decoding_ended()
    assert waiting.batch(first, 2, wait_s=3600.0) == [first]


def test_batch_waits_for_a_picture_that_is_being_decoded() -> None:
    waiting = DeviceQueue()
    first, second = tasks(2)
    waiting.decoding_started()
    thread = threading.Thread(target=waiting.put, args=(second,))
    thread.start()
    assert waiting.batch(first, 2, wait_s=60.0) == [first, second]
    thread.join()


def test_batch_leaves_the_end_mark_for_the_device_loop() -> None:
    waiting = DeviceQueue()
    first, second, late = tasks(3)
    waiting.put(second)
    waiting.close()
    waiting.put(late)
    assert waiting.batch(first, 8, wait_s=0.0) == [first, second]
    assert waiting.get(timeout=1.0) is late
    assert waiting.get(timeout=1.0) is None


def test_get_raises_empty_after_its_timeout() -> None:
    with pytest.raises(queue.Empty):
        DeviceQueue().get(timeout=0.001)
