"""Checks of the checkpoint in the settings: its place, its size and hash.

Limitations: a file on a slow share may not be read within the time limit; then its hash is not
checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ModelError
from sam_poll.diagnostics.doctor.findings import CheckTimeout, Finding, run_check
from sam_poll.engines import catalog, hub, resolve
from sam_poll.engines.checkpoint import family_of_folder

LIMIT_S = 180.0  # 2.6 GB at 20 MB/s take 130 s
MIB = 2**20


def check(settings: Settings, limit_s: float = LIMIT_S) -> list[Finding]:
    """Return the findings of the section `model`."""
    found: list[Finding] = []
    for name, run in (("checkpoint", _place), ("hash", _hash)):
        try:
            found += run_check(
                "model", name, partial(run, settings), limit_s, system_error="problem"
            )
        except CheckTimeout as late:
            remedy = "copy the file to a local disk"
            return [*found, Finding("model", name, "warning", f"not judged: {late}", None, remedy)]
        if any(finding.level == "problem" for finding in found):
            break
    return found


def _place(settings: Settings) -> Iterator[Finding]:
    spec = resolve(settings.model, config=settings.model_cfg)
    yield Finding(
        "model", "model", "ok", f"{spec.name} ({spec.family or 'which SAM, its weights tell'})"
    )
    if spec.family == "fake":
        return
    path = catalog.folder_or_file(spec)
    if path is not None and path.is_dir():
        yield from _folder(path)
        return
    if path is None or not path.is_file():
        remedy = (
            f"run `sam-poll models download {spec.download}`"
            if spec.download
            else "check the path, or `sam-poll models list`"
        )
        raise ModelError("the checkpoint is not there", place=str(path or spec.name), remedy=remedy)
    if not os.access(path, os.R_OK):
        remedy = f"let user {os.getuid()} read it"
        raise ModelError(
            "the checkpoint may not be read by this user", place=str(path), remedy=remedy
        )
    size = path.stat().st_size
    what = f"{size / MIB:,.1f} MiB"
    entry = next((model for model in catalog.MODELS.values() if model.filename == path.name), None)
    if entry and entry.size != size:
        # Published copies differ in size, so that this alone is nothing to act upon: the hash
        # decides.
        what = f"{what}, the catalogue's is {entry.size / MIB:,.1f} MiB"
    yield Finding("model", "checkpoint", "ok", what, str(path))
    if spec.config:
        yield Finding("model", "config", "ok", spec.config)


def _folder(path: Path) -> Iterator[Finding]:
    """Check a folder in the form of the Hugging Face hub. Raises ModelError."""
    family = family_of_folder(path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    if not size:
        raise ModelError("the folder holds no weights (*.safetensors)", place=str(path))
    revision = hub.revision_of(path)
    what = f"{family}, {size / MIB:,.1f} MiB" + (f", revision {revision}" if revision else "")
    yield Finding("model", "checkpoint", "ok", what, str(path))


def _hash(settings: Settings) -> Iterator[Finding]:
    spec = resolve(settings.model, config=settings.model_cfg)
    path = catalog.folder_or_file(spec)
    if path is None:
        return
    verdict = catalog.verify(path)
    if verdict is catalog.Verdict.UNKNOWN:
        what = (
            "bundled" if spec.name == "demo" else "none is known for this file; it is used as it is"
        )
        yield Finding("model", "SHA-256", "ok", what)
    elif verdict is not catalog.Verdict.DIFFERENT:
        yield Finding("model", "SHA-256", "ok", verdict.value)
    else:
        name = next(
            (name for name, entry in catalog.MODELS.items() if entry.filename == path.name),
            spec.name,
        )
        remedy = (
            f"delete the file and run `sam-poll models download {name}`, or give weights "
            "of your own another name"
        )
        what = f"DIFFERENT from that of the published {name}"
        yield Finding("model", "SHA-256", "problem", what, str(path), remedy)
