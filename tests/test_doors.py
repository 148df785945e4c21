"""Both doors keep the doors' contract."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sam_poll.doors.files import FilesDoor
from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.scan import Manners
from sam_poll.types import Box, Job, Prompt
from tests.conftest import Share
from tests.door_contract import DoorContract


class TestFolderDoor(DoorContract):
    @pytest.fixture
    def door(self, share: Share) -> Iterator[FolderDoor]:
        share.pair("a")
        share.pair("b")
        with FolderDoor(share.layout, Manners(quiet_s=0.0, once=True, events=False)) as door:
            yield door

    def answers(self, door: Any) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in door.layout.output.path.iterdir()}

    def refusals(self, door: Any) -> dict[str, str]:
        errors = (json.loads(p.read_text()) for p in door.layout.failed.path.glob("*.error.json"))
        return {error["job"]: error["reason"] for error in errors}

    def test_a_released_job_is_handed_out_again(self, door: Any) -> None:
        for job in self.take(door).values():
            door.release(job)
        assert sorted(self.take(door)) == ["a", "b"]


class TestFilesDoor(DoorContract):
    @pytest.fixture
    def door(self, tmp_path: Path) -> FilesDoor:
        self.refused: dict[str, str] = {}
        jobs = [Job(name, f"{name}.jpg", b"", (Prompt(box=Box(0, 0, 1, 1)),)) for name in "ab"]
        return FilesDoor(jobs, tmp_path / "out", lambda job, error: self.refused.update({job.id: error.reason}))

    def answers(self, door: Any) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for paths in door.written.values() for path in paths}

    def refusals(self, door: Any) -> dict[str, str]:
        return self.refused
