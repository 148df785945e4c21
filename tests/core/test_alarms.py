"""Alarms: their kinds, and what the log has of them."""

from __future__ import annotations

import re

from sam_poll.core.alarms import KINDS, REMEDIES, Alarms
from tests.support.paths import ROOT


def test_every_kind_of_alarm_that_is_raised_is_listed() -> None:
    package = ROOT / "sam_poll"
    raised = {
        kind
        for path in package.rglob("*.py")
        for kind in re.findall(r"raise_\(\s*\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert raised <= set(KINDS)
    assert "stuck" in raised


def test_an_alarm_logs_each_change_of_its_message_and_its_end(logged: list[str]) -> None:
    alarms = Alarms()
    alarms.clear("share")
    for _ in range(3):
        alarms.raise_("share", "gone")
    alarms.raise_("share", "not writable")
    assert "share" in alarms
    alarms.clear("share")
    assert "share" not in alarms
    assert [line.split(maxsplit=1)[0] for line in logged] == ["ERROR", "ERROR", "INFO"]


def test_every_kind_of_alarm_has_a_remedy() -> None:
    assert set(REMEDIES) == set(KINDS)
