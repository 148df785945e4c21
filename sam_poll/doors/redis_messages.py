"""What is said through Redis, both ways: messages and stream entries become jobs, answers and refusals become bytes.

Pure: nothing here talks to a server. The pub/sub shapes are Waikato's (`{"image": base64, "prompt": {…}}` in,
`{"mask": base64 PNG, "contours": [[[x, y], …], …], "meta": {…}}` out) with more beside them; docs/redis.md has all.

What can still go wrong here: a picture in JSON is in memory three times for a moment (text, base64, bytes).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sam_poll.base64_text import picture_file
from sam_poll.errors import InputError, PictureError, PromptError, SamPollError
from sam_poll.fs import shown
from sam_poll.prompts import PromptFile
from sam_poll.types import Document, Job

MASK, OPEX = ".mask.png", ".opex.json"
MAX_ID_BYTES = 1024
BLANK = (  # a PNG of one pixel, 0: readers that know nothing of errors find a mask, and nothing on it
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
SEE = "docs/redis.md shows what a message may say"

_NONE = PromptFile(())
Parse: TypeAlias = Callable[[bytes], PromptFile]


@dataclass(frozen=True, slots=True)
class Asked:
    """A message, read. `fault` says why it cannot be answered. `sender` is the sender's id, if it gave one; `prompt` is
    the prompt as it came, for the answer; `formats` are the only ones wanted, where the sender said so."""

    picture: bytes = field(default=b"", repr=False)
    file: PromptFile = _NONE
    sender: str | None = None
    prompt: Any = None
    formats: tuple[str, ...] | None = None
    fault: SamPollError | None = None

    def job(self, name: str, origin: Any, attempt: int = 1) -> Job:
        """The job it asks for, called `name` unless the sender has named it."""
        title = self.sender or name
        return Job(
            title,
            self.file.image or title,
            self.picture,
            self.file.prompts,
            origin=origin,
            fault=self.fault,
            sha256=self.file.image_sha256,
            nbytes=self.file.image_bytes,
            image_size=self.file.image_size,
            attempt=attempt,
        )


# ── in ──


def of_message(data: bytes, parse: Parse) -> Asked:
    """A pub/sub message. Never raises: what is wrong with it is its `fault`."""
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else f"not JSON: {shown(error)}"
        return Asked(fault=InputError(reason, place="message", remedy=SEE))
    if not isinstance(said, dict):
        return Asked(fault=InputError("not a JSON object {…}", place="message", remedy=SEE))
    prompt, sender, faults = said.get("prompt"), None, []
    try:
        sender = _sender(said["id"]) if "id" in said else None
    except InputError as error:
        faults.append(error)
    file, picture, formats = _NONE, b"", None
    try:
        picture = picture_file(said.get("image"), "image")
        if "prompt" not in said:
            raise PromptError("there is no prompt", place="prompt", remedy=SEE)
        file = _file(json.dumps(prompt).encode(), parse)
        formats = _formats(said["formats"]) if "formats" in said else None
    except InputError as error:
        faults.append(error)
    fault = faults[0] if faults else None
    return Asked(b"" if fault else picture, file, sender, prompt, formats, fault)


def of_fields(fields: Mapping[bytes, bytes], parse: Parse) -> Asked:
    """A stream entry: `image` (the file's bytes) and `prompt` (JSON), or a pub/sub message in `message`; and `id`,
    `formats`. Never raises."""
    sender = None
    try:
        sender = _sender(fields[b"id"].decode("utf-8", "replace")) if b"id" in fields else None
        formats = _formats(_json_or_words(fields[b"formats"])) if b"formats" in fields else None
        if b"message" in fields:
            read = of_message(fields[b"message"], parse)
            return Asked(
                read.picture, read.file, sender or read.sender, read.prompt, formats or read.formats, read.fault
            )
        if not fields.get(b"image"):
            raise PictureError("there is no picture", place="image", remedy=SEE)
        if b"prompt" not in fields:
            raise PromptError("there is no prompt", place="prompt", remedy=SEE)
        return Asked(fields[b"image"], _file(fields[b"prompt"], parse), sender, None, formats)
    except InputError as error:
        return Asked(sender=sender, fault=error)


def _sender(given: object) -> str:
    if not isinstance(given, str | int) or isinstance(given, bool) or not str(given):
        raise InputError("is neither a text nor a whole number", place="id", remedy=SEE)
    text = str(given)
    if len(text.encode("utf-8", "replace")) > MAX_ID_BYTES:
        raise InputError(f"is longer than {MAX_ID_BYTES:,} bytes", place="id", remedy="a shorter one")
    return text


def _file(data: bytes, parse: Parse) -> PromptFile:
    try:
        return parse(data)
    except PromptError as error:
        error.place = f"prompt, {error.place}" if error.place else "prompt"
        raise


def _json_or_words(data: bytes) -> object:
    text = data.decode("utf-8", "replace").strip()
    if not text.startswith("["):
        return [word.strip() for word in text.split(",") if word.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _formats(given: object) -> tuple[str, ...]:
    if not isinstance(given, list) or not given or not all(isinstance(name, str) for name in given):
        raise InputError("is no list of formats", place="formats", remedy='["mask", "opex"], or mask,opex')
    return tuple(given)


# ── out ──


def format_of(document: Document) -> str:
    """The format that a document is of, by its ending: `.mask.1.png` → `mask`."""
    return document.suffix.lstrip(".").partition(".")[0]


def name_of(document: Document) -> str:
    """What a document is called in an answer: `.mask.png` → `mask.png`."""
    return document.suffix.lstrip(".")


def wanted(asked: Asked, documents: Sequence[Document], made_here: Collection[str] = ()) -> list[Document]:
    """Those documents that the sender wants. InputError where one is not made here. Of a format in `made_here` there
    may be none: a mask for each object, where there is no object."""
    if asked.formats is None:
        return list(documents)
    made = {format_of(document) for document in documents}.union(made_here)
    if missing := [name for name in asked.formats if name not in made]:
        names = ", ".join(sorted(made))
        raise InputError(
            f"{shown(missing[0])!r} is not made here", place="formats", remedy=f"this worker makes {names}"
        )
    return [document for document in documents if format_of(document) in asked.formats]


def prediction(asked: Asked, documents: Sequence[Document], segmenter: Mapping[str, Any]) -> bytes:
    """The pub/sub answer. `mask` and `contours` are Waikato's; `objects` are OPEX's, one for each contour, with label,
    score and holes. What else was made is in `documents`, base64."""
    by_suffix = {document.suffix: document.body for document in documents}
    found = json.loads(by_suffix.pop(OPEX, b"{}"))
    objects, about = found.get("objects", []), found.get("meta", {})
    mask = by_suffix.pop(MASK, None)
    made: dict[str, Any] = {
        "contours": [entry["polygon"]["points"] for entry in objects],
        "mask": _base64(mask) if mask is not None else BLANK,
        "meta": {"segmenter": _segmenter(segmenter, about), **_asked(asked)},
        "objects": objects,
    }
    if notes := about.get("notes"):
        made["meta"]["notes"] = notes
    if by_suffix:
        made["documents"] = {suffix.lstrip("."): _base64(body) for suffix, body in by_suffix.items()}
    return json.dumps(made).encode()


def _segmenter(given: Mapping[str, Any], about: Mapping[str, str]) -> dict[str, Any]:
    family, name = about.get("family", ""), about.get("model")
    made = {"type": "sam" if family == "sam1" else family or "sam", "model_type": name, "model_file": name}
    return made | {key: value for key, value in given.items() if value is not None}


def refusal(asked: Asked, error: SamPollError, segmenter: Mapping[str, Any]) -> bytes:
    """The pub/sub answer to what cannot be done. It has a `mask` of one pixel and no `contours`: Waikato's receiver,
    and others that look for both, would end without."""
    made = {
        "error": error_fields(error),
        "contours": [],
        "mask": BLANK,
        "meta": {"segmenter": _segmenter(segmenter, {}), **_asked(asked)},
    }
    return json.dumps(made).encode()


def error_fields(error: SamPollError) -> dict[str, str | None]:
    """An error as the folder's error file has it."""
    return {"code": error.code, "reason": error.reason, "place": error.place, "remedy": error.remedy}


def _asked(asked: Asked) -> dict[str, Any]:
    return {"prompt": asked.prompt} | ({"id": asked.sender} if asked.sender is not None else {})


def _base64(body: bytes) -> str:
    return base64.b64encode(body).decode("ascii")
