"""The schemas and examples of /openapi.json: bodies, answers and errors of each path.

Prompts have the schema that `sam-poll schema` prints.

Limitations: no schema can say whether prompts fit their picture, or whether it can be decoded.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from sam_poll.formats import registry
from sam_poll.integrations.http.requests import MAX_NAME
from sam_poll.integrations.nuclio import answer_form
from sam_poll.prompts import parser

_REFS = "#/components/schemas/"
_SUMMARY = (
    "Segment anything over HTTP: masks of points, boxes, or all objects; "
    "and the requests of CVAT's functions."
)
_TOKEN_OR_NONE: list[dict[str, list[str]]] = [{"token": []}, {}]
# A PNG of 16 × 16 pixels, so that the examples can be sent as they are.
EXAMPLE = (
    "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAAPElEQVQY02PUYEAFTAw4BLbABBg1EDwfmIotyKpw"
    "moEsADcPzGKCmgU3lSgz4Hp84A4DmeeD7FKiPAcHAHyQB3GlkQhQAAAAAElFTkSuQmCC"
)
_BOX = {"box": {"x0": 2, "y0": 2, "x1": 12, "y1": 12}}

_ERRORS = {
    "400": "The body is malformed, or the headers leave open where it ends.",
    "401": "The token is missing or wrong.",
    "403": "The request comes from a web page of an origin that is not in serve.origins.",
    "408": "The body was not complete in time.",
    "413": "The body is longer than serve.body_mib.",
    "415": "The content type is neither JSON nor a form.",
    "421": "The Host header names another server; serve.hosts adds names.",
    "422": "The prompt, the picture, or the two together cannot be used.",
    "429": "serve.queue requests are being answered; Retry-After says when to send it again.",
    "500": "The server's fault. After a device failure the process ends, to be restarted.",
    "503": "Loading, stopping, or not answered in time; Retry-After says when to send it again.",
}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REFS + name}


def _json(schema: dict[str, Any], **examples: Any) -> dict[str, Any]:
    content = {"schema": schema}
    if examples:
        content["examples"] = {
            name.replace("_", " "): {"value": value} for name, value in examples.items()
        }
    return {"application/json": content}


def _errors(*statuses: str) -> dict[int | str, dict[str, Any]]:
    retry_after = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}}
    errors: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        errors[status] = {"description": _ERRORS[status], "content": _json(_ref("Refusal"))}
        if status in ("429", "503"):
            errors[status]["headers"] = retry_after
    return errors


def _post(summary: str, content: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": summary,
        "responses": {
            200: {"description": "The answer.", "content": answer},
            **_errors(*_ERRORS),
        },
        "openapi_extra": {
            "requestBody": {"required": True, "content": content},
            "security": _TOKEN_OR_NONE,
        },
    }


def _predict() -> dict[str, Any]:
    box = {"picture": EXAMPLE, "prompt": _BOX, "formats": ["mask"], "name": "done/cam1/dog.jpg"}
    everything = {"picture": EXAMPLE, "prompt": {"everything": True}, "formats": ["opex", "yolo"]}
    form = {
        "schema": _ref("PredictForm"),
        "encoding": {
            "picture": {"contentType": "image/*"},
            "prompt": {"contentType": "application/json"},
        },
    }
    text = {"picture": EXAMPLE, "prompt": {"text": ["dog", "yellow bus"]}, "formats": ["coco"]}
    content = {
        **_json(_ref("Predict"), a_box=box, everything=everything, a_text=text),
        "multipart/form-data": form,
    }
    single = {"type": "object", "description": "The file of a format that is JSON (opex, coco)."}
    answer = _json({"anyOf": [_ref("Bundle"), single]})
    for media_type in registry.media_types():
        if media_type != "application/json":
            answer[media_type] = {"schema": {"type": "string", "format": "binary"}}
    return _post("Masks of a picture's prompts", content, answer)


def _interact() -> dict[str, Any]:
    click = {"image": EXAMPLE, "pos_points": [[7, 7]], "neg_points": [], "obj_bbox": None}
    box = {"image": EXAMPLE, "pos_points": [], "neg_points": [], "obj_bbox": [[2, 2], [12, 12]]}
    content = _json(_ref("Interact"), a_click=click, a_box=box)
    answer = _json({"anyOf": [_ref("InteractedMask"), _ref("InteractedShapes")]})
    route = _post("Requests of CVAT's interactors", content, answer)
    route["openapi_extra"]["parameters"] = [
        {
            "name": "answer",
            "in": "query",
            "description": "The form of the answer; auto: shapes for CVAT since 2.60, else mask.",
            "schema": {"type": "string", "enum": list(answer_form.WORDS), "default": "auto"},
        }
    ]
    return route


def _features() -> dict[str, Any]:
    content = _json(_ref("Features"), a_picture={"image": EXAMPLE})
    return _post(
        "Requests of CVAT's SAM1 function: the embedding", content, _json(_ref("Embedded"))
    )


def _warm() -> dict[str, Any]:
    form = {"schema": _ref("WarmForm"), "encoding": {"picture": {"contentType": "image/*"}}}
    content = {
        **_json(_ref("Warm"), a_picture={"picture": EXAMPLE}),
        "multipart/form-data": form,
    }
    return _post("Encode a picture ahead, into the disk cache", content, _json(_ref("Warmed")))


def _health() -> dict[str, Any]:
    content = _json(_ref("Health"))
    return {
        "summary": "Live, ready, model, memory",
        "responses": {
            200: {"description": "Ready.", "content": content},
            503: {"description": "Not ready.", "content": content},
            **_errors("421"),
        },
    }


def _metrics() -> dict[str, Any]:
    content = {"text/plain": {"schema": {"type": "string"}}}
    return {
        "summary": "Metrics for Prometheus",
        "responses": {
            200: {"description": "The metrics.", "content": content},
            **_errors("401", "421"),
        },
        "openapi_extra": {"security": _TOKEN_OR_NONE},
    }


_ROUTES = {
    "/predict": _predict,
    "/interact": _interact,
    "/features": _features,
    "/warm": _warm,
    "/health": _health,
    "/metrics": _metrics,
}


def route(path: str) -> dict[str, Any]:
    """Return the arguments of FastAPI's `add_api_route` that describe a path."""
    return _ROUTES[path]()


def describe(app: FastAPI) -> None:
    """Make an application's /openapi.json contain the schemas of this module."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            document = get_openapi(
                title=app.title, version=app.version, routes=app.routes, summary=_SUMMARY
            )
            components = document.setdefault("components", {})
            components["schemas"] = {**_schemas(), **_prompt_schemas()}
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _prompt_schemas() -> dict[str, Any]:
    """Return the schema of prompt files and its definitions, as components."""
    schema = {key: value for key, value in parser.schema().items() if key != "$schema"}
    definitions = schema.pop("$defs", {})
    components = {name: _with_new_refs(part) for name, part in definitions.items()}
    return {"Prompt": _with_new_refs(schema), **components}


def _prompt_keys() -> dict[str, Any]:
    """Return the schemas of the keys of prompt files that /interact takes, too."""
    forms = parser.schema()["$defs"]
    return {
        key: _with_new_refs(forms[form]["properties"][key])
        for form, keys in (
            ("ConceptFile", ("text", "exemplars", "max_objects")),
            ("ObjectForm", ("polygon", "mask")),
        )
        for key in keys
    }


def _with_new_refs(part: Any) -> Any:
    """Return a part of a schema whose references lead to the document's components."""
    if isinstance(part, list):
        return [_with_new_refs(value) for value in part]
    if not isinstance(part, dict):
        return part
    return {
        key: value.replace("#/$defs/", _REFS)
        if key == "$ref" and isinstance(value, str)
        else _with_new_refs(value)
        for key, value in part.items()
    }


def _object(required: tuple[str, ...], **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that may have further keys."""
    return {"type": "object", "required": list(required), "properties": properties}


def _closed(*required: str, **properties: Any) -> dict[str, Any]:
    """Return the schema of an object that has these keys only."""
    return _object(required, **properties) | {"additionalProperties": False}


def _schemas() -> dict[str, Any]:
    return {**_predict_schemas(), **_cvat_schemas(), **_server_schemas()}


_TEXT: dict[str, Any] = {"type": "string"}
_TEXT_OR_NULL: dict[str, Any] = {"type": ["string", "null"]}
_INTEGER: dict[str, Any] = {"type": "integer"}
_BASE64: dict[str, Any] = {"type": "string", "format": "byte", "minLength": 1}
_PICTURE = _BASE64 | {
    "description": "The picture's file in base64, also as a data URL (data:image/png;base64,…)."
}


def _predict_schemas() -> dict[str, Any]:
    formats = {
        "type": "array",
        "items": {"type": "string", "enum": registry.names()},
        "minItems": 1,
        "description": "Default: the formats of the settings.",
    }
    name = {
        "type": "string",
        "minLength": 1,
        "maxLength": MAX_NAME,
        "description": "The picture's name in the answers.",
    }
    others = {"prompt": _ref("Prompt"), "formats": formats, "name": name}
    file = {"type": "string", "format": "binary"}
    document = _object(
        ("name", "media_type"), name=_TEXT, media_type=_TEXT, text=_TEXT, base64=_BASE64
    )
    return {
        "Predict": _closed("picture", "prompt", picture=_PICTURE, **others),
        "PredictForm": _closed("picture", "prompt", picture=file, **others),
        "Warm": _closed("picture", picture=_PICTURE),
        "WarmForm": _closed("picture", picture=file),
        "Warmed": _object(
            ("embedding", "size", "model"),
            embedding={"type": "string", "description": "Name of the file in cache.folder."},
            size={"type": "array", "items": _INTEGER, "minItems": 2, "maxItems": 2},
            model=_TEXT,
        ),
        "Bundle": _object(("documents",), documents={"type": "array", "items": document}),
    }


def _cvat_schemas() -> dict[str, Any]:
    pair = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    points = {"anyOf": [{"type": "array", "items": pair}, {"type": "null"}]}
    corners = {"type": "array", "items": pair, "minItems": 2, "maxItems": 2}
    row = {"type": "array", "items": {"enum": [0, 255]}}
    shape = _object(
        ("type", "points", "attributes"),
        type={"const": "mask"},
        points={
            "type": "array",
            "items": _INTEGER,
            "description": "Run lengths in the box, zeros first; then left, top, right, bottom.",
        },
        attributes={"type": "array", "items": _object((), spec_id=_INTEGER, value=_TEXT)},
    )
    return {
        "Interact": _object(
            ("image",),
            image=_PICTURE,
            pos_points=points,
            neg_points=points,
            obj_bbox={"anyOf": [corners, {"type": "null"}]},
            threshold={"type": ["number", "null"], "minimum": 0, "maximum": 1},
            **_prompt_keys(),
        ),
        "InteractedMask": _object(
            ("mask",), mask={"type": "array", "items": row}, objects={"type": "array"}
        ),
        "InteractedShapes": _object(("shapes",), shapes={"type": "array", "items": shape}),
        "Features": _object(("image",), image=_PICTURE),
        "Embedded": _object(
            ("blob",), blob=_BASE64 | {"description": "float32, 1×256×64×64, little-endian."}
        ),
    }


def _server_schemas() -> dict[str, Any]:
    model = _object((), name=_TEXT, family=_TEXT, device=_TEXT, precision=_TEXT, side=_INTEGER)
    memory = _object((), step=_TEXT, peak_mib={"type": ["number", "null"]}, out_of_memory=_INTEGER)
    counts = ("places", "taken", "waiting", "at_work", "answered", "rejected")
    return {
        "Refusal": _object(
            ("code", "reason", "place", "remedy"),
            code=_TEXT,
            reason=_TEXT,
            place=_TEXT_OR_NULL,
            remedy=_TEXT_OR_NULL,
        ),
        "Health": _object(
            ("live", "ready", "version", "model", "memory", "requests"),
            live={"type": "boolean"},
            ready={"type": "boolean"},
            version=_TEXT,
            model={"anyOf": [model, {"type": "null"}]},
            memory={"anyOf": [memory, {"type": "null"}]},
            requests=_object((), **dict.fromkeys(counts, _INTEGER)),
        ),
    }
