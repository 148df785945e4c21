"""Helpers to call Nuclio functions as Nuclio does."""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any

import nuclio_sdk
from nuclio_sdk.event import EventDeserializerKinds
from nuclio_sdk.json_encoder import Encoder

from tests.support.paths import ROOT

FUNCTIONS = ROOT / "docker" / "nuclio"
# The `User-Agent` of CVAT's server before interactors could answer with shapes, and since then.
OLD_CVAT = {"User-Agent": "CVAT/2.59.1 python-requests/2.32.4"}
NEW_CVAT = {"User-Agent": "CVAT/2.60.0 python-requests/2.32.4"}


def event(
    body: Any, content_type: str = "application/json", headers: dict[Any, Any] | None = None
) -> nuclio_sdk.Event:
    """Return an event as Nuclio's wrapper makes it of a request."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    packed = {
        "body": raw,
        "content_type": content_type,
        "trigger": {"kind": "http", "name": "http"},
        "fields": {},
        "headers": headers or {},
        "id": "1",
        "method": "POST",
        "path": "/",
        "size": len(raw),
        "timestamp": 0,
        "url": "",
        "shard_id": 0,
        "num_shards": 1,
        "type": "",
        "type_version": "",
        "version": "",
    }
    return nuclio_sdk.Event.deserialize(packed, kind=EventDeserializerKinds.msgpack)


def wire(response: nuclio_sdk.Response) -> tuple[int, Any]:
    """Return status and parsed body of a response as they leave Nuclio's wrapper."""
    sent = nuclio_sdk.Response.from_entrypoint_output(Encoder().encode, response)
    assert sent["content_type"] == "application/json"
    assert sent["body_encoding"] == "text"
    return sent["status_code"], json.loads(sent["body"])


def load(path: str, name: str) -> Any:
    """Import a handler's module, as Nuclio does."""
    spec = importlib.util.spec_from_file_location(name, FUNCTIONS / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Lines:
    """A logger that stores its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, line: str) -> None:
        self.lines.append(line)

    error = warn = info
