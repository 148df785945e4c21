"""Bodies of answers: the formats that requests can be answered in, and several files as one body.

One file of one format is the body itself, with its own media type. Several files are a JSON object
with all of them: every client has a JSON parser, and hardly any one for multipart/mixed. Which of
the two it is follows from the request and the settings, never from the picture's content.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from sam_poll.config.settings import Contours, Settings
from sam_poll.core.protocols import Format
from sam_poll.core.types import Mask, ModelInfo, OutputFile, Result
from sam_poll.formats import registry
from sam_poll.formats.answer_reader import parts_of
from sam_poll.formats.common import published_score
from sam_poll.integrations.http.errors import UnavailableError
from sam_poll.integrations.nuclio import responses
from sam_poll.integrations.nuclio.answer_form import AnswerForm
from sam_poll.pipeline.predictor import for_browsers
from sam_poll.runtime import builders

# Names of the formats of CVAT's functions and of the page's previews. No request can select them:
# they are not in `formats.registry`, and a slash is in no name there.
INTERACT = {form: f"/interact/{form.value}" for form in AnswerForm}
FEATURES = "/features"
WARM = "/warm"
PREVIEW = "/preview"
_TEXT_TYPES = ("application/json", "application/xml", "application/yaml")


def formats_by_name(settings: Settings) -> dict[str, Format]:
    """Return all formats by name, with the settings' options, and those of CVAT's functions."""
    names = registry.names()
    selectable = dict(zip(names, builders.formats_of(settings, names), strict=True))
    interactors = {name: partial(interact, form=form) for form, name in INTERACT.items()}
    shown = partial(preview, contours=settings.contours)
    return {**selectable, **interactors, FEATURES: features, WARM: warm, PREVIEW: shown}


def multi_file_formats(settings: Settings) -> frozenset[str]:
    """Return the names of the formats that may make more than one file."""
    return frozenset(name for name in registry.names() if registry.writes_several(name, settings))


def interact(result: Result, form: AnswerForm) -> Sequence[OutputFile]:
    """Return the answer of CVAT's interactor, in one of its forms."""
    body = responses.interactor_response(
        result.masks, result.size, clicked=bool(result.prompts), form=form
    )
    return [OutputFile(".json", "application/json", body.encode("ascii"))]


def preview(result: Result, contours: Contours) -> Sequence[OutputFile]:
    """Return the masks as the page draws them, see `preview_body`."""
    body = preview_body(result.masks, result.model, contours)
    return [OutputFile(".json", "application/json", body)]


def preview_body(masks: Sequence[Mask], model: ModelInfo, contours: Contours) -> bytes:
    """Return masks as JSON: `{"model", "objects": [{"label", "score", "area", "parts"}, …]}`.

    A part is a list of polygons, the outer one first, then its holes; a polygon is a list of
    [x, y] in pixels of the full picture.
    """
    objects = []
    for mask in masks:
        parts = parts_of(mask, tolerance_px=contours.tolerance_px, min_area_px=contours.min_area_px)
        polygons = [[polygon.tolist() for polygon in part] for part in parts]
        score = published_score(mask.score)
        objects.append({"label": mask.label, "score": score, "area": mask.area, "parts": polygons})
    return json.dumps({"model": model.name, "objects": objects}).encode("ascii")


def features(result: Result) -> Sequence[OutputFile]:
    """Return the answer of CVAT's SAM1 function: the embedding, for the decoder in the browser.

    Raises DeviceOutOfMemoryError if the picture was encoded at a smaller side than browsers expect.
    """
    assert result.embedding is not None
    body = responses.embedding_response(for_browsers(result.embedding, result.model))
    return [OutputFile(".json", "application/json", body.encode("ascii"))]


def warm(result: Result) -> Sequence[OutputFile]:
    """Return the answer of `/warm`: `{"embedding": its file's name, "size": …, "model": …}`.

    Raises UnavailableError if the embedding could not be written.
    """
    if result.kept is None:
        raise UnavailableError(
            "the embedding could not be written",
            place="cache.folder",
            remedy="the server's log names the cause",
        )
    answer = {"embedding": result.kept, "size": result.size, "model": result.model.name}
    return [OutputFile(".json", "application/json", json.dumps(answer).encode("ascii"))]


def bundle(name: str, documents: Sequence[OutputFile]) -> bytes:
    """Return several output files as one JSON body.

    `{"documents": [{"name", "media_type", "text" | "base64"}, …]}`, with `text` for the media
    types that are text. `name` is the picture's name, with an ending.
    """
    stem = PurePosixPath(name).with_suffix("").as_posix()
    entries = [_entry(stem, document) for document in documents]
    return json.dumps({"documents": entries}).encode("ascii")


def _entry(stem: str, document: OutputFile) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": stem + document.suffix,
        "media_type": document.media_type,
    }
    if document.media_type.startswith("text/") or document.media_type in _TEXT_TYPES:
        entry["text"] = document.body.decode("utf-8")
    else:
        entry["base64"] = base64.b64encode(document.body).decode("ascii")
    return entry
