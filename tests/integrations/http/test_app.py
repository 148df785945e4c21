"""HTTP endpoints: requests and their answers."""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from nuclio_sdk.test import Platform

from sam_poll.core.errors import DeviceError, DeviceOutOfMemoryError, InputError
from sam_poll.core.types import Job, ModelInfo
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry as formats
from sam_poll.imaging import decode
from sam_poll.integrations.http import requests as bodies_
from sam_poll.integrations.http.errors import BadRequestError
from sam_poll.integrations.nuclio import handler, proxy
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.pipeline.predictor import Predictor
from sam_poll.prompts.parser import parse
from tests.conftest import BOX, picture_bytes, wait_until
from tests.support.http_server import TOKEN, Site, in_base64, json_body, running_site
from tests.support.nuclio_calls import NEW_CVAT, OLD_CVAT, Lines, event
from tests.support.pipelines import MemorySource
from tests.support.strategies import encoded, sample

pytestmark = pytest.mark.filterwarnings(
    "ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning"
)
CLICK = {"pos_points": [[30, 20]], "neg_points": [], "obj_bbox": None}


@pytest.fixture(scope="module")
def shared() -> Iterator[Site]:
    """A server for tests that do not change its state."""
    with running_site() as site:
        yield site


def of_the_folder(picture: bytes, prompt: Any, name: str, wanted: str) -> list[tuple[str, bytes]]:
    """Return what the same pipeline writes for the same files in a folder."""
    job = Job(name.rpartition(".")[0], name, picture, parse(json.dumps(prompt).encode()).prompts)
    source = MemorySource([job])
    Pipeline(FakeEngine(), formats.load([wanted], formats.FormatOptions())).run(
        source, threading.Event()
    )
    return [(job.id + document.suffix, document.body) for document in source.delivered[job.id]]


def bodies(answer: httpx.Response) -> list[tuple[str, bytes]]:
    found = answer.json()["documents"]
    return [
        (d["name"], d["text"].encode() if "text" in d else base64.b64decode(d["base64"]))
        for d in found
    ]


# ── /predict ──


@pytest.mark.parametrize(
    "prompt",
    [
        BOX,
        {"everything": {"points_per_side": 4}},
        {"objects": [BOX, BOX]},
        {"text": ["a b", "nothing"]},
    ],
)
@pytest.mark.parametrize("wanted", formats.names())
def test_predict_answers_with_the_bytes_that_the_folder_gets(
    wanted: str, prompt: Any, shared: Site
) -> None:
    answer = shared.post(
        "/predict", json_body(prompt=prompt, formats=[wanted], name="done/cam1/dog.jpg")
    )
    assert answer.status_code == 200, answer.text
    expected = of_the_folder(picture_bytes(), prompt, "done/cam1/dog.jpg", wanted)
    if len(expected) == 1:
        assert answer.content == expected[0][1]
    else:
        assert bodies(answer) == expected


def test_predict_notes_the_first_frame_of_an_animated_gif(shared: Site) -> None:
    frames = [sample(200, 100), sample(200, 100).rotate(180)]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for picture in (in_base64(gif), f"data:image/gif;base64,{in_base64(gif)}"):
        answer = shared.post("/predict", {"picture": picture, "prompt": BOX, "formats": ["opex"]})
        assert answer.status_code == 200, answer.text
        assert "first frame of 2" in answer.json()["meta"]["notes"]


def test_predict_answers_a_form_and_json_alike() -> None:
    picture = picture_bytes()
    with running_site() as site, site.client() as client:
        of_json = client.post("/predict", json=json_body(formats=["mask", "coco"], name="dog.jpg"))
        for form in (
            {"formats": ["mask", "coco"]},
            {"formats": "mask,coco"},
            {"formats": "mask", "name": "dog.jpg"},
        ):
            data: dict[str, Any] = {"prompt": json.dumps(BOX), **form}
            of_form = client.post(
                "/predict", files={"picture": ("dog.jpg", picture, "image/jpeg")}, data=data
            )
            assert of_form.status_code == 200, of_form.text
            wanted = of_json.content if form["formats"] != "mask" else bodies(of_json)[0][1]
            assert of_form.content == wanted


def test_predict_accepts_a_forms_prompt_as_a_file_and_windows_paths() -> None:
    with running_site() as site, site.client() as client:
        files = {
            "picture": ("C:\\cam1\\dog.jpg", picture_bytes()),
            "prompt": ("dog.json", json.dumps(BOX).encode()),
        }
        answer = client.post("/predict", files=files, data={"formats": "yolo"})
    assert [name for name, _ in bodies(answer)] == ["dog.yolo.txt", "dog.yolo.yaml"]


def test_predict_answers_one_file_or_several_by_the_request_alone() -> None:
    with running_site(formats=["opex"], mask="per-object") as site:
        for count in (1, 2):
            prompt = {"objects": [BOX] * count}
            answer = site.post("/predict", json_body(prompt=prompt, formats=["mask"]))
            assert [name for name, _ in bodies(answer)] == [
                f"picture.mask.{n + 1}.png" for n in range(count)
            ]
            plain = site.post("/predict", json_body(prompt=prompt))
            assert plain.headers["content-type"] == "application/json"
            assert len(plain.json()["objects"]) == count


def test_predict_answers_with_the_files_media_type(shared: Site) -> None:
    expected = {
        "mask": "image/png",
        "overlay": "image/jpeg",
        "cvat": "application/xml",
        "coco": "application/json",
    }
    kinds = {
        f: shared.post("/predict", json_body(formats=[f])).headers["content-type"] for f in expected
    }
    several = shared.post("/predict", json_body(formats=["mask", "cvat"]))
    assert kinds == expected
    assert several.headers["content-type"] == "application/json"


def test_predict_takes_the_name_from_the_prompt_by_default() -> None:
    with running_site() as site:
        answer = site.post(
            "/predict", json_body(prompt={**BOX, "image": "cat.jpg"}, formats=["cvat"])
        )
    assert 'name="cat.jpg"' in answer.text


def test_predict_keeps_pixels_for_the_overlay_only_and_shares_the_embedding() -> None:
    with running_site() as site:
        for wanted in ("mask", "overlay", "mask"):
            assert site.post("/predict", json_body(formats=[wanted])).status_code == 200
        assert len(site.engine.encoded) == 1
        assert site.engine.encoded == [decode.digest_of(picture_bytes())]


def test_predict_encodes_pictures_of_several_clients_in_one_batch() -> None:
    gate = threading.Event()
    with running_site(FakeEngine(gate=gate, batch=4)) as site:
        first = site.start_post("/predict", json_body(0, formats=["mask"]))
        wait_until(lambda: site.engine.calls["encode"])
        others = [site.start_post("/predict", json_body(n, formats=["mask"])) for n in range(1, 5)]
        wait_until(lambda: site.pipeline._device_queue.qsize() == 4)
        gate.set()
        assert {request.result().status_code for request in [first, *others]} == {200}
        assert site.engine.calls["encode"] == 2


# ── /interact, /features ──


def of_nuclio(
    what: str, body: Any, engine: FakeEngine | None = None, headers: dict[str, str] | None = None
) -> Any:
    service = handler.Service(Predictor(engine or FakeEngine()))
    context = Platform().context
    context.logger = Lines()
    return getattr(service, what)(context, event(body, headers=headers))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [CLICK, {**CLICK, "obj_bbox": [[5, 5], [40, 40]]}, {}, {"threshold": 0.95}]
)
def test_interact_answers_like_the_nuclio_function(fields: dict[str, Any], shared: Site) -> None:
    body = {"image": in_base64(picture_bytes()), **fields}
    answer = shared.post("/interact", body)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.text == of_nuclio("interact", body).body
    assert np.shape(answer.json()["mask"]) == (48, 64)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [CLICK, {}])
@pytest.mark.parametrize(
    ("path", "headers", "form"),
    [
        ("/interact", OLD_CVAT, "mask"),
        ("/interact", NEW_CVAT, "shapes"),
        ("/interact?answer=auto", NEW_CVAT, "shapes"),
        ("/interact?answer=mask", NEW_CVAT, "mask"),
        ("/interact?answer=shapes", {}, "shapes"),
    ],
)
def test_the_form_of_the_answer_follows_from_the_address_else_from_the_user_agent(
    path: str, headers: dict[str, str], form: str, fields: dict[str, Any], shared: Site
) -> None:
    body = {"image": in_base64(picture_bytes()), **fields}
    answer = shared.post(path, body, headers=headers)
    expected = of_nuclio("interact", body, headers=NEW_CVAT if form == "shapes" else OLD_CVAT)
    assert (answer.status_code, answer.text) == (200, expected.body)
    assert form in answer.json()


def test_an_unknown_form_of_the_answer_is_refused(shared: Site) -> None:
    body = {"image": in_base64(picture_bytes()), **CLICK}
    answer = shared.post("/interact?answer=rle", body)
    assert (answer.status_code, answer.json()["place"]) == (422, "answer")
    assert "shapes" in answer.json()["remedy"]


def test_features_answers_like_the_nuclio_function() -> None:
    body = {"image": in_base64(picture_bytes()), **CLICK}
    with running_site(FakeEngine(side=1024)) as site:
        answer = site.post("/features", body)
        assert site.engine.calls["decode"] == 0
    assert answer.text == of_nuclio("embed", body, FakeEngine(side=1024)).body
    assert len(base64.b64decode(answer.json()["blob"])) == 4 * 256 * 64 * 64


class Sam2(FakeEngine):
    @property
    def info(self) -> ModelInfo:
        return ModelInfo("other", "sam2", 1024, "cpu", "float32")


def test_features_refuses_other_networks_and_fails_for_a_small_side() -> None:
    body = {"image": in_base64(picture_bytes())}
    with running_site(Sam2()) as site:
        answer = site.post("/features", body)
        assert (answer.status_code, "SAM1" in answer.json()["remedy"]) == (422, True)
        assert site.engine.calls["encode"] == 0
    with running_site() as site:
        answer = site.post("/features", body)
        assert (answer.status_code, answer.json()["code"]) == (500, "memory")


def test_warm_keeps_a_pictures_embedding_for_the_next_server(tmp_path: Path) -> None:
    kept = {"model": "fake", "cache__disk_mib": 64, "cache__folder": str(tmp_path / "embeddings")}
    picture = picture_bytes()
    with running_site(**kept) as site, site.client() as client:
        answer = client.post("/warm", json={"picture": in_base64(picture)})
        assert answer.status_code == 200, answer.text
        form = client.post("/warm", files={"picture": ("dog.jpg", picture, "image/jpeg")})
        assert form.json() == answer.json()
        assert site.engine.calls == {"encode": 1, "decode": 0}
    assert answer.json()["size"] == [64, 48]
    assert [path.name for path in (tmp_path / "embeddings").iterdir()] == [
        answer.json()["embedding"]
    ]
    with running_site(**kept) as site:
        body = {"image": in_base64(picture), **CLICK}
        assert site.post("/interact", body).status_code == 200
        assert site.engine.calls == {"encode": 0, "decode": 1}
        counted = site.get("/metrics").text
    assert 'sam_poll_disk_cache_total{event="hit"} 1.0' in counted


def test_warm_is_refused_where_nothing_is_kept_or_the_picture_cannot_be_used(
    shared: Site, tmp_path: Path
) -> None:
    body = {"picture": in_base64(picture_bytes())}
    answer = shared.post("/warm", body)
    assert (answer.status_code, answer.json()["place"]) == (422, "cache.disk_mib")
    kept = {"model": "fake", "cache__disk_mib": 64, "cache__folder": str(tmp_path / "embeddings")}
    with running_site(**kept) as site:
        for wrong, status, code in (
            ({"picture": in_base64(picture_bytes()[:200])}, 422, "picture"),
            ({}, 422, "picture"),
            ({**body, "prompt": BOX}, 422, "input"),
        ):
            answer = site.post("/warm", wrong)
            assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def test_warm_fails_with_503_where_the_embedding_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = {"model": "fake", "cache__disk_mib": 64, "cache__folder": str(tmp_path / "file" / "x")}
    with running_site(**kept) as site:
        answer = site.post("/warm", {"picture": in_base64(picture_bytes())})
        assert (answer.status_code, answer.json()["place"]) == (503, "cache.folder")
        assert site.post("/interact", {"image": in_base64(picture_bytes()), **CLICK}).is_success


@pytest.mark.parametrize(
    ("path", "headers", "key"),
    [
        ("/interact", OLD_CVAT, "mask"),
        ("/interact", NEW_CVAT, "shapes"),
        ("/features", NEW_CVAT, "blob"),
    ],
)
def test_nuclio_proxy_forwards_to_the_server_with_the_token_in_its_url(
    path: str, headers: dict[str, str], key: str
) -> None:
    body = {"image": in_base64(picture_bytes()), **CLICK}
    context = Platform().context
    context.logger = Lines()
    with running_site(FakeEngine(side=1024), token=TOKEN) as site:
        for address, status in ((site.url, 401), (site.url.replace("//", f"//:{TOKEN}@"), 200)):
            service = proxy.Remote.open(context.logger, {"SAM_URI": address + path})
            response = service.forward(context, event(body, headers=headers))
            assert response.status_code == status
    assert set(json.loads(response.body)) == {key}


# ── errors of the request ──

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


def test_bad_values_get_422_with_code_reason_place_and_remedy() -> None:
    with running_site(limits__prompts=10) as site, site.client() as client:
        for body, code, place in REFUSED:
            answer = client.post("/predict", json=body)
            error = answer.json()
            assert (answer.status_code, error["code"], error["place"]) == (422, code, place), (
                body,
                error,
            )
            assert error["reason"]
            assert error["remedy"]
        assert site.engine.calls["encode"] == 0


def test_picture_of_too_many_pixels_is_refused_by_its_header() -> None:
    with running_site(limits__picture_mpx=0.001) as site:
        answer = site.post("/predict", json_body())
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
    (
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        "multipart/form-data; boundary=b",
        400,
        "body",
    ),
    (
        b'--b\r\nContent-Disposition: form-data; name="picture"\r\n\r\nx\r\n' * 40 + b"--b--\r\n",
        "multipart/form-data; boundary=b",
        400,
        "body",
    ),
]


def test_malformed_body_is_refused() -> None:
    with running_site() as site, site.client() as client:
        for body, kind, status, code in MALFORMED:
            answer = client.post("/predict", content=body, headers={"Content-Type": kind})
            assert (answer.status_code, answer.json()["code"]) == (status, code), (
                body[:60],
                kind,
                answer.text,
            )
        for path in ("/interact", "/features"):
            assert client.post(path, content=b"{").status_code == 400
            assert (
                client.post(path, content=b"{}", headers={"Content-Type": "text/plain"}).status_code
                == 415
            )
            assert client.post(path, json={"image": "!"}).status_code == 422
        assert client.get("/predict").headers["allow"] == "POST"
        assert client.get("/nowhere").json()["code"] == "address"


def test_repeated_key_is_found_among_very_many() -> None:
    body = "{" + ",".join(f'"{n}":0' for n in range(400_000)) + ',"399999":0}'
    with pytest.raises(BadRequestError) as caught:
        bodies_.parse_interact("application/json", body.encode())
    assert (caught.value.reason, caught.value.place) == ("given twice", "399999")


def test_form_with_repeated_unknown_or_missing_parts_is_refused() -> None:
    good = {"picture": ("a.jpg", picture_bytes()), "prompt": (None, json.dumps(BOX))}
    with running_site() as site, site.client() as client:
        for change, status, place in [
            ([("prompt", (None, "{}"))], 400, "prompt"),
            ([("pictures", (None, "x"))], 422, "pictures"),
            ([("formats", (None, b"\xff"))], 400, "formats"),
        ]:
            answer = client.post("/predict", files=[*good.items(), *change])
            assert (answer.status_code, answer.json()["place"]) == (status, place), answer.text
        for missing in good:
            answer = client.post(
                "/predict", files={key: value for key, value in good.items() if key != missing}
            )
            assert (answer.status_code, answer.json()["place"]) == (422, missing)


@pytest.mark.parametrize("name", ["a.jpg", None], ids=["file", "field"])
def test_form_stays_in_memory_however_large_its_picture_is(
    monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    def refuse(*given: Any, **more: Any) -> Any:
        raise AssertionError("a part of the form was written to a disk")

    for maker in ("NamedTemporaryFile", "TemporaryFile", "SpooledTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, maker, refuse)
    picture = bytes(range(256)) * (5 << 12)  # 5 MiB; the library's own limit is 1 MiB
    parts = {"picture": (name, picture), "prompt": (None, json.dumps(BOX))}
    request = httpx.Request("POST", "http://server", files=parts)
    parsed = bodies_.parse_predict(request.headers["Content-Type"], request.read(), parse=parse)
    assert parsed.picture == picture


@pytest.mark.parametrize(
    ("parsed", "body"),
    [
        (
            partial(bodies_.parse_predict, parse=parse),
            '{{"picture": "aGk=", "prompt": {{"polygon": {}}}}}',
        ),
        (bodies_.parse_interact, '{{"image": "aGk=", "polygon": {}}}'),
    ],
    ids=["predict", "interact"],
)
def test_body_of_any_depth_is_refused(parsed: Any, body: str) -> None:
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit() + 10):
        with pytest.raises((BadRequestError, InputError)):
            parsed("application/json", body.format("[" * depth + "]" * depth).encode())


def test_body_that_is_too_long_is_refused_with_and_without_content_length() -> None:
    with running_site(serve__body_mib=1) as site, site.client() as client:
        promised = client.post("/predict", content=b"x" * (1 << 20) + b"x")
        counted = client.post(
            "/predict",
            content=iter([b"x" * 100_000] * 20),
            headers={"Content-Type": "application/json"},
        )
        assert [(a.status_code, a.json()["code"]) for a in (promised, counted)] == [
            (413, "length")
        ] * 2
        assert client.post("/predict", json=json_body(formats=["mask"])).status_code == 200
        assert site.source.inside == 0


# ── errors of the server ──


def test_unexpected_exception_gets_500_and_other_requests_go_on() -> None:
    with running_site() as site:
        site.engine.fail("decode", ZeroDivisionError("odd"))
        answer = site.post("/predict", json_body(formats=["mask"]))
        assert (answer.status_code, "ZeroDivisionError" in answer.json()["reason"]) == (500, True)
        assert site.post("/predict", json_body(formats=["mask"])).status_code == 200


def test_picture_too_large_for_the_devices_memory_gets_500() -> None:
    with running_site() as site:
        site.engine.fail(
            "encode", DeviceOutOfMemoryError("does not fit", remedy="free some"), times=9
        )
        answer = site.post("/predict", json_body(formats=["mask"]))
    assert (answer.status_code, answer.json()["code"]) == (500, "memory")


def test_failed_device_ends_all_waiting_requests_and_the_pipeline() -> None:
    gate = threading.Event()
    engine = FakeEngine(gate=gate, batch=1)
    with running_site(engine) as site:
        engine.fail("encode", DeviceError("the card is gone"), at=2)
        held = site.start_post("/predict", json_body(0, formats=["mask"]))
        wait_until(lambda: engine.calls["encode"])
        waiting = [site.start_post("/predict", json_body(n, formats=["mask"])) for n in (1, 2)]
        wait_until(lambda: site.pipeline._device_queue.qsize() == 2)
        gate.set()
        assert held.result().status_code in (200, 500)
        answers = [request.result() for request in waiting]
        assert {(a.status_code, a.json()["code"]) for a in answers} == {(500, "device")}
        wait_until(lambda: site.error)
        assert isinstance(site.error, DeviceError)


def answered_picture(site: Site) -> bytes:
    return site.post("/predict", json_body(formats=["mask"])).content


def test_predict_masks_the_prompts_object() -> None:
    with running_site() as site:
        mask = cv2.imdecode(np.frombuffer(answered_picture(site), np.uint8), cv2.IMREAD_UNCHANGED)
    rows, columns = np.nonzero(mask)
    assert mask.shape == (48, 64)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (10, 10, 49, 39)


def test_large_answer_is_sent_whole_in_pieces() -> None:
    big = cv2.imencode(".jpg", np.zeros((1500, 2000, 3), np.uint8))[1].tobytes()
    body = {"image": in_base64(big), "obj_bbox": [[100, 100], [1900, 1400]]}
    with running_site() as site:
        answer = site.post("/interact", body)
    assert int(answer.headers["content-length"]) == len(answer.content) > 6_000_000
    assert np.shape(json.load(io.BytesIO(answer.content))["mask"]) == (1500, 2000)
