"""Parse the bodies of requests into a picture, prompts and formats.

There are two content types: JSON with the picture in base64, and multipart/form-data with the
picture as a file. Anything else is refused with place and remedy. Bodies are parsed in memory, and
never written to a disk.

Limitations: whether the picture can be decoded, and the prompts lie inside it, is checked later, as
with jobs from a folder.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import File, FormParser, parse_options_header

from sam_poll.core.base64_text import picture_file
from sam_poll.core.errors import InputError, PictureError, PromptError
from sam_poll.core.types import AutomaticMaskRequest
from sam_poll.core.validation import nearest, quoted
from sam_poll.formats import registry
from sam_poll.integrations.http.errors import BadRequestError, UnsupportedMediaTypeError
from sam_poll.integrations.nuclio import requests as nuclio_requests
from sam_poll.prompts.parser import PromptFile, encoded

KEYS = ("picture", "prompt", "formats", "name")
"""The keys of a JSON body, and the names of a form's parts."""
_PICTURE_ONLY = ("picture",)
MOST_PARTS = 32
"""Maximum number of parts of a form."""
MAX_NAME = 1024
"""Maximum length of a picture's name in characters; CVAT stores as many of a frame's name."""
UNNAMED = "picture"
"""The name of a picture without a name."""
_JSON = "application/json"
_FORM = "multipart/form-data"
_SHOWN_KEY = 100  # characters of an unknown key that are quoted as they are

Parse = Callable[[bytes], PromptFile]


@dataclass(frozen=True, slots=True, eq=False)
class PredictRequest:
    """A parsed request.

    `name`: the picture's name in the answers. `formats` None: those of the settings.
    """

    picture: bytes
    file: PromptFile
    formats: tuple[str, ...] | None = None
    name: str = UNNAMED


def parse_predict(kind: str, body: bytes, *, parse: Parse) -> PredictRequest:
    """Parse the body of POST /predict.

    `kind` is its content type; `parse` parses prompts.

    Raises BadRequestError for a malformed body, UnsupportedMediaTypeError, and InputError for a
    value that cannot be used.
    """
    media_type, options = parse_options_header(kind)
    if media_type == _JSON.encode():
        return _from_json(_parse_json(body), parse)
    if media_type == _FORM.encode():
        return _from_form(_parse_form(body, options.get(b"boundary", b"")), parse)
    raise _wrong_kind(kind)


def _wrong_kind(kind: str) -> UnsupportedMediaTypeError:
    return UnsupportedMediaTypeError(
        f"the content type is {quoted(kind or 'none')}", remedy=f"send {_JSON}, or {_FORM}"
    )


def parse_interact(kind: str, body: bytes, *, clicks: bool = True) -> PredictRequest:
    """Parse what CVAT sends to an interactor, or (without `clicks`) to its SAM1 function.

    The SAM1 function gets no clicks, because the browser decodes them. `kind` is the content type.

    Raises the errors of `parse_predict`.
    """
    if kind and parse_options_header(kind)[0] != _JSON.encode():
        raise UnsupportedMediaTypeError(
            f"the content type is {quoted(kind)}", remedy=f"send {_JSON}"
        )
    parsed = nuclio_requests.parse_request(_parse_json(body), clicks=clicks)
    if parsed.prompt is not None:
        return PredictRequest(parsed.picture, PromptFile((parsed.prompt,)))
    if parsed.concept is not None:
        return PredictRequest(parsed.picture, PromptFile(parsed.concept))
    if not clicks:
        return PredictRequest(parsed.picture, PromptFile(()))
    everything = AutomaticMaskRequest()
    if parsed.threshold is not None:
        everything = AutomaticMaskRequest(iou=parsed.threshold)
    return PredictRequest(parsed.picture, PromptFile(everything))


def parse_warm(kind: str, body: bytes) -> PredictRequest:
    """Parse the body of POST /warm: the picture of a `/predict`, in JSON or a form.

    `kind` is its content type. Raises the errors of `parse_predict`.
    """
    media_type, options = parse_options_header(kind)
    if media_type == _JSON.encode():
        fields = _parse_json(body)
        _check_keys(fields, _PICTURE_ONLY)
        return PredictRequest(picture_file(fields.get("picture"), "picture"), PromptFile(()))
    if media_type == _FORM.encode():
        parts = _parse_form(body, options.get(b"boundary", b""))
        _check_keys({part.name: part for part in parts}, _PICTURE_ONLY)
        return PredictRequest(_picture_part(parts)[1], PromptFile(()))
    raise _wrong_kind(kind)


# ── JSON ──


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise _not_json("nested too deep") from None
    except ValueError as error:  # also for bytes that are not UTF-8
        raise _not_json(str(error)) from None
    if not isinstance(value, dict):
        raise BadRequestError(
            "not a JSON object", place="body", remedy='send {"picture": base64, …}'
        )
    return value


def _not_json(reason: str) -> BadRequestError:
    return BadRequestError(f"not JSON: {reason}", place="body", remedy="send a JSON object")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; refuse one in which a key occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key in counts if counts[key] > 1)
        raise _given_twice(_shown(twice))
    return found


def _given_twice(place: str) -> BadRequestError:
    return BadRequestError("given twice", place=place, remedy="keep one of them")


def _from_json(fields: Mapping[str, Any], parse: Parse) -> PredictRequest:
    _check_keys(fields)
    picture = picture_file(fields.get("picture"), "picture")
    prompt = fields.get("prompt")
    formats = fields.get("formats")
    name = fields.get("name")
    if prompt is None:
        raise _no_prompt()
    if formats is not None and not (
        isinstance(formats, list) and all(isinstance(one, str) for one in formats)
    ):
        raise InputError(
            "not a list of names", place="formats", remedy='["mask", "coco"], for instance'
        )
    if name is not None and not isinstance(name, str):
        raise InputError("not a text", place="name", remedy="the picture's name, or leave it out")
    return _request(picture, parse(encoded(prompt, "prompt")), formats, name)


# ── forms ──


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """A part of a form: its name, its file's name ("" for a part without one), its bytes."""

    name: str
    file: str
    body: bytes

    def text(self) -> str:
        """Return the part's content as text."""
        try:
            return self.body.decode("utf-8")
        except UnicodeDecodeError:
            raise BadRequestError(
                "not UTF-8", place=self.name, remedy="send text in UTF-8"
            ) from None


def _parse_form(body: bytes, boundary: bytes) -> list[_Part]:
    """Return the parts of a form. They stay in memory, however large they are."""
    if not boundary:
        raise BadRequestError(
            "the content type has no boundary",
            place="body",
            remedy="let your HTTP library set the content type",
        )
    parts: list[_Part] = []
    complete = False

    def add(name: bytes | None, file: bytes | None, content: bytes | None) -> None:
        if len(parts) >= MOST_PARTS:
            raise BadRequestError(
                f"more than {MOST_PARTS} parts", place="body", remedy="send one picture a request"
            )
        shown_name = (name or b"").decode("utf-8", "replace")
        file_name = (file or b"").decode("utf-8", "replace")
        parts.append(_Part(shown_name, file_name, content or b""))

    def add_file(file: File) -> None:
        assert isinstance(file.file_object, io.BytesIO)  # it stays in memory
        add(file.field_name, file.file_name, file.file_object.getvalue())

    def end() -> None:
        nonlocal complete
        complete = True

    try:
        parser = FormParser(
            _FORM,
            lambda field: add(field.field_name, None, field.value),
            add_file,
            end,
            boundary,
            config={"MAX_MEMORY_FILE_SIZE": float("inf")},
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise BadRequestError(
            f"not {_FORM}: {error}", place="body", remedy="let your HTTP library write the body"
        ) from None
    if not complete:
        raise BadRequestError(
            "the last boundary is missing",
            place="body",
            remedy="send the whole body; it may have been cut off",
        )
    return parts


def _from_form(parts: Sequence[_Part], parse: Parse) -> PredictRequest:
    _check_keys({part.name: part for part in parts})
    picture_name, picture = _picture_part(parts)
    prompt = _only(parts, "prompt")
    name = _only(parts, "name")
    if prompt is None:
        raise _no_prompt()
    if name:
        picture_name = name.text()
    formats = [
        one.strip()
        for part in parts
        if part.name == "formats"
        for one in part.text().split(",")
        if one.strip()
    ]
    prompt_file = parse(prompt.body)
    return _request(picture, prompt_file, formats or None, picture_name)


def _picture_part(parts: Sequence[_Part]) -> tuple[str, bytes]:
    """Return the name and the content of the picture's file. Raises PictureError."""
    picture = _only(parts, "picture")
    if picture is None or not picture.body:
        raise PictureError(
            "there is no picture", place="picture", remedy="send its file as the part `picture`"
        )
    # Some clients send the whole path, also of Windows.
    return PurePosixPath(picture.file.replace("\\", "/")).name, picture.body


def _only(parts: Sequence[_Part], name: str) -> _Part | None:
    """Return the part of this name, or None; refuse a form that has two."""
    found = [part for part in parts if part.name == name]
    if len(found) > 1:
        raise _given_twice(name)
    return found[0] if found else None


# ── both ──


def _request(
    picture: bytes, file: PromptFile, formats: Sequence[str] | None, name: str | None
) -> PredictRequest:
    return PredictRequest(
        picture=picture,
        file=file,
        formats=_check_formats(formats),
        name=_check_name(name or file.image or UNNAMED),
    )


def _no_prompt() -> PromptError:
    return PromptError(
        "there is no prompt",
        place="prompt",
        remedy='send one; {"everything": true} segments all objects',
    )


def _check_keys(fields: Mapping[str, Any], known: Sequence[str] = KEYS) -> None:
    for key in fields:
        if key not in known:
            raise InputError("unknown key", place=_shown(key), remedy=_suggestion(key, known))


def _check_formats(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names without repetitions. Raises InputError for an unknown one, or for none."""
    if names is None:
        return None
    known = registry.names()
    if not names:
        raise InputError(
            "names no format", place="formats", remedy=f"there are: {', '.join(known)}"
        )
    for name in names:
        if name not in known:
            raise InputError(
                f"there is no format {quoted(name)}",
                place="formats",
                remedy=_suggestion(name, known),
            )
    return tuple(dict.fromkeys(names))


def _suggestion(word: str, known: Sequence[str]) -> str:
    guess = nearest(word, known)
    return f"did you mean {guess}?" if guess else f"there are: {', '.join(known)}"


def _check_name(text: str) -> str:
    """Return a picture's name if it is a relative path.

    The server opens nothing by this name, but the programs that read the answers may.
    """
    parts = text.split("/")
    if not text.isprintable() or not text.strip() or len(text) > MAX_NAME:
        raise InputError(
            "not a plain name", place="name", remedy=f"at most {MAX_NAME} printable characters"
        )
    if "\\" in text or any(part in ("", ".", "..") for part in parts):
        raise InputError(
            "leads out of its folder",
            place="name",
            remedy="send a relative path: done/cam1/dog.jpg",
        )
    return text


def _shown(key: str) -> str:
    return key if key.isprintable() and len(key) < _SHOWN_KEY else quoted(key)
