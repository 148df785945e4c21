"""Words and exemplars answered by SAM 3 with few weights: from the folder, HTTP and Nuclio."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from nuclio_sdk.test import Platform

from sam_poll import engines
from sam_poll.core.errors import ExitCode
from sam_poll.core.protocols import Engine
from sam_poll.core.types import Size
from sam_poll.integrations.nuclio import handler
from sam_poll.pipeline.predictor import Predictor
from tests.conftest import Share, picture_bytes
from tests.support import tiny_sam3
from tests.support.commands import Run
from tests.support.commands import elsewhere as elsewhere
from tests.support.http_server import json_body, running_site
from tests.support.nuclio_calls import event, wire

FORMATS = ("mask", "opex", "overlay", "cvat", "coco", "yolo")
SUFFIXES = (
    *(".coco.json", ".cvat.xml", ".mask.png", ".opex.json", ".overlay.jpg"),
    *(".yolo.txt", ".yolo.yaml"),
)
BOX = {"x0": 5, "y0": 5, "x1": 30, "y1": 30}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sam3.save(tmp_path_factory.mktemp("models") / "tiny", scale=100)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return engines.load(engines.resolve(str(folder)), device="cpu", warmup=False)


def watch(share: Share, folder: Path, *more: object) -> Run:
    formats = [flag for name in FORMATS for flag in ("-f", name)]
    return Run("watch", share.input, "--once", "-m", folder, *formats, *more)


def objects(share: Share, name: str) -> list[dict[str, Any]]:
    entries = json.loads((share.output / f"{name}.coco.json").read_text())["annotations"]
    return list(entries)


@pytest.mark.slow
def test_texts_dropped_into_the_folder_come_back_in_every_format(
    share: Share, folder: Path
) -> None:
    like = {"text": "dog", "exemplars": [{"box": BOX}, {"box": BOX, "label": 0}], "threshold": 0.1}
    for stem, prompt in {
        "two": {"text": ["dog", "yellow bus"], "threshold": 0.1, "max_objects": 3},
        "like": like,
        "alone": {"label": "screw", "exemplars": [{"box": BOX}], "threshold": 0.1},
        "nothing": {"text": "dog", "threshold": 1},
        "point": {"points": [{"x": 20, "y": 20}]},
        "all": {"everything": {"points_per_side": 2, "iou": 0, "stability": 0}},
        "long": {"text": ["dog", "a" * 40]},
        "outside": {"exemplars": [{"box": {**BOX, "x1": 900}}]},
    }.items():
        share.pair(stem, prompt=prompt)
    assert watch(share, folder).code == ExitCode.FAILED_JOBS
    answered = ("all", "alone", "like", "nothing", "point", "two")
    assert share.tree("output") == [f"{stem}{end}" for stem in answered for end in SUFFIXES]
    assert share.error("long")["place"] == "text[1]"
    assert "tokens" in share.error("long")["reason"]
    assert share.error("outside")["place"] == "exemplars[0].box.x1"

    # Labels and scores, best first
    opex = json.loads((share.output / "two.opex.json").read_text())
    scores: dict[str, tuple[str, float]] = {}
    for entry in opex["objects"]:
        scores[entry["meta"]["object"]] = (entry["label"], entry["score"])
    assert {label for label, _ in scores.values()} == {"dog", "yellow bus"}
    order = [score for _, (_, score) in sorted(scores.items(), key=lambda item: int(item[0]))]
    assert order == sorted(order, reverse=True)
    assert len(objects(share, "two")) == 6
    assert "more than 3 objects" in opex["meta"]["notes"]
    masks = ET.fromstring((share.output / "alone.cvat.xml").read_text()).iter("mask")
    assert {mask.get("label") for mask in masks} == {"screw"}
    assert objects(share, "like")

    # Nothing found is an answer without objects
    assert objects(share, "nothing") == []
    mask = cv2.imread(str(share.output / "nothing.mask.png"), cv2.IMREAD_UNCHANGED)
    assert mask is not None
    assert not mask.any()
    notes = json.loads((share.output / "nothing.opex.json").read_text())["meta"]["notes"]
    assert 'nothing found for "dog"' in notes

    # A restart: a further text for the picture that is in done/ now
    share.drop("two.cat.json", {"image": "two.jpg", "text": "cat", "threshold": 0.1})
    assert watch(share, folder).code == ExitCode.OK
    assert {entry["image_id"] for entry in objects(share, "two.cat")} == {1}


def test_a_mosaic_of_texts_dropped_into_the_folder_has_polygons_with_classes(
    share: Share, folder: Path
) -> None:
    pytest.importorskip("rasterio", exc_type=ImportError)
    rng = np.random.default_rng(0)
    cv2.imwrite(str(share.input / "ortho.png"), rng.integers(0, 255, (300, 300, 3), np.uint8))
    options = {"text": ["dog", "cat"], "threshold": 0.1, "tile": 160, "padding": 32}
    share.drop("ortho.json", {"mosaic": options})
    long = {"mosaic": {**options, "text": ["dog", "a" * 40]}}
    share.drop("ortho.long.json", {**long, "image": "ortho.png"})
    assert watch(share, folder).code == ExitCode.FAILED_JOBS
    assert share.error("ortho.long")["place"] == "mosaic.text[1]"
    stats = json.loads((share.output / "ortho.stats.json").read_text())
    drawn = json.loads((share.output / "ortho.labels.geojson").read_text())["features"]
    classes = [one["properties"]["class"] for one in drawn]
    assert stats["classes"] == {text: classes.count(text) for text in ("dog", "cat")}
    assert stats["labels"] == len(drawn) > 0
    assert all(0.1 < one["properties"]["score"] <= 1 for one in drawn)


def test_texts_over_http_are_answered_by_the_same_network(engine: Engine) -> None:
    with running_site(engine) as site:
        prompt = {"text": ["dog", "cat"], "threshold": 0.1}
        body = json_body(prompt=prompt, formats=["coco"])
        first, again = (site.post("/predict", body) for _ in range(2))
        assert first.status_code == 200, first.text
        names = [category["name"] for category in first.json()["categories"]]
        assert names == ["cat", "dog"] or names == ["dog", "cat"]
        assert first.json() == again.json()
        refused = site.post("/predict", json_body(prompt={"text": "a" * 40}))
        assert refused.status_code == 422 or refused.status_code == 400
        assert refused.json()["place"] == "text"


def test_a_nuclio_detector_finds_texts_with_the_same_network(engine: Engine) -> None:
    service = handler.Service(Predictor(engine))
    image = base64.b64encode(picture_bytes()).decode()
    body = {"image": image, "text": ["dog", "cat"], "threshold": 0.1}
    status, found = wire(service.detect(Platform().context, event(body)))
    assert status == 200
    assert {entry["label"] for entry in found} == {"dog", "cat"}
    assert all(entry["mask"][-4:] for entry in found)
    size = Size(64, 48)
    assert all(entry["mask"][-2] < size.width for entry in found)


def test_embeddings_on_the_disk_serve_further_texts_after_a_restart(
    share: Share, folder: Path, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"cache: {{disk_mib: 64, folder: {tmp_path / 'cache'}}}\n")
    answers, encoded = [], []
    for _ in range(2):
        share.pair("dog", prompt={"text": "dog", "threshold": 0.1})
        run = watch(share, folder, "-c", config)
        assert run.code == ExitCode.OK, run.text
        newest = max(share.output.glob("*.coco.json"), key=lambda path: path.stat().st_mtime_ns)
        answers.append(json.loads(newest.read_text())["annotations"])
        encoded.append(re.search(r"job dog\S* done: .*encode \d+", run.text) is not None)
    assert encoded == [True, False]
    first, second = ([entry["score"] for entry in answer] for answer in answers)
    assert second == pytest.approx(first, abs=0.01)
