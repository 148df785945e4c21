"""All looks in their order: what is quick first, then the trial; one that fails hides no other.

What can still go wrong here: the trial beside a working daemon takes memory of its card for as long as it lasts;
`--quick` leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_poll.console import set_up_log
from sam_poll.doctor import attempt, cards, child, compare, given, machine, plan, share, weights
from sam_poll.doctor.findings import Finding, Late, Level, code_of, error_of, looked, told
from sam_poll.errors import DeviceError, ExitCode, SamPollError
from sam_poll.settings import Settings

LIMIT_S = 30.0  # for a look at this machine


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is asked for. `flags`: settings by their keys; `box`: x0, y0, x1, y1 in pixels."""

    config: Path | None = None
    share: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    compare: Path | None = None
    box: tuple[float, float, float, float] | None = None
    out: Path | None = None
    quick: bool = False


@dataclass
class Examined:
    """Everything that was found. `ms` by stage; `details` in numbers, for programs."""

    findings: list[Finding] = field(default_factory=list)
    ms: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def examine(wishes: Wishes, on_step: Callable[[str], None] = lambda step: None) -> Examined:
    """Looks at all of it. `on_step` is told what is looked at."""
    set_up_log("text", "ERROR")
    done = Examined()
    flags = {key: value for key, value in wishes.flags.items() if value is not None}
    if wishes.share:
        flags["input"] = share.input_of(wishes.share)
    on_step("settings")
    settings, shared, modelled, found = given.look(wishes.config, flags)
    done.findings += found
    done.findings += _patiently("settings", "metrics", lambda: given.metrics(settings))
    on_step("machine")
    done.findings += _patiently("machine", "system", machine.look)
    on_step("model")
    why = "--quick" if wishes.quick else None
    if modelled:
        done.findings += weights.look(settings)
        if any(f.section == "model" and f.level == "problem" and f.name == "checkpoint" for f in done.findings):
            why = "the checkpoint cannot be used"
    else:
        why = "the settings do not tell which model"
        done.findings.append(Finding("model", "model", "ok", f"not looked at: {why}; mend them, or name one with -m"))
    on_step("share")
    if shared:
        done.findings += share.look(settings)
    else:
        done.findings.append(Finding("share", "folders", "ok", "not looked at: name one with --share, or in settings"))
    _tried(settings, wishes, done, why=why, on_step=on_step)
    return done


def _patiently(section: str, name: str, look: Callable[[], Any]) -> list[Finding]:
    try:
        return looked(section, name, look, LIMIT_S)
    except Late as late:
        return [Finding(section, name, "warning", f"cannot be found out: {late}")]


def _tried(
    settings: Settings, wishes: Wishes, done: Examined, *, why: str | None, on_step: Callable[[str], None]
) -> None:
    """The device and the trial: both by the process that may hang or die. `why` no model is loaded; None: it is."""
    on_step("driver")
    smi = cards.nvidia_smi()
    beside = None
    if wishes.compare:
        out = str(wishes.out.absolute()) if wishes.out else None
        beside = {"picture": str(wishes.compare.absolute()), "box": wishes.box, "out": out}
    trial = child.run(settings, load=not why, compare=beside, on_stage=lambda stage: on_step(f"trial: {stage}"))
    done.ms.update(trial.ms)
    limits = machine.Limits.read()
    done.findings += _patiently("device", "cards", lambda: cards.look(trial.facts, smi, settings))
    if trial.facts is not None:
        facts = trial.facts
        done.details["device"] = facts
        done.findings += _patiently("machine", "threads", lambda: machine.threads(facts, limits))
    if trial.plan:
        done.details["plan"] = trial.plan
        done.findings.append(plan.finding(trial.plan, machine.available_mib(limits)))
    if trial.trial:
        done.details["trial"] = trial.trial
        step = trial.trial["step"] or "ready"
        done.findings.append(Finding("trial", "load", "ok", step))
        done.findings.append(attempt.finding(trial.trial))
    if trial.compare:
        done.details["compare"] = trial.compare
        done.findings += compare.finding(trial.compare)
    if failed := _failed(trial, settings, wishes.compare):
        done.findings.append(failed)
    elif why:
        done.findings.append(Finding("trial", "load", "ok", f"not tried: {why}"))
    if wishes.compare and not trial.trial:
        remedy = "mend what is wrong above, then ask again"
        done.findings.append(
            Finding("compare", "masks", "warning", "not compared: the model was not loaded", None, remedy)
        )


def _failed(trial: child.Told, settings: Settings, picture: Path | None = None) -> Finding | None:
    """What ended the trial: an error it told, or its own end."""
    section = "compare" if trial.trial else "trial"
    name = trial.stage
    if trial.error:
        error = error_of(trial.error)
        finding = told(section, name, error)
        known = type(error) is not SamPollError
        code = code_of(error.exit_code) if known else ExitCode.MODEL
        level: Level = finding.level if section == "trial" else "warning"
        where = finding.where or (str(picture) if picture and section == "compare" else None)
        return Finding(section, name, level, finding.what, where, finding.remedy, code)
    if not trial.trouble:
        return None
    remedy = trial.remedy or (
        "look at `nvidia-smi`, dmesg and the disk; "
        f"a slow disk needs a larger load_timeout_s (now {settings.load_timeout_s:g} s)"
    )
    code = DeviceError.exit_code if name == "device" else None
    # The daemon does without the official predictor, and without the masks of a picture at full size on the device.
    level = "problem" if section == "trial" else "warning"
    return Finding(section, name, level, trial.trouble, settings.model, remedy, code)
