"""/openapi.json is right: schemathesis sends valid and invalid requests; the examples work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from email import message_from_bytes
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from sam_poll.core.protocols import Embedding
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import FloatArray, ModelInput, PackedEmbedding, PackedMask
from sam_poll.engines.fake import FakeEmbedding, FakeEngine
from sam_poll.integrations.http import app, errors, server
from sam_poll.integrations.http.source import HttpSource
from tests.conftest import picture_bytes
from tests.support.http_server import Site, in_base64, running_site
from tests.support.http_server import settings as site_settings
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
PICTURES = [picture_bytes(), picture_bytes(".png", 300, 200), picture_bytes(".bmp", 1, 1)]
# A schema says what a picture in base64 looks like; that it is one, only we can.
schemathesis.openapi.format("byte", st.sampled_from([in_base64(picture) for picture in PICTURES]))


class Handed(FakeEmbedding):
    """An embedding of the size that browsers take."""

    def array(self) -> FloatArray:
        return np.zeros((1, 256, 64, 64), np.float32)


class Quick(FakeEngine):
    """An engine that finds objects for a few of the clicks only, to be fast."""

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        return [Handed(made.frame, made.digest) for made in super().encode(pictures)]  # type: ignore[attr-defined]

    def unpack(self, packed: PackedEmbedding) -> Embedding | None:
        made = super().unpack(packed)
        return Handed(made.frame, made.digest) if isinstance(made, FakeEmbedding) else made

    def candidates(
        self,
        embedding: Embedding,
        points: Sequence[tuple[float, float]],
        *,
        iou: float,
        stability: float,
    ) -> list[PackedMask]:
        return super().candidates(embedding, points[:1], iou=iou, stability=stability)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = str(tmp_path_factory.mktemp("embeddings"))
    kept = {"model": "fake", "cache__disk_mib": 64, "cache__folder": folder}
    with running_site(Quick(), **kept) as made:
        yield made


def description() -> dict[str, Any]:
    terms = server.server_options_of(site_settings())
    return app.create_app(HttpSource(places=1), Telemetry(), terms, lambda: False).openapi()


def operations(mode: GenerationMode) -> dict[str, Any]:
    """Return every operation of the description by its name."""
    text = description()
    if mode is GenerationMode.POSITIVE:  # what is valid is done: nobody has minutes for a test
        grid = text["components"]["schemas"]["EverythingForm"]["properties"]
        grid["points_per_side"]["maximum"], grid["crops"]["maximum"] = 4, 0
    found = schemathesis.openapi.from_dict(text)
    return {result.ok().label: result.ok() for result in found.get_all_operations()}


OPERATIONS = {mode: operations(mode) for mode in GenerationMode}
NAMES = list(OPERATIONS[GenerationMode.POSITIVE])
DESCRIPTION = description()
FORM = "multipart/form-data"


def sent_fields(case: Any, request: requests.PreparedRequest) -> Any:
    """Return the value of a body as the schema sees it, once it has been sent.

    A file in a form is a string there, which the schema allows to be anything.
    """
    if case.media_type != FORM or not isinstance(case.body, dict):
        return case.body
    kind, body = request.headers.get("Content-Type", ""), request.body
    if not isinstance(body, bytes):
        return None  # a form without parts is no body at all
    form = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + body)
    names = [str(part.get_param("name", header="content-disposition")) for part in form.walk()][1:]
    if len(set(names)) < len(names):
        return None  # given twice, which no schema can say
    values = {name: case.body.get(name) for name in names}
    return {name: "" if isinstance(one, bytes) else one for name, one in values.items()}


def is_valid_as_sent(case: Any, request: requests.PreparedRequest) -> bool:
    content = DESCRIPTION["paths"][case.operation.path]["post"]["requestBody"]["content"]
    schema = {**content[case.media_type]["schema"], "components": DESCRIPTION["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    return bool(validator.is_valid(sent_fields(case, request)))


def invalid_is_refused(ctx: Any, response: Any, case: Any) -> bool | None:
    """Check that what the description does not allow is refused.

    schemathesis takes a file's bytes for no string, and so a valid form for an invalid one. Whether
    it makes such a form depends on the constants of all modules that are imported at the time.
    """
    if is_valid_as_sent(case, response.request):
        return None
    return negative_data_rejection(ctx, response, case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_answers_match_the_description_for_all_requests(
    name: str, mode: GenerationMode, data: st.DataObject, site: Site
) -> None:
    operation = OPERATIONS[mode][name]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        return  # there is nothing to get wrong
    case = data.draw(operation.as_strategy(generation_mode=mode))
    # A prompt of the right form may still lie beside the picture: no schema can say that.
    case.call_and_validate(
        base_url=site.url,
        excluded_checks=[positive_data_acceptance, negative_data_rejection],
        additional_checks=[invalid_is_refused] if mode is GenerationMode.NEGATIVE else [],
        timeout=60,
    )


@pytest.mark.parametrize(
    ("kind", "body", "valid"),
    [
        (FORM, {"picture": PICTURES[2]}, True),
        (FORM, {"picture": PICTURES[2], "other": "1"}, False),
        (FORM, {"other": PICTURES[2]}, False),
        (FORM, {"picture": [PICTURES[2], PICTURES[2]]}, False),
        (FORM, {'pic"ture\r\n': PICTURES[2]}, False),
        (FORM, {}, False),
        ("application/json", {"picture": in_base64(PICTURES[2])}, True),
        ("application/json", {"picture": 1}, False),
    ],
    ids=[
        "form",
        "form-unknown-key",
        "form-no-picture",
        "form-twice",
        "form-quote",
        "form-empty",
        "json",
        "json-number",
    ],
)
def test_check_of_invalid_requests_knows_which_are_valid(
    site: Site, kind: str, body: Any, valid: bool
) -> None:
    case = OPERATIONS[GenerationMode.NEGATIVE]["POST /warm"].Case(body=body, media_type=kind)
    answer = case.call(base_url=site.url, timeout=60)
    assert is_valid_as_sent(case, answer.request) is valid
    assert (answer.status_code == 200) is valid


def test_description_has_all_paths() -> None:
    assert set(NAMES) == {
        "POST /predict",
        "POST /interact",
        "POST /features",
        "POST /warm",
        "GET /health",
        "GET /metrics",
    }


def described(site: Site) -> dict[str, Any]:
    return site.get("/openapi.json").json()


def test_description_examples_can_be_sent_as_they_are(site: Site) -> None:
    sent = 0
    for path, operations in described(site)["paths"].items():
        body = (
            operations.get("post", {})
            .get("requestBody", {})
            .get("content", {})
            .get("application/json", {})
        )
        for name, example in body.get("examples", {}).items():
            answer = site.post(path, example["value"])
            assert answer.status_code == 200, (path, name, answer.text)
            sent += 1
    assert sent == 7


def test_description_has_no_dead_reference_and_all_prompt_forms(site: Site) -> None:
    text = json.dumps(described(site))
    names = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text))
    assert names <= set(described(site)["components"]["schemas"])
    assert "$defs" not in text
    assert {"Prompt", "ObjectForm", "EverythingForm", "Refusal"} <= names


def test_every_error_is_in_the_description_and_on_the_page(site: Site) -> None:
    kinds = [
        kind
        for kind in errors.RefusalError.__subclasses__()
        if kind.__module__ == errors.__name__  # the page has errors of its own
    ]
    posts = described(site)["paths"]["/predict"]["post"]["responses"]
    for kind in kinds:
        if kind.status not in (404, 405):  # of no address that there is
            assert str(kind.status) in posts, kind
        assert re.search(
            rf"^\| [\d, ]*{kind.status}[\d, ]* \| [^|]*`{kind.code}`", PAGE, re.MULTILINE
        ), kind
    assert set(posts) == {"200", "422", "500", *(str(k.status) for k in kinds)} - {"404", "405"}


def test_page_example_in_python_works(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "dog.jpg").write_bytes(picture_bytes(width=400, height=300))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8000", site.url), {})
    assert re.findall(r"(\S+) (\S+) \d+\n", capsys.readouterr().out) == [
        ("picture.opex.json", "application/json"),
        ("picture.overlay.jpg", "image/jpeg"),
    ]


def test_page_example_of_an_error_is_exact(site: Site) -> None:
    (shown,) = re.findall(r'^\{"code".*\}$', PAGE, re.MULTILINE)
    prompt = {"box": {"x0": 1, "y0": 1, "x1": 900, "y1": 9}}
    picture = in_base64(picture_bytes(width=640, height=480))
    answer = site.post("/predict", {"picture": picture, "prompt": prompt})
    assert (answer.status_code, answer.json()) == (422, json.loads(shown))
