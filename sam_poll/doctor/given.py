"""The settings as the daemon would read them: which file, what it says, and what counts where it cannot be read.

What can still go wrong here: a daemon that is started elsewhere has another environment, and another `./config.yaml`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam_poll import settings as settings_
from sam_poll.doctor.findings import Finding, Late, bounded, told
from sam_poll.errors import SettingsError
from sam_poll.settings import Settings

LIMIT_S = 20.0
# Shown even where they are as by default; of the others those that are not.
ALWAYS = ("model", "device", "precision", "formats", "watch.mode", "memory.budget_mib", "lease_s", "load_timeout_s")


def look(
    config: Path | None, flags: Mapping[str, Any], env: Mapping[str, str] = os.environ, limit_s: float = LIMIT_S
) -> tuple[Settings, bool, list[Finding]]:
    """The settings, whether they name a share, and what is to say about them. Where they are wrong, the flags alone
    count, or the defaults."""
    found: list[Finding] = []
    path = config or (Path(env["SAM_POLL_CONFIG"]) if env.get("SAM_POLL_CONFIG") else None)
    try:
        if path is None and bounded(lambda: Path("config.yaml").is_file(), limit_s):
            path = Path("config.yaml")
        settings = bounded(lambda: settings_.load(path, env=env, flags=flags), limit_s)
    except SettingsError as error:
        found.append(told("settings", "file" if path else "environment", error))
        return _without(flags), "input" in flags, found
    except Late as late:
        remedy = "look at the disk or share it lies on"
        found.append(Finding("settings", "file", "problem", f"cannot be read: {late}", str(path), remedy))
        return _without(flags), "input" in flags, found
    if path:
        found.append(Finding("settings", "file", "ok", "as it should be", str(settings_.absolute(path))))
    else:
        found.append(Finding("settings", "file", "ok", "none: no -c, no SAM_POLL_CONFIG, no ./config.yaml; defaults"))
    if named := [name for name in sorted(env) if name.startswith(settings_.PREFIX) or name in ("MODEL", "MODEL_CFG")]:
        found.append(Finding("settings", "environment", "ok", ", ".join(named)))
    found.append(Finding("settings", "values", "ok", values(settings)))
    # Without a file nobody has named a share: the default of `input` is only a proposal.
    return settings, "input" in flags or "input" in settings.model_fields_set, found


def _without(flags: Mapping[str, Any]) -> Settings:
    try:
        return settings_.load(None, env={}, flags=flags)
    except SettingsError:
        return settings_.load(None, env={})


def values(settings: Settings) -> str:
    """Those that matter, and those that are not as by default: `model=demo, device=auto, …`."""
    shown = []
    for key, default in settings_.keys().items():
        value: Any = settings
        for part in key.split("."):
            value = getattr(value, part)
        if key in ALWAYS or value != default:
            shown.append(f"{key}={','.join(value) if isinstance(value, tuple) else value}")
    return ", ".join(shown)
