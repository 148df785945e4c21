"""The systemd unit: its times fit the settings, and systemd itself accepts it."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sam_poll.config.settings import Settings
from sam_poll.runtime import health
from tests.support.paths import ROOT

UNIT = ROOT / "examples" / "systemd" / "sam-poll.service"


@pytest.fixture
def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT, encoding="utf-8")
    return unit["Service"]


def test_it_is_started_when_it_says_so_and_no_other_process_may_say_it(
    service: configparser.SectionProxy,
) -> None:
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")


def test_loading_the_model_is_over_before_systemd_gives_up(
    service: configparser.SectionProxy,
) -> None:
    assert int(service["TimeoutStartSec"]) >= Settings().load_timeout_s + 30


def test_the_watchdog_waits_for_many_reports_and_not_longer_than_a_loop_may_stand_still(
    service: configparser.SectionProxy,
) -> None:
    seconds = int(service["WatchdogSec"])
    assert 10 * (health._TICK_S + health._SEND_S) <= seconds <= Settings().health.stuck_s


def test_systemd_itself_accepts_it(tmp_path: Path) -> None:
    verifier = shutil.which("systemd-analyze")
    if verifier is None:
        pytest.skip("there is no systemd-analyze: apt install systemd")
    installed = tmp_path / "sam-poll.service"
    installed.write_text(UNIT.read_text().replace("/opt/sam_poll/bin/sam-poll", sys.executable))
    done = subprocess.run(
        [verifier, "verify", "--man=no", str(installed)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
