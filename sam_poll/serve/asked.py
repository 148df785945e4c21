"""What a request asks: its body, read with care, becomes a picture, prompts as in a prompt file, and formats.

Two kinds: JSON with the picture in base64, and multipart/form-data with the picture as a file. Whatever is not
understood is refused with the place and the remedy; the body is in memory, and nothing of it touches a disk.

What can still go wrong here: a picture that is none, and prompts that do not fit it; both are seen later, as in the
folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sam_poll import formats as formats_
from sam_poll.base64_text import picture_file
from sam_poll.complaints import nearest, quoted
from sam_poll.cvat import request
from sam_poll.errors import InputError, PictureError, PromptError
from sam_poll.prompts import PromptFile
from sam_poll.serve.refusals import KindError, MalformedError
from sam_poll.types import Everything

KEYS = ("picture", "prompt", "formats", "name")
MOST_PARTS = 32
MAX_NAME = 1024  # characters; CVAT keeps as many of a frame's name
UNNAMED = "picture"
_JSON = "application/json"
_FORM = "multipart/form-data"
_KINDS = f"send {_JSON}, or {_FORM}"


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """One request. `name` is what the picture is called in the answers; `formats` None: those of the settings."""

    picture: bytes
    file: PromptFile
    formats: tuple[str, ...] | None = None
    name: str = UNNAMED


def predict(kind: str, body: bytes, *, parse: Callable[[bytes], PromptFile]) -> Asked:
    """The body of POST /predict; `kind` is its content type, `parse` reads prompts. RefusalError, InputError."""
    media, options = parse_options_header(kind)
    if media == _JSON.encode():
        return _of_json(_object(body), parse)
    if media == _FORM.encode():
        return _of_form(_parts(body, options.get(b"boundary", b"")), parse)
    raise KindError(f"not a kind of body that is read here: {quoted(kind or 'none')}", remedy=_KINDS)


def interact(kind: str, body: bytes, *, clicks: bool = True) -> Asked:
    """What CVAT asks of an interactor, or (without `clicks`) of SAM1, whose clicks the browser keeps."""
    if kind and parse_options_header(kind)[0] != _JSON.encode():
        raise KindError(f"not JSON: {quoted(kind)}", remedy=f"send {_JSON}")
    asked = request.read(_object(body), clicks=clicks)
    if asked.prompt is not None:
        return Asked(asked.picture, PromptFile((asked.prompt,)))
    if not clicks:
        return Asked(asked.picture, PromptFile(()))
    least = Everything().iou if asked.threshold is None else asked.threshold
    return Asked(asked.picture, PromptFile(Everything(iou=least)))


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, too
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise MalformedError(f"not JSON: {said}", place="body", remedy="send a JSON object") from None
    if not isinstance(found, dict):
        raise MalformedError("not a JSON object", place="body", remedy='send {"picture": base64, …}')
    return found


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        times = Counter(key for key, _ in pairs)
        twice = next(key for key in times if times[key] > 1)
        raise MalformedError("given twice", place=_shown(twice), remedy="keep one of them")
    return made


def _of_json(found: Mapping[str, Any], parse: Callable[[bytes], PromptFile]) -> Asked:
    _known(found)
    picture = picture_file(found.get("picture"), "picture")
    prompt, wanted, name = found.get("prompt"), found.get("formats"), found.get("name")
    if prompt is None:
        raise _no_prompt()
    if wanted is not None and not (isinstance(wanted, list) and all(isinstance(one, str) for one in wanted)):
        raise InputError("not a list of names", place="formats", remedy='["mask", "coco"], for instance')
    if name is not None and not isinstance(name, str):
        raise InputError("not a text", place="name", remedy="the picture's name, or leave it out")
    try:
        text = json.dumps(prompt).encode("ascii")
    except RecursionError:
        raise PromptError("nested too deep", place="prompt", remedy="docs/prompts.md shows the forms") from None
    return _made(picture, parse(text), wanted, name)


def _of_form(parts: Sequence[_Part], parse: Callable[[bytes], PromptFile]) -> Asked:
    _known({part.name: part for part in parts})
    by_name = {key: [part for part in parts if part.name == key] for key in KEYS}
    for key in ("picture", "prompt", "name"):
        if len(by_name[key]) > 1:
            raise MalformedError("given twice", place=key, remedy="keep one of them")
    picture, prompt, name = (next(iter(by_name[key]), None) for key in ("picture", "prompt", "name"))
    if picture is None or not picture.body:
        raise PictureError("there is no picture", place="picture", remedy="send its file as the part `picture`")
    if prompt is None:
        raise _no_prompt()
    given = _text(name) if name else PurePosixPath(picture.file.replace("\\", "/")).name or None
    wanted = [one.strip() for part in by_name["formats"] for one in _text(part).split(",") if one.strip()]
    return _made(bytes(picture.body), parse(bytes(prompt.body)), wanted or None, given)


def _made(picture: bytes, file: PromptFile, wanted: Sequence[str] | None, name: str | None) -> Asked:
    return Asked(picture, file, _formats(wanted), _name(name or file.image or UNNAMED))


def _no_prompt() -> PromptError:
    return PromptError("there is no prompt", place="prompt", remedy='{"everything": true} asks for all there is')


def _known(found: Mapping[str, Any]) -> None:
    for key in found:
        if key not in KEYS:
            guess = nearest(key, KEYS)
            remedy = f"did you mean {guess}?" if guess else f"there are: {', '.join(KEYS)}"
            raise InputError("unknown key", place=_shown(key), remedy=remedy)


def _formats(wanted: Sequence[str] | None) -> tuple[str, ...] | None:
    if wanted is None:
        return None
    known = formats_.names()
    if not wanted:
        raise InputError("names no format", place="formats", remedy=f"there are: {', '.join(known)}")
    for one in wanted:
        if one not in known:
            guess = nearest(one, known)
            remedy = f"did you mean {guess}?" if guess else f"there are: {', '.join(known)}"
            raise InputError(f"there is no format {quoted(one)}", place="formats", remedy=remedy)
    return tuple(dict.fromkeys(wanted))


def _name(text: str) -> str:
    """A relative path for the answers' readers; nothing is opened by it here, but it may be there."""
    parts = text.split("/")
    if not text.isprintable() or not text.strip() or len(text) > MAX_NAME:
        raise InputError("not a plain name", place="name", remedy=f"at most {MAX_NAME} printable characters")
    if "\\" in text or any(part in ("", ".", "..") for part in parts):
        raise InputError("leads out of its folder", place="name", remedy="a relative path: done/cam1/dog.jpg")
    return text


def _shown(key: str) -> str:
    return key if key.isprintable() and len(key) < 100 else quoted(key)


# ── multipart ──


class _Part:
    """One part: its name, its file's name ("" where it is none), its bytes."""

    def __init__(self, disposition: bytes) -> None:
        self.name, self.file = "", ""
        self.body = bytearray()
        kind, options = parse_options_header(disposition)
        if kind != b"form-data" or b"name" not in options:
            raise MalformedError("a part without a name", place="body", remedy="Content-Disposition: form-data; name=…")
        self.name = options[b"name"].decode("utf-8", "replace")
        self.file = options.get(b"filename", b"").decode("utf-8", "replace")


def _text(part: _Part) -> str:
    try:
        return part.body.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedError("not UTF-8", place=part.name, remedy="send text in UTF-8") from None


def _parts(body: bytes, boundary: bytes) -> list[_Part]:
    if not boundary:
        raise MalformedError("the content type names no boundary", place="body", remedy="let your HTTP library set it")
    reader = _Reader()
    try:
        parser = MultipartParser(boundary, reader.callbacks())  # type: ignore[arg-type]
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise MalformedError(f"not {_FORM}: {error}", place="body", remedy="let your HTTP library write it") from None
    if not reader.ended:
        raise MalformedError("the last boundary is missing", place="body", remedy="was the body cut off?")
    return reader.parts


class _Reader:
    """What the parser calls."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []
        self.ended = False
        self._field, self._value, self._disposition = bytearray(), bytearray(), b""

    def callbacks(self) -> dict[str, Callable[..., None]]:
        """By the parser's names."""
        return {name: getattr(self, f"_{name}") for name in self._names()}

    @staticmethod
    def _names() -> Iterator[str]:
        yield from ("on_part_begin", "on_part_data", "on_header_field", "on_header_value", "on_header_end")
        yield from ("on_headers_finished", "on_end")

    def _on_part_begin(self) -> None:
        self._disposition = b""
        if len(self.parts) >= MOST_PARTS:
            raise MalformedError(f"more than {MOST_PARTS} parts", place="body", remedy="one picture a request")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field, self._value = bytearray(), bytearray()

    def _on_headers_finished(self) -> None:
        self.parts.append(_Part(self._disposition))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self.parts[-1].body += memoryview(data)[start:end]

    def _on_end(self) -> None:
        self.ended = True
