"""The functions for CVAT's SDK, run by its own drivers: cvat-cli against the stand-in server, and an agent's."""

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

from sam_poll import engines, geometry
from sam_poll.cvat import asked, credentials, function, interactor, sdk, server
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import DeviceError, InputError, UsageError
from sam_poll.formats.cvat import flat
from sam_poll.predictor import Predictor
from sam_poll.types import Box, Everything, Point, Prompt, Size
from tests.conftest import picture_bytes
from tests.cvat_standin import TOKEN, USER, StandIn, Task, score_spec, served
from tools import scenes

OBJECT = {"name": "object", "sublabels": [], "attributes": []}
SCORED = {"name": "object", "sublabels": [], "attributes": [score_spec()]}
DEMO = ("model=str:demo", "device=str:cpu")
TIME = "2026-01-01T00:00:00Z"


class Chunked(StandIn):
    """The stand-in with what the SDK's datasets want besides: pictures in chunks, and all that it thinks required."""

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
        return {**meta, "frames": frames, "chunks_updated_date": TIME, "chunk_size": 72, "stop_frame": len(frames) - 1}

    def _shown(self, task: Task) -> Any:
        counts = {"completed": 0, "validation": 0, "count": 1, "url": ""}
        data = {"data_original_chunk_type": "imageset", "data_chunk_size": 72, "mode": "annotation", "dimension": "2d"}
        who = {"id": 1, "username": USER, "url": "", "first_name": "", "last_name": ""}
        more = {"updated_date": TIME, "status": "annotation", "organization": None, "labels": {"url": ""}}
        return {**super()._shown(task), **data, **more, "jobs": counts, "owner": who}


@pytest.fixture
def memory() -> Chunked:
    return Chunked()


@pytest.fixture
def host(memory: Chunked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    # The SDK keeps what it has fetched by address and task, and has looked for the place when it was imported: a task
    # of an earlier test at the same port would be taken for this one's.
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


def auto_annotate(host: str, task: Task, *words: str, flags: tuple[str, ...] = (), model: str = "fake") -> int:
    """`cvat-cli task auto-annotate` with our function, in this process; its exit code."""
    given = [word for pair in (f"model=str:{model}", *words) for word in ("-p", pair)]
    command = ["task", "auto-annotate", str(task.id), "--function-module", "sam_poll.cvat.function"]
    return main(["--server-host", host, *command, *given, *flags])


def masks_of(task: Task, frame: int, size: Size) -> list[np.ndarray]:
    """The task's masks on a frame, as the SDK reads them."""
    found = [s for s in task.shapes if s["frame"] == frame and s["type"] == "mask"]
    return [decode_mask(s["points"], image_width=size.width, image_height=size.height) for s in found]


# ── cvat-cli, the whole way ──


def test_everything_of_a_task_is_annotated_by_a_real_network(memory: Chunked, host: str, scene: scenes.Scene) -> None:
    task = memory.add_task("scenes", [("a.png", png(scene))], OBJECT)
    assert auto_annotate(host, task, "device=str:cpu", "points_per_side=int:12", model="demo") == 0
    found = masks_of(task, 0, scene.size)
    for truth in scene.masks:
        assert max(scenes.iou(mask, truth) for mask in found) > 0.8
    assert {shape["source"] for shape in task.shapes} == {"auto"}
    assert [shape["attributes"] for shape in task.shapes] == [[]] * len(found)


def test_the_boxes_of_a_task_are_answered_with_masks_of_their_labels(
    memory: Chunked, host: str, scene: scenes.Scene
) -> None:
    dog, cat = ({"name": name, "sublabels": [], "attributes": [score_spec()]} for name in ("dog", "cat"))
    task = memory.add_task("scenes", [("done/a.png", png(scene)), ("done/b.png", png(scene))], dog, cat)
    for index, label in ((1, "dog"), (2, "cat")):
        box = scenes.box_of(scene.mask(index))
        memory.draw(task, 1, "rectangle", label, [box.x0, box.y0, box.x1, box.y1])
    assert auto_annotate(host, task, "mode=str:boxes", f"task=int:{task.id}", "device=str:cpu", model="demo") == 0
    made = [shape for shape in task.shapes if shape["type"] == "mask"]
    names = {label["id"]: label["name"] for label in task.labels}
    assert [(names[shape["label_id"]], shape["frame"]) for shape in made] == [("dog", 1), ("cat", 1)]
    for mask, truth in zip(masks_of(task, 1, scene.size), scene.masks, strict=True):
        assert scenes.iou(mask, truth) > 0.8
    scores = [float(shape["attributes"][0]["value"]) for shape in made]
    assert all(0.5 < score <= 1 for score in scores)


def test_masks_are_polygons_where_the_caller_wants_them(memory: Chunked, host: str) -> None:
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
def test_a_score_is_written_where_it_is_asked_for_and_the_task_has_a_place(
    memory: Chunked, host: str, labels: dict[str, Any], words: tuple[str, ...], flags: tuple[str, ...], scored: bool
) -> None:
    task = memory.add_task("one", [("a.png", picture_bytes(".png"))], labels)
    assert auto_annotate(host, task, "points_per_side=int:2", *words, flags=flags) == 0
    assert task.shapes
    assert {bool(shape["attributes"]) for shape in task.shapes} == {scored}


def test_a_task_whose_label_allows_rectangles_only_is_refused_before_anything_is_computed(
    memory: Chunked, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = memory.add_task("one", [("a.png", picture_bytes(".png"))], {**OBJECT, "type": "rectangle"})
    monkeypatch.setattr(Predictor, "embed", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(cvataa.BadFunctionError, match="rectangle"):
        auto_annotate(host, task, "points_per_side=int:2")


XML = """<annotations><version>1.1</version>
<image id="0" name="a.png" width="64" height="48"><box label="dog" xtl="10" ytl="10" xbr="50" ybr="40"/></image>
<image id="1" name="b.png" width="65" height="48"><box label="cat" xtl="10" ytl="10" xbr="50" ybr="40"/></image>
<image id="2" name="c.png" width="64" height="48"><box label="cat" xtl="400" ytl="10" xbr="500" ybr="40"/>
<box label="cat" xtl="20" ytl="10" xbr="50" ybr="40"/></image></annotations>"""


def test_boxes_of_a_file_are_answered_and_what_cannot_be_takes_nothing_along(
    memory: Chunked, host: str, tmp_path: Path, logged: list[str]
) -> None:
    (tmp_path / "annotations.xml").write_text(XML)
    frames = [(f"done/cam1/{name}.png", picture_bytes(".png")) for name in "abcd"]
    labels = ({"name": name, "sublabels": [], "attributes": []} for name in ("dog", "cat"))
    task = memory.add_task("four", frames, *labels)
    words = ("mode=str:boxes", f"annotations=str:{tmp_path}/annotations.xml")
    assert auto_annotate(host, task, *words) == 0
    names = {label["id"]: label["name"] for label in task.labels}
    assert [(shape["frame"], names[shape["label_id"]]) for shape in task.shapes] == [(0, "dog"), (2, "cat")]
    told = [line for line in logged if line.startswith("WARNING")]
    assert ["b.png" in told[0], "c.png" in told[1], "d.png" in told[2]] == [True] * 3
    assert "65×48" in told[0]


BAD = {
    "an unknown parameter": (("colour=str:red",), "colour"),
    "text for a number": (("points_per_side=str:8",), "points_per_side=int:"),
    "a number out of range": (("iou=float:7",), "-p iou"),
    "an unknown mode": (("mode=str:magic",), "magic"),
    "boxes of nowhere": (("mode=str:boxes",), "task=int:ID"),
    "boxes of two places": (("mode=str:boxes", "task=int:1", "annotations=str:a.xml"), "task=int:ID"),
    "a file that is not there": (("mode=str:boxes", "annotations=str:no/such.xml"), "no/such.xml"),
    "a label with boxes": (("mode=str:boxes", "annotations=str:a.xml", "label=str:dog"), "label"),
    "boxes with everything": (("task=int:1",), "task"),
    "an empty label": (("label=str: ",), "label"),
    "a model that is not there": (("model=str:no_such_model",), "no_such_model"),
    "a config that is not there": (("config=str:no.yaml",), "no.yaml"),
    "a task without boxes": (("mode=str:boxes", "task=int:1"), "no boxes"),
    "a task that is not there": (("mode=str:boxes", "task=int:99"), "task 99"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_of_cvat_cli_and_exit_code_1(
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


def test_a_device_failure_is_one_line_too(
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


def test_nothing_below_the_threshold_comes_back(demo: Predictor, scene: scenes.Scene) -> None:
    detector = function.Detector(demo, function.Source(("object",), frozenset({"object"}), Everything(12)))
    image = Image.fromarray(scene.pixels)
    scores = [float(s.attributes[0].value) for s in detector.detect(Context(conf_threshold=0.3), image)]
    assert len(scores) >= 2
    middle = sum(sorted(scores)[:2]) / 2
    for least in (middle, 1.0):
        kept = [float(s.attributes[0].value) for s in detector.detect(Context(conf_threshold=least), image)]
        assert all(score >= least - 1e-4 for score in kept)
        assert len(kept) < len(scores)


def test_boxes_below_the_threshold_do_not_come_back_either() -> None:
    boxes = asked.Boxes({"a.png": lambda size: [Prompt("dog", box=Box(10, 10, 50, 40))]}, ("dog",))
    detector = function.Detector(Predictor(FakeEngine()), function.Source(("dog",), boxes=boxes))
    image = Image.open(io.BytesIO(picture_bytes()))
    assert len(detector.detect(Context(conf_threshold=0.0), image)) == 1
    assert detector.detect(Context(conf_threshold=1.0), image) == []


def test_a_refused_picture_gets_nothing_and_is_told(logged: list[str]) -> None:
    detector = function.Detector(Predictor(FakeEngine(), max_pixels=100), function.Source(("object",)))
    assert detector.detect(Context(frame_name="big.jpg"), Image.new("RGB", (64, 48))) == []
    assert any("big.jpg" in line and "100" in line for line in logged)


def test_cvats_flat_form_is_that_of_the_sdk() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        bitmap = rng.random((rng.integers(1, 12), rng.integers(1, 12))) < 0.5
        if bitmap.any():
            assert flat(geometry.tight(bitmap, "object", 0.5)) == encode_mask(bitmap)


def test_frames_are_known_by_their_name_with_or_without_leading_folders() -> None:
    def one(size: Size) -> list[Prompt]:
        return []

    def two(size: Size) -> list[Prompt]:
        return []

    boxes = asked.Boxes({"cam1/dog.jpg": one, "dog.jpg": two}, ("dog",))
    assert boxes.of("done/cam1/dog.jpg") is one
    assert boxes.of("cam1/dog.jpg") is one
    assert boxes.of("cam2/dog.jpg") is two
    assert boxes.of("cat.jpg") is None


def test_a_part_of_a_picture_is_not_answered_with_the_boxes_of_the_whole() -> None:
    frames = {0: asked.shapes.FramePicture(0, "a.png", Size(64, 48))}
    labels = [{"id": 1, "name": "dog", "attributes": []}]
    drawn = [{"type": "rectangle", "frame": 0, "label_id": 1, "points": [1, 2, 30, 40]}]
    ask = asked.of_entries(drawn, labels, frames).of("a.png")
    assert ask
    assert [prompt.box for prompt in ask(Size(64, 48))] == [Box(1, 2, 30, 40)]
    with pytest.raises(InputError, match="64×48"):
        ask(Size(32, 48))


def test_frames_of_one_name_cannot_be_told_apart_and_are_refused() -> None:
    frames = {n: asked.shapes.FramePicture(n, "video.mp4", Size(64, 48)) for n in range(2)}
    with pytest.raises(UsageError, match="one name"):
        asked.of_entries([], [], frames)


def test_a_score_of_the_task_is_used_where_it_is_a_text(logged: list[str]) -> None:
    labels = [
        {"id": 1, "name": "dog", "attributes": [{"id": 3, **score_spec()}]},
        {"id": 2, "name": "cat", "attributes": [{"id": 4, **score_spec("number", ("0", "100", "1"))}]},
    ]
    frames = {0: asked.shapes.FramePicture(0, "a.png", Size(64, 48))}
    drawn = [{"type": "rectangle", "frame": 0, "label_id": n, "points": [1, 2, 30, 40]} for n in (1, 2)]
    boxes = asked.of_entries(drawn, labels, frames)
    assert (boxes.labels, boxes.scored) == (("dog", "cat"), {"dog"})
    assert any("'cat'" in line for line in logged)


# ── pictures ──


def turned(orientation: int) -> Image.Image:
    """A picture of two colours, 40×20 upright, as a camera stores it with this EXIF orientation."""
    upright = Image.new("RGB", (40, 20), "blue")
    upright.paste("red", (0, 0, 20, 20))
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    stored.save(buffer, "png", exif=exif)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_is_turned_as_its_exif_says(orientation: int) -> None:
    pixels = sdk.content(turned(orientation))
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (20, 40, 3)
    assert pixels[10, 5].tolist() == [255, 0, 0]
    assert pixels[10, 35].tolist() == [0, 0, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_a_picture_of_any_mode_can_be_embedded(mode: str) -> None:
    known = Predictor(FakeEngine()).embed(sdk.content(Image.new(mode, (30, 20))))
    assert known.size == Size(30, 20)


# ── the interactor, by the agent's drivers ──


def interact(made: interactor.Interactor, image: Image.Image | None, **prompts: Any) -> list[dict[str, Any]]:
    """What an agent's worker does with a request."""
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
    """An agent's worker with our function in it."""
    made = interactor.Interactor(demo, Everything(12))
    agent.set_worker_current_function(made)
    agent_driver_interaction.AgentInteractionFunctionDriver.init_worker(None)
    return made


def test_an_agent_gets_masks_for_clicks_boxes_and_nothing(worker: interactor.Interactor, scene: scenes.Scene) -> None:
    truth, size = scene.mask(1), scene.size
    box, point = scenes.box_of(truth), scenes.point_in(truth, np.random.default_rng(0))
    corners = ((box.x0, box.y0), (box.x1, box.y1))
    image: Image.Image | None = Image.fromarray(scene.pixels)
    for prompts in (
        {"pos_points": ((point.x, point.y),)},
        {"bounding_box": corners},
        {"bounding_box": corners[::-1], "pos_points": ((point.x, point.y),), "neg_points": ((1.0, 1.0),)},
    ):
        (shape,) = interact(worker, image, **prompts)
        image = None  # a further click comes out of the agent's cache
        assert shape["type"] == "mask"
        mask = decode_mask(shape["points"], image_width=size.width, image_height=size.height)
        assert scenes.iou(mask, truth) > 0.8
        (confidence,) = shape["attributes"]
        assert confidence.spec_id == cvataa.InteractionResultAttributes.CONFIDENCE
        assert 0 <= float(confidence.value) <= 1
    everything = interact(worker, None)
    masks = [decode_mask(s["points"], image_width=size.width, image_height=size.height) for s in everything]
    for truth in scene.masks:
        assert max(scenes.iou(mask, truth) for mask in masks) > 0.8


def test_negative_points_alone_are_refused_in_words_that_the_server_gets(worker: interactor.Interactor) -> None:
    with pytest.raises(cvataa.BadFunctionError, match="negative points only"):
        interact(worker, Image.new("RGB", (30, 20)), neg_points=((1.0, 1.0),))


def test_the_spec_fits_an_agent_of_both_kinds(demo: Predictor) -> None:
    made = interactor.Interactor(demo)
    driver = agent.get_function_driver_class(made.spec)
    fields = driver.get_remote_function_fields(made.spec)
    assert fields == {"min_pos_points": 0, "min_neg_points": 0, "startswith_box_optional": True}
    detector = function.Detector(demo, function.Source(("object",), frozenset({"object"})))
    (label,) = agent.get_function_driver_class(detector.spec).get_remote_function_fields(detector.spec)["labels_v2"]
    assert (label["name"], label["type"]) == ("object", "mask")
    assert [attribute["name"] for attribute in label["attributes"]] == ["score"]


@pytest.mark.parametrize("module", ["sam_poll.cvat.function", "sam_poll.cvat.interactor"])
def test_the_clis_loader_makes_both_functions(module: str) -> None:
    loaded = FunctionLoader(module, None, {"model": "fake", "points_per_side": 4}).load()
    assert hasattr(loaded, "detect")
    with pytest.raises(CriticalError, match="no such parameter"):
        FunctionLoader(module, None, {"modle": "fake"}).load()


def _fail_in_a_worker() -> None:
    with sdk.told():
        raise DeviceError("the device failed")


def test_a_device_failure_ends_an_agents_worker_with_its_code() -> None:
    process = multiprocessing.get_context("spawn").Process(target=_fail_in_a_worker)
    process.start()
    process.join(100)
    assert process.exitcode == 70


def test_points_are_kept_as_they_were_clicked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    predictor = Predictor(FakeEngine())
    answer = predictor.predict
    monkeypatch.setattr(predictor, "predict", lambda known, asked: seen.extend(asked) or answer(known, asked))
    made = interactor.Interactor(predictor)
    agent.set_worker_current_function(made)
    agent_driver_interaction.AgentInteractionFunctionDriver.init_worker(None)
    interact(made, Image.new("RGB", (64, 48)), pos_points=((20.5, 20.25),), neg_points=((60.0, 40.0),))
    assert seen == [Prompt(points=(Point(20.5, 20.25, 1), Point(60.0, 40.0, 0)))]


# ── a real server ──


@pytest.mark.cvat
@pytest.mark.skipif("CVAT_HOST" not in os.environ, reason="CVAT_HOST names no server")
@pytest.mark.parametrize("mode", ["everything", "boxes"])
def test_cvat_cli_annotates_a_task_of_a_real_server(mode: str, scene: scenes.Scene, tmp_path: Path) -> None:
    from cvat_sdk import make_client
    from cvat_sdk.core.proxies.tasks import ResourceType

    who, address = credentials.find(os.environ), os.environ["CVAT_HOST"]
    file = tmp_path / "scene.png"
    file.write_bytes(png(scene))
    given: dict[str, Any] = {"access_token": who.token} if who.token else {"credentials": (who.user, who.password)}
    with make_client(address, **given) as client:
        spec = {"name": "sam_poll test", "labels": [{"name": "object", "attributes": [score_spec()]}]}
        task = client.tasks.create_from_data(spec=spec, resource_type=ResourceType.LOCAL, resources=[file])
        try:
            known = server.connect(address, who)
            label = known.labels(task=task.id)[0]["id"]
            boxes = [scenes.box_of(mask) for mask in scene.masks]
            like = {"type": "rectangle", "frame": 0, "label_id": label, "group": 0}
            known.change(task.id, "create", [{**like, "points": [b.x0, b.y0, b.x1, b.y1]} for b in boxes])
            of_mode = (f"task=int:{task.id}",) if mode == "boxes" else ("points_per_side=int:12", "score=bool:true")
            function_ = function.create(**dict(map(parse_function_parameter, (f"mode=str:{mode}", *of_mode, *DEMO))))
            cvataa.annotate_task(client, task.id, function_)
            made = [shape for shape in known.annotations(task.id)["shapes"] if shape["type"] == "mask"]
            width, height = scene.size
            found = [decode_mask(s["points"], image_width=width, image_height=height) for s in made]
            for truth in scene.masks:
                assert max(scenes.iou(mask, truth) for mask in found) > 0.8
            assert all(shape["attributes"] for shape in made)
        finally:
            task.remove()
