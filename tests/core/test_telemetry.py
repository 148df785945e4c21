"""What a daemon reports of itself."""

from __future__ import annotations

import json

from sam_poll.core.telemetry import Telemetry
from sam_poll.engines.fake import FakeEngine


def test_the_state_is_json_with_model_counts_and_alarms() -> None:
    telemetry = Telemetry()
    assert (telemetry.state()["model"], telemetry.ooms, telemetry.info) == (None, 0, None)
    telemetry.engine = FakeEngine()
    telemetry.stats.started()
    telemetry.stats.started()
    telemetry.stats.rejected("a", "prompt")
    telemetry.alarms.raise_("share", "gone")
    state = json.loads(json.dumps(telemetry.state()))
    assert (state["model"], state["device"]) == (
        telemetry.engine.info.name,
        telemetry.engine.info.device,
    )
    assert (state["answered"], state["rejected"], state["at_work"]) == (0, 1, 1)
    assert [(a["kind"], a["message"]) for a in state["alarms"]] == [("share", "gone")]


def test_ooms_are_those_that_the_engine_counts() -> None:
    telemetry = Telemetry()
    telemetry.engine = FakeEngine()
    assert telemetry.ooms == 0
    telemetry.engine.ooms = 3  # type: ignore[attr-defined]
    assert telemetry.ooms == 3
