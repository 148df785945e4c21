"""Everything mode as jobs: through the pipeline, a fleet and the command line, in all formats; and
ended in time.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_poll.core.errors import DeviceError, ExitCode, InputError
from sam_poll.core.protocols import Embedding
from sam_poll.core.stats import LoopHeartbeat
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import AutomaticMaskRequest, ModelInput, PackedMask, Result
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.pipeline.task import NOTHING_FOUND
from tests.conftest import Share, picture_bytes, wait_until
from tests.support.commands import Run
from tests.support.monitors import monitor
from tests.support.pipelines import MemorySource, job, run
from tests.support.worker_pools import drain, equipped, pool_of

FOUR = AutomaticMaskRequest(
    points_per_side=8, min_area=0
)  # the fake engine finds an ellipse in each quarter


class Watched(FakeEngine):
    """Calls `look` before each call for candidates, with how many there have been."""

    def __init__(self, look: Callable[[int], None] = lambda count: None, **more: Any) -> None:
        super().__init__(**more)
        self.look, self.asked = look, 0
        self.pictures: list[tuple[int, int]] = []

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        self.pictures += [tuple(picture.frame.size) for picture in pictures]
        return super().encode(pictures)

    def candidates(
        self,
        embedding: Embedding,
        points: Sequence[tuple[float, float]],
        *,
        iou: float,
        stability: float,
    ) -> list[PackedMask]:
        self.asked += 1
        self.look(self.asked)
        return super().candidates(embedding, points, iou=iou, stability=stability)


def answered(asked: AutomaticMaskRequest, engine: Any = None, **more: Any) -> Result:
    results: list[Result] = []
    run(MemorySource([job("j", prompts=asked)]), engine, on_result=results.append, **more)
    return results[0]


# ── answers ──


def test_a_job_without_prompts_is_answered_with_many_masks() -> None:
    result = answered(FOUR)
    assert result.prompts == ()
    assert len(result.masks) == 4
    assert {mask.label for mask in result.masks} == {"object"}
    assert {"decode", "encode", "predict", "masks"} <= set(result.timings)


def test_all_formats_hold_what_was_found() -> None:
    source = MemorySource([job("j", prompts=FOUR)])
    made = registry.load(registry.names(), registry.FormatOptions())
    Pipeline(FakeEngine(), made).run(source, threading.Event())
    documents = {document.suffix: document.body for document in source.delivered["j"]}
    instances = cv2.imdecode(np.frombuffer(documents[".mask.png"], np.uint8), cv2.IMREAD_UNCHANGED)
    assert np.unique(instances).tolist() == [0, 1, 2, 3, 4]
    assert len(json.loads(documents[".opex.json"])["objects"]) == 4
    assert documents[".cvat.xml"].count(b"<mask ") == 4
    assert cv2.imdecode(
        np.frombuffer(documents[".overlay.jpg"], np.uint8), cv2.IMREAD_COLOR
    ).shape == (48, 64, 3)


def test_where_nothing_is_found_the_answer_is_empty_and_says_why() -> None:
    result = answered(AutomaticMaskRequest(points_per_side=2, iou=0.99))
    assert result.masks == ()
    assert result.notes == (NOTHING_FOUND,)
    assert answered(FOUR).notes == ()


def test_more_objects_than_a_mask_can_number_are_refused_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sam_poll.formats.mask.MAX_OBJECTS", 3)
    source = MemorySource([job("j", prompts=FOUR)])
    run(source)
    assert isinstance(source.rejected["j"], InputError)
    assert "per-object" in str(source.rejected["j"].remedy)


def test_jobs_with_and_without_prompts_share_one_embedding_of_their_picture() -> None:
    engine = FakeEngine(batch=1)
    source = MemorySource([job("a"), job("b", prompts=FOUR), job("c", prompts=FOUR), job("d")])
    run(source, engine, decode_threads=1)
    assert len(source.delivered) == 4
    assert engine.calls["encode"] == 1


@pytest.mark.parametrize("pixels", [True, False])
def test_crops_are_encoded_one_by_one_also_when_the_whole_picture_is_known(pixels: bool) -> None:
    engine = Watched(batch=1)
    crops = AutomaticMaskRequest(points_per_side=4, min_area=0, crops=1)
    results: list[Result] = []
    source = MemorySource([job("a"), job("b", prompts=crops)])
    run(source, engine, decode_threads=1, pixels=pixels, on_result=results.append)
    assert engine.pictures[0] == (64, 48)
    assert len(engine.pictures) == 5
    assert all(width < 64 and height < 48 for width, height in engine.pictures[1:])
    assert [result.picture is not None for result in results] == [pixels, pixels]


def test_with_crops_a_jpeg_is_decoded_at_a_scale_that_shows_them_sharp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, ...]] = []
    real = FakeEngine.prepare

    def prepare(self: FakeEngine, picture: Any) -> ModelInput:
        seen.append(picture.pixels.shape[:2])
        return real(self, picture)

    monkeypatch.setattr(FakeEngine, "prepare", prepare)
    data = picture_bytes(width=640, height=512)
    for crops in (0, 1):
        made = job("j", prompts=AutomaticMaskRequest(2, 0, crops=crops))
        run(
            MemorySource([type(made)("j", "j.jpg", data, made.prompts)]),
            FakeEngine(side=64),
            pixels=False,
        )
    assert seen[0] == (64, 80)
    assert seen[1] == (128, 160)


def test_missing_prompts_may_mean_everything(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    snapshot = share.run_once(missing_prompt="everything")
    assert (snapshot.answered, snapshot.rejected) == (1, 0)
    assert share.tree("output") == ["dog.mask.png"]


# ── long jobs ──


def test_a_long_job_shows_that_it_moves() -> None:
    ages: list[float] = []
    pulse = LoopHeartbeat()

    def look(count: int) -> None:
        ages.append(pulse.age)
        pulse.beat(ago=1000.0)  # as if this call had taken that long

    made = run(
        MemorySource([job("j", prompts=FOUR)]), Watched(look), telemetry=Telemetry(device=pulse)
    )
    assert len(ages) == 4
    assert max(ages) < 500
    assert made.stats.now().advances >= 4


def test_a_long_job_that_moves_is_not_stuck() -> None:
    signs = Telemetry()
    watch = monitor(signs)
    signs.stats.started()
    assert watch.check()
    for _ in range(3):
        signs.stats.progressed()
        watch._jobs.frozen += 299.0  # type: ignore[attr-defined]
        assert watch.check()
    watch._jobs.frozen += 301.0  # type: ignore[attr-defined]
    assert not watch.check()


def test_a_long_job_ends_soon_after_the_time_to_drain_and_goes_back() -> None:
    stop = threading.Event()
    seen = threading.Event()

    def look(count: int) -> None:
        stop.set()
        if made[0]._abort.wait(30):
            seen.set()

    engine = Watched(look)
    made = [
        Pipeline(
            engine,
            registry.load(["mask"], registry.FormatOptions()),
            options=PipelineOptions(drain_s=0.05),
        )
    ]
    source = MemorySource([job("j", prompts=AutomaticMaskRequest(128, 0))])
    made[0].run(source, stop)
    assert seen.is_set()
    assert engine.asked == 1  # of a thousand
    assert source.released == ["j"]
    assert not source.delivered
    assert not source.rejected


def test_a_device_that_fails_in_the_middle_ends_the_run_and_the_job_stays_claimed() -> None:
    def look(count: int) -> None:
        if count == 2:
            raise DeviceError("the device failed: injected")

    source = MemorySource([job("j", prompts=FOUR)])
    with pytest.raises(DeviceError):
        run(source, Watched(look))
    assert not source.delivered
    assert not source.rejected
    assert not source.released


def test_one_job_that_fails_in_the_middle_keeps_no_other_from_its_answer() -> None:
    def look(count: int) -> None:
        if count == 1:
            raise ValueError("a surprise")

    source = MemorySource([job("a", prompts=FOUR), job("b", 1, prompts=FOUR), job("c")])
    run(source, Watched(look))
    assert len(source.delivered) == 2
    assert len(source.rejected) == 1


# ── worker pool and command line ──


def test_a_process_of_a_fleet_segments_everything_and_tells_that_it_moves(share: Share) -> None:
    share.pair("dog", prompt={"everything": {"points_per_side": 8, "min_area": 0}})
    with pool_of(equipped, count=1) as pool:
        drain(share, pool)
        wait_until(lambda: pool.stats.now().answered == 1)
        now = pool.stats.now()
    assert (now.objects, now.at_work) == (4, 0)
    assert now.advances >= 4


@pytest.fixture
def dog(tmp_path: Path) -> Path:
    path = tmp_path / "dog.jpg"
    path.write_bytes(picture_bytes(width=200, height=100))
    return path


def test_predict_everything_writes_all_objects_into_one_mask(dog: Path, tmp_path: Path) -> None:
    out = Run("predict", "-m", "fake", dog, "--everything", "-f", "mask", "-o", tmp_path / "o")
    assert out.code == ExitCode.OK
    instances = cv2.imread(str(tmp_path / "o/dog.mask.png"), cv2.IMREAD_UNCHANGED)
    assert np.unique(instances).tolist() == [0, 1, 2, 3, 4]


def test_predict_says_when_nothing_is_found(dog: Path, tmp_path: Path) -> None:
    dog.with_suffix(".json").write_text('{"everything": {"iou": 1}}')
    out = Run("predict", "-m", "fake", dog, "-f", "opex", "-o", tmp_path / "o")
    assert out.code == ExitCode.OK
    assert "nothing found" in out.out
    assert NOTHING_FOUND in json.loads((tmp_path / "o/dog.opex.json").read_text())["meta"]["notes"]


@pytest.mark.parametrize(
    "flags", [["--box", "1,1,5,5"], ["--point", "3,3"], ["--prompt", "p.json"]]
)
def test_everything_and_a_prompt_are_not_both_asked_for(
    dog: Path, tmp_path: Path, flags: list[str]
) -> None:
    out = Run("predict", "-m", "fake", dog, "--everything", *flags, "-o", tmp_path / "o")
    assert out.code == ExitCode.USAGE
    assert "--everything" in out.err
