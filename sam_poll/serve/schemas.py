"""What /openapi.json says of the addresses: bodies, answers, refusals, examples.

Prompts are described by the same schema that `sam-poll schema` prints.

What can still go wrong here: whether prompts fit the picture, and whether it is one, no schema can say.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from sam_poll import formats, prompts
from sam_poll.serve.asked import MAX_NAME

_REFS = "#/components/schemas/"
# A PNG of 16 × 16 pixels: the examples can be sent as they are.
EXAMPLE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAAPElEQVQY02PUYEAFTAw4BLbABBg1EDwfmIotyKpwmoEsADcPzGKC"
    "mgU3lSgz4Hp84A4DmeeD7FKiPAcHAHyQB3GlkQhQAAAAAElFTkSuQmCC"
)
_BOX = {"box": {"x0": 2, "y0": 2, "x1": 12, "y1": 12}}

_REFUSALS = {
    "400": "The body is not JSON, or not multipart/form-data; or it is not clear where it ends.",
    "401": "The token is missing, or another one.",
    "403": "A web page of another origin asks; serve.origins allows some.",
    "408": "The body has not come in time.",
    "413": "The body is too long.",
    "415": "A kind of body that is not read here.",
    "421": "The server is called by a name that is not its own; serve.hosts gives it more.",
    "422": "The prompt, the picture or the two together cannot be answered; the reasons are the folder's.",
    "429": "All places are taken; Retry-After says when to ask again.",
    "500": "The fault is here. After a device failure the server ends, to be started anew.",
    "503": "Not now: loading, stopping, or not answered in time; Retry-After says when to ask again.",
}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REFS + name}


def _json(schema: dict[str, Any], **examples: Any) -> dict[str, Any]:
    found = {"schema": schema}
    if examples:
        found["examples"] = {name.replace("_", " "): {"value": value} for name, value in examples.items()}
    return {"application/json": found}


def _refused(*codes: str) -> dict[int | str, dict[str, Any]]:
    headers = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}}
    return {
        code: {
            "description": _REFUSALS[code],
            "content": _json(_ref("Refusal")),
            **({"headers": headers} if code in ("429", "503") else {}),
        }
        for code in codes
    }


def _post(summary: str, content: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {200: {"description": "The answer.", "content": answer}, **_refused(*_REFUSALS)},
        "openapi_extra": {"requestBody": {"required": True, "content": content}, "security": [{"token": []}, {}]},
    }


def _binary() -> dict[str, Any]:
    return {"schema": {"type": "string", "format": "binary"}}


def _predict() -> dict[str, Any]:
    asked = {"picture": EXAMPLE, "prompt": _BOX, "formats": ["mask"], "name": "done/cam1/dog.jpg"}
    form = {
        "schema": _ref("PredictForm"),
        "encoding": {"picture": {"contentType": "image/*"}, "prompt": {"contentType": "application/json"}},
    }
    everything = {"picture": EXAMPLE, "prompt": {"everything": True}, "formats": ["opex", "yolo"]}
    answer = {
        **_json({"anyOf": [_ref("Bundle"), {"type": "object", "description": "The one document (opex, coco)."}]}),
        **{kind: _binary() for kind in ("image/png", "image/jpeg", "application/xml")},
    }
    content = {**_json(_ref("Predict"), a_box=asked, everything=everything), "multipart/form-data": form}
    return _post("Masks of a picture's prompts", content, answer)


def _interact() -> dict[str, Any]:
    clicked = {"image": EXAMPLE, "pos_points": [[7, 7]], "neg_points": [], "obj_bbox": None}
    boxed = {"image": EXAMPLE, "pos_points": [], "neg_points": [], "obj_bbox": [[2, 2], [12, 12]]}
    content = _json(_ref("Interact"), a_click=clicked, a_box=boxed)
    return _post("As CVAT's interactors are asked", content, _json(_ref("Interacted")))


def _features() -> dict[str, Any]:
    content = _json(_ref("Features"), a_picture={"image": EXAMPLE})
    return _post("As CVAT's SAM1 function is asked: the embedding", content, _json(_ref("Embedded")))


def route(path: str) -> dict[str, Any]:
    """What FastAPI is told of one address."""
    if path == "/health":
        answer = {"content": _json(_ref("Health"))}
        told = {
            200: {"description": "Ready.", **answer},
            503: {"description": "Not ready.", **answer},
            **_refused("421"),
        }
        return {"summary": "Live, ready, model, memory", "responses": told}
    if path == "/metrics":
        content = {"text/plain": {"schema": {"type": "string"}}}
        told = {200: {"description": "The numbers.", "content": content}, **_refused("401", "421")}  # type: ignore[dict-item]
        return {"summary": "For Prometheus", "responses": told, "openapi_extra": {"security": [{"token": []}, {}]}}
    return {"/predict": _predict, "/interact": _interact, "/features": _features}[path]()


def describe(app: FastAPI) -> None:
    """Puts the schemas into what /openapi.json says."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes, summary=_SUMMARY)
            parts = made.setdefault("components", {})
            parts["schemas"] = {**_schemas(), **_prompt_schemas()}
            parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


_SUMMARY = "Segment anything over HTTP: masks of points, boxes, or all there is; and what CVAT's functions are asked."


def _prompt_schemas() -> dict[str, Any]:
    """The schema of prompt files, its parts as components."""
    made = {key: value for key, value in prompts.schema().items() if key != "$schema"}
    parts = made.pop("$defs", {})
    return {"Prompt": _moved(made), **{name: _moved(part) for name, part in parts.items()}}


def _moved(part: Any) -> Any:
    if isinstance(part, list):
        return [_moved(value) for value in part]
    if not isinstance(part, dict):
        return part
    return {
        key: value.replace("#/$defs/", _REFS) if key == "$ref" and isinstance(value, str) else _moved(value)
        for key, value in part.items()
    }


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": properties}


def _closed(*required: str, **properties: Any) -> dict[str, Any]:
    return _object(required, **properties) | {"additionalProperties": False}


def _schemas() -> dict[str, Any]:
    text: dict[str, Any] = {"type": "string"}
    whole: dict[str, Any] = {"type": "integer"}
    number: dict[str, Any] = {"type": "number"}
    maybe: dict[str, Any] = {"type": ["string", "null"]}
    base64: dict[str, Any] = {"type": "string", "format": "byte", "minLength": 1}
    picture = base64 | {"description": "The picture's file in base64, also as a data URL (data:image/png;base64,…)."}
    named = {"type": "string", "enum": formats.names()}
    wanted = {"type": "array", "items": named, "minItems": 1, "description": "Without it: those of the settings."}
    name = {"type": "string", "minLength": 1, "maxLength": MAX_NAME, "description": "The picture's, for the answers."}
    pair = {"type": "array", "items": number, "minItems": 2, "maxItems": 2}
    pairs = {"anyOf": [{"type": "array", "items": pair}, {"type": "null"}]}
    corners = {"anyOf": [{"type": "array", "items": pair, "minItems": 2, "maxItems": 2}, {"type": "null"}]}
    form = {"picture": {"type": "string", "format": "binary"}, "prompt": _ref("Prompt"), "formats": wanted}
    document = _object(("name", "media_type"), name=text, media_type=text, text=text, base64=base64)
    clicks = {"image": picture, "pos_points": pairs, "neg_points": pairs, "obj_bbox": corners}
    counts = dict.fromkeys(("places", "taken", "waiting", "at_work", "answered", "rejected"), whole)
    asked = {"picture": picture, "prompt": _ref("Prompt"), "formats": wanted, "name": name}
    loaded = {"name": text, "family": text, "device": text, "precision": text, "side": whole}
    memory = {"step": text, "peak_mib": {"type": ["number", "null"]}, "out_of_memory": whole}
    row = {"type": "array", "items": {"enum": [0, 255]}}
    return {
        "Predict": _closed("picture", "prompt", **asked),
        "PredictForm": _closed("picture", "prompt", **form, name=name),
        "Bundle": _object(("documents",), documents={"type": "array", "items": document}),
        "Interact": _object(("image",), **clicks, threshold={"type": ["number", "null"], "minimum": 0, "maximum": 1}),
        "Interacted": _object(("mask",), mask={"type": "array", "items": row}, objects={"type": "array"}),
        "Features": _object(("image",), image=picture),
        "Embedded": _object(("blob",), blob=base64 | {"description": "float32, 1×256×64×64, little-endian."}),
        "Refusal": _object(("code", "reason", "place", "remedy"), code=text, reason=text, place=maybe, remedy=maybe),
        "Health": _object(
            ("live", "ready", "version", "model", "memory", "requests"),
            live={"type": "boolean"},
            ready={"type": "boolean"},
            version=text,
            model={"anyOf": [_object((), **loaded), {"type": "null"}]},
            memory={"anyOf": [_object((), **memory), {"type": "null"}]},
            requests=_object((), **counts),
        ),
    }
