"""The share's job source and the file list keep the contract of job sources."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.types import Box, Job, Prompt
from sam_poll.runtime.file_list import FileListSource
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource
from tests.conftest import Share
from tests.support.source_contract import SourceContract


class TestFolderSource(SourceContract):
    @pytest.fixture
    def source(self, share: Share) -> Iterator[FolderSource]:
        share.pair("a")
        share.pair("b")
        with FolderSource(
            share.layout, FolderOptions(settle_s=0.0, once=True, mode="poll")
        ) as source:
            yield source

    def answers(self, source: Any) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in source.layout.output.path.iterdir()}

    def refusals(self, source: Any) -> dict[str, str]:
        errors = (json.loads(p.read_text()) for p in source.layout.failed.path.glob("*.error.json"))
        return {error["job"]: error["reason"] for error in errors}

    def test_a_requeued_job_is_handed_out_again(self, source: Any) -> None:
        for job in self.take(source).values():
            source.requeue(job)
        assert sorted(self.take(source)) == ["a", "b"]


class TestFileListSource(SourceContract):
    @pytest.fixture
    def source(self, tmp_path: Path) -> FileListSource:
        self.refused: dict[str, str] = {}
        jobs = [Job(name, f"{name}.jpg", b"", (Prompt(box=Box(0, 0, 1, 1)),)) for name in "ab"]
        return FileListSource(
            jobs, tmp_path / "out", lambda job, error: self.refused.update({job.id: error.reason})
        )

    def answers(self, source: Any) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for paths in source.written.values() for path in paths}

    def refusals(self, source: Any) -> dict[str, str]:
        return self.refused
