"""`sam-poll ui`: what its flags become, and what it says when it cannot start."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam_poll.cli.ui import ui_options_of
from sam_poll.config import settings
from sam_poll.core.errors import ExitCode
from tests.conftest import Share
from tests.support.commands import Run
from tests.support.commands import elsewhere as elsewhere


def test_a_share_that_is_not_there_is_named(tmp_path: Path) -> None:
    run = Run("ui", tmp_path / "nowhere")
    assert run.code == ExitCode.SHARE
    assert "the share does not exist" in run.text


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--listen", "0.0.0.0:0"), "there is no token"),
        (("--listen", "nonsense"), "not an address"),
        (("--token-file", "nowhere"), "nowhere"),
    ],
)
def test_addresses_and_tokens_that_cannot_be_used_are_refused(
    share: Share, flags: tuple[str, str], reason: str
) -> None:
    run = Run("ui", share.input, *flags)
    assert run.code == ExitCode.SETTINGS
    assert reason in run.text


def test_without_a_folder_it_takes_the_settings_file_of_the_current_one() -> None:
    assert Run("ui").code == ExitCode.USAGE
    Path("config.yaml").write_text("input: /nowhere/in\nlease_s: 1\n")
    run = Run("ui")
    assert run.code == ExitCode.SETTINGS
    assert "config.yaml, line 2, lease_s" in run.text


def test_doctor_gets_the_same_share_file_and_model(tmp_path: Path) -> None:
    config = Path("config.yaml")
    config.write_text(f"input: {tmp_path}/in\n")
    Path("weights.pt").write_text("")
    flags = {"model": "weights.pt", "model_cfg": None, "device": "cpu", "serve.listen": "1"}
    loaded = settings.load(config, env={}, flags=flags)
    options = ui_options_of(loaded, config, flags, read_only=True)
    here = Path.cwd()
    assert list(options.doctor) == [
        *("--share", str(tmp_path / "in")),
        *("-c", str(here / "config.yaml")),
        *("-m", str(here / "weights.pt")),
        *("--device", "cpu"),
    ]
    places = {one.key: one.where for one in options.in_force}
    assert places["input"] == "config.yaml, line 1, input"
    assert places["serve.listen"] == "command line, serve.listen"
