"""docs/functions.md says what the functions do: its commands run, its parameters and variables are
all there are.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from typing import Any

import pytest
import yaml
from cvat_cli._internal.commands_all import COMMANDS
from cvat_cli._internal.common import configure_common_arguments

from sam_poll.integrations.cvat.sdk import common, function, interactor
from sam_poll.integrations.nuclio import handler, proxy
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "functions.md").read_text(encoding="utf-8")
MODULES = {"sam_poll.cvat.function": function, "sam_poll.cvat.interactor": interactor}
FILES = {name.replace(".", "/") + ".py": name for name in MODULES}  # as seen from a checkout


def lines(program: str) -> list[str]:
    """The lines of the page's shell blocks that call a program."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    joined = re.sub(r"\\\n\s*", "", "\n".join(blocks))
    return [line for line in joined.splitlines() if re.search(program, line)]


@pytest.mark.parametrize("line", lines(r"^cvat-cli "))
def test_a_line_of_cvat_cli_is_one_that_it_and_our_function_take(line: str) -> None:
    parser = argparse.ArgumentParser()
    configure_common_arguments(parser)
    COMMANDS.configure_parser(parser)
    read = parser.parse_args(shlex.split(line)[1:])
    name = read.function_module or FILES[read.function_file.as_posix()]
    module: Any = MODULES[name]
    wanted = common.read_parameters(module.Parameters, read.function_parameters)
    if module is function and wanted.mode in ("everything", "text"):
        function.detection_spec(wanted, frozenset(read.function_parameters))


def test_the_lines_are_found() -> None:
    assert len(lines(r"^cvat-cli ")) >= 5
    assert len(lines("deploy_")) >= 4


def test_every_parameter_is_explained() -> None:
    for field in dataclasses.fields(function.Parameters):
        assert f"`{field.name}={field.type.__name__}:" in PAGE, field.name
    assert {f.name for f in dataclasses.fields(interactor.Parameters)} <= {
        f.name for f in dataclasses.fields(function.Parameters)
    }


def test_every_variable_of_a_function_is_explained() -> None:
    for name in (
        handler.LABEL,
        handler.TEXTS,
        handler.POINTS_PER_SIDE,
        handler.STARTSWITH_BOX,
        handler.INTERACTOR_ANSWER,
        proxy.URI,
        proxy.TIMEOUT_S,
    ):
        assert f"`{name}`" in PAGE, name
    assert f"({proxy.DEFAULT_TIMEOUT_S:g} s;" in PAGE


def test_the_scripts_names_and_cvats_ids_stand_side_by_side() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \| `([\w-]+)` \|", PAGE, re.MULTILINE))
    yamls = {
        "sam2": "sam2/function-gpu.yaml",
        "sam2-everything": "sam2/function-detector-gpu.yaml",
        "sam1": "sam1/function-gpu.yaml",
        "remote": "remote/function.yaml",
        "remote-sam1": "remote/function-sam1.yaml",
    }
    ids = {
        name: yaml.safe_load((ROOT / "docker" / "nuclio" / path).read_text())["metadata"]["name"]
        for name, path in yamls.items()
    }
    assert rows == ids


@pytest.mark.parametrize("line", lines("deploy_"))
def test_a_deploying_line_names_a_script_and_functions_that_are_there(line: str) -> None:
    *settings, script = re.split(
        r"\s+", line.partition(" sam2")[0].partition(" remote")[0].partition(" sam1")[0]
    )
    assert (ROOT / script).is_file()
    assert all(
        re.fullmatch(r"(MODEL|SAM_URI|SAM_TIMEOUT_S|CVAT_NETWORK|TORCH_INDEX)=\S+", one)
        for one in settings
    )
    named = set(line.split()) & {"sam2", "sam2-everything", "sam1", "remote", "remote-sam1"}
    assert set(line.split()[len(settings) + 1 :]) == named
