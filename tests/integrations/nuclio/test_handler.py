"""Tests of CVAT's Nuclio functions with nuclio-sdk's events, contexts and responses."""

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
from cvat_sdk.auto_annotation import InteractionResultAttributes
from cvat_sdk.masks import decode_mask
from hypothesis import given
from hypothesis import strategies as st
from nuclio_sdk.test import Platform

from sam_poll import engines
from sam_poll.core.errors import (
    DeviceError,
    DeviceOutOfMemoryError,
    InputError,
    ModelError,
    SettingsError,
)
from sam_poll.core.types import AutomaticMaskRequest, Mask, Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.imaging import masks
from sam_poll.integrations.nuclio import handler, requests, responses
from sam_poll.pipeline.predictor import Predictor
from tests.conftest import picture_bytes
from tests.support.nuclio_calls import NEW_CVAT, OLD_CVAT, ROOT, Lines, event, load, wire
from tools import scenes

pytestmark = pytest.mark.filterwarnings(
    "ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning"
)


# ── ways to call a function ──


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


@dataclass
class Caller:
    """A service on an engine, and whether it has ended its process."""

    service: handler.Service
    context: Any = field(default_factory=lambda: Platform().context)
    ended: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.service = replace(self.service, on_device_failure=lambda: self.ended.append(True))

    def interact(self, **body: Any) -> tuple[int, Any]:
        return wire(self.service.interact(self.context, event(body)))

    def detect(self, **body: Any) -> tuple[int, Any]:
        return wire(self.service.detect(self.context, event(body)))


def fake(**more: Any) -> Caller:
    engine = more.pop("engine", None) or FakeEngine()
    return Caller(
        handler.Service(
            Predictor(engine), automatic=AutomaticMaskRequest(points_per_side=4), **more
        )
    )


@pytest.fixture(scope="module")
def demo() -> handler.Service:
    engine = engines.load(engines.resolve("demo"), device="cpu", precision="float32")
    return handler.Service(Predictor(engine), automatic=AutomaticMaskRequest(points_per_side=12))


@pytest.fixture(scope="module")
def scene() -> scenes.Scene:
    return scenes.draw(41, difficulty=0, count=(2, 2), kinds=["ellipse", "rectangle"])


def png(scene: scenes.Scene) -> str:
    return b64(cv2.imencode(".png", scene.pixels[..., ::-1])[1].tobytes())


def of_detector(entry: dict[str, Any], size: Size) -> np.ndarray:
    """Return a detector's mask on the whole picture, read as CVAT reads it."""
    *pixels, left, top, right, bottom = entry["mask"]
    whole = np.zeros((size.height, size.width), dtype=bool)
    whole[top : bottom + 1, left : right + 1] = np.array(pixels).reshape(
        bottom + 1 - top, right + 1 - left
    )
    return whole


def of_list(entry: dict[str, Any], size: Size) -> np.ndarray:
    """Return the mask of an interactor's object, read as CVAT's SDK reads masks."""
    return decode_mask(entry["rle"], image_width=size.width, image_height=size.height)


# ── the real handlers, the real network ──


@pytest.mark.slow
def test_handlers_answer_clicks_boxes_and_no_prompt_with_a_real_network(
    scene: scenes.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("MODEL", "demo"), ("SAM_POLL_DEVICE", "cpu"), ("POINTS_PER_SIDE", "12")):
        monkeypatch.setenv(name, value)
    main = load("sam2/main.py", "sam_poll_nuclio_sam2")
    platform, truth = Platform(), scene.mask(1)
    box, point = scenes.box_of(truth), scenes.point_in(truth, np.random.default_rng(0))
    corners, click = [[box.x0, box.y0], [box.x1, box.y1]], [[point.x, point.y]]
    for prompt in (
        {"pos_points": click, "neg_points": [], "obj_bbox": None},
        {"pos_points": [], "neg_points": [], "obj_bbox": corners},
        {"pos_points": click, "neg_points": [[1, 1]], "obj_bbox": corners},
        {"points": [*click, [1, 1]], "labels": [1, 0]},
        {"box": [box.x0, box.y0, box.x1, box.y1]},
    ):
        status, answer = wire(
            platform.call_handler(main.handler, event({"image": png(scene), **prompt}))
        )
        assert status == 200
        mask = np.array(answer["mask"])
        assert mask.shape == truth.shape
        assert set(np.unique(mask)) == {0, 255}
        assert scenes.iou(mask > 0, truth) > 0.8, prompt
    status, answer = wire(
        platform.call_handler(main.handler, event({"image": png(scene), "pos_points": []}))
    )
    assert status == 200
    assert answer["objects"]
    status, found = wire(
        main.detector(platform._handler_contexts[main.handler], event({"image": png(scene)}))
    )
    assert status == 200
    for one, other in zip(found, answer["objects"], strict=True):
        assert {key: one[key] for key in one if key not in ("mask", "attributes")} == {
            key: other[key] for key in other if key != "rle"
        }
        np.testing.assert_array_equal(of_detector(one, scene.size), of_list(other, scene.size))


def test_a_request_without_prompt_gets_the_union_and_each_object(
    demo: handler.Service, scene: scenes.Scene
) -> None:
    status, answer = Caller(demo).interact(
        image=png(scene), pos_points=[], neg_points=[], obj_bbox=None
    )
    assert status == 200
    together = np.array(answer["mask"]) > 0
    alone = [of_list(entry, scene.size) for entry in answer["objects"]]
    assert (np.logical_or.reduce(alone) == together).all()
    for truth in scene.masks:
        assert max(scenes.iou(mask, truth) for mask in alone) > 0.8


@pytest.mark.slow
def test_a_detector_drops_masks_below_the_threshold_and_sorts_by_confidence(
    demo: handler.Service, scene: scenes.Scene
) -> None:
    caller = Caller(replace(demo, label="thing"))
    status, found = caller.detect(image=png(scene), threshold=0.5)
    assert status == 200
    scores = [float(entry["confidence"]) for entry in found]
    assert scores == sorted(scores, reverse=True)
    assert {entry["label"] for entry in found} == {"thing"}
    assert {entry["type"] for entry in found} == {"mask"}
    assert all(len(entry["points"]) >= 6 and len(entry["points"]) % 2 == 0 for entry in found)
    _, fewer = caller.detect(image=png(scene), threshold=scores[0] - 1e-3)
    assert 1 <= len(fewer) <= len(found)
    assert all(float(entry["confidence"]) >= scores[0] - 2e-3 for entry in fewer)


def test_the_same_picture_is_encoded_once_for_many_clicks() -> None:
    engine = FakeEngine()
    caller = fake(engine=engine)
    image = b64(picture_bytes())
    for x in (10, 20, 30):
        assert caller.interact(image=image, pos_points=[[x, 20]])[0] == 200
    assert engine.calls == {"encode": 1, "decode": 3}


def test_startswith_box_takes_the_first_two_points_as_the_box_of_an_old_server_only() -> None:
    image = b64(picture_bytes())
    box, click = [[10, 10], [50, 40]], [[20, 20]]
    old, new = fake(box_first=True), fake()
    expected = new.interact(image=image, pos_points=click, neg_points=[], obj_bbox=box)
    assert old.interact(image=image, pos_points=[*box, *click], neg_points=[]) == expected
    assert old.interact(image=image, pos_points=click, neg_points=[], obj_bbox=box) == expected
    assert new.interact(image=image, pos_points=[*box, *click], neg_points=[]) != expected


def test_a_body_without_a_content_type_is_read() -> None:
    body = json.dumps({"image": b64(picture_bytes()), "pos_points": [[20, 20]]}).encode()
    caller = fake()
    assert wire(caller.service.interact(caller.context, event(body, "text/plain")))[0] == 200


# ── the two forms of an interactor's answer ──


def whole(shapes: list[dict[str, Any]], size: Size) -> np.ndarray:
    """Return the union of an answer's shapes, read as CVAT's SDK reads masks."""
    return np.logical_or.reduce(
        [
            decode_mask(shape["points"], image_width=size.width, image_height=size.height)
            for shape in shapes
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("clicks", [{"pos_points": [[150, 100]]}, {}], ids=["clicked", "all"])
def test_a_new_server_gets_the_same_pixels_as_shapes(
    demo: handler.Service, scene: scenes.Scene, clicks: dict[str, Any]
) -> None:
    caller, body = Caller(demo), {"image": png(scene), **clicks}
    status, old = wire(demo.interact(caller.context, event(body, headers=OLD_CVAT)))
    assert (status, set(old)) == (200, {"mask"} if clicks else {"mask", "objects"})
    status, new = wire(demo.interact(caller.context, event(body, headers=NEW_CVAT)))
    assert (status, set(new)) == (200, {"shapes"})
    np.testing.assert_array_equal(whole(new["shapes"], scene.size), np.array(old["mask"]) > 0)
    assert len(new["shapes"]) == (1 if clicks else len(old["objects"]))
    for shape in new["shapes"]:
        assert shape["type"] == "mask"
        assert all(type(value) is int for value in shape["points"])
        (confidence,) = shape["attributes"]
        assert confidence["spec_id"] == int(InteractionResultAttributes.CONFIDENCE)
        assert 0 < float(confidence["value"]) <= 1


def test_an_empty_mask_is_no_shape_and_has_no_position() -> None:
    empty = Mask("dog", 0.5, 0, 0, np.zeros((0, 0), dtype=bool))
    assert json.loads(responses.shapes_response([empty])) == {"shapes": []}


@pytest.mark.parametrize(
    ("headers", "form"),
    [
        ({}, "mask"),
        ({"User-Agent": "python-requests/2.32.4"}, "mask"),
        ({"User-Agent": "CVAT/2.23.1 python-requests/2.31.0"}, "mask"),
        (OLD_CVAT, "mask"),
        (NEW_CVAT, "shapes"),
        ({"user-agent": "CVAT/2.73.0"}, "shapes"),
        ({"User-Agent": "CVAT/3.0.0.alpha.1 python-requests/2.32.4"}, "shapes"),
        ({b"User-Agent": b"CVAT/2.73.0 python-requests/2.32.4"}, "shapes"),
        ({"User-Agent": "CVAT/develop"}, "mask"),
        ({"User-Agent": "not CVAT/2.73.0"}, "mask"),
        ({"User-Agent": "CVAT/2.73.0\nx"}, "mask"),
    ],
)
def test_the_user_agent_of_cvats_server_decides_the_form(
    headers: dict[Any, Any], form: str
) -> None:
    caller = fake()
    body = {"image": b64(picture_bytes()), "pos_points": [[20, 20]]}
    assert set(wire(caller.service.interact(caller.context, event(body, headers=headers)))[1]) == {
        form
    }


@pytest.mark.parametrize("setting", ["auto", "mask", "shapes"])
def test_the_variable_overrides_the_user_agent(setting: str) -> None:
    options = handler._options({"INTERACTOR_ANSWER": setting})
    caller = fake(**options)
    body = {"image": b64(picture_bytes()), "pos_points": [[20, 20]]}
    for headers, form in ((OLD_CVAT, "mask"), (NEW_CVAT, "shapes")):
        _, answer = wire(caller.service.interact(caller.context, event(body, headers=headers)))
        assert set(answer) == {form if setting == "auto" else setting}


# ── SAM1 ──


def test_sam1_answers_the_embedding_as_float32_in_base64(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(side=1024)
    caller = fake(engine=engine)
    made = np.random.default_rng(0).random((1, 256, 64, 64), dtype=np.float32)
    monkeypatch.setattr("sam_poll.engines.fake.FakeEmbedding.array", lambda self: made)
    main = load("sam1/main.py", "sam_poll_nuclio_sam1")
    caller.context.user_data.service = caller.service
    request = {"image": b64(picture_bytes()), "pos_points": "whatever", "neg_points": None}
    status, answer = wire(main.handler(caller.context, event(request)))
    assert status == 200
    assert set(answer) == {"blob"}
    blob = np.frombuffer(base64.b64decode(answer["blob"]), dtype="<f4").reshape(1, 256, 64, 64)
    np.testing.assert_array_equal(blob, made)


def test_sam2_has_no_embedding_for_the_browser_and_says_so(demo: handler.Service) -> None:
    caller = Caller(demo)
    status, answer = wire(demo.embed(caller.context, event({"image": b64(picture_bytes())})))
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
def test_an_invalid_request_is_refused_with_400_and_the_reason(case: str) -> None:
    body, place = BAD[case]
    caller = fake()
    status, answer = wire(caller.service.interact(caller.context, event(body)))
    assert status == 400
    assert answer["error"]
    if place:
        assert answer["place"] == place
    assert not caller.ended


def test_a_picture_above_the_limit_is_refused_with_400() -> None:
    caller = Caller(handler.Service(Predictor(FakeEngine(), max_pixels=1000)))
    status, answer = caller.interact(image=IMAGE, pos_points=[[1, 1]])
    assert status == 400
    assert "1,000" in answer["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(
    ["image", "pos_points", "neg_points", "obj_bbox", "points", "labels", "box", "threshold"]
)


@given(
    body=st.dictionaries(keys, json_values) | json_values, image=st.booleans(), old=st.booleans()
)
def test_any_request_is_either_parsed_or_refused(body: Any, image: bool, old: bool) -> None:
    if image and isinstance(body, dict):
        body = {**body, "image": "AAAA"}
    request, refused = None, None
    try:
        request = requests.parse_request(body, box_first=old)
    except InputError as error:
        refused = error
    if request is None:
        assert refused
        assert refused.reason
        assert refused.place
        return
    assert request.picture
    assert (
        request.prompt is None or request.prompt.box or any(p.label for p in request.prompt.points)
    )


@pytest.mark.parametrize("key", ["polygon", "mask", "text", "points"])
def test_a_request_of_any_depth_is_refused(key: str) -> None:
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 10):
        nested = "[" * depth + "]" * depth
        with pytest.raises(InputError):
            requests.parse_request(f'{{"image": "aGk=", "{key}": {nested}}}')


# ── failures of ours ──


def test_a_device_failure_answers_500_and_ends_the_process() -> None:
    engine = FakeEngine()
    caller = fake(engine=engine)
    engine.fail("decode", DeviceError("the device failed: CUDA error"))
    status, answer = caller.interact(image=IMAGE, pos_points=[[20, 20]])
    assert (status, answer["error"]) == (500, "the device failed: CUDA error")
    assert caller.ended == [True]
    assert caller.interact(image=IMAGE, pos_points=[[20, 20]])[0] == 500
    assert engine.calls["decode"] == 1


def test_exit_soon_ends_the_process_with_the_code_of_a_device_failure() -> None:
    waits = "threading.Event().wait()"  # forever
    code = (
        "import threading, sam_poll.integrations.nuclio.handler as n; "
        f"n.EXIT_DELAY_S = 0.01; n.exit_soon(); {waits}"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT, timeout=100)
    assert done.returncode == 70


def test_too_little_memory_is_500_and_the_process_continues() -> None:
    engine = FakeEngine()
    caller = fake(engine=engine)
    engine.fail("encode", DeviceOutOfMemoryError("out of memory"))
    assert caller.interact(image=IMAGE, pos_points=[[20, 20]])[0] == 500
    assert not caller.ended
    assert caller.interact(image=IMAGE, pos_points=[[20, 20]])[0] == 200


def test_an_unexpected_error_is_500_with_its_name_and_the_next_request_is_answered() -> None:
    engine = FakeEngine()
    caller = fake(engine=engine)
    engine.fail("decode", ZeroDivisionError("by zero"))
    status, answer = caller.interact(image=IMAGE, pos_points=[[20, 20]])
    assert status == 500
    assert "ZeroDivisionError" in answer["error"]
    assert caller.interact(image=IMAGE, pos_points=[[20, 20]])[0] == 200


# ── start ──


@pytest.mark.parametrize(
    ("env", "kind", "word"),
    [
        ({"MODEL": "no_such_model"}, ModelError, "no_such_model"),
        ({"MODEL": "demo", "POINTS_PER_SIDE": "many"}, SettingsError, "POINTS_PER_SIDE"),
        ({"MODEL": "demo", "POINTS_PER_SIDE": "1000"}, SettingsError, "POINTS_PER_SIDE"),
        ({"MODEL": "demo", "INTERACTOR_ANSWER": "rle"}, SettingsError, "INTERACTOR_ANSWER"),
        ({"MODEL": "demo", "TEXTS": "dog"}, SettingsError, "facebook/sam3"),
        ({"MODEL": "fake", "TEXTS": "dog, " + "a " * 40}, SettingsError, "TEXTS: text[1]"),
        ({"MODEL": "demo", "SAM_POLL_NONSENSE": "1"}, SettingsError, "NONSENSE"),
    ],
)
def test_a_function_that_cannot_start_logs_the_reason(
    env: dict[str, str], kind: type[Exception], word: str
) -> None:
    logger = Lines()
    with pytest.raises(kind):
        handler.Service.open(logger, env)
    assert word.lower() in logger.lines[-1].lower()


# ── text ──

bitmaps = st.tuples(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)


@given(bitmaps)
def test_the_text_of_a_mask_is_the_json_of_its_picture(made: tuple[int, int, int, float]) -> None:
    height, width, seed, density = made
    bitmap = np.random.default_rng(seed).random((height, width)) < density
    mask, size = masks.tight(bitmap, "object", 0.5), Size(width, height)
    assert json.loads(responses.frame(mask, size)) == (bitmap.astype(int) * 255).tolist()
    entries = json.loads(responses.detector_response([mask]))
    assert len(entries) == bool(bitmap.any())
    for entry in entries:
        np.testing.assert_array_equal(of_detector(entry, size), bitmap)
    for entry in json.loads(responses.compact([mask])):
        np.testing.assert_array_equal(of_list(entry, size), bitmap)


def test_empty_masks_are_left_out() -> None:
    empty = Mask("object", 0.9, 0, 0, np.zeros((0, 0), bool))
    dot = Mask("a", 0.25, 3, 2, np.ones((1, 1), bool))
    (entry,) = json.loads(responses.detector_response([empty, dot, empty]))
    assert entry["mask"] == [1, 3, 2, 3, 2]
    assert json.loads(responses.detector_response([empty])) == []


def test_a_confidence_is_a_number_from_0_to_1_for_any_predicted_iou() -> None:
    dots = [Mask("a", score, 0, 0, np.ones((1, 1), bool)) for score in (1.02, -0.5, float("nan"))]
    assert [entry["confidence"] for entry in json.loads(responses.detector_response(dots))] == [
        "1.0000",
        "0.0000",
        "0.0000",
    ]


def test_a_detector_answers_with_the_score_as_an_attribute() -> None:
    dots = [Mask("a", score, 0, 0, np.ones((1, 1), bool)) for score in (0.98765, float("nan"))]
    found = [entry["attributes"] for entry in json.loads(responses.detector_response(dots))]
    assert found == [[{"name": "score", "value": "0.9877"}], []]


def test_a_label_of_any_characters_is_returned_unchanged(
    demo: handler.Service, scene: scenes.Scene
) -> None:
    status, answer = Caller(replace(demo, label='Häs"chen')).interact(image=png(scene))
    assert status == 200
    assert {entry["label"] for entry in answer["objects"]} == {'Häs"chen'}


# ── words instead of clicks ──


def test_texts_and_exemplars_find_objects_for_detectors_and_interactors() -> None:
    caller = fake(label="screw")
    image = b64(picture_bytes())
    status, found = caller.detect(image=image, text=["a b", "c"], threshold=0.85)
    assert status == 200
    assert [(entry["label"], entry["confidence"]) for entry in found] == [
        ("a b", "0.9000"),
        ("c", "0.9000"),
    ]
    box = {"x0": 5, "y0": 5, "x1": 30, "y1": 30}
    _, found = caller.detect(image=image, exemplars=[{"box": box}])
    assert [entry["label"] for entry in found] == ["screw"]
    assert caller.detect(image=image, text="nothing") == (200, [])
    status, answer = caller.interact(image=image, text="a b")
    assert status == 200
    assert [entry["label"] for entry in answer["objects"]] == ["a b", "a b"]


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"text": ""}, "text"),
        ({"text": ["a", 1]}, "text[1]"),
        ({"text": "very " * 35}, "text"),
        ({"text": "a", "threshold": 2}, "threshold"),
        ({"text": "a", "max_objects": 0}, "max_objects"),
        ({"exemplars": [{"box": {"x0": 500, "y0": 1, "x1": 510, "y1": 9}}]}, "exemplars[0].box.x0"),
        ({"text": "a", "pos_points": [[1, 1]]}, "text"),
    ],
)
def test_a_text_that_cannot_be_used_is_answered_with_400_and_its_place(
    more: dict[str, Any], place: str
) -> None:
    status, answer = fake().detect(image=b64(picture_bytes()), **more)
    assert status == 400
    assert answer["place"] == place


def test_texts_of_the_environment_are_what_a_detector_finds() -> None:
    options = handler._options({"TEXTS": "a b, c"})
    caller = fake(**options)
    image = b64(picture_bytes())
    _, found = caller.detect(image=image)
    assert [entry["label"] for entry in found] == ["a b", "c", "a b"]
    _, found = caller.detect(image=image, threshold=0.85)
    assert [entry["label"] for entry in found] == ["a b", "c"]
    _, found = caller.detect(image=image, text="nothing")
    assert found == []
    with pytest.raises(SettingsError, match=r"text\[1\]: is empty") as caught:
        handler._options({"TEXTS": "dog,"})
    assert caught.value.place == "TEXTS"


# ── rough shapes ──


def test_a_rough_shape_is_the_prompt_alone_or_beside_clicks() -> None:
    caller = fake()
    body = picture_bytes()
    height, width = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR).shape[:2]
    right, below = width // 2, height // 2
    corners = [[0, 0], [right, 0], [right, below], [0, below]]
    rest = height * width - (right - 1) * height - below
    counts = [0, *[below, height - below] * (right - 1), below, rest]
    mask = {"size": [height, width], "counts": counts}
    for shape in ({"polygon": corners}, {"mask": mask}):
        for clicks in ({}, {"neg_points": [[width - 1, height - 1]]}):
            status, answer = caller.interact(image=b64(body), **shape, **clicks)
            assert status == 200
            found = np.array(answer["mask"]) > 0
            assert found.mean() == pytest.approx(1 / 4, abs=0.05)
            assert found[: height // 3, : width // 3].all()


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"polygon": [[1, 1], [2, 2]]}, "polygon"),
        ({"polygon": [[1, 1], [9, 1], [9, 5000]]}, "polygon[2][1]"),
        ({"mask": {"size": [2, 2], "counts": [1, 3]}}, "mask.size"),
        ({"mask": {"size": [2, 2], "counts": [1, 4]}}, "mask.counts"),
        ({"polygon": [[1, 1], [9, 1], [9, 5]], "text": "a"}, "text"),
    ],
)
def test_a_rough_shape_that_cannot_be_used_is_answered_with_400_and_its_place(
    more: dict[str, Any], place: str
) -> None:
    status, answer = fake().interact(image=b64(picture_bytes()), **more)
    assert status == 400
    assert answer["place"] == place
