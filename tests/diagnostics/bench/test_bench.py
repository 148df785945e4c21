"""The benchmark measures what it says: the same work for all contestants, honest ratios, nothing
left behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import publish
from benchmarks import settings as tried
from sam_poll import engines
from sam_poll.config import settings
from sam_poll.core.errors import ModelError, SettingsError, UsageError
from sam_poll.core.types import (
    AutomaticMaskRequest,
    Box,
    InputTransform,
    Logits,
    Picture,
    Prompt,
    Size,
)
from sam_poll.diagnostics.bench import bare_network as limits
from sam_poll.diagnostics.bench import (
    checkpoints,
    naive_loop,
    plan,
    processes,
    report,
    runtimes,
    worker,
)
from sam_poll.diagnostics.bench import (
    cpu_stages as outside,
)
from sam_poll.diagnostics.bench import (
    dataset as pictures,
)
from sam_poll.diagnostics.bench.checkpoints import Weights
from sam_poll.diagnostics.bench.plan import BenchError, plan_of, size_of
from sam_poll.engines import resolve
from sam_poll.engines.sam_hq import Architecture
from sam_poll.imaging import decode as images
from sam_poll.imaging.contours import contours
from sam_poll.imaging.masks import mask_of
from sam_poll.prompts import parser
from tests.conftest import wait_until
from tests.support.networks import SMALL_SAM1, small_edgetam
from tests.support.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

SMALL = Size(320, 240)
DEMO = resolve("demo")
DEMO_WEIGHTS = Weights("demo", Path(str(DEMO.checkpoint)), DEMO.config, random=False)


@pytest.fixture(scope="module")
def subject() -> pictures.TestImages:
    return pictures.draw_pictures(SMALL, 1)


# ── what the flags mean ──


@given(st.integers(64, 99_999), st.integers(64, 99_999), st.sampled_from("x×X"))
def test_a_size_is_read_as_it_is_written(width: int, height: int, cross: str) -> None:
    assert size_of(f" {width}{cross}{height}") == Size(width, height)


@pytest.mark.parametrize(
    "text", ["", "640", "640x", "640x480x3", "63x480", "-640x480", "640.5x480", "x".join("9" * 6)]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="size"):
        size_of(text)


@pytest.mark.parametrize(
    "flags",
    [
        {"jobs": 0},
        {"rounds": 0},
        {"objects": 0},
        {"objects": 256},
        {"parts": ["everything"]},
        {"pictures": Path("no")},
    ],
    ids=str,
)
def test_flags_that_make_no_sense_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        plan_of(**flags)


def test_own_pictures_have_their_own_sizes(tmp_path: Path) -> None:
    assert plan_of(pictures=tmp_path).sizes == ()
    with pytest.raises(UsageError, match="sizes of their own"):
        plan_of(pictures=tmp_path, sizes=["640x480"])


def test_quick_is_one_round_of_the_bundled_model_unless_told_otherwise() -> None:
    assert plan_of(quick=True) == plan.Plan(models=("demo",), rounds=1, quick=True)
    assert plan_of(quick=True, models=["x"], rounds=2) == plan.Plan(
        models=("x",), rounds=2, quick=True
    )
    assert plan_of() == plan.Plan()


# ── pictures ──


def test_each_file_handed_out_is_another_one_with_the_same_pixels(
    tmp_path: Path, subject: pictures.TestImages
) -> None:
    first, _, _, again = pictures.Supply(tmp_path).pairs(subject, 4)
    seen = [images.decode(pair.picture.read_bytes()) for pair in (first, again)]
    assert seen[0].digest != seen[1].digest
    np.testing.assert_array_equal(seen[0].pixels, seen[1].pixels)
    supply = pictures.Supply(tmp_path / "known")
    one, other, _, again = (
        pair.picture.read_bytes() for pair in supply.pairs(subject, 4, known=True)
    )
    assert one == again != other
    assert supply.pairs(subject, 1, known=True)[0].picture.read_bytes() != one


def test_a_stamp_leaves_the_first_segment_first(subject: pictures.TestImages) -> None:
    plain = subject.jpegs[0]
    assert plain[2:4] == b"\xff\xe0"
    bare = plain[:2] + plain[4 + int.from_bytes(plain[4:6], "big") :]  # without JFIF's segment
    for jpeg in (plain, bare):
        stamped = pictures.with_comment(jpeg, "p000007")
        assert len(stamped) == len(jpeg) + 4 + 7
        np.testing.assert_array_equal(images.decode(stamped).pixels, images.decode(jpeg).pixels)
    assert pictures.with_comment(plain, "x")[:4] == plain[:4]


@pytest.mark.parametrize("objects", [1, 2, 7, 255])
def test_the_prompts_are_boxes_inside_the_picture_that_do_not_overlap(objects: int) -> None:
    boxes = pictures.grid(Size(640, 480), objects)
    read = parser.parse(pictures.prompt_body(boxes)).prompts
    assert not isinstance(read, AutomaticMaskRequest)
    assert [prompt.box for prompt in read] == list(boxes)
    assert parser.fit(read, Size(640, 480)) == read
    drawn = np.zeros((480, 640), int)
    for box in boxes:
        drawn[int(box.y0) : int(box.y1), int(box.x0) : int(box.x1)] += 1
    assert drawn.max() == 1


def test_made_photographs_are_as_large_on_disk_as_a_cameras(subject: pictures.TestImages) -> None:
    bits = 8e6 * pictures.draw_pictures(Size(1280, 960), 1).megabytes / (1280 * 960)
    assert 1.5 < bits < 4  # a pixel; 20 megapixels have 3.8 to 10 MB
    assert len(set(subject.jpegs)) == 3


def test_own_pictures_are_taken_as_they_are(tmp_path: Path, subject: pictures.TestImages) -> None:
    with pytest.raises(BenchError, match="no JPEGs"):
        pictures.own_pictures(tmp_path, 1)
    (tmp_path / "B.JPG").write_bytes(subject.jpegs[0])
    (tmp_path / "notes.txt").write_text("no picture")
    own = pictures.own_pictures(tmp_path, 2)
    assert own.jpegs == subject.jpegs[:1]
    assert own.boxes == (pictures.grid(SMALL, 2),)
    assert own.megapixels == pytest.approx(0.0768)
    (tmp_path / "c.jpg").write_bytes(b"no JPEG at all")
    with pytest.raises(BenchError, match="cannot be used"):
        pictures.own_pictures(tmp_path, 1)


# ── weights ──


def blobs(engine: Any) -> list[tuple[float, int]]:
    """Part of the picture and number of contours of two masks on a made photograph."""
    size = Size(640, 480)
    boxes = pictures.grid(size, 1)
    (embedding,) = engine.encode(
        [engine.prepare(Picture(pictures.photograph(size, boxes, 5), size, "x"))]
    )
    asked = [Prompt(box=boxes[0]), Prompt(box=Box(10, 10, 300, 200))]
    masks = [mask_of(logits, "object") for logits in engine.decode(embedding, asked)]
    return [
        (m.area / 640 / 480, sum(1 + len(c.holes) for c in contours(m, min_area_px=0)))
        for m in masks
    ]


@pytest.mark.parametrize("family", ["sam1", "sam2", "sam-hq"])
def test_random_weights_make_masks_like_those_of_a_trained_network(
    family: str, tmp_path: Path
) -> None:
    import torch

    torch.manual_seed(1)
    # Enough channels in the last layer to make a blob of; the bundled model's and the smallest
    # SAM1's have few.
    encoder = {**SMALL_SAM1, "out_chans": 64}
    if family == "sam1":
        model = checkpoints.build_sam1(encoder)
    elif family == "sam-hq":
        model = checkpoints.build_sam_hq(Architecture(encoder, False, encoder["embed_dim"]))
    else:
        model = checkpoints.build_sam2(str(DEMO.config))
    path = tmp_path / "random.pt"
    checkpoints.save(model, path)
    engine = engines.load(
        resolve(str(path), config=DEMO.config if family == "sam2" else None), device="cpu"
    )
    for part, found in blobs(engine):
        assert 0.02 < part < 0.6
        assert 1 <= found <= 60


def test_random_weights_of_a_model_of_the_hub_are_a_folder_that_can_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checkpoints, "make", lambda *_: small_edgetam(256))
    made = checkpoints.weights_for("yonigozlan/EdgeTAM-hf", tmp_path)
    assert made.random
    assert engines.load(resolve(str(made.path)), device="cpu").info.family == "edgetam"
    made.remove_random()
    assert not made.path.exists()


def test_weights_that_are_there_are_used_and_only_missing_ones_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        checkpoints, "make", lambda *_: pytest.importorskip("torch").nn.Linear(2, 2)
    )
    assert checkpoints.weights_for("demo", tmp_path) == DEMO_WEIGHTS
    told: list[str] = []
    made = checkpoints.weights_for("sam_vit_b", tmp_path, told.append)
    assert made == Weights("sam_vit_b", tmp_path / "sam_vit_b.pt", None, random=True)
    assert made.path.is_file()
    made.remove_random()
    assert not made.path.exists()
    assert len(told) == 1
    there = tmp_path / "cache" / "sam_vit_b_01ec64.pth"
    there.parent.mkdir()
    there.write_bytes(b"weights")
    assert checkpoints.weights_for("sam_vit_b", tmp_path) == Weights(
        "sam_vit_b", there, None, random=False
    )
    checkpoints.weights_for("sam_vit_b", tmp_path).remove_random()
    assert there.is_file()
    with pytest.raises(ModelError, match="no weights"):
        checkpoints.weights_for("fake", tmp_path)


# ── contestants ──


def test_the_loop_answers_each_object_with_the_first_mask_at_full_size(tmp_path: Path) -> None:
    subject = pictures.draw_pictures(SMALL, 2)
    (pair,) = pictures.Supply(tmp_path).pairs(subject, 1)
    loop = naive_loop.NaiveLoop(DEMO_WEIGHTS.path, DEMO_WEIGHTS.config, "cpu")
    asked: list[np.ndarray] = []
    predict = loop._official.predictor.predict
    loop._official.predictor.predict = lambda **given: (
        asked.append(predict(**given)[0]) or predict(**given)
    )
    loop(pair.picture, pair.prompt, tmp_path)
    assert [masks.shape for masks in asked] == [(3, 240, 320)] * 2
    labels = cv2.imread(str(tmp_path / f"{pair.picture.stem}.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(labels == 2, asked[1][0] > 0)
    written = json.loads((tmp_path / f"{pair.picture.stem}.json").read_text())["objects"]
    assert len(written) == sum(len(naive_loop.lines_around(masks[0] > 0)) for masks in asked)


def test_the_limit_encodes_and_decodes_as_often_as_it_says_and_nothing_else(
    tmp_path: Path, subject: pictures.TestImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"model": "demo", "device": "cpu", "pipeline": {"batch": 2}}
    limit = limits.BareNetwork(settings.load(None, env={}, flags=flags))
    limit.ready(
        [(pair.picture, pair.prompt) for pair in pictures.Supply(tmp_path).pairs(subject, 2)]
    )
    calls: list[Any] = []
    encode, decode = limit._engine._encode, limit._engine.decode
    monkeypatch.setattr(
        limit._engine, "_encode", lambda square: calls.append(tuple(square.shape)) or encode(square)
    )
    monkeypatch.setattr(
        limit._engine, "decode", lambda *given: calls.append(decode(*given)) or calls[-1]
    )
    for forbidden in ("prepare", "_square", "encode"):
        monkeypatch.setattr(
            limit._engine, forbidden, lambda *_: pytest.fail("that is not the bare network")
        )
    assert limit.run(3) > 0
    assert [call for call in calls if isinstance(call, tuple)] == [(2, 3, 256, 256)] * 3
    assert len(calls) == 3 * (1 + 2)
    calls.clear()
    assert limit.run(1, single=True) > 0
    assert calls[0] == (1, 3, 256, 256)
    assert len(calls) == 2


def test_both_sides_of_the_work_outside_the_network_make_the_same_mask(
    tmp_path: Path, subject: pictures.TestImages
) -> None:
    ours, loop = outside.OurSide(tmp_path / "share"), outside.LoopSide()
    try:
        mine, theirs = pictures.Supply(tmp_path / "share" / "aside").pairs(subject, 2)
        clocks = [
            ours.run(mine.picture, mine.prompt, tmp_path),
            loop.run(theirs.picture, theirs.prompt, tmp_path),
        ]
    finally:
        ours.close()
    for clock in clocks:
        assert list(clock.cpu) == list(clock.wall) == list(outside.STAGES)
        assert all(clock.wall[stage] > 0 for stage in outside.STAGES if stage != "share")
    found = [
        cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        for path in (
            tmp_path / "share" / "out" / f"{mine.picture.stem}.mask.png",
            tmp_path / f"{theirs.picture.stem}.png",
        )
    ]
    assert found[0].shape == found[1].shape == (240, 320)
    assert (found[0] != found[1]).mean() < 0.001
    assert 0.1 < (found[0] > 0).mean() < 0.4


def test_the_logits_outside_the_network_are_a_plausible_object() -> None:
    mask = mask_of(
        Logits(outside.blob(), 0.9, InputTransform(SMALL, 1024, Size(1024, 1024), two_step=False)),
        "object",
    )
    assert 0.1 < mask.area / (320 * 240) < 0.4
    assert len(contours(mask)) <= 5


# ── processes ──


def test_only_settings_that_may_change_speed_reach_the_contestants() -> None:
    given = {
        "PATH": "/bin",
        "OMP_NUM_THREADS": "1",
        "MODEL": "x",
        "SAM_POLL_INPUT": "/mnt",
        "SAM_POLL_CONFIG": "c.yaml",
        "SAM_POLL_FORMATS": "[cvat]",
        "SAM_POLL_PIPELINE__BATCH": "4",
        "SAM_POLL_PRECISION": "bfloat16",
    }
    kept = processes.environment(given, {"MORE": "1"})
    assert set(kept) == {
        "PATH",
        "OMP_NUM_THREADS",
        "SAM_POLL_PIPELINE__BATCH",
        "SAM_POLL_PRECISION",
        "MORE",
    }
    assert processes.settings_in(kept) == {
        "SAM_POLL_PIPELINE__BATCH": "4",
        "SAM_POLL_PRECISION": "bfloat16",
    }


@pytest.mark.slow
def test_a_worker_that_fails_says_why_and_ends(tmp_path: Path) -> None:
    order = {
        "kind": "loop",
        "checkpoint": str(tmp_path / "none.pt"),
        "config": None,
        "device": "cpu",
    }
    with pytest.raises(BenchError, match="does not exist") as caught:
        processes.Worker("the loop", order, tmp_path / "log")
    assert caught.value.place == "the loop"


@pytest.mark.slow
def test_a_worker_that_is_killed_is_told_with_its_last_words(tmp_path: Path) -> None:
    order = {"kind": "outside", "side": "sam_poll", "root": str(tmp_path / "share")}
    with processes.Worker("ours", order, tmp_path / "log") as told:
        (tmp_path / "log").write_text("first\n\nlast words\n")
        told.process.kill()
        with pytest.raises(BenchError, match="last words"):
            told(picture="x", prompt="y", out="z")
    assert told.process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_worker_ends_with_the_benchmark_even_if_nobody_ends_it(tmp_path: Path) -> None:
    order = {"kind": "outside", "side": "sam_poll", "root": str(tmp_path / "share")}
    with processes.Worker("ours", order, tmp_path / "log") as told:
        told.process.stdin.close()
        assert told.process.wait(30) == 0


def test_what_libraries_print_does_not_disturb_a_workers_answers(
    capfd: pytest.CaptureFixture[str],
) -> None:
    code = (
        "from sam_poll.diagnostics.bench import worker\n"
        "def noisy(order):\n"
        "    print('chatter', flush=True)\n"
        "    return lambda given: {'got': given}\n"
        "worker._KINDS['noisy'] = noisy\n"
        'worker.main(\'{"kind": "noisy"}\')\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input='{"a": 1}\n', capture_output=True, text=True, timeout=60
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(answer) for answer in answers] == [{"ready"}, {"got"}]
    assert "chatter" in done.stderr
    assert set(worker._KINDS) == {"loop", "limit", "outside"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_a_process_is_not_charged_with_the_benchmarks_own_memory(tmp_path: Path) -> None:
    own = np.ones(600 << 17)  # 600 MiB, which getrusage would hand down through exec
    order = {"kind": "outside", "side": "sam_poll", "root": str(tmp_path / "share")}
    with processes.Worker("ours", order, tmp_path / "log") as told:
        with processes.Child(
            "short", ["-c", "input()"], tmp_path / "short.log", stdin=subprocess.PIPE
        ) as short:
            wait_until(lambda: short.peak_mib > 5)
            assert short.peak_mib < 200
        assert told.peak_mib > 100
        assert told.cpu_s > 0
    assert own.nbytes > 0


@pytest.mark.slow
def test_a_daemon_that_cannot_start_is_told_with_its_last_words(
    tmp_path: Path, subject: pictures.TestImages
) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"<html>")
    share = tmp_path / "share"
    with (
        processes.Daemon(
            Weights("broken", broken, None, random=False), "cpu", share, tmp_path / "log"
        ) as daemon,
        pytest.raises(BenchError, match=r"ended with 4.*web page"),
    ):
        daemon.run(pictures.Supply(share / "aside").pairs(subject, 1))


# ── the whole ──


def start(tmp_path: Path, *flags: str) -> subprocess.Popen[str]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}
    line = [
        sys.executable,
        "-m",
        "sam_poll",
        "bench",
        "--device",
        "cpu",
        "-m",
        "demo",
        "--size",
        "64x64",
        *flags,
    ]
    return subprocess.Popen(
        line, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def named_in_a_running_process(folder: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue  # gone meanwhile
        found += [line] if str(folder) in line else []
    return found


@pytest.mark.slow
def test_the_command_measures_all_three_prints_tables_and_leaves_only_its_files(
    tmp_path: Path,
) -> None:
    flags = [
        "--quick",
        "--part",
        "speed",
        "--part",
        "latency",
        "--jobs",
        "3",
        "--json",
        "a.json",
        "--plot",
        "a.png",
    ]
    process = start(tmp_path, *flags)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert not list((tmp_path / "scratch").iterdir())
    found = json.loads((tmp_path / "a.json").read_text())
    (cell,) = found["speed"]
    assert (cell["model"], cell["pictures"], cell["jobs"]) == ("demo", "64×64", 3)
    assert all(len(cell[name]) == 1 and cell[name][0] > 0 for name in ("loop", "sam_poll", "limit"))
    assert found["models"][0]["random"] is False
    assert "batch 1" in found["models"][0]["step"]
    latency = found["latency"][0]
    assert all(ms > 0 for name in ("drop_to_result", "network") for ms in latency[name])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for title, _, _ in report.tables(found):
        assert title in out
    assert "demo, 64×64, round 1 of 1: loop" in err
    assert (
        os.uname().nodename not in (tmp_path / "a.json").read_text() or len(os.uname().nodename) < 4
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_benchmark_that_is_stopped_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = start(tmp_path, "--part", "speed", "--rounds", "1000")
    scratch = tmp_path / "scratch"
    try:
        # Ctrl-C while all is running, the others while it still loads.
        word = " watching " if number == signal.SIGINT else ""
        wait_until(
            lambda: any(word in log.read_text() for log in scratch.glob("*/*/daemon.log")), 90
        )
        wait_until(lambda: named_in_a_running_process(scratch))  # its log is there a little earlier
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not list(scratch.iterdir())
    assert not named_in_a_running_process(scratch)


@pytest.mark.slow
def test_the_daemon_ends_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "--part", "speed", "--rounds", "1000")
    scratch = tmp_path / "scratch"
    try:
        wait_until(
            lambda: any(" watching " in log.read_text() for log in scratch.glob("*/*/daemon.log")),
            90,
        )
    finally:
        process.kill()
        process.communicate(timeout=60)
    wait_until(lambda: not named_in_a_running_process(scratch))


def test_missing_packages_are_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sam_poll.diagnostics.bench import command

    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "skimage" else True)
    monkeypatch.setattr(command, "measured", lambda _: pytest.fail("nothing may be measured"))
    with pytest.raises(SettingsError, match="skimage") as caught:
        command.run_bench(plan.Plan(), json_file=None, plot_file=None)
    assert "sam_poll[bench]" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "files", [{"json_file": Path("no/such/a.json")}, {"plot_file": Path("no/such/a.png")}], ids=str
)
def test_files_that_cannot_be_written_are_told_before_anything_is_measured(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sam_poll.diagnostics.bench import command

    monkeypatch.setattr(command, "measured", lambda _: pytest.fail("nothing may be measured"))
    with pytest.raises(UsageError, match="no such folder"):
        command.run_bench(plan.Plan(), **{"json_file": None, "plot_file": None, **files})


# ── figures ──


def cell(
    model: str = "sam2.1_hiera_tiny", megapixels: float = 3.1, **figures: list[float]
) -> dict[str, Any]:
    made = {"loop": [3.0], "sam_poll": [1.0], "limit": [0.95]} | figures
    about = {
        "model": model,
        "pictures": "2048×1536",
        "megapixels": megapixels,
        "megabytes": 1.0,
        "jobs": 4,
    }
    return {**about, **made, "cpu_s": {name: [0.5] for name in made}}


def figures(**parts: Any) -> dict[str, Any]:
    machine = {"device": "cpu", "cpu": "a CPU", "cores": 2, "torch_threads": 2, "torch": "2.9"}
    return {
        "machine": machine,
        "settings": {},
        "models": [],
        "speed": [],
        "outside": None,
        "latency": [],
        "runtimes": [],
    } | parts


def test_ratios_are_made_round_by_round_so_that_a_slow_minute_bends_none() -> None:
    slow = cell(loop=[3.0, 30.0, 3.0], sam_poll=[1.0, 10.0, 1.0], limit=[0.9, 9.0, 0.9])
    assert report.times_loop(slow) == pytest.approx(3.0)
    assert report.part_of_limit(slow) == pytest.approx(0.9)


@pytest.mark.parametrize(("limit", "reached"), [(0.95, True), (0.949, False)])
def test_the_goal_of_the_limit_is_judged_where_the_network_takes_the_time(
    limit: float, reached: bool
) -> None:
    others = [
        cell("demo", limit=[0.1]),
        cell(megapixels=0.3, limit=[0.1]),
        cell(megapixels=20.2, limit=[0.1]),
    ]
    (goal,) = report.goals(figures(speed=[*others, cell(limit=[limit])]))
    assert goal.reached is reached


@pytest.mark.parametrize(("loop", "reached"), [(10.0, True), (9.9, False)])
def test_ten_times_the_loop_is_asked_of_large_pictures_on_a_gpu_only(
    loop: float, reached: bool
) -> None:
    speed = [cell(megapixels=20.2, loop=[loop]), cell(loop=[1.0])]
    on_gpu = figures(speed=speed)
    on_gpu["machine"]["device"] = "cuda:0"
    assert [goal.reached for goal in report.goals(on_gpu)] == [reached]


@pytest.mark.parametrize(("ours", "reached"), [(0.15, True), (0.151, False)])
def test_the_goal_outside_the_network_is_a_twentieth_of_the_loops_cpu_time(
    ours: float, reached: bool
) -> None:
    sides = {
        name: {
            "cpu": dict.fromkeys(outside.STAGES, 0.1),
            "wall": dict.fromkeys(outside.STAGES, 0.1),
            "cpu_s": [cpu],
        }
        for name, cpu in (("loop", 3.0), ("sam_poll", ours))
    }
    found = figures(outside={"pictures": "5184×3888", "megabytes": 6.0, **sides})
    (goal,) = report.goals(found)
    assert goal.reached is reached
    assert report.tables(found)[0][2][-1][:3] == ["all", "3000.0", f"{ours * 1000:.1f}"]


@pytest.mark.parametrize(("latency", "reached"), [(0.160, True), (0.1611, False)])
def test_the_goal_of_latency_is_judged_with_the_quickest_network(
    latency: float, reached: bool
) -> None:
    rows = [
        {"model": "slow", "pictures": "640×480", "network": [2.0], "drop_to_result": [3.0]},
        {"model": "demo", "pictures": "640×480", "network": [0.1], "drop_to_result": [latency]},
    ]
    (goal,) = report.goals(figures(latency=rows))
    assert goal.reached is reached


def by_runtime(
    openvino: list[float], limit: list[float], model: str = "sam2.1_hiera_tiny"
) -> dict[str, Any]:
    rest = {"cpu_s": [1.0], "peak_mib": 1000.0, "step": "bfloat16 1024 on cpu"}
    rows = {
        "torch": {"sam_poll": [1.4, 14.0, 1.4], "limit": [1.3, 13.0, 1.3], **rest},
        "openvino": {"sam_poll": openvino, "limit": limit, **rest},
    }
    return {"model": model, "pictures": "2048×1536", "jobs": 4, "rows": rows}


@pytest.mark.parametrize(
    ("openvino", "limit", "reached"),
    [
        ([1.0, 10.0, 1.0], [0.95, 9.5, 0.95], [True, True]),
        ([1.01, 10.1, 1.01], [0.95, 9.5, 0.95], [False, False]),
    ],
)
def test_runtimes_are_compared_round_by_round(
    openvino: list[float], limit: list[float], reached: list[bool]
) -> None:
    found = figures(
        runtimes=[
            by_runtime(openvino, limit),
            by_runtime([1.0, 10.0, 1.0], [1.0, 1.0, 1.0], "demo"),
        ]
    )
    assert [goal.reached for goal in report.goals(found)] == reached
    (_, columns, rows), _ = report.tables(found)
    assert [row[:2] for row in rows] == [
        ["sam2.1_hiera_tiny", "torch, bfloat16"],
        ["sam2.1_hiera_tiny", "openvino, bfloat16"],
        ["demo", "torch, bfloat16"],
        ["demo", "openvino, bfloat16"],
    ]
    assert rows[0][columns.index("× torch")] == "1.00"


@pytest.mark.slow
def test_runtimes_are_measured_side_by_side(
    tmp_path: Path, subject: pictures.TestImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    found = runtimes.measure(
        DEMO_WEIGHTS,
        "cpu",
        tmp_path,
        subject,
        jobs=2,
        rounds=1,
        round_s=1.0,
        tell=lambda _: None,
    )
    assert set(found["rows"]) == {"torch", "openvino"}
    for name, row in found["rows"].items():
        assert ("OpenVINO" in row["step"]) == (name == "openvino")
        assert all(seconds > 0 for key in ("sam_poll", "limit") for seconds in row[key])


def test_random_weights_and_settings_are_named_with_the_figures() -> None:
    models = [
        {"name": n, "random": r, "peak_mib": dict.fromkeys(plan.CONTESTANTS, 1.0)}
        for n, r in (("a", True), ("b", False))
    ]
    text = report.summary(figures(models=models, settings={"SAM_POLL_PIPELINE__BATCH": "4"}))
    assert "random weights: a" in text
    assert "SAM_POLL_PIPELINE__BATCH=4" in text


# ── what is published ──


def test_the_page_says_what_the_results_say() -> None:
    text = publish.PAGE.read_text("utf-8")
    assert publish.published(text) == text
    named = re.findall(r"<!-- figures: ([\w-]+) -->", text)
    assert len(named) >= 2
    for picture in re.findall(r"\]\((images/[^)]+)\)", text):
        assert (publish.PAGE.parent / picture).stat().st_size < 150_000


@pytest.mark.parametrize("gpu", [False, True])
def test_every_variant_that_is_tried_is_a_setting_there_is(gpu: bool) -> None:
    for group in tried.groups(gpu):
        assert group.variants["default"] == {}
        for name, env in group.variants.items():
            settings.load(None, env=dict(env))
            if env and not name.startswith("OMP"):
                assert settings.load(None, env=dict(env)) != settings.Settings()


@pytest.mark.slow
def test_variants_are_measured_side_by_side(tmp_path: Path) -> None:
    variants = {"default": {}, "pipeline.queue: 1": {"SAM_POLL_PIPELINE__QUEUE": "1"}}
    group = tried.Group("queue", "demo", Size(64, 64), variants, jobs=2)
    found = tried.measure(dataclasses.replace(group, known=True), "cpu", tmp_path, rounds=1)
    assert [len(row["seconds"]) for row in found["rows"].values()] == [1, 1]
    first, second = tried.lines(found)
    assert first.startswith("| queue (demo, 64×64) | default | ")
    assert second.startswith("|  | pipeline.queue: 1 | ")
