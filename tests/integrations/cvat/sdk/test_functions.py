"""Tests of the functions for CVAT's SDK, run by cvat-cli against a stand-in, and by an agent."""

from __future__ import annotations

import io
import multiprocessing
import os
import zipfile
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import attrs
import cv2
import cvat_sdk.auto_annotation as cvataa
import numpy as np
import pytest
from cvat_cli.__main__ import main
from cvat_cli._internal import agent, agent_driver_interaction
from cvat_cli._internal.common import CriticalError, FunctionLoader
from cvat_cli._internal.parsers import parse_function_parameter
from cvat_sdk.core import client as sdk_client
from cvat_sdk.masks import decode_mask, encode_mask
from PIL import Image

from sam_poll import engines
from sam_poll.core.errors import DeviceError
from sam_poll.core.types import AutomaticMaskRequest, Box, Point, Prompt, Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats.cvat import flat
from sam_poll.imaging import masks as geometry
from sam_poll.integrations.cvat import client, credentials
from sam_poll.integrations.cvat.sdk import boxes as frame_prompts
from sam_poll.integrations.cvat.sdk import common, function, interactor
from sam_poll.pipeline.predictor import Predictor
from tests.conftest import picture_bytes
from tests.support.cvat_real import logged_in_sdk
from tests.support.cvat_server import TOKEN, USER, StandIn, Task, score_spec, served
from tests.support.paths import ROOT
from tools import scenes

OBJECT = {"name": "object", "sublabels": [], "attributes": []}
SCORED = {"name": "object", "sublabels": [], "attributes": [score_spec()]}
DEMO = ("model=str:demo", "device=str:cpu")
TIME = "2026-01-01T00:00:00Z"


class Chunked(StandIn):
    """The stand-in with what the SDK's datasets also need: pictures in chunks, required fields."""

    def about(self, **_: Any) -> Any:
        return {**super().about(), "logo_url": "", "subtitle": ""}

    def get_frame(self, number: int, query: dict[str, str], **more: Any) -> Any:
        if query.get("type") != "chunk":
            return super().get_frame(number, query, **more)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for index, (name, data) in enumerate(self._task(number).frames):
                archive.writestr(f"{index:06d}{Path(name).suffix}", data)
        return buffer.getvalue()

    def get_meta(self, number: int, **more: Any) -> Any:
        meta = super().get_meta(number, **more)
        frames = [{**frame, "has_related_context": False} for frame in meta["frames"]]
        return {
            **meta,
            "frames": frames,
            "chunks_updated_date": TIME,
            "chunk_size": 72,
            "stop_frame": len(frames) - 1,
        }

    def _shown(self, task: Task) -> Any:
        counts = {"completed": 0, "validation": 0, "count": 1, "url": ""}
        data = {
            "data_original_chunk_type": "imageset",
            "data_chunk_size": 72,
            "mode": "annotation",
            "dimension": "2d",
        }
        who = {"id": 1, "username": USER, "url": "", "first_name": "", "last_name": ""}
        more = {
            "updated_date": TIME,
            "status": "annotation",
            "organization": None,
            "labels": {"url": ""},
        }
        return {**super()._shown(task), **data, **more, "jobs": counts, "owner": who}


@pytest.fixture
def memory() -> Chunked:
    return Chunked()


@pytest.fixture
def host(memory: Chunked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    # The SDK caches what it has fetched by address and task, in a folder chosen at its import: a
    # task of an earlier test at the same port would be taken for this one's.
    own = partialmethod(sdk_client.Config.__init__, cache_dir=tmp_path / "sdk")
    monkeypatch.setattr(sdk_client.Config, "__init__", own)
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    with served(memory) as address:
        monkeypatch.setenv("CVAT_HOST", address)
        yield address


@pytest.fixture(scope="module")
def scene() -> scenes.Scene:
    return scenes.draw(41, difficulty=0, count=(2, 2), kinds=["ellipse", "rectangle"])


@pytest.fixture(scope="module")
def demo() -> Predictor:
    return Predictor(engines.load(engines.resolve("demo"), device="cpu", precision="float32"))


def png(scene: scenes.Scene) -> bytes:
    return cv2.imencode(".png", scene.pixels[..., ::-1])[1].tobytes()


def auto_annotate(
    host: str,
    task: Task,
    *words: str,
    flags: tuple[str, ...] = (),
    model: str = "fake",
    place: tuple[str, str] = ("--function-module", "sam_poll.cvat.function"),
) -> int:
    """Run `cvat-cli task auto-annotate` in this process, and return its exit code."""
    given = [word for pair in (f"model=str:{model}", *words) for word in ("-p", pair)]
    command = ["task", "auto-annotate", str(task.id), *place]
    return main(["--server-host", host, *command, *given, *flags])


def masks_of(task: Task, frame: int, size: Size) -> list[np.ndarray]:
    """Return the task's masks on a frame, as the SDK reads them."""
    found = [s for s in task.shapes if s["frame"] == frame and s["type"] == "mask"]
    return [
        decode_mask(s["points"], image_width=size.width, image_height=size.height) for s in found
    ]


# ── cvat-cli, the whole way ──


@pytest.mark.slow
def test_everything_mode_annotates_a_task_with_a_real_network(
    memory: Chunked, host: str, scene: scenes.Scene
) -> None:
    task = memory.add_task("scenes", [("a.png", png(scene))], OBJECT)
    assert auto_annotate(host, task, "device=str:cpu", "points_per_side=int:12", model="demo") == 0
    found = masks_of(task, 0, scene.size)
    for truth in scene.masks:
        assert max(scenes.iou(mask, truth) for mask in found) > 0.8
    assert {shape["source"] for shape in task.shapes} == {"auto"}
    assert [shape["attributes"] for shape in task.shapes] == [[]] * len(found)


def test_text_mode_finds_all_objects_of_some_kinds_with_their_labels(
    memory: Chunked, host: str
) -> None:
    labels = [{**OBJECT, "name": name} for name in ("a b", "c")]
    task = memory.add_task("words", [("a.png", picture_bytes(".png"))], *labels)
    assert auto_annotate(host, task, "mode=str:text", "texts=str:a b, c") == 0
    names = {label["id"]: label["name"] for label in task.labels}
    found = [names[shape["label_id"]] for shape in task.shapes]
    assert sorted(found) == ["a b", "a b", "c"]
    task.shapes.clear()
    flags = ("--conf-threshold", "0.85")
    assert auto_annotate(host, task, "mode=str:text", "texts=str:a b,c", flags=flags) == 0
    assert len(task.shapes) == 2


def test_boxes_of_a_task_become_masks_with_their_labels(
    memory: Chunked, host: str, scene: scenes.Scene
) -> None:
    dog, cat = (
        {"name": name, "sublabels": [], "attributes": [score_spec()]} for name in ("dog", "cat")
    )
    task = memory.add_task(
        "scenes", [("done/a.png", png(scene)), ("done/b.png", png(scene))], dog, cat
    )
    for index, label in ((1, "dog"), (2, "cat")):
        box = scenes.box_of(scene.mask(index))
        memory.draw(task, 1, "rectangle", label, [box.x0, box.y0, box.x1, box.y1])
    assert (
        auto_annotate(
            host, task, "mode=str:boxes", f"task=int:{task.id}", "device=str:cpu", model="demo"
        )
        == 0
    )
    made = [shape for shape in task.shapes if shape["type"] == "mask"]
    names = {label["id"]: label["name"] for label in task.labels}
    assert [(names[shape["label_id"]], shape["frame"]) for shape in made] == [
        ("dog", 1),
        ("cat", 1),
    ]
    for mask, truth in zip(masks_of(task, 1, scene.size), scene.masks, strict=True):
        assert scenes.iou(mask, truth) > 0.8
    scores = [float(shape["attributes"][0]["value"]) for shape in made]
    assert all(0.5 < score <= 1 for score in scores)


def test_masks_are_polygons_if_the_caller_requests_them(memory: Chunked, host: str) -> None:
    task = memory.add_task("one", [("a.png", picture_bytes(".png"))], {**OBJECT, "type": "polygon"})
    assert auto_annotate(host, task, "points_per_side=int:2", flags=("--conv-mask-to-poly",)) == 0
    assert task.shapes
    assert {shape["type"] for shape in task.shapes} == {"polygon"}


@pytest.mark.parametrize(
    ("labels", "words", "flags", "scored"),
    [
        (OBJECT, (), (), False),
        (SCORED, (), (), False),
        (SCORED, ("score=bool:true",), (), True),
        (OBJECT, ("score=bool:true",), ("--allow-unmatched-labels",), False),
    ],
)
def test_a_score_is_written_if_requested_and_the_task_has_an_attribute(
    memory: Chunked,
    host: str,
    labels: dict[str, Any],
    words: tuple[str, ...],
    flags: tuple[str, ...],
    scored: bool,
) -> None:
    task = memory.add_task("one", [("a.png", picture_bytes(".png"))], labels)
    assert auto_annotate(host, task, "points_per_side=int:2", *words, flags=flags) == 0
    assert task.shapes
    assert {bool(shape["attributes"]) for shape in task.shapes} == {scored}
    # The shapes of this server have a score of their own, which needs no attribute.
    assert all(0 < shape["score"] < 1 for shape in task.shapes)


def test_a_task_whose_label_allows_rectangles_only_is_refused_before_anything_is_computed(
    memory: Chunked, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = memory.add_task(
        "one", [("a.png", picture_bytes(".png"))], {**OBJECT, "type": "rectangle"}
    )
    monkeypatch.setattr(Predictor, "embed", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(cvataa.BadFunctionError, match="rectangle"):
        auto_annotate(host, task, "points_per_side=int:2")


XML = """<annotations><version>1.1</version>
<image id="0" name="a.png" width="64" height="48">
<box label="dog" xtl="10" ytl="10" xbr="50" ybr="40"/></image>
<image id="1" name="b.png" width="65" height="48">
<box label="cat" xtl="10" ytl="10" xbr="50" ybr="40"/></image>
<image id="2" name="c.png" width="64" height="48">
<box label="cat" xtl="400" ytl="10" xbr="500" ybr="40"/>
<box label="cat" xtl="20" ytl="10" xbr="50" ybr="40"/></image></annotations>"""


def test_boxes_of_a_file_become_masks_and_bad_ones_do_not_affect_the_others(
    memory: Chunked, host: str, tmp_path: Path, logged: list[str]
) -> None:
    (tmp_path / "annotations.xml").write_text(XML)
    frames = [(f"done/cam1/{name}.png", picture_bytes(".png")) for name in "abcd"]
    labels = ({"name": name, "sublabels": [], "attributes": []} for name in ("dog", "cat"))
    task = memory.add_task("four", frames, *labels)
    words = ("mode=str:boxes", f"annotations=str:{tmp_path}/annotations.xml")
    assert auto_annotate(host, task, *words) == 0
    names = {label["id"]: label["name"] for label in task.labels}
    assert [(shape["frame"], names[shape["label_id"]]) for shape in task.shapes] == [
        (0, "dog"),
        (2, "cat"),
    ]
    warnings = [line for line in logged if line.startswith("WARNING")]
    assert ["b.png" in warnings[0], "c.png" in warnings[1], "d.png" in warnings[2]] == [True] * 3
    assert "65×48" in warnings[0]


ANNOTATED = {
    "YOLO": {"data.yaml": "names: [dog]\n", "labels/train/done/cam1/a.txt": "0 0.5 0.5 0.5 0.5\n"},
    "Datumaro": {
        "annotations/default.json": """{"categories": {"label": {"labels": [{"name": "dog"}]}},
"items": [{"id": "done/cam1/a", "image": {"path": "", "size": [48, 64]},
"annotations": [{"type": "bbox", "label_id": 0, "bbox": [10, 10, 40, 30]}]}]}"""
    },
    "a name without the folders": {
        "annotations.xml": XML.replace("a.png", "cam1/a.png"),
    },
}


@pytest.mark.parametrize("kind", ANNOTATED)
def test_annotations_with_other_leading_folders_and_without_extensions_find_their_frame(
    memory: Chunked, host: str, tmp_path: Path, kind: str
) -> None:
    for name, text in ANNOTATED[kind].items():
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    frames = [(f"done/{name}.png", picture_bytes(".png")) for name in ("cam1/a", "cam2/a")]
    labels = ({"name": name, "sublabels": [], "attributes": []} for name in ("dog", "cat"))
    task = memory.add_task("two", frames, *labels)
    assert auto_annotate(host, task, "mode=str:boxes", f"annotations=str:{tmp_path}/set") == 0
    assert [shape["frame"] for shape in task.shapes] == [0]


BAD = {
    "an unknown parameter": (("colour=str:red",), "colour"),
    "text for a number": (("points_per_side=str:8",), "points_per_side=int:"),
    "a number out of range": (("iou=float:7",), "-p iou"),
    "an unknown mode": (("mode=str:magic",), "magic"),
    "boxes of nowhere": (("mode=str:boxes",), "task=int:ID"),
    "boxes of two places": (
        ("mode=str:boxes", "task=int:1", "annotations=str:a.xml"),
        "task=int:ID",
    ),
    "a file that is not there": (("mode=str:boxes", "annotations=str:no/such.xml"), "no/such.xml"),
    "a label with boxes": (("mode=str:boxes", "annotations=str:a.xml", "label=str:dog"), "label"),
    "boxes with everything": (("task=int:1",), "task"),
    "texts with everything": (("texts=str:dog",), "texts"),
    "a label with texts": (("mode=str:text", "texts=str:dog", "label=str:dog"), "label"),
    "no text": (("mode=str:text",), "-p texts"),
    "a text twice": (("mode=str:text", "texts=str:dog,dog"), "given twice"),
    "a threshold out of range": (
        ("mode=str:text", "texts=str:dog", "threshold=float:2"),
        "-p threshold",
    ),
    "texts for a model that takes none": (
        ("mode=str:text", "texts=str:dog", *DEMO),
        "facebook/sam3",
    ),
    "a text that is too long": (("mode=str:text", f"texts=str:{'a ' * 40}"), "-p texts"),
    "an empty label": (("label=str: ",), "label"),
    "a model that is not there": (("model=str:no_such_model",), "no_such_model"),
    "a config that is not there": (("config=str:no.yaml",), "no.yaml"),
    "a task without boxes": (("mode=str:boxes", "task=int:1"), "no boxes"),
    "a task that is not there": (("mode=str:boxes", "task=int:99"), "task 99"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_parameter_is_one_line_of_cvat_cli_and_exit_code_1(
    memory: Chunked, host: str, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    words, said = BAD[case]
    task = memory.add_task("one", [("a.png", picture_bytes(".png"))], OBJECT)
    words = tuple(word.replace("task=int:1", f"task=int:{task.id}") for word in words)
    assert auto_annotate(host, task, *words) == 1
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "CRITICAL"]
    assert said in line
    assert TOKEN not in line
    assert not memory.writes()


def test_a_device_failure_is_one_line_of_cvat_cli(
    memory: Chunked, host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise DeviceError("the device failed: CUDA error")

    monkeypatch.setattr(FakeEngine, "encode", broken)
    task = memory.add_task("one", [("a.png", picture_bytes(".png"))], OBJECT)
    assert auto_annotate(host, task) == 1
    assert "CUDA error" in caplog.records[-1].getMessage()


# ── the function alone ──


@attrs.frozen(kw_only=True)
class Context(cvataa.DetectionFunctionContext):
    frame_name: str = "a.png"
    conf_threshold: float | None = None
    conv_mask_to_poly: bool = False


@pytest.mark.slow
def test_everything_mode_drops_masks_below_the_threshold(
    demo: Predictor, scene: scenes.Scene
) -> None:
    detector = function.Detector(
        demo, function.DetectionSpec(("object",), frozenset({"object"}), AutomaticMaskRequest(12))
    )
    image = Image.fromarray(scene.pixels)
    scores = [
        float(s.attributes[0].value) for s in detector.detect(Context(conf_threshold=0.3), image)
    ]
    assert len(scores) >= 2
    middle = sum(sorted(scores)[:2]) / 2
    for least in (middle, 1.0):
        kept = [
            float(s.attributes[0].value)
            for s in detector.detect(Context(conf_threshold=least), image)
        ]
        assert all(score >= least - 1e-4 for score in kept)
        assert len(kept) < len(scores)


def test_boxes_mode_drops_masks_below_the_threshold() -> None:
    boxes = frame_prompts.FramePrompts(
        {"a.png": lambda size: [Prompt("dog", box=Box(10, 10, 50, 40))]}, ("dog",)
    )
    detector = function.Detector(
        Predictor(FakeEngine()), function.DetectionSpec(("dog",), boxes=boxes)
    )
    image = Image.open(io.BytesIO(picture_bytes()))
    assert len(detector.detect(Context(conf_threshold=0.0), image)) == 1
    assert detector.detect(Context(conf_threshold=1.0), image) == []


def test_a_refused_picture_gets_no_shapes_and_is_logged(logged: list[str]) -> None:
    detector = function.Detector(
        Predictor(FakeEngine(), max_pixels=100), function.DetectionSpec(("object",))
    )
    assert detector.detect(Context(frame_name="big.jpg"), Image.new("RGB", (64, 48))) == []
    assert any("big.jpg" in line and "100" in line for line in logged)


def test_cvats_flat_form_is_that_of_the_sdk() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        bitmap = rng.random((rng.integers(1, 12), rng.integers(1, 12))) < 0.5
        if bitmap.any():
            assert flat(geometry.tight(bitmap, "object", 0.5)) == encode_mask(bitmap)


# ── the interactor, by the agent's drivers ──


def interact(
    made: interactor.Interactor, image: Image.Image | None, **prompts: Any
) -> list[dict[str, Any]]:
    """Do what an agent's worker does with a request."""
    empty = {"pos_points": (), "neg_points": (), "bounding_box": None}
    given = agent_driver_interaction._InteractionPromptsImpl(**{**empty, **prompts})
    agent_driver = agent_driver_interaction
    if image is None:
        found = agent_driver._worker_job_interact_from_cache("key", given)
    else:
        found = agent_driver._worker_job_interact("key", image, given)
    assert found is not None
    return [attrs.asdict(shape) for shape in found]


@pytest.fixture
def worker(demo: Predictor) -> interactor.Interactor:
    """Stand for an agent's worker with the function loaded."""
    made = interactor.Interactor(demo, AutomaticMaskRequest(12))
    agent.set_worker_current_function(made)
    agent_driver_interaction.AgentInteractionFunctionDriver.init_worker(None)
    return made


def test_an_agent_gets_masks_for_clicks_boxes_and_nothing(
    worker: interactor.Interactor, scene: scenes.Scene
) -> None:
    truth, size = scene.mask(1), scene.size
    box, point = scenes.box_of(truth), scenes.point_in(truth, np.random.default_rng(0))
    corners = ((box.x0, box.y0), (box.x1, box.y1))
    image: Image.Image | None = Image.fromarray(scene.pixels)
    for prompts in (
        {"pos_points": ((point.x, point.y),)},
        {"bounding_box": corners},
        {
            "bounding_box": corners[::-1],
            "pos_points": ((point.x, point.y),),
            "neg_points": ((1.0, 1.0),),
        },
    ):
        (shape,) = interact(worker, image, **prompts)
        image = None  # for a further click, the agent uses its cache
        assert shape["type"] == "mask"
        mask = decode_mask(shape["points"], image_width=size.width, image_height=size.height)
        assert scenes.iou(mask, truth) > 0.8
        (confidence,) = shape["attributes"]
        assert confidence.spec_id == cvataa.InteractionResultAttributes.CONFIDENCE
        assert 0 <= float(confidence.value) <= 1
    everything = interact(worker, None)
    masks = [
        decode_mask(s["points"], image_width=size.width, image_height=size.height)
        for s in everything
    ]
    for truth in scene.masks:
        assert max(scenes.iou(mask, truth) for mask in masks) > 0.8


def test_negative_points_alone_are_refused_with_a_message_for_the_server(
    worker: interactor.Interactor,
) -> None:
    with pytest.raises(cvataa.BadFunctionError, match="negative points only"):
        interact(worker, Image.new("RGB", (30, 20)), neg_points=((1.0, 1.0),))


def test_the_spec_fits_an_agent_of_both_kinds(demo: Predictor) -> None:
    made = interactor.Interactor(demo)
    driver = agent.get_function_driver_class(made.spec)
    fields = driver.get_remote_function_fields(made.spec)
    assert fields == {"min_pos_points": 0, "min_neg_points": 0, "startswith_box_optional": True}
    detector = function.Detector(demo, function.DetectionSpec(("object",), frozenset({"object"})))
    (label,) = agent.get_function_driver_class(detector.spec).get_remote_function_fields(
        detector.spec
    )["labels_v2"]
    assert (label["name"], label["type"]) == ("object", "mask")
    assert [attribute["name"] for attribute in label["attributes"]] == ["score"]


@pytest.mark.parametrize(
    "place",
    [
        "sam_poll.cvat.function",
        "sam_poll.cvat.interactor",
        ROOT / "sam_poll/cvat/function.py",
        ROOT / "sam_poll/cvat/interactor.py",
        ROOT / "sam_poll/integrations/cvat/sdk/function.py",
        ROOT / "sam_poll/integrations/cvat/sdk/interactor.py",
    ],
)
def test_the_loader_of_cvat_cli_creates_both_functions_by_module_and_by_file(
    place: str | Path,
) -> None:
    module_and_file = (place, None) if isinstance(place, str) else (None, place)
    loaded = FunctionLoader(*module_and_file, {"model": "fake", "points_per_side": 4}).load()
    assert hasattr(loaded, "detect")
    for wrong, reason in (({"modle": "fake"}, "no such parameter"), ({"model": 3}, "type str")):
        with pytest.raises(CriticalError, match=reason):
            FunctionLoader(*module_and_file, wrong).load()


@pytest.mark.parametrize("file", ["sam_poll/cvat", "sam_poll/integrations/cvat/sdk"])
def test_a_function_file_annotates_a_task_as_the_module_does(
    memory: Chunked, host: str, scene: scenes.Scene, file: str
) -> None:
    tasks = [memory.add_task(name, [("a.png", png(scene))], OBJECT) for name in ("one", "two")]
    place = ("--function-file", str(ROOT / file / "function.py"))
    assert auto_annotate(host, tasks[0], "points_per_side=int:4") == 0
    assert auto_annotate(host, tasks[1], "points_per_side=int:4", place=place) == 0
    by_module, by_file = ([shape["points"] for shape in task.shapes] for task in tasks)
    assert by_module == by_file
    assert by_file


def _fail_in_a_worker() -> None:
    with common.sdk_errors():
        raise DeviceError("the device failed")


@pytest.mark.slow
def test_a_device_failure_ends_an_agents_worker_with_its_code() -> None:
    process = multiprocessing.get_context("spawn").Process(target=_fail_in_a_worker)
    process.start()
    process.join(100)
    assert process.exitcode == 70


def test_points_are_kept_as_they_were_clicked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    predictor = Predictor(FakeEngine())
    answer = predictor.predict
    monkeypatch.setattr(
        predictor,
        "predict",
        lambda prepared, prompts: seen.extend(prompts) or answer(prepared, prompts),
    )
    made = interactor.Interactor(predictor)
    agent.set_worker_current_function(made)
    agent_driver_interaction.AgentInteractionFunctionDriver.init_worker(None)
    interact(
        made, Image.new("RGB", (64, 48)), pos_points=((20.5, 20.25),), neg_points=((60.0, 40.0),)
    )
    assert seen == [Prompt(points=(Point(20.5, 20.25, 1), Point(60.0, 40.0, 0)))]


# ── a real server ──


@pytest.mark.cvat
@pytest.mark.skipif("CVAT_HOST" not in os.environ, reason="CVAT_HOST names no server")
@pytest.mark.parametrize("mode", ["everything", "boxes"])
def test_cvat_cli_annotates_a_task_of_a_real_server(
    mode: str, scene: scenes.Scene, tmp_path: Path
) -> None:
    from cvat_sdk.core.proxies.tasks import ResourceType

    who, address = credentials.find(os.environ), os.environ["CVAT_HOST"]
    file = tmp_path / "scene.png"
    file.write_bytes(png(scene))
    with logged_in_sdk(address, who) as sdk:
        spec = {
            "name": "sam_poll test",
            "labels": [{"name": "object", "attributes": [score_spec()]}],
        }
        task = sdk.tasks.create_from_data(
            spec=spec, resource_type=ResourceType.LOCAL, resources=[file]
        )
        try:
            connection = client.connect(address, who)
            label = connection.labels(task=task.id)[0]["id"]
            boxes = [scenes.box_of(mask) for mask in scene.masks]
            common_fields = {"type": "rectangle", "frame": 0, "label_id": label, "group": 0}
            connection.change_shapes(
                task.id,
                "create",
                [{**common_fields, "points": [b.x0, b.y0, b.x1, b.y1]} for b in boxes],
            )
            of_mode = (
                (f"task=int:{task.id}",)
                if mode == "boxes"
                else ("points_per_side=int:12", "score=bool:true")
            )
            detector = function.create(
                **dict(map(parse_function_parameter, (f"mode=str:{mode}", *of_mode, *DEMO)))
            )
            cvataa.annotate_task(sdk, task.id, detector)
            written = [
                shape
                for shape in connection.annotations(task.id)["shapes"]
                if shape["type"] == "mask"
            ]
            width, height = scene.size
            found = [
                decode_mask(s["points"], image_width=width, image_height=height) for s in written
            ]
            for truth in scene.masks:
                assert max(scenes.iou(mask, truth) for mask in found) > 0.8
            assert all(shape["attributes"] for shape in written)
        finally:
            task.remove()
