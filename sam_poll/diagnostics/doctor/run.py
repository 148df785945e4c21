"""All checks in order: the quick ones, then the trial; a check that fails hides no other one.

Limitations: the trial needs memory of the GPU, also beside a running daemon; `--quick` skips it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_poll.config.settings import Settings
from sam_poll.core.errors import DeviceError, ExitCode, SamPollError
from sam_poll.diagnostics.doctor import (
    checkpoint,
    compare,
    gpus,
    machine,
    memory_plan,
    settings_check,
    share,
    test_prediction,
    trial_process,
)
from sam_poll.diagnostics.doctor.findings import (
    CheckTimeout,
    Finding,
    Level,
    code_of,
    error_of,
    problem_of,
    run_check,
)
from sam_poll.runtime.console import set_up_log

LIMIT_S = 30.0  # for a check of this machine


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """The options of the command.

    `flags`: settings by their keys; `box`: x0, y0, x1, y1 in pixels.
    """

    config: Path | None = None
    share: Path | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    compare: Path | None = None
    box: tuple[float, float, float, float] | None = None
    out: Path | None = None
    quick: bool = False


@dataclass
class DoctorReport:
    """Everything that was found. `ms` by stage; `details` in numbers, for programs."""

    findings: list[Finding] = field(default_factory=list)
    ms: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def examine(
    options: DoctorOptions, on_step: Callable[[str], None] = lambda step: None
) -> DoctorReport:
    """Run all checks. `on_step` gets the name of each."""
    set_up_log("text", "ERROR")
    report = DoctorReport()
    flags = {key: value for key, value in options.flags.items() if value is not None}
    if options.share:
        flags["input"] = share.input_of(options.share)
    on_step("settings")
    settings, share_known, model_known, findings = settings_check.check(options.config, flags)
    report.findings += findings
    report.findings += _check_with_limit(
        "settings", "metrics", lambda: settings_check.metrics(settings)
    )
    on_step("machine")
    report.findings += _check_with_limit("machine", "system", machine.check)
    on_step("model")
    why = "--quick" if options.quick else None
    if model_known:
        report.findings += checkpoint.check(settings)
        if any(
            f.section == "model" and f.level == "problem" and f.name == "checkpoint"
            for f in report.findings
        ):
            why = "the checkpoint cannot be used"
    else:
        why = "the settings name no model"
        report.findings.append(
            Finding(
                "model", "model", "ok", f"not checked: {why}; correct them, or name one with -m"
            )
        )
    on_step("share")
    if share_known:
        report.findings += share.check(settings)
    else:
        report.findings.append(
            Finding("share", "folders", "ok", "not checked: name one with --share, or in settings")
        )
    _run_trial(settings, options, report, why=why, on_step=on_step)
    return report


def _check_with_limit(section: str, name: str, look: Callable[[], Any]) -> list[Finding]:
    try:
        return run_check(section, name, look, LIMIT_S)
    except CheckTimeout as timeout:
        return [Finding(section, name, "warning", f"check failed: {timeout}")]


def _run_trial(
    settings: Settings,
    options: DoctorOptions,
    report: DoctorReport,
    *,
    why: str | None,
    on_step: Callable[[str], None],
) -> None:
    """Check the device and run the trial, in the process that may hang or die.

    `why` says why no model is loaded; None: it is loaded.
    """
    on_step("driver")
    smi = gpus.nvidia_smi()
    beside = None
    if options.compare:
        out = str(options.out.absolute()) if options.out else None
        beside = {"picture": str(options.compare.absolute()), "box": options.box, "out": out}
    trial = trial_process.run(
        settings, load=not why, compare=beside, on_stage=lambda stage: on_step(f"trial: {stage}")
    )
    report.ms.update(trial.ms)
    limits = machine.Limits.read()
    report.findings += _check_with_limit(
        "device", "cards", lambda: gpus.check(trial.facts, smi, settings)
    )
    if trial.facts is not None:
        facts = trial.facts
        report.details["device"] = facts
        report.findings += _check_with_limit(
            "machine", "threads", lambda: machine.threads(facts, limits)
        )
    if trial.plan:
        report.details["plan"] = trial.plan
        report.findings.append(memory_plan.finding(trial.plan, machine.available_mib(limits)))
    if trial.trial:
        report.details["trial"] = trial.trial
        step = trial.trial["step"] or "ready"
        report.findings.append(Finding("trial", "load", "ok", step))
        report.findings.append(test_prediction.finding(trial.trial))
    if trial.compare:
        report.details["compare"] = trial.compare
        report.findings += compare.finding(trial.compare)
    if failed := _failed(trial, settings, options.compare):
        report.findings.append(failed)
    elif why:
        report.findings.append(Finding("trial", "load", "ok", f"not tried: {why}"))
    if options.compare and not trial.trial:
        remedy = "solve the problems above, then run it again"
        report.findings.append(
            Finding(
                "compare",
                "masks",
                "warning",
                "not compared: the model was not loaded",
                None,
                remedy,
            )
        )


def _failed(
    trial: trial_process.TrialResult, settings: Settings, picture: Path | None = None
) -> Finding | None:
    """Return a finding on what ended the trial: an error that it reported, or a crash."""
    section = "compare" if trial.trial else "trial"
    name = trial.stage
    if trial.error:
        error = error_of(trial.error)
        finding = problem_of(section, name, error)
        known = type(error) is not SamPollError
        code = code_of(error.exit_code) if known else ExitCode.MODEL
        level: Level = finding.level if section == "trial" else "warning"
        where = finding.where or (str(picture) if picture and section == "compare" else None)
        return Finding(section, name, level, finding.what, where, finding.remedy, code)
    if not trial.trouble:
        return None
    remedy = trial.remedy or (
        "check `nvidia-smi`, dmesg and the disk; "
        f"a slow disk needs a larger load_timeout_s (now {settings.load_timeout_s:g} s)"
    )
    code = DeviceError.exit_code if name == "device" else None
    # The daemon does without the official predictor, and without the masks of a picture at full
    # size on the device.
    level = "problem" if section == "trial" else "warning"
    return Finding(section, name, level, trial.trouble, settings.model, remedy, code)
