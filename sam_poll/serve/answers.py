"""What goes back: the formats that requests can be answered in, and documents as one HTTP body.

One document of one format is the body itself, of its own media type. Several are a JSON object with all of them: every
client has a JSON reader, and hardly any one for multipart/mixed. Which of the two it is follows from what was asked for
and the settings, never from what was found in the picture.

What can still go wrong here: nothing; these are pure.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from sam_poll import app, formats
from sam_poll.cvat import text
from sam_poll.predictor import for_browsers
from sam_poll.settings import Settings
from sam_poll.types import Document, Format, Result

INTERACT, FEATURES = "/interact", "/features"  # no names of output formats: nobody can ask for them by name
_TEXT = ("application/json", "application/xml", "application/yaml")


def menu_of(settings: Settings) -> dict[str, Format]:
    """All formats by their names, as the settings want them, and CVAT's two answers."""
    names = formats.names()
    public = dict(zip(names, app.formats_of(settings, names), strict=True))
    return {**public, INTERACT: interact, FEATURES: features}


def bundles_of(settings: Settings) -> frozenset[str]:
    """The formats that may make more than one document."""
    return frozenset({"yolo"} | ({"mask"} if settings.mask == "per-object" else set()))


def interact(result: Result) -> Sequence[Document]:
    """CVAT's interactor: the whole picture row by row."""
    body = text.interacted(result.masks, result.size, clicked=bool(result.prompts))
    return [Document(".json", "application/json", body.encode("ascii"))]


def features(result: Result) -> Sequence[Document]:
    """CVAT's SAM1: the embedding, for the decoder in the browser. TooLargeError."""
    assert result.embedding is not None
    body = text.embedded(for_browsers(result.embedding, result.model))
    return [Document(".json", "application/json", body.encode("ascii"))]


def bundle(name: str, documents: Sequence[Document]) -> bytes:
    """`{"documents": [{"name", "media_type", "text" | "base64"}, …]}`: what can be read as text is text."""
    stem = PurePosixPath(name).with_suffix("").as_posix()
    return json.dumps({"documents": [_entry(stem, document) for document in documents]}).encode("ascii")


def _entry(stem: str, document: Document) -> dict[str, Any]:
    made = {"name": stem + document.suffix, "media_type": document.media_type}
    if document.media_type.startswith("text/") or document.media_type in _TEXT:
        return made | {"text": document.body.decode("utf-8")}
    return made | {"base64": base64.b64encode(document.body).decode("ascii")}
