"""CVAT's Nuclio functions through nuclio-sdk's own events, contexts and responses; their yamls and scripts."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import cv2
import numpy as np
import pytest
from cvat_sdk.masks import decode_mask
from hypothesis import given
from hypothesis import strategies as st
from nuclio_sdk.test import Platform

from sam_poll import engines, geometry
from sam_poll.cvat import nuclio, request, text
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import DeviceError, InputError, ModelError, SettingsError, TooLargeError
from sam_poll.predictor import Predictor
from sam_poll.types import Everything, Mask, Size
from tests.conftest import picture_bytes
from tests.nuclio_calls import ROOT, Lines, event, load, wire
from tools import scenes

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")


# ── ways to ask ──


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


@dataclass
class Asker:
    """A service on an engine, and what became of it."""

    service: nuclio.Service
    context: Any = field(default_factory=lambda: Platform().context)
    ended: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.service = replace(self.service, end=lambda: self.ended.append(True))

    def interact(self, **body: Any) -> tuple[int, Any]:
        return wire(self.service.interact(self.context, event(body)))

    def detect(self, **body: Any) -> tuple[int, Any]:
        return wire(self.service.detect(self.context, event(body)))


def fake(**more: Any) -> Asker:
    engine = more.pop("engine", None) or FakeEngine()
    return Asker(nuclio.Service(Predictor(engine), asked=Everything(points_per_side=4), **more))


@pytest.fixture(scope="module")
def demo() -> nuclio.Service:
    engine = engines.load(engines.resolve("demo"), device="cpu", precision="float32")
    return nuclio.Service(Predictor(engine), asked=Everything(points_per_side=12))


@pytest.fixture(scope="module")
def scene() -> scenes.Scene:
    return scenes.draw(41, difficulty=0, count=(2, 2), kinds=["ellipse", "rectangle"])


def png(scene: scenes.Scene) -> str:
    return b64(cv2.imencode(".png", scene.pixels[..., ::-1])[1].tobytes())


def of_detector(entry: dict[str, Any], size: Size) -> np.ndarray:
    """A detector's mask on the whole picture, read as CVAT reads it."""
    *pixels, left, top, right, bottom = entry["mask"]
    whole = np.zeros((size.height, size.width), dtype=bool)
    whole[top : bottom + 1, left : right + 1] = np.array(pixels).reshape(bottom + 1 - top, right + 1 - left)
    return whole


def of_list(entry: dict[str, Any], size: Size) -> np.ndarray:
    """The mask of an interactor's list of objects, read as CVAT's SDK reads masks."""
    return decode_mask(entry["rle"], image_width=size.width, image_height=size.height)


# ── the real handlers, the real network ──


def test_the_handlers_answer_clicks_boxes_and_nothing_with_a_real_network(
    scene: scenes.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MODEL", "demo"), ("SAM_POLL_DEVICE", "cpu"), ("POINTS_PER_SIDE", "12")):
        monkeypatch.setenv(name, value)
    main = load("sam2/main.py", "sam_poll_nuclio_sam2")
    platform, truth = Platform(), scene.mask(1)
    box, point = scenes.box_of(truth), scenes.point_in(truth, np.random.default_rng(0))
    corners, click = [[box.x0, box.y0], [box.x1, box.y1]], [[point.x, point.y]]
    for asked in (
        {"pos_points": click, "neg_points": [], "obj_bbox": None},
        {"pos_points": [], "neg_points": [], "obj_bbox": corners},
        {"pos_points": click, "neg_points": [[1, 1]], "obj_bbox": corners},
        {"points": [*click, [1, 1]], "labels": [1, 0]},
        {"box": [box.x0, box.y0, box.x1, box.y1]},
    ):
        status, answer = wire(platform.call_handler(main.handler, event({"image": png(scene), **asked})))
        assert status == 200
        mask = np.array(answer["mask"])
        assert mask.shape == truth.shape
        assert set(np.unique(mask)) == {0, 255}
        assert scenes.iou(mask > 0, truth) > 0.8, asked
    status, answer = wire(platform.call_handler(main.handler, event({"image": png(scene), "pos_points": []})))
    assert status == 200
    assert answer["objects"]
    status, found = wire(main.detector(platform._handler_contexts[main.handler], event({"image": png(scene)})))
    assert status == 200
    for one, other in zip(found, answer["objects"], strict=True):
        assert {key: one[key] for key in one if key != "mask"} == {key: other[key] for key in other if key != "rle"}
        np.testing.assert_array_equal(of_detector(one, scene.size), of_list(other, scene.size))


def test_nothing_clicked_answers_all_that_there_is_together_and_one_by_one(
    demo: nuclio.Service, scene: scenes.Scene
) -> None:
    status, answer = Asker(demo).interact(image=png(scene), pos_points=[], neg_points=[], obj_bbox=None)
    assert status == 200
    together = np.array(answer["mask"]) > 0
    alone = [of_list(entry, scene.size) for entry in answer["objects"]]
    assert (np.logical_or.reduce(alone) == together).all()
    for truth in scene.masks:
        assert max(scenes.iou(mask, truth) for mask in alone) > 0.8


def test_a_detector_keeps_what_reaches_the_threshold_and_the_best_comes_first(
    demo: nuclio.Service, scene: scenes.Scene
) -> None:
    asker = Asker(replace(demo, label="thing"))
    status, found = asker.detect(image=png(scene), threshold=0.5)
    assert status == 200
    scores = [float(entry["confidence"]) for entry in found]
    assert scores == sorted(scores, reverse=True)
    assert {entry["label"] for entry in found} == {"thing"}
    assert {entry["type"] for entry in found} == {"mask"}
    assert all(len(entry["points"]) >= 6 and len(entry["points"]) % 2 == 0 for entry in found)
    _, fewer = asker.detect(image=png(scene), threshold=scores[0] - 1e-3)
    assert 1 <= len(fewer) <= len(found)
    assert all(float(entry["confidence"]) >= scores[0] - 2e-3 for entry in fewer)


def test_the_same_picture_is_encoded_once_for_many_clicks() -> None:
    engine = FakeEngine()
    asker = fake(engine=engine)
    image = b64(picture_bytes())
    for x in (10, 20, 30):
        assert asker.interact(image=image, pos_points=[[x, 20]])[0] == 200
    assert engine.calls == {"encode": 1, "decode": 3}


def test_an_old_servers_box_comes_as_the_first_two_points_and_a_new_servers_does_not() -> None:
    image = b64(picture_bytes())
    box, click = [[10, 10], [50, 40]], [[20, 20]]
    old, new = fake(box_first=True), fake()
    wanted = new.interact(image=image, pos_points=click, neg_points=[], obj_bbox=box)
    assert old.interact(image=image, pos_points=[*box, *click], neg_points=[]) == wanted
    assert old.interact(image=image, pos_points=click, neg_points=[], obj_bbox=box) == wanted
    assert new.interact(image=image, pos_points=[*box, *click], neg_points=[]) != wanted


def test_a_body_without_a_content_type_is_read_all_the_same() -> None:
    body = json.dumps({"image": b64(picture_bytes()), "pos_points": [[20, 20]]}).encode()
    asker = fake()
    assert wire(asker.service.interact(asker.context, event(body, "text/plain")))[0] == 200


# ── SAM1 ──


def test_sam1_answers_the_embedding_as_float32_in_base64(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(side=1024)
    asker = fake(engine=engine)
    made = np.random.default_rng(0).random((1, 256, 64, 64), dtype=np.float32)
    monkeypatch.setattr("sam_poll.engines.fake.FakeEmbedding.array", lambda self: made)
    main = load("sam1/main.py", "sam_poll_nuclio_sam1")
    asker.context.user_data.service = asker.service
    asked = {"image": b64(picture_bytes()), "pos_points": "whatever", "neg_points": None}
    status, answer = wire(main.handler(asker.context, event(asked)))
    assert status == 200
    assert set(answer) == {"blob"}
    blob = np.frombuffer(base64.b64decode(answer["blob"]), dtype="<f4").reshape(1, 256, 64, 64)
    np.testing.assert_array_equal(blob, made)


def test_sam2_has_no_embedding_for_the_browser_and_says_so(demo: nuclio.Service) -> None:
    asker = Asker(demo)
    status, answer = wire(demo.embed(asker.context, event({"image": b64(picture_bytes())})))
    assert status == 400
    assert "SAM1" in answer["remedy"]


# ── refusals ──

IMAGE = b64(picture_bytes())

BAD = {
    "no picture": ({}, "image"),
    "null": ({"image": None}, "image"),
    "empty": ({"image": ""}, "image"),
    "a number": ({"image": 7}, "image"),
    "broken base64": ({"image": "abc"}, "image"),
    "letters of no base64": ({"image": "äöü!"}, "image"),
    "no picture in it": ({"image": b64(b"hello, this is no picture")}, None),
    "half a picture": ({"image": b64(picture_bytes(".png")[:200])}, None),
    "points that are no pairs": ({"image": IMAGE, "pos_points": [[1, 2, 3]]}, "pos_points[0]"),
    "flat points": ({"image": IMAGE, "pos_points": [1, 2]}, "pos_points[0]"),
    "points that are no list": ({"image": IMAGE, "pos_points": {"x": 1}}, "pos_points"),
    "words": ({"image": IMAGE, "neg_points": [["a", "b"]]}, "neg_points[0]"),
    "booleans": ({"image": IMAGE, "pos_points": [[True, 1]]}, "pos_points[0]"),
    "null in a pair": ({"image": IMAGE, "pos_points": [[None, 1]]}, "pos_points[0]"),
    "a number of many digits": ({"image": IMAGE, "pos_points": [[10**400, 1]]}, "pos_points[0]"),
    "outside": ({"image": IMAGE, "pos_points": [[5000, 2]]}, "points[0].x"),
    "negative only": ({"image": IMAGE, "neg_points": [[1, 2]]}, "pos_points"),
    "half a box": ({"image": IMAGE, "obj_bbox": [[1, 2]]}, "obj_bbox"),
    "an empty box": ({"image": IMAGE, "obj_bbox": [[5, 5], [5, 9]]}, "box"),
    "fewer labels": ({"image": IMAGE, "points": [[1, 2], [3, 4]], "labels": [1]}, "labels"),
    "labels alone": ({"image": IMAGE, "labels": [1]}, "labels"),
    "labels that are no list": ({"image": IMAGE, "points": [[1, 2]], "labels": 1}, "labels"),
    "another label": ({"image": IMAGE, "points": [[1, 2]], "labels": [2]}, "labels[0]"),
    "a threshold above 1": ({"image": IMAGE, "threshold": 7}, "threshold"),
    "a list": ([1, 2], "body"),
    "no JSON": (b"{", "body"),
    "NaN": (b'{"image": "%s", "pos_points": [[NaN, 1]]}' % IMAGE.encode(), "pos_points[0]"),
    "nested without end": (b"[" * 100_000, "body"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_the_requests_fault_is_refused_with_400_and_the_reason(case: str) -> None:
    body, place = BAD[case]
    asker = fake()
    status, answer = wire(asker.service.interact(asker.context, event(body)))
    assert status == 400
    assert answer["error"]
    if place:
        assert answer["place"] == place
    assert not asker.ended


def test_a_picture_above_the_limit_is_refused_with_400() -> None:
    asker = Asker(nuclio.Service(Predictor(FakeEngine(), max_pixels=1000)))
    status, answer = asker.interact(image=IMAGE, pos_points=[[1, 1]])
    assert status == 400
    assert "1,000" in answer["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["image", "pos_points", "neg_points", "obj_bbox", "points", "labels", "box", "threshold"])


@given(body=st.dictionaries(keys, json_values) | json_values, image=st.booleans(), old=st.booleans())
def test_whatever_is_asked_is_read_or_refused_and_nothing_else(body: Any, image: bool, old: bool) -> None:
    if image and isinstance(body, dict):
        body = {**body, "image": "AAAA"}
    asked, refused = None, None
    try:
        asked = request.read(body, box_first=old)
    except InputError as error:
        refused = error
    if asked is None:
        assert refused
        assert refused.reason
        assert refused.place
        return
    assert asked.picture
    assert asked.prompt is None or asked.prompt.box or any(p.label for p in asked.prompt.points)


# ── failures of ours ──


def test_a_device_failure_answers_500_ends_the_process_and_answers_nobody_any_more() -> None:
    engine = FakeEngine()
    asker = fake(engine=engine)
    engine.fail("decode", DeviceError("the device failed: CUDA error"))
    status, answer = asker.interact(image=IMAGE, pos_points=[[20, 20]])
    assert (status, answer["error"]) == (500, "the device failed: CUDA error")
    assert asker.ended == [True]
    assert asker.interact(image=IMAGE, pos_points=[[20, 20]])[0] == 500
    assert engine.calls["decode"] == 1


def test_the_process_ends_with_the_code_of_a_device_failure() -> None:
    waits = "threading.Event().wait()"  # for ever: only being ended ends it
    code = f"import threading, sam_poll.cvat.nuclio as n; n.END_AFTER_S = 0.01; n.end_process(); {waits}"
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, timeout=100)
    assert done.returncode == 70


def test_too_little_memory_is_500_and_the_process_lives_on() -> None:
    engine = FakeEngine()
    asker = fake(engine=engine)
    engine.fail("encode", TooLargeError("out of memory"))
    assert asker.interact(image=IMAGE, pos_points=[[20, 20]])[0] == 500
    assert not asker.ended
    assert asker.interact(image=IMAGE, pos_points=[[20, 20]])[0] == 200


def test_a_surprise_is_500_with_its_name_and_the_next_request_is_answered() -> None:
    engine = FakeEngine()
    asker = fake(engine=engine)
    engine.fail("decode", ZeroDivisionError("by zero"))
    status, answer = asker.interact(image=IMAGE, pos_points=[[20, 20]])
    assert status == 500
    assert "ZeroDivisionError" in answer["error"]
    assert asker.interact(image=IMAGE, pos_points=[[20, 20]])[0] == 200


# ── start ──


@pytest.mark.parametrize(
    ("env", "kind", "word"),
    [
        ({"MODEL": "no_such_model"}, ModelError, "no_such_model"),
        ({"MODEL": "demo", "POINTS_PER_SIDE": "many"}, SettingsError, "POINTS_PER_SIDE"),
        ({"MODEL": "demo", "POINTS_PER_SIDE": "1000"}, SettingsError, "POINTS_PER_SIDE"),
        ({"MODEL": "demo", "SAM_POLL_NONSENSE": "1"}, SettingsError, "NONSENSE"),
    ],
)
def test_a_function_that_cannot_start_says_why(env: dict[str, str], kind: type[Exception], word: str) -> None:
    logger = Lines()
    with pytest.raises(kind):
        nuclio.Service.open(logger, env)
    assert word.lower() in logger.lines[-1].lower()


# ── text ──

bitmaps = st.tuples(
    st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.02, 0.5, 1.0])
)


@given(bitmaps)
def test_the_text_of_a_mask_is_the_json_of_its_picture(made: tuple[int, int, int, float]) -> None:
    height, width, seed, density = made
    bitmap = np.random.default_rng(seed).random((height, width)) < density
    mask, size = geometry.tight(bitmap, "object", 0.5), Size(width, height)
    assert json.loads(text.frame(mask, size)) == (bitmap.astype(int) * 255).tolist()
    entries = json.loads(text.detected([mask]))
    assert len(entries) == bool(bitmap.any())
    for entry in entries:
        np.testing.assert_array_equal(of_detector(entry, size), bitmap)
    for entry in json.loads(text.listed([mask])):
        np.testing.assert_array_equal(of_list(entry, size), bitmap)


def test_masks_of_nothing_are_left_out_and_the_others_stay() -> None:
    empty = Mask("object", 0.9, 0, 0, np.zeros((0, 0), bool))
    dot = Mask("a", 0.25, 3, 2, np.ones((1, 1), bool))
    (entry,) = json.loads(text.detected([empty, dot, empty]))
    assert entry["mask"] == [1, 3, 2, 3, 2]
    assert json.loads(text.detected([empty])) == []


def test_a_confidence_is_a_number_from_0_to_1_whatever_the_network_guesses() -> None:
    dots = [Mask("a", score, 0, 0, np.ones((1, 1), bool)) for score in (1.02, -0.5, float("nan"))]
    assert [entry["confidence"] for entry in json.loads(text.detected(dots))] == ["1.0000", "0.0000", "0.0000"]


def test_a_label_of_any_letters_comes_through(demo: nuclio.Service, scene: scenes.Scene) -> None:
    status, answer = Asker(replace(demo, label='Häs"chen')).interact(image=png(scene))
    assert status == 200
    assert {entry["label"] for entry in answer["objects"]} == {'Häs"chen'}
