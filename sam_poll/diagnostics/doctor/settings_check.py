"""The settings as a daemon would load them here, and the fallback if they are invalid.

Limitations: a daemon that is started elsewhere has another environment and another `./config.yaml`.
A port that is free now may be in use when the daemon starts.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import importlib.util
import os
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sam_poll.config import settings as settings_
from sam_poll.config.fields import port_error
from sam_poll.config.settings import Settings
from sam_poll.core.errors import SettingsError
from sam_poll.diagnostics.doctor.findings import CheckTimeout, Finding, problem_of, run_with_timeout

LIMIT_S = 20.0
_ANSWER_S, _MOST_BYTES = 2.0, 1 << 20
# Shown even where they are as by default; of the others those that are not.
ALWAYS = (
    "model",
    "device",
    "precision",
    "formats",
    "watch.mode",
    "memory.budget_mib",
    "lease_s",
    "load_timeout_s",
)


class LoadedSettings(NamedTuple):
    """The loaded settings, whether they name a share and a model, and the findings."""

    settings: Settings
    shared: bool
    modelled: bool
    found: list[Finding]


def check(
    config: Path | None,
    flags: Mapping[str, Any],
    env: Mapping[str, str] = os.environ,
    limit_s: float = LIMIT_S,
) -> LoadedSettings:
    """Load the settings that a daemon would load here.

    If they are invalid, the flags alone are used, or the defaults.
    """
    found: list[Finding] = []
    path = config or (Path(env["SAM_POLL_CONFIG"]) if env.get("SAM_POLL_CONFIG") else None)
    try:
        if path is None and run_with_timeout(lambda: Path("config.yaml").is_file(), limit_s):
            path = Path("config.yaml")
        settings = run_with_timeout(lambda: settings_.load(path, env=env, flags=flags), limit_s)
    except SettingsError as error:
        found.append(problem_of("settings", "file" if path else "environment", error))
        return _without(flags, found)
    except CheckTimeout as timeout:
        remedy = "check the disk or share that it is on"
        found.append(
            Finding("settings", "file", "problem", f"cannot be read: {timeout}", str(path), remedy)
        )
        return _without(flags, found)
    if path:
        found.append(Finding("settings", "file", "ok", "valid", str(settings_.absolute(path))))
    else:
        found.append(
            Finding(
                "settings",
                "file",
                "ok",
                "none: no -c, no SAM_POLL_CONFIG, no ./config.yaml; defaults",
            )
        )
    if variables := [
        name
        for name in sorted(env)
        if name.startswith(settings_.PREFIX) or name in ("MODEL", "MODEL_CFG")
    ]:
        found.append(Finding("settings", "environment", "ok", ", ".join(variables)))
    found.append(Finding("settings", "values", "ok", values(settings)))
    # Without a file the share is not known: the default of `input` is only a proposal.
    return LoadedSettings(
        settings, "input" in flags or "input" in settings.model_fields_set, True, found
    )


def _without(flags: Mapping[str, Any], found: list[Finding]) -> LoadedSettings:
    """Apply the flags one by one, so that an invalid flag does not hide the others."""
    good: dict[str, Any] = {}
    for key, value in flags.items():
        with contextlib.suppress(SettingsError):
            settings_.load(None, env={}, flags={**good, key: value})
            good[key] = value
    return LoadedSettings(
        settings_.load(None, env={}, flags=good), "input" in good, "model" in good, found
    )


def metrics(settings: Settings) -> Iterator[Finding]:
    """Whether the port for Prometheus can be had: without it no daemon starts."""
    address = settings.health.metrics
    if address is None:
        return
    if importlib.util.find_spec("prometheus_client") is None:
        remedy = "pip install 'sam_poll[metrics]', or set health.metrics to null"
        yield Finding(
            "settings",
            "metrics",
            "problem",
            "they need the package prometheus_client",
            "health.metrics",
            remedy,
        )
        return
    host, _, port = address.rpartition(":")
    try:
        family, kind, *_, place = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as source:
            source.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            source.bind(place)
    except (OSError, UnicodeError) as error:
        if (
            isinstance(error, OSError)
            and error.errno == errno.EADDRINUSE
            and _is_our_daemon(address)
        ):
            what = f"a daemon answers at {address}; a further one needs a port of its own"
            yield Finding("settings", "metrics", "ok", what, "health.metrics")
            return
        yield problem_of("settings", "metrics", port_error(address, error, "health.metrics"))
        return
    yield Finding(
        "settings", "metrics", "ok", f"the port can be opened: {address}", "health.metrics"
    )


def _is_our_daemon(address: str) -> bool:
    """Whether it is one of our daemons that has the port."""
    host, _, port = address.rpartition(":")
    here = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104  queried, not bound
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{here}:{port}/metrics", timeout=_ANSWER_S) as answer:
            return b"sam_poll_" in answer.read(_MOST_BYTES)
    except (OSError, ValueError, http.client.HTTPException):
        return False


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
