"""Memory requirements: estimated, measured, insufficient; and the file of measured peaks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.engines.memory.estimate import Footprint
from sam_poll.engines.memory.peak_store import FORMAT, NAME, PeakStore
from sam_poll.engines.memory.plan import MemoryStep, chunked
from sam_poll.engines.memory.requirements import MARGIN, STEP_UP, Key, MemoryRequirements

FOOTPRINT = Footprint(27_219_136, 4_436_450, 69.0, 0.0, 256, 4)
STEP = MemoryStep("bfloat16", 64, 8, 1024, "cuda:0")
ESTIMATE = {count: FOOTPRINT.call_mib("encode", "bfloat16", 1024, count) for count in range(1, 9)}


def test_requirements_estimate_unmeasured_calls() -> None:
    needs = MemoryRequirements(FOOTPRINT)
    assert needs.call_mib("encode", STEP, 4) == ESTIMATE[4]
    assert not needs.is_known("encode", STEP)


def test_requirements_scale_estimates_by_a_measured_peak() -> None:
    needs = MemoryRequirements(FOOTPRINT)
    assert needs.record_peak("encode", STEP, 2, 100.0)
    assert needs.call_mib("encode", STEP, 2) == 100.0 * MARGIN
    assert needs.call_mib("encode", STEP, 8) == pytest.approx(
        100.0 * MARGIN * ESTIMATE[8] / ESTIMATE[2]
    )
    assert needs.is_known("encode", STEP)
    assert not needs.is_known("decode", STEP)
    assert not needs.is_known("encode", MemoryStep("float32", 64, 8, 1024, "cuda:0"))


def test_record_peak_reports_only_higher_peaks() -> None:
    needs = MemoryRequirements(FOOTPRINT)
    assert [needs.record_peak("encode", STEP, 2, mib) for mib in (100.0, 100.5, 90.0, 130.0)] == [
        True,
        False,
        False,
        True,
    ]
    assert needs.measured == {("encode", "bfloat16", 1024, 2): 130.0}


def test_record_failure_raises_the_need_until_a_call_succeeds() -> None:
    needs = MemoryRequirements(FOOTPRINT)
    needs.record_failure("encode", STEP, 4, 2 * ESTIMATE[4])
    assert needs.call_mib("encode", STEP, 4) == pytest.approx(2 * ESTIMATE[4] * STEP_UP)
    assert needs.call_mib("encode", STEP, 1) == pytest.approx(2 * ESTIMATE[1] * STEP_UP)
    needs.record_peak("encode", STEP, 1, 50.0)
    assert (
        needs.call_mib("encode", STEP, 1) == 50.0 * MARGIN
    )  # known to succeed, although larger calls failed
    assert needs.call_mib("encode", STEP, 4) == pytest.approx(2 * ESTIMATE[4] * STEP_UP)
    needs.record_peak("encode", STEP, 4, 300.0)
    assert needs.call_mib("encode", STEP, 4) == 300.0 * MARGIN


def test_failures_are_forgotten_after_enough_calls_and_later_each_time() -> None:
    needs = MemoryRequirements(FOOTPRINT, patience=4)
    waits = []
    for _ in range(3):
        needs.record_failure("encode", STEP, 8, 5000.0)
        calls = 0
        while needs.call_mib("encode", STEP, 8) > 5000:
            needs.record_peak("decode", STEP, 1, 10.0)
            calls += 1
        waits.append(calls)
    assert waits == [4, 8, 16]


@given(free=st.floats(0, 5000), count=st.integers(0, 200), refused=st.floats(1, 5000))
def test_chunked_never_exceeds_the_step_and_keeps_at_least_one(
    free: float, count: int, refused: float
) -> None:
    needs = MemoryRequirements(FOOTPRINT)
    needs.record_failure("decode", STEP, 16, refused)
    for call in ("encode", "decode"):
        step = chunked(STEP, call, count, free, needs)
        assert 1 <= step.at_once(call) <= STEP.at_once(call)
        assert step.network == STEP.network
        if step.at_once(call) > 1:
            assert needs.call_mib(call, step, min(count, step.at_once(call))) <= free


# ── the file ──

MEASURED: dict[Key, float] = {
    ("encode", "bfloat16", 1024, 8): 1234.4,
    ("decode", "float32", 512, 64): 77.0,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / NAME


def test_peak_store_returns_whole_mib_of_the_same_network_only(path: Path) -> None:
    PeakStore(path, "tiny, card").keep(MEASURED)
    assert PeakStore(path, "tiny, card").read() == {
        key: round(mib) for key, mib in MEASURED.items()
    }
    assert PeakStore(path, "tiny, another card").read() == {}


def test_peak_store_keeps_the_entries_of_other_networks(path: Path) -> None:
    one, other = PeakStore(path, "one"), PeakStore(path, "other")
    one.keep({("encode", "float32", 1024, 1): 10.0})
    other.keep({("encode", "float32", 1024, 1): 20.0})
    one.keep({("decode", "float32", 1024, 1): 30.0})
    assert PeakStore(path, "one").read() == {
        ("encode", "float32", 1024, 1): 10.0,
        ("decode", "float32", 1024, 1): 30.0,
    }
    assert PeakStore(path, "other").read() == {("encode", "float32", 1024, 1): 20.0}
    assert [entry.name for entry in path.parent.iterdir()] == [NAME]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\x00", b"[" * 100_000, b'{"format": "sam_poll peaks 1", ']
)
def test_peak_store_logs_a_damaged_file_once_and_overwrites_it(
    path: Path, body: bytes, logged: list[str]
) -> None:
    path.parent.mkdir()
    path.write_bytes(body)
    peaks = PeakStore(path, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    peaks.keep(MEASURED)
    assert len(PeakStore(path, "x").read()) == 2
    assert len([line for line in logged if "damaged" in line]) == 1


FOREIGN = [
    "[]",
    "3",
    "null",
    '{"peaks_mib": {}}',
    '{"format": "sam_poll peaks 2", "peaks_mib": {"x": {}}}',
]


@pytest.mark.parametrize("text", FOREIGN)
def test_peak_store_leaves_a_file_of_another_format_and_logs_it_once(
    path: Path, text: str, logged: list[str]
) -> None:
    path.parent.mkdir()
    path.write_text(text)
    peaks = PeakStore(path, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    peaks.keep(MEASURED)
    assert path.read_text() == text
    assert len([line for line in logged if "has another format" in line]) == 1


def test_peak_store_logs_an_unwritable_file_once(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    peaks = PeakStore(tmp_path / "cache" / NAME, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    peaks.keep(MEASURED)
    assert len([line for line in logged if "not kept" in line]) == 1


def test_peak_store_ignores_a_key_of_thousands_of_digits(path: Path) -> None:
    keys = {"encode float32 1024 1": 5, f"encode float32 {'9' * 5000} 1": 5}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "peaks_mib": {"ours": keys}}))
    assert PeakStore(path, "ours").read() == {("encode", "float32", 1024, 1): 5}


def test_peak_store_logs_a_folder_in_place_of_the_file_once(path: Path, logged: list[str]) -> None:
    path.mkdir(parents=True)
    peaks = PeakStore(path, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    assert path.is_dir()
    assert len([line for line in logged if "not kept" in line]) == 1


values: Any = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(
    [
        "encode bfloat16 1024 8",
        "decode float32 -1 2",
        "encode float32 1024",
        "",
        "a b c d",
        "encode x ² 1",
    ]
)


@given(entries=st.dictionaries(keys, values, max_size=6), network=values)
def test_peak_store_reads_plausible_peaks_only(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any], network: Any
) -> None:
    path = tmp_path_factory.mktemp("peaks") / NAME
    for content in (entries, network):
        path.write_text(json.dumps({"format": "sam_poll peaks 1", "peaks_mib": {"x": content}}))
        for (call, _, side, count), mib in PeakStore(path, "x").read().items():
            assert call in ("encode", "decode")
            assert (side, count) == (1024, 8)
            assert 0 < mib < 2**20


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_peak_store_leaves_planted_files_alone(
    tmp_path: Path, kind: str, logged: list[str]
) -> None:
    outside, path = tmp_path / "outside", tmp_path / NAME
    PeakStore(outside, "x").keep(MEASURED)
    before = outside.read_bytes()
    if kind == "link":
        path.symlink_to(outside)
    else:
        os.mkfifo(path)
    peaks = PeakStore(path, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    assert outside.read_bytes() == before
    assert {found.name for found in tmp_path.iterdir()} == {"outside", NAME}
    assert len([line for line in logged if "cannot be read" in line]) == 1
