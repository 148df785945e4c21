"""The checkpoint that the settings name: where it lies, its size and hash beside the catalogue's.

What can still go wrong here: a file on a slow share is not read to its end within the limit; it is then not judged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from sam_poll.doctor.findings import Finding, Late, looked
from sam_poll.engines import catalog, resolve
from sam_poll.errors import ModelError
from sam_poll.settings import Settings

LIMIT_S = 180.0  # 2.6 GB at 20 MB/s take 130 s
MIB = 2**20


def look(settings: Settings, limit_s: float = LIMIT_S) -> list[Finding]:
    """Findings of the section model."""
    found: list[Finding] = []
    for name, run in (("checkpoint", _place), ("hash", _hash)):
        try:
            found += looked("model", name, lambda run=run: run(settings), limit_s, sick="problem")  # type: ignore[misc]
        except Late as late:
            remedy = "copy the file to a local disk"
            return [*found, Finding("model", name, "warning", f"not judged: {late}", None, remedy)]
        if any(finding.level == "problem" for finding in found):
            break
    return found


def _place(settings: Settings) -> Iterator[Finding]:
    spec = resolve(settings.model, config=settings.model_cfg)
    yield Finding("model", "model", "ok", f"{spec.name} ({spec.family or 'which SAM, its weights tell'})")
    if spec.family == "fake":
        return
    path = spec.checkpoint
    if path is None or not path.is_file():
        known = settings.model in catalog.MODELS
        remedy = f"run `sam-poll models download {spec.name}`" if known else "check the path, or `sam-poll models list`"
        is_folder = path is not None and path.is_dir()
        what = "the checkpoint is a folder" if is_folder else "the checkpoint is not there"
        raise ModelError(what, place=str(path), remedy="name the file in it" if is_folder else remedy)
    if not os.access(path, os.R_OK):
        remedy = f"let user {os.getuid()} read it"
        raise ModelError("the checkpoint may not be read by this user", place=str(path), remedy=remedy)
    size = path.stat().st_size
    what = f"{size / MIB:,.1f} MiB"
    entry = next((model for model in catalog.MODELS.values() if model.filename == path.name), None)
    if entry and entry.size != size:
        # Published copies differ in size, so that this alone is nothing to act upon: the hash decides.
        what = f"{what}, the catalogue's is {entry.size / MIB:,.1f} MiB"
    yield Finding("model", "checkpoint", "ok", what, str(path))
    if spec.config:
        yield Finding("model", "config", "ok", spec.config)


def _hash(settings: Settings) -> Iterator[Finding]:
    spec = resolve(settings.model, config=settings.model_cfg)
    if spec.checkpoint is None:
        return
    good = catalog.verify(spec.checkpoint)
    if good is None:
        what = "bundled" if spec.name == "demo" else "none is known for this file; it is used as it is"
        yield Finding("model", "SHA-256", "ok", what)
    elif good:
        yield Finding("model", "SHA-256", "ok", "as published")
    else:
        name = next(name for name, entry in catalog.MODELS.items() if entry.filename == spec.checkpoint.name)
        remedy = f"delete the file and run `sam-poll models download {name}`, or give weights of your own another name"
        what = f"DIFFERENT from that of the published {name}"
        yield Finding("model", "SHA-256", "problem", what, str(spec.checkpoint), remedy)
