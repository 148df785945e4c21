"""SAM over HTTP: what is asked and what is answered."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from nuclio_sdk.test import Platform

from sam_poll import formats, images
from sam_poll.cvat import nuclio, remote
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import DeviceError, TooLargeError
from sam_poll.pipeline import Pipeline
from sam_poll.predictor import Predictor
from sam_poll.prompts import parse
from sam_poll.serve import asked as bodies_
from sam_poll.serve.refusals import MalformedError
from sam_poll.types import Job, ModelInfo
from tests.conftest import BOX, picture_bytes, wait_until
from tests.nuclio_calls import Lines, event
from tests.serve_site import TOKEN, Site, in_base64, json_body, site
from tests.test_pipeline import MemoryDoor

pytestmark = pytest.mark.filterwarnings("ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning")
CLICK = {"pos_points": [[30, 20]], "neg_points": [], "obj_bbox": None}


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """For tests that leave nothing behind."""
    with site() as there:
        yield there


def of_the_folder(picture: bytes, prompt: Any, name: str, wanted: str) -> list[tuple[str, bytes]]:
    """What the same pipeline writes for the same files that lie in a folder."""
    job = Job(name.rpartition(".")[0], name, picture, parse(json.dumps(prompt).encode()).prompts)
    door = MemoryDoor([job])
    Pipeline(FakeEngine(), formats.load([wanted], formats.FormatOptions())).run(door, threading.Event())
    return [(job.id + document.suffix, document.body) for document in door.delivered[job.id]]


def bodies(answer: httpx.Response) -> list[tuple[str, bytes]]:
    found = answer.json()["documents"]
    return [(d["name"], d["text"].encode() if "text" in d else base64.b64decode(d["base64"])) for d in found]


# ── /predict ──


@pytest.mark.parametrize("prompt", [BOX, {"everything": {"points_per_side": 4}}, {"objects": [BOX, BOX]}])
@pytest.mark.parametrize("wanted", formats.names())
def test_an_answer_is_byte_for_byte_what_the_folder_writes(wanted: str, prompt: Any, shared: Site) -> None:
    answer = shared.post("/predict", json_body(prompt=prompt, formats=[wanted], name="done/cam1/dog.jpg"))
    assert answer.status_code == 200, answer.text
    expected = of_the_folder(picture_bytes(), prompt, "done/cam1/dog.jpg", wanted)
    if len(expected) == 1:
        assert answer.content == expected[0][1]
    else:
        assert bodies(answer) == expected


def test_a_form_and_json_are_answered_alike() -> None:
    picture = picture_bytes()
    with site() as there, there.client() as client:
        of_json = client.post("/predict", json=json_body(formats=["mask", "coco"], name="dog.jpg"))
        for form in ({"formats": ["mask", "coco"]}, {"formats": "mask,coco"}, {"formats": "mask", "name": "dog.jpg"}):
            data: dict[str, Any] = {"prompt": json.dumps(BOX), **form}
            of_form = client.post("/predict", files={"picture": ("dog.jpg", picture, "image/jpeg")}, data=data)
            assert of_form.status_code == 200, of_form.text
            wanted = of_json.content if form["formats"] != "mask" else bodies(of_json)[0][1]
            assert of_form.content == wanted


def test_the_prompt_of_a_form_may_be_a_file_and_its_picture_may_have_windows_paths() -> None:
    with site() as there, there.client() as client:
        files = {"picture": ("C:\\cam1\\dog.jpg", picture_bytes()), "prompt": ("dog.json", json.dumps(BOX).encode())}
        answer = client.post("/predict", files=files, data={"formats": "yolo"})
    assert [name for name, _ in bodies(answer)] == ["dog.yolo.txt", "dog.yolo.yaml"]


def test_several_documents_or_one_follows_from_what_is_asked_never_from_what_is_found() -> None:
    with site(formats=["opex"], mask="per-object") as there:
        for count in (1, 2):
            prompt = {"objects": [BOX] * count}
            answer = there.post("/predict", json_body(prompt=prompt, formats=["mask"]))
            assert [name for name, _ in bodies(answer)] == [f"picture.mask.{n + 1}.png" for n in range(count)]
            plain = there.post("/predict", json_body(prompt=prompt))
            assert plain.headers["content-type"] == "application/json"
            assert len(plain.json()["objects"]) == count


def test_media_types_are_those_of_the_documents(shared: Site) -> None:
    expected = {"mask": "image/png", "overlay": "image/jpeg", "cvat": "application/xml", "coco": "application/json"}
    kinds = {f: shared.post("/predict", json_body(formats=[f])).headers["content-type"] for f in expected}
    several = shared.post("/predict", json_body(formats=["mask", "cvat"]))
    assert kinds == expected
    assert several.headers["content-type"] == "application/json"


def test_the_name_is_the_prompts_own_where_none_is_given() -> None:
    with site() as there:
        answer = there.post("/predict", json_body(prompt={**BOX, "image": "cat.jpg"}, formats=["cvat"]))
    assert 'name="cat.jpg"' in answer.text


def test_overlay_and_mask_of_one_picture_share_its_embedding_and_only_the_overlay_keeps_its_pixels() -> None:
    with site() as there:
        for wanted in ("mask", "overlay", "mask"):
            assert there.post("/predict", json_body(formats=[wanted])).status_code == 200
        assert len(there.engine.encoded) == 1
        assert there.engine.encoded == [images.digest_of(picture_bytes())]


def test_pictures_of_several_callers_are_encoded_in_one_batch() -> None:
    gate = threading.Event()
    with site(FakeEngine(gate=gate, batch=4)) as there:
        first = there.later("/predict", json_body(0, formats=["mask"]))
        wait_until(lambda: there.engine.calls["encode"])
        others = [there.later("/predict", json_body(n, formats=["mask"])) for n in range(1, 5)]
        wait_until(lambda: there.pipeline._device_queue.qsize() == 4)
        gate.set()
        assert {asked.done().status_code for asked in [first, *others]} == {200}
        assert there.engine.calls["encode"] == 2


# ── /interact, /features ──


def of_nuclio(what: str, body: Any, engine: FakeEngine | None = None) -> Any:
    service = nuclio.Service(Predictor(engine or FakeEngine()))
    context = Platform().context
    context.logger = Lines()
    return getattr(service, what)(context, event(body))


@pytest.mark.parametrize("asked", [CLICK, {**CLICK, "obj_bbox": [[5, 5], [40, 40]]}, {}, {"threshold": 0.95}])
def test_interact_answers_as_our_nuclio_function(asked: dict[str, Any], shared: Site) -> None:
    body = {"image": in_base64(picture_bytes()), **asked}
    answer = shared.post("/interact", body)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.text == of_nuclio("interact", body).body
    assert np.shape(answer.json()["mask"]) == (48, 64)


def test_features_answers_as_our_nuclio_function() -> None:
    body = {"image": in_base64(picture_bytes()), **CLICK}
    with site(FakeEngine(side=1024)) as there:
        answer = there.post("/features", body)
        assert there.engine.calls["decode"] == 0
    assert answer.text == of_nuclio("embed", body, FakeEngine(side=1024)).body
    assert len(base64.b64decode(answer.json()["blob"])) == 4 * 256 * 64 * 64


class Sam2(FakeEngine):
    @property
    def info(self) -> ModelInfo:
        return ModelInfo("other", "sam2", 1024, "cpu", "float32")


def test_features_of_a_network_that_no_browser_decodes_are_refused_and_of_too_small_a_side_our_fault() -> None:
    body = {"image": in_base64(picture_bytes())}
    with site(Sam2()) as there:
        answer = there.post("/features", body)
        assert (answer.status_code, "SAM1" in answer.json()["remedy"]) == (422, True)
        assert there.engine.calls["encode"] == 0
    with site() as there:
        answer = there.post("/features", body)
        assert (answer.status_code, answer.json()["code"]) == (500, "memory")


@pytest.mark.parametrize("path", ["/interact", "/features"])
def test_the_nuclio_function_that_hands_on_works_against_it_with_the_token_in_its_address(path: str) -> None:
    body = {"image": in_base64(picture_bytes()), **CLICK}
    context = Platform().context
    context.logger = Lines()
    with site(FakeEngine(side=1024), token=TOKEN) as there:
        for address, status in ((there.url, 401), (there.url.replace("//", f"//:{TOKEN}@"), 200)):
            service = remote.Remote.open(context.logger, {"SAM_URI": address + path})
            response = service.forward(context, event(body))
            assert response.status_code == status
    assert set(json.loads(response.body)) == ({"mask"} if path == "/interact" else {"blob"})


# ── refusals ──

SHORT = picture_bytes(".png")[:-40]
REFUSED = [
    (json_body(prompt={}), "prompt", "top level"),
    (json_body(prompt={"box": {"x0": 1, "y0": 1, "x1": 900, "y1": 9}}), "prompt", "box.x1"),
    (json_body(prompt={"box": [1, 2, 3, 4]}), "prompt", "box"),
    (json_body(prompt={**BOX, "image_bytes": 1}), "picture", None),
    (json_body(prompt={**BOX, "image_sha256": "0" * 64}), "picture", None),
    (json_body(prompt=None), "prompt", "prompt"),
    (json_body(prompt={**BOX, "points": [{"x": 1, "y": 1}] * 20}), "prompt", "points"),
    ({"prompt": BOX}, "picture", "picture"),
    (json_body() | {"picture": "/etc/hostname"}, "picture", "picture"),
    (json_body() | {"picture": "file:///etc/hostname"}, "picture", "picture"),
    (json_body() | {"picture": 3}, "picture", "picture"),
    (json_body() | {"picture": in_base64(b"no picture")}, "picture", None),
    (json_body() | {"picture": in_base64(SHORT)}, "picture", None),
    (json_body(formats=["masks"]), "input", "formats"),
    (json_body(formats=["/interact"]), "input", "formats"),
    (json_body(formats=[]), "input", "formats"),
    (json_body(formats="mask"), "input", "formats"),
    (json_body(name="../../etc/passwd"), "input", "name"),
    (json_body(name="/etc/passwd"), "input", "name"),
    (json_body(name="a\nb"), "input", "name"),
    (json_body(name="a" * 2000), "input", "name"),
    (json_body(name=3), "input", "name"),
    (json_body(promt=1), "input", "promt"),
]


def test_what_cannot_be_answered_is_refused_with_code_reason_place_and_remedy() -> None:
    with site(limits__prompts=10) as there, there.client() as client:
        for body, code, place in REFUSED:
            answer = client.post("/predict", json=body)
            told = answer.json()
            assert (answer.status_code, told["code"], told["place"]) == (422, code, place), (body, told)
            assert told["reason"]
            assert told["remedy"]
        assert there.engine.calls["encode"] == 0


def test_a_picture_of_too_many_pixels_is_refused_by_its_header() -> None:
    with site(limits__picture_mpx=0.001) as there:
        answer = there.post("/predict", json_body())
    assert (answer.status_code, answer.json()["code"]) == (422, "picture")
    assert "more than the limit" in answer.json()["reason"]


MALFORMED: list[tuple[bytes, str, int, str]] = [
    (b"", "application/json", 400, "body"),
    (b"{", "application/json", 400, "body"),
    (b"[]", "application/json", 400, "body"),
    (b"\xff\xfe", "application/json", 400, "body"),
    (b"[" * 100_000, "application/json", 400, "body"),
    (b'{"picture": "A", "picture": "B"}', "application/json", 400, "body"),
    (b'{"a": ' + b"9" * 5000 + b"}", "application/json", 400, "body"),
    (b"x", "text/plain", 415, "kind"),
    (b"x", "", 415, "kind"),
    (b"x", "multipart/form-data", 400, "body"),
    (b"x", "multipart/form-data; boundary=b", 400, "body"),
    (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b", 400, "body"),
    (
        b'--b\r\nContent-Disposition: form-data; name="picture"\r\n\r\nxx',
        "multipart/form-data; boundary=b",
        400,
        "body",
    ),
    (b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b", 400, "body"),
    (
        b'--b\r\nContent-Disposition: form-data; name="picture"\r\n\r\nx\r\n' * 40 + b"--b--\r\n",
        "multipart/form-data; boundary=b",
        400,
        "body",
    ),
]


def test_a_body_that_is_none_is_refused() -> None:
    with site() as there, there.client() as client:
        for body, kind, status, code in MALFORMED:
            answer = client.post("/predict", content=body, headers={"Content-Type": kind})
            assert (answer.status_code, answer.json()["code"]) == (status, code), (body[:60], kind, answer.text)
        for path in ("/interact", "/features"):
            assert client.post(path, content=b"{").status_code == 400
            assert client.post(path, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
            assert client.post(path, json={"image": "!"}).status_code == 422
        assert client.get("/predict").headers["allow"] == "POST"
        assert client.get("/nowhere").json()["code"] == "address"


def test_that_a_key_came_twice_is_found_among_very_many() -> None:
    body = "{" + ",".join(f'"{n}":0' for n in range(400_000)) + ',"399999":0}'
    with pytest.raises(MalformedError) as caught:
        bodies_.interact("application/json", body.encode())
    assert (caught.value.reason, caught.value.place) == ("given twice", "399999")


def test_a_form_with_something_twice_or_unknown_or_missing_is_refused() -> None:
    good = {"picture": ("a.jpg", picture_bytes()), "prompt": (None, json.dumps(BOX))}
    with site() as there, there.client() as client:
        for change, status, place in [
            ([("prompt", (None, "{}"))], 400, "prompt"),
            ([("pictures", (None, "x"))], 422, "pictures"),
            ([("formats", (None, b"\xff"))], 400, "formats"),
        ]:
            answer = client.post("/predict", files=[*good.items(), *change])
            assert (answer.status_code, answer.json()["place"]) == (status, place), answer.text
        for missing in good:
            answer = client.post("/predict", files={key: value for key, value in good.items() if key != missing})
            assert (answer.status_code, answer.json()["place"]) == (422, missing)


def test_a_body_that_is_too_long_is_refused_promised_or_not() -> None:
    with site(serve__body_mib=1) as there, there.client() as client:
        promised = client.post("/predict", content=b"x" * (1 << 20) + b"x")
        counted = client.post(
            "/predict", content=iter([b"x" * 100_000] * 20), headers={"Content-Type": "application/json"}
        )
        assert [(a.status_code, a.json()["code"]) for a in (promised, counted)] == [(413, "length")] * 2
        assert client.post("/predict", json=json_body(formats=["mask"])).status_code == 200
        assert there.door.inside == 0


# ── when something is wrong here ──


def test_a_surprise_of_ours_is_500_and_the_others_go_on() -> None:
    with site() as there:
        there.engine.fail("decode", ZeroDivisionError("odd"))
        answer = there.post("/predict", json_body(formats=["mask"]))
        assert (answer.status_code, "ZeroDivisionError" in answer.json()["reason"]) == (500, True)
        assert there.post("/predict", json_body(formats=["mask"])).status_code == 200


def test_a_picture_that_the_device_has_no_room_for_is_our_fault() -> None:
    with site() as there:
        there.engine.fail("encode", TooLargeError("does not fit", remedy="free some"), times=9)
        answer = there.post("/predict", json_body(formats=["mask"]))
    assert (answer.status_code, answer.json()["code"]) == (500, "memory")


def test_a_failed_device_is_told_to_all_who_wait_and_ends_the_run() -> None:
    gate = threading.Event()
    engine = FakeEngine(gate=gate, batch=1)
    with site(engine) as there:
        engine.fail("encode", DeviceError("the card is gone"), at=2)
        held = there.later("/predict", json_body(0, formats=["mask"]))
        wait_until(lambda: engine.calls["encode"])
        waiting = [there.later("/predict", json_body(n, formats=["mask"])) for n in (1, 2)]
        wait_until(lambda: there.pipeline._device_queue.qsize() == 2)
        gate.set()
        assert held.done().status_code in (200, 500)
        told = [asked.done() for asked in waiting]
        assert {(a.status_code, a.json()["code"]) for a in told} == {(500, "device")}
        wait_until(lambda: there.error)
        assert isinstance(there.error, DeviceError)


def answered_picture(there: Site) -> bytes:
    return there.post("/predict", json_body(formats=["mask"])).content


def test_the_mask_is_that_of_the_prompt() -> None:
    with site() as there:
        mask = cv2.imdecode(np.frombuffer(answered_picture(there), np.uint8), cv2.IMREAD_UNCHANGED)
    rows, columns = np.nonzero(mask)
    assert mask.shape == (48, 64)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 10, 49, 39)


def test_the_answer_of_a_large_picture_comes_whole_through_its_pieces() -> None:
    big = cv2.imencode(".jpg", np.zeros((1500, 2000, 3), np.uint8))[1].tobytes()
    body = {"image": in_base64(big), "obj_bbox": [[100, 100], [1900, 1400]]}
    with site() as there:
        answer = there.post("/interact", body)
    assert int(answer.headers["content-length"]) == len(answer.content) > 6_000_000
    assert np.shape(json.load(io.BytesIO(answer.content))["mask"]) == (1500, 2000)
