"""What /openapi.json says is so: schemathesis asks as it describes, and otherwise; its examples and the page's work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from sam_poll.engines.fake import FakeEmbedding, FakeEngine
from sam_poll.health import Signs
from sam_poll.serve import refusals, run, schemas, web
from sam_poll.serve.door import HttpDoor
from sam_poll.types import Candidate, Embedding, Field, Prepared
from tests.conftest import picture_bytes
from tests.serve_site import Site, in_base64, site
from tests.serve_site import settings as site_settings

PAGE = (Path(__file__).parent.parent / "docs" / "serve.md").read_text(encoding="utf-8")
PICTURES = [picture_bytes(), picture_bytes(".png", 300, 200), picture_bytes(".bmp", 1, 1)]
# A schema says what a picture in base64 looks like; that it is one, only we can.
schemathesis.openapi.format("byte", st.sampled_from([in_base64(picture) for picture in PICTURES]))


class Handed(FakeEmbedding):
    """Of the size that a browser takes."""

    def array(self) -> Field:
        return np.zeros((1, 256, 64, 64), np.float32)


class Quick(FakeEngine):
    """Finds something with a few of its clicks only."""

    def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
        return [Handed(made.frame, made.digest) for made in super().encode(pictures)]  # type: ignore[attr-defined]

    def candidates(
        self, embedding: Embedding, points: Sequence[tuple[float, float]], *, iou: float, stability: float
    ) -> list[Candidate]:
        return super().candidates(embedding, points[:1], iou=iou, stability=stability)


@pytest.fixture(scope="module")
def there() -> Iterator[Site]:
    with site(Quick()) as made:
        yield made


def operations(mode: GenerationMode) -> dict[str, Any]:
    """Every operation of the description, by its name."""
    terms = run.terms_of(site_settings())
    text = web.application(HttpDoor(places=1), Signs(), terms, lambda: False).openapi()
    if mode is GenerationMode.POSITIVE:  # what is valid is done: nobody has minutes for a test
        grid = text["components"]["schemas"]["EverythingForm"]["properties"]
        grid["points_per_side"]["maximum"], grid["crops"]["maximum"] = 4, 0
    found = schemathesis.openapi.from_dict(text)
    return {result.ok().label: result.ok() for result in found.get_all_operations()}


OPERATIONS = {mode: operations(mode) for mode in GenerationMode}
NAMES = list(OPERATIONS[GenerationMode.POSITIVE])


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_nothing_that_can_be_sent_is_answered_otherwise_than_described(
    name: str, mode: GenerationMode, data: st.DataObject, there: Site
) -> None:
    operation = OPERATIONS[mode][name]
    if mode is GenerationMode.NEGATIVE and not operation.body:
        return  # there is nothing to get wrong
    case = data.draw(operation.as_strategy(generation_mode=mode))
    # A prompt of the right form may still lie beside the picture: no schema can say that.
    case.call_and_validate(base_url=there.url, excluded_checks=[positive_data_acceptance], timeout=60)


def test_all_addresses_are_asked() -> None:
    assert set(NAMES) == {"POST /predict", "POST /interact", "POST /features", "GET /health", "GET /metrics"}


def described(there: Site) -> dict[str, Any]:
    return there.get("/openapi.json").json()


def test_the_examples_can_be_sent_as_they_are(there: Site) -> None:
    sent = 0
    for path, operations in described(there)["paths"].items():
        body = operations.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json", {})
        for name, example in body.get("examples", {}).items():
            answer = there.post(path, example["value"])
            assert answer.status_code == 200, (path, name, answer.text)
            sent += 1
    assert sent == 5


def test_every_reference_leads_somewhere_and_every_prompt_form_is_there(there: Site) -> None:
    text = json.dumps(described(there))
    names = set(re.findall(r'"\$ref": "#/components/schemas/(\w+)"', text))
    assert names <= set(described(there)["components"]["schemas"])
    assert "$defs" not in text
    assert {"Prompt", "ObjectForm", "EverythingForm", "Refusal"} <= names


def test_every_refusal_is_described_and_explained(there: Site) -> None:
    kinds = refusals.RefusalError.__subclasses__()
    posts = described(there)["paths"]["/predict"]["post"]["responses"]
    for kind in kinds:
        if kind.status not in (404, 405):  # of no address that there is
            assert str(kind.status) in posts, kind
        assert re.search(rf"^\| [\d, ]*{kind.status}[\d, ]* \| [^|]*`{kind.code}`", PAGE, re.MULTILINE), kind
    assert set(schemas._REFUSALS) == set(posts) - {"200"}


def test_the_pages_python_works(there: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "dog.jpg").write_bytes(picture_bytes(width=400, height=300))
    monkeypatch.chdir(tmp_path)
    exec(code.replace("http://127.0.0.1:8000", there.url), {})
    assert re.findall(r"(\S+) (\S+) \d+\n", capsys.readouterr().out) == [
        ("picture.opex.json", "application/json"),
        ("picture.overlay.jpg", "image/jpeg"),
    ]


def test_the_pages_refusal_is_one_of_ours(there: Site) -> None:
    (shown,) = re.findall(r'^\{"code".*\}$', PAGE, re.MULTILINE)
    prompt = {"box": {"x0": 1, "y0": 1, "x1": 900, "y1": 9}}
    picture = in_base64(picture_bytes(width=640, height=480))
    answer = there.post("/predict", {"picture": picture, "prompt": prompt})
    assert (answer.status_code, answer.json()) == (422, json.loads(shown))
