"""docs/formats.md: its snippets run one after another on the outputs they speak of, and it names
every format.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_poll.core.types import Box, Point, Prompt, Result, Size
from sam_poll.formats import registry
from sam_poll.formats.registry import FormatOptions
from tests.support.paths import ROOT
from tests.support.results import disc, grey_picture, rectangle, result_of

TEXT = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
SIZE = Size(120, 90)


def made_result() -> Result:
    masks = [
        disc(SIZE, 40, 40, 30, hole=12, label="wheel", score=0.97),
        rectangle(SIZE, 60, 30, 110, 80, label="plate", score=0.9),
    ]
    prompts = [Prompt("wheel", points=(Point(20, 40),)), Prompt("plate", box=Box(60, 30, 110, 80))]
    return result_of(
        SIZE, masks, prompts=prompts, picture=grey_picture(SIZE), job_id="dog", name="done/dog.jpg"
    )


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for make in registry.load(registry.names(), FormatOptions()):
        for document in make(made_result()):
            (tmp_path / f"dog{document.suffix}").write_bytes(document.body)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_snippets_run_as_they_stand(outputs: Path) -> None:
    snippets = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(snippets) >= 5
    names: dict[str, Any] = {}
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"snippet {number} of docs/formats.md", "exec"), names)
    wheel, again = names["masks"]["wheel"], names["again"].astype(bool)
    assert np.count_nonzero(wheel & again) / np.count_nonzero(wheel | again) >= 0.98
    assert np.array_equal(names["wheel"], wheel), (
        "the wheel is smaller than the plate, so nothing hides it"
    )
    assert np.array_equal(names["plate_again"], names["masks"]["plate"])


def test_the_xml_shown_is_the_xml_written(outputs: Path) -> None:
    shown = re.findall(r"```xml\n(.*?)```", TEXT, re.DOTALL)
    (other,) = registry.load(["cvat"], FormatOptions(cvat="polygon"))[0](made_result())
    for xml, written in zip(
        shown, ((outputs / "dog.cvat.xml").read_bytes(), other.body), strict=True
    ):
        for line in xml.splitlines():
            for piece in line.split("…"):
                assert piece.strip() in written.decode()


def test_the_yaml_shown_is_the_yaml_written(outputs: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert shown == (outputs / "dog.yolo.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", registry.names())
def test_every_format_has_a_section_and_its_ending_in_the_table(name: str, outputs: Path) -> None:
    assert f"## `{name}`" in TEXT
    written = sorted(
        file.name.removeprefix("dog") for file in outputs.iterdir() if f".{name}." in file.name
    )
    assert f"| `{name}` | {', '.join(f'`{ending}`' for ending in written)} |" in TEXT
