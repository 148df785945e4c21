"""What is known of memory: estimated, measured, refused; and the file in which the measured part is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.engines.estimate import Footprint
from sam_poll.engines.memory import Step, chunked
from sam_poll.engines.needs import MARGIN, STEP_UP, Key, Needs
from sam_poll.engines.peaks import FORMAT, NAME, Peaks

FOOTPRINT = Footprint(27_219_136, 4_436_450, 69.0, 18.5, 0.0, 256, 4)
STEP = Step("bfloat16", 64, 8, 1024, "cuda:0")
ESTIMATE = {count: FOOTPRINT.call_mib("encode", "bfloat16", 1024, count) for count in range(1, 9)}


def test_what_nothing_is_known_of_is_estimated() -> None:
    needs = Needs(FOOTPRINT)
    assert needs.call_mib("encode", STEP, 4) == ESTIMATE[4]
    assert not needs.sure("encode", STEP)


def test_a_measured_peak_counts_for_its_number_and_scales_the_others() -> None:
    needs = Needs(FOOTPRINT)
    assert needs.worked("encode", STEP, 2, 100.0)
    assert needs.call_mib("encode", STEP, 2) == 100.0 * MARGIN
    assert needs.call_mib("encode", STEP, 8) == pytest.approx(100.0 * MARGIN * ESTIMATE[8] / ESTIMATE[2])
    assert needs.sure("encode", STEP)
    assert not needs.sure("decode", STEP)
    assert not needs.sure("encode", Step("float32", 64, 8, 1024, "cuda:0"))


def test_only_a_higher_peak_is_news() -> None:
    needs = Needs(FOOTPRINT)
    assert [needs.worked("encode", STEP, 2, mib) for mib in (100.0, 100.5, 90.0, 130.0)] == [True, False, False, True]
    assert needs.measured == {("encode", "bfloat16", 1024, 2): 130.0}


def test_what_was_not_enough_is_believed_with_a_margin_until_it_is() -> None:
    needs = Needs(FOOTPRINT)
    needs.not_enough("encode", STEP, 4, 2 * ESTIMATE[4])
    assert needs.call_mib("encode", STEP, 4) == pytest.approx(2 * ESTIMATE[4] * STEP_UP)
    assert needs.call_mib("encode", STEP, 1) == pytest.approx(2 * ESTIMATE[1] * STEP_UP)
    needs.worked("encode", STEP, 1, 50.0)
    assert needs.call_mib("encode", STEP, 1) == 50.0 * MARGIN  # seen to work, whatever failed with more
    assert needs.call_mib("encode", STEP, 4) == pytest.approx(2 * ESTIMATE[4] * STEP_UP)
    needs.worked("encode", STEP, 4, 300.0)
    assert needs.call_mib("encode", STEP, 4) == 300.0 * MARGIN


def test_what_was_not_enough_is_forgotten_after_enough_calls_and_later_each_time_it_comes_again() -> None:
    needs = Needs(FOOTPRINT, patience=4)
    waits = []
    for _ in range(3):
        needs.not_enough("encode", STEP, 8, 5000.0)
        calls = 0
        while needs.call_mib("encode", STEP, 8) > 5000:
            needs.worked("decode", STEP, 1, 10.0)
            calls += 1
        waits.append(calls)
    assert waits == [4, 8, 16]


@given(free=st.floats(0, 5000), count=st.integers(0, 200), refused=st.floats(1, 5000))
def test_a_chunk_is_never_larger_than_the_step_allows_and_one_is_always_tried(
    free: float, count: int, refused: float
) -> None:
    needs = Needs(FOOTPRINT)
    needs.not_enough("decode", STEP, 16, refused)
    for call in ("encode", "decode"):
        step = chunked(STEP, call, count, free, needs)
        assert 1 <= step.at_once(call) <= STEP.at_once(call)
        assert step.network == STEP.network
        if step.at_once(call) > 1:
            assert needs.call_mib(call, step, min(count, step.at_once(call))) <= free


# -- the file ----------------------------------------------------------------------------------------------------------

MEASURED: dict[Key, float] = {("encode", "bfloat16", 1024, 8): 1234.4, ("decode", "float32", 512, 64): 77.0}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / NAME


def test_what_is_kept_is_read_again_in_whole_mib_and_only_by_the_same_network(path: Path) -> None:
    Peaks(path, "tiny, card").keep(MEASURED)
    assert Peaks(path, "tiny, card").read() == {key: round(mib) for key, mib in MEASURED.items()}
    assert Peaks(path, "tiny, another card").read() == {}


def test_networks_share_the_file_and_each_keeps_what_it_finds_there(path: Path) -> None:
    one, other = Peaks(path, "one"), Peaks(path, "other")
    one.keep({("encode", "float32", 1024, 1): 10.0})
    other.keep({("encode", "float32", 1024, 1): 20.0})
    one.keep({("decode", "float32", 1024, 1): 30.0})
    assert Peaks(path, "one").read() == {("encode", "float32", 1024, 1): 10.0, ("decode", "float32", 1024, 1): 30.0}
    assert Peaks(path, "other").read() == {("encode", "float32", 1024, 1): 20.0}
    assert [entry.name for entry in path.parent.iterdir()] == [NAME]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\x00", b"[" * 100_000, b'{"format": "sam_poll peaks 1", '])
def test_a_damaged_file_is_said_once_and_written_anew(path: Path, body: bytes, logged: list[str]) -> None:
    path.parent.mkdir()
    path.write_bytes(body)
    peaks = Peaks(path, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    peaks.keep(MEASURED)
    assert len(Peaks(path, "x").read()) == 2
    assert len([line for line in logged if "damaged" in line]) == 1


FOREIGN = ["[]", "3", "null", '{"peaks_mib": {}}', '{"format": "sam_poll peaks 2", "peaks_mib": {"x": {}}}']


@pytest.mark.parametrize("text", FOREIGN)
def test_a_file_that_is_not_ours_is_left_alone_and_said_once(path: Path, text: str, logged: list[str]) -> None:
    path.parent.mkdir()
    path.write_text(text)
    peaks = Peaks(path, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    peaks.keep(MEASURED)
    assert path.read_text() == text
    assert len([line for line in logged if "not ours" in line]) == 1


def test_a_file_that_cannot_be_written_is_said_once_and_costs_nothing(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    peaks = Peaks(tmp_path / "cache" / NAME, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    peaks.keep(MEASURED)
    assert len([line for line in logged if "not kept" in line]) == 1


def test_a_key_of_thousands_of_digits_is_passed_over(path: Path) -> None:
    keys = {"encode float32 1024 1": 5, f"encode float32 {'9' * 5000} 1": 5}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "peaks_mib": {"ours": keys}}))
    assert Peaks(path, "ours").read() == {("encode", "float32", 1024, 1): 5}


def test_a_folder_in_the_files_place_is_said_once(path: Path, logged: list[str]) -> None:
    path.mkdir(parents=True)
    peaks = Peaks(path, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    assert path.is_dir()
    assert len([line for line in logged if "not kept" in line]) == 1


values: Any = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    ["encode bfloat16 1024 8", "decode float32 -1 2", "encode float32 1024", "", "a b c d", "encode x ² 1"]
)


@given(entries=st.dictionaries(keys, values, max_size=6), network=values)
def test_whatever_stands_in_the_file_only_believable_peaks_are_read(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, Any], network: Any
) -> None:
    path = tmp_path_factory.mktemp("peaks") / NAME
    for content in (entries, network):
        path.write_text(json.dumps({"format": "sam_poll peaks 1", "peaks_mib": {"x": content}}))
        for (call, _, side, count), mib in Peaks(path, "x").read().items():
            assert call in ("encode", "decode")
            assert (side, count) == (1024, 8)
            assert 0 < mib < 2**20


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["link", "FIFO"])
def test_what_others_have_put_in_the_files_place_is_left_alone(tmp_path: Path, kind: str, logged: list[str]) -> None:
    outside, path = tmp_path / "outside", tmp_path / NAME
    Peaks(outside, "x").keep(MEASURED)
    before = outside.read_bytes()
    if kind == "link":
        path.symlink_to(outside)
    else:
        os.mkfifo(path)
    peaks = Peaks(path, "x")
    assert peaks.read() == {}
    peaks.keep(MEASURED)
    assert outside.read_bytes() == before
    assert {found.name for found in tmp_path.iterdir()} == {"outside", NAME}
    assert len([line for line in logged if "cannot be read" in line]) == 1
