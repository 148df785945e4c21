"""Tests of the prompts of a task's frames: matched by name, checked for size, with their labels."""

from __future__ import annotations

import pytest

from sam_poll.core.errors import InputError, UsageError
from sam_poll.core.types import Box, Prompt, Size
from sam_poll.integrations.cvat.sdk import boxes
from sam_poll.integrations.cvat.shapes import FramePicture
from tests.support.cvat_server import StandIn, score_spec


def test_frames_are_matched_by_name_with_or_without_leading_folders() -> None:
    def one(size: Size) -> list[Prompt]:
        return []

    def two(size: Size) -> list[Prompt]:
        return []

    prompts = boxes.FramePrompts({"cam1/dog.jpg": one, "dog.jpg": two}, ("dog",))
    assert prompts.find("done/cam1/dog.jpg") is one
    assert prompts.find("cam1/dog.jpg") is one
    assert prompts.find("cam2/dog.jpg") is two
    assert prompts.find("cat.jpg") is None


def test_a_part_of_a_picture_is_not_segmented_with_the_boxes_of_the_whole() -> None:
    frames = {0: FramePicture(0, "a.png", Size(64, 48))}
    labels = [{"id": 1, "name": "dog", "attributes": []}]
    drawn = [{"type": "rectangle", "frame": 0, "label_id": 1, "points": [1, 2, 30, 40]}]
    prompts_for = boxes.from_shapes(drawn, labels, frames).find("a.png")
    assert prompts_for
    assert [prompt.box for prompt in prompts_for(Size(64, 48))] == [Box(1, 2, 30, 40)]
    with pytest.raises(InputError, match="64×48"):
        prompts_for(Size(32, 48))


def test_points_on_a_frame_of_two_jobs_are_one_object() -> None:
    memory = StandIn()
    task = memory.add_task("two jobs", [(f"{n}.png", b"") for n in range(4)], "dog")
    memory.split(task, segment_size=3, overlap=2)
    memory.draw(task, 1, "points", "dog", [5, 6])
    memory.draw(task, 1, "rectangle", "dog", [1, 2, 30, 40])
    assert [shape["type"] for shape in task.shapes].count("points") == 2
    frames = {n: FramePicture(n, f"{n}.png", Size(64, 48)) for n in range(4)}
    prompts_for = boxes.from_shapes(task.shapes, task.labels, frames).find("1.png")
    assert prompts_for
    assert len(prompts_for(Size(64, 48))) == 2


def test_frames_of_the_same_name_are_refused() -> None:
    frames = {n: FramePicture(n, "video.mp4", Size(64, 48)) for n in range(2)}
    with pytest.raises(UsageError, match="same name"):
        boxes.from_shapes([], [], frames)


def test_a_score_attribute_of_the_task_is_used_if_it_is_a_text(logged: list[str]) -> None:
    labels = [
        {"id": 1, "name": "dog", "attributes": [{"id": 3, **score_spec()}]},
        {
            "id": 2,
            "name": "cat",
            "attributes": [{"id": 4, **score_spec("number", ("0", "100", "1"))}],
        },
    ]
    frames = {0: FramePicture(0, "a.png", Size(64, 48))}
    drawn = [
        {"type": "rectangle", "frame": 0, "label_id": n, "points": [1, 2, 30, 40]} for n in (1, 2)
    ]
    prompts = boxes.from_shapes(drawn, labels, frames)
    assert (prompts.labels, prompts.scored) == (("dog", "cat"), {"dog"})
    assert any("'cat'" in line for line in logged)
