"""Embeddings on a disk: whole or not there, bounded, shared, and never in the way of a job."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loguru import logger

from sam_poll import engines
from sam_poll.core.errors import PictureError
from sam_poll.core.protocols import Engine
from sam_poll.core.stats import Stats
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import AutomaticMaskRequest, Box, Job, Point, Prompt
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.pipeline.disk_cache import DamagedFileError, DiskCache
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.predictor import Predictor
from sam_poll.pipeline.worker_process import WorkerSetup
from tests.conftest import Share, picture_bytes, wait_until
from tests.support.disk_caches import (
    NETWORK_NOW,
    bytes_in,
    cache_of,
    embedding_of,
    key_of,
    number_in,
    put,
)
from tests.support.paths import ROOT
from tests.support.pipelines import MemorySource, job, run
from tests.support.worker_pools import drain, pool_of

ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
CLICK = (Prompt(points=(Point(20, 20),)),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "embeddings"


def file_bytes(folder: Path) -> int:
    """Return the size of one file of these tests."""
    put(cache_of(folder / "one"), 1)
    return bytes_in(folder / "one")


# ── one file ──


def test_what_is_written_is_read_by_another_process_or_later(folder: Path) -> None:
    put(cache_of(folder), 7)
    later = cache_of(folder)
    assert number_in(later, 7) == 7
    found = later.read(key_of(later, 7))
    assert found
    assert found[0].size == embedding_of(7).size
    assert [path.suffix for path in folder.iterdir()] == [".embedding"]


def test_another_picture_network_runtime_precision_or_side_is_another_embedding(
    folder: Path,
) -> None:
    cache = cache_of(folder)
    put(cache, 7)
    assert cache.read(cache.key("picture 8", NETWORK_NOW)) is None
    others: list[dict[str, Any]] = [{"precision": "bfloat16"}, {"side": 512}, {"runtime": "other"}]
    for other in others:
        assert cache.read(cache.key("picture 7", replace(NETWORK_NOW, **other))) is None
    assert number_in(cache_of(folder, network="net@5678"), 7) is None


def _cut(body: bytes) -> bytes:
    return body[:-100]


def _shorter_by_a_byte(body: bytes) -> bytes:
    return body[:-1]


def _flipped(body: bytes) -> bytes:
    return body[:-50] + bytes([body[-50] ^ 1]) + body[-49:]


def _flipped_in_the_header(body: bytes) -> bytes:
    return body[:40] + bytes([body[40] ^ 1]) + body[41:]


def _zeros(body: bytes) -> bytes:
    return bytes(len(body))


def _longer(body: bytes) -> bytes:
    return body + b"\0"


def _empty(body: bytes) -> bytes:
    return b""


DAMAGES = [_cut, _shorter_by_a_byte, _flipped, _flipped_in_the_header, _zeros, _longer, _empty]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_from_a_whole_one(folder: Path, damage: Any) -> None:
    cache = cache_of(folder)
    put(cache, 7)
    [path] = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFileError):
        number_in(cache, 7)


def test_a_whole_file_under_the_name_of_another_is_not_used(folder: Path) -> None:
    cache = cache_of(folder)
    put(cache, 7)
    put(cache, 8)
    (folder / key_of(cache, 7).name).rename(folder / key_of(cache, 8).name)
    with pytest.raises(DamagedFileError):
        number_in(cache, 8)


def test_a_number_that_is_none_in_a_whole_file_makes_it_damaged(folder: Path) -> None:
    cache = cache_of(folder)
    put(cache, 7)
    [path] = folder.iterdir()
    body = path.read_bytes()[:-4].replace(b"[640,480]", b"[1e999,9]")
    path.write_bytes(body + struct.pack("<I", zlib.crc32(body)))
    with pytest.raises(DamagedFileError):
        number_in(cache, 7)


def test_a_planted_link_is_neither_followed_nor_written_through(
    folder: Path, tmp_path: Path
) -> None:
    cache, outside = cache_of(folder), tmp_path / "outside"
    folder.mkdir()
    outside.write_bytes(b"mine")
    (folder / key_of(cache, 7).name).symlink_to(outside)
    with pytest.raises(OSError, match="symbolic links"):
        number_in(cache, 7)
    put(cache, 7)
    assert number_in(cache, 7) == 7
    assert outside.read_bytes() == b"mine"


# ── the bound ──


def test_the_folder_stays_below_its_limit_and_the_least_recently_used_go_first(
    folder: Path,
) -> None:
    limit = 20 * file_bytes(folder.parent)
    cache = cache_of(folder, limit)
    for number in range(12):
        put(cache, number)
        os.utime(folder / key_of(cache, number).name, (number, number))
    assert number_in(cache, 0) == 0  # used: now it is the newest
    removed = 0
    for number in range(12, 24):
        removed += put(cache, number)
        assert bytes_in(folder) <= limit
    there = [number for number in range(24) if number_in(cache, number) is not None]
    assert 17 <= len(there) == 24 - removed
    assert there == [0, *range(24 - len(there) + 1, 24)]


def test_an_embedding_larger_than_the_limit_is_refused_and_removes_nothing(folder: Path) -> None:
    limit = 2 * file_bytes(folder.parent)
    cache = cache_of(folder, limit)
    put(cache, 1)
    with pytest.raises(ValueError, match="larger than the limit"):
        cache.write(key_of(cache, 2), embedding_of(2, 4096), [])
    assert number_in(cache, 1) == 1


def test_files_of_others_in_the_folder_are_neither_counted_nor_removed(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_bytes(bytes(1 << 20))
    cache = cache_of(folder, 4 * file_bytes(folder.parent))
    for number in range(10):
        put(cache, number)
    assert number_in(cache, 9) == 9
    assert (folder / "notes.txt").stat().st_size == 1 << 20


def test_what_a_killed_writer_left_is_removed_after_an_hour(folder: Path) -> None:
    folder.mkdir()
    old, new = folder / ".sam_poll-1-1-1.tmp", folder / ".sam_poll-2-2-2.tmp"
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    hour_ago = new.stat().st_mtime - 3700
    os.utime(old, (hour_ago, hour_ago))
    put(cache_of(folder), 1)
    assert not old.exists()
    assert new.exists()


# ── several processes ──


def writer(folder: Path, limit: int, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.support.disk_caches", str(folder), str(limit)]
    command += [str(first), str(count)]
    return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, text=True)


def test_several_processes_share_a_folder_and_its_limit(folder: Path) -> None:
    limit = 40 * file_bytes(folder.parent)
    writers = [writer(folder, limit, first, 150) for first in (0, 50, 100)]
    for process in writers:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert bytes_in(folder) <= limit
    assert not list(folder.glob(".*"))
    cache = cache_of(folder, limit)
    there = [number for number in range(250) if number_in(cache, number) is not None]
    assert len(there) >= 20


def test_a_process_that_is_killed_while_it_writes_leaves_whole_files_only(folder: Path) -> None:
    for _ in range(3):
        process = writer(folder, 1 << 30, 0, 100_000)
        for path in folder.glob("*.embedding"):
            path.unlink()
        wait_until(lambda: len(list(folder.glob("*.embedding"))) > 20)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    cache = cache_of(folder)
    names = {path.name for path in folder.glob("*.embedding")}
    whole = {number for number in range(len(names)) if number_in(cache, number) == number}
    assert len(whole) == len(names) > 0


# ── in the pipeline ──


def answers(source: MemorySource) -> dict[str, list[bytes]]:
    return {name: [file.body for file in files] for name, files in source.delivered.items()}


def events(stats: Stats) -> dict[str, int]:
    return stats.now().disk_cache


@pytest.mark.parametrize("pixels", [True, False])
def test_a_second_process_encodes_nothing_and_answers_the_same(folder: Path, pixels: bool) -> None:
    found = []
    for expected in (3, 0):
        engine = FakeEngine()
        source = MemorySource([job(f"j{n}", seed=n) for n in range(3)])
        pipeline = run(source, engine, pixels=pixels, disk_cache=cache_of(folder))
        assert len(engine.encoded) == expected
        found.append((answers(source), events(pipeline.stats)))
    (first, counted_first), (second, counted_second) = found
    assert first == second
    assert len(first) == 3
    assert counted_first == {"miss": 3, "written": 3}
    assert counted_second == {"hit": 3}


def test_without_a_disk_cache_nothing_is_written_and_nothing_counted(tmp_path: Path) -> None:
    pipeline = run(MemorySource([job("dog")]))
    assert events(pipeline.stats) == {}
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def demo() -> Engine:
    return engines.load(engines.resolve("demo"), device="cpu", precision="float32")


def test_a_network_answers_byte_for_byte_the_same_with_and_without_the_file(
    folder: Path, demo: Engine
) -> None:
    prompts = (*CLICK, Prompt("box", box=Box(8, 8, 50, 40)))
    found = []
    for _ in range(2):
        jobs = [job("clicks", prompts=prompts), job("all", 1, AutomaticMaskRequest(4, iou=0))]
        source = MemorySource(jobs)
        pipeline = run(source, demo, disk_cache=cache_of(folder))
        found.append((answers(source), events(pipeline.stats)))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 2
    assert found[1][1] == {"hit": 2}
    sizes = [path.stat().st_size for path in folder.iterdir()]
    [embedding] = demo.encode([demo.prepare(picture_of(64, 48))])
    assert max(sizes) < embedding.nbytes / 2 + 2000  # half of float32, and the header


def picture_of(width: int, height: int) -> Any:
    from tests.support.engine_contract import picture

    return picture(width, height)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_embedding_is_computed_anew_and_replaced(folder: Path, damage: Any) -> None:
    run(MemorySource([job("dog")]), disk_cache=cache_of(folder))
    [path] = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    engine = FakeEngine()
    source = MemorySource([job("dog")])
    lines = list[str]()
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    pipeline = run(source, engine, disk_cache=cache_of(folder))
    logger.remove(sink)
    assert list(source.delivered) == ["dog"]
    assert len(engine.encoded) == 1
    assert events(pipeline.stats) == {"damaged": 1, "written": 1}
    assert path.read_bytes() == whole
    [line] = lines
    assert path.name in line


def test_a_disk_that_cannot_be_used_delays_no_job_and_is_reported_once(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    source, lines = MemorySource([job(f"j{n}", seed=n) for n in range(3)]), list[str]()
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    pipeline = run(source, disk_cache=cache_of(blocked / "embeddings"))
    logger.remove(sink)
    assert len(source.delivered) == 3
    assert events(pipeline.stats)["failed"] >= 3
    [line] = lines
    assert "embeddings cannot be kept" in line
    assert str(blocked) in line


def test_an_embedding_of_a_picture_above_the_limit_does_not_let_it_in(folder: Path) -> None:
    run(MemorySource([job("dog")]), disk_cache=cache_of(folder))
    source = MemorySource([job("dog")])
    run(source, max_pixels=1000, disk_cache=cache_of(folder))
    assert isinstance(source.rejected["dog"], PictureError)


def test_a_job_that_keeps_its_embedding_writes_it_even_if_memory_has_it(folder: Path) -> None:
    class Emptied(MemorySource):
        """Removes the file before the second job is handed out."""

        def jobs(self, stop: threading.Event) -> Any:
            yield self.waiting[0]
            wait_until(lambda: "first" in self.delivered)
            for path in folder.iterdir():
                path.unlink()
            yield self.waiting[1]

    results: list[Any] = []
    engine = FakeEngine()
    source = Emptied([job("first"), Job("second", "x.jpg", picture_bytes(), (), keep=True)])
    run(source, engine, disk_cache=cache_of(folder), on_result=results.append)
    assert len(engine.encoded) == 1
    assert [path.name for path in folder.iterdir()] == [results[1].kept]


def equipped_with(folder: Path) -> WorkerSetup:
    formats = registry.load(["mask"], registry.FormatOptions())
    return WorkerSetup(FakeEngine(), formats, PipelineOptions(), disk_cache=cache_of(folder))


class EquippedWith:
    """Makes the setup of a worker; pickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self) -> WorkerSetup:
        return equipped_with(self.folder)


@pytest.mark.slow
def test_worker_processes_share_the_folder_and_are_counted_together(
    share: Share, folder: Path
) -> None:
    for expected in ({"miss": 6, "written": 6}, {"hit": 6}):
        for number in range(6):
            share.pair(f"p{number}", seed=number)
        telemetry = Telemetry()
        with pool_of(EquippedWith(folder), telemetry=telemetry) as pool:
            drain(share, pool)
        assert telemetry.stats.now().disk_cache == expected


# ── in the predictor ──


def test_a_second_predictor_neither_decodes_nor_encodes(
    folder: Path, demo: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = picture_bytes(width=200, height=120)
    [first] = _predicted(demo, cache_of(folder), data)
    with monkeypatch.context() as patch:
        patch.setattr(type(demo), "encode", _never)
        patch.setattr(type(demo), "prepare", _never)
        [second] = _predicted(demo, cache_of(folder), data)
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert (first.left, first.top, first.score) == (second.left, second.top, second.score)


def test_a_picture_from_the_disk_is_encoded_when_memory_and_disk_have_lost_it(
    folder: Path,
) -> None:
    _predicted(FakeEngine(), cache_of(folder), picture_bytes())
    engine = FakeEngine()
    predictor = Predictor(engine, disk_cache=cache_of(folder))
    known = predictor.embed(picture_bytes())
    for path in folder.iterdir():
        path.unlink()
    predictor._embeddings.evict()
    assert len(predictor.predict(known, CLICK)) == 1
    assert engine.calls["encode"] == 1
    assert len(list(folder.iterdir())) == 1


def _predicted(engine: Engine, cache: DiskCache, data: bytes) -> Sequence[Any]:
    predictor = Predictor(engine, disk_cache=cache)
    return predictor.predict(predictor.embed(data), CLICK)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("called")
