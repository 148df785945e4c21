"""Read requests that come through Redis, and write the answers: bytes in, bytes out, no I/O.

The pub/sub messages are Waikato's (`{"image": base64, "prompt": {…}}` in, `{"mask": base64 PNG,
"contours": [[[x, y], …], …], "meta": {…}}` out) with more keys beside them; docs/redis.md describes
them all.

Limitations: a picture in JSON is in memory three times for a moment (text, base64, bytes).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from sam_poll.core.base64_text import picture_file
from sam_poll.core.errors import InputError, PictureError, PromptError, SamPollError
from sam_poll.core.text import shown
from sam_poll.core.types import Job, OutputFile
from sam_poll.prompts import parser
from sam_poll.prompts.parser import PromptFile

MASK, OPEX = ".mask.png", ".opex.json"
MAX_ID_BYTES = 1024
BLANK = (  # a PNG of one pixel of value 0: receivers that do not know errors find an empty mask
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
SEE = "docs/redis.md describes the messages"

_NO_PROMPTS = PromptFile(())
Parse: TypeAlias = Callable[[bytes], PromptFile]


@dataclass(frozen=True, slots=True)
class RedisRequest:
    """A request, parsed. `error` is why it cannot be answered; then there is no picture.

    `sender`: the sender's id of the request, if it has one. `prompt`: the prompt as it came, for
    the answer's `meta`. `formats`: the formats that the sender selected; None for all.
    """

    picture: bytes = field(default=b"", repr=False)
    file: PromptFile = _NO_PROMPTS
    sender: str | None = None
    prompt: Any = None
    formats: tuple[str, ...] | None = None
    error: SamPollError | None = None

    def job(self, default_id: str, source_ref: Any, attempt: int = 1) -> Job:
        """Return the job of this request; its id is the sender's, or else `default_id`."""
        job_id = self.sender or default_id
        return Job(
            job_id,
            self.file.image or job_id,
            self.picture,
            self.file.prompts,
            source_ref=source_ref,
            error=self.error,
            sha256=self.file.image_sha256,
            nbytes=self.file.image_bytes,
            image_size=self.file.image_size,
            attempt=attempt,
        )


# ── in ──


def parse_message(data: bytes, parse: Parse) -> RedisRequest:
    """Parse a pub/sub message.

    Never raises: what is wrong with the message is the request's `error`.
    """
    try:
        message = json.loads(data)
    except RecursionError:
        return RedisRequest(error=InputError("nested too deep", place="message", remedy=SEE))
    except ValueError as error:
        reason = f"not JSON: {shown(error)}"
        return RedisRequest(error=InputError(reason, place="message", remedy=SEE))
    if not isinstance(message, dict):
        return RedisRequest(error=InputError("not a JSON object {…}", place="message", remedy=SEE))
    # The id is read first and on its own, so that the refusal of a bad request carries it.
    sender: str | None = None
    errors: list[InputError] = []
    try:
        sender = _sender(message["id"]) if "id" in message else None
    except InputError as error:
        errors.append(error)
    picture = b""
    file = _NO_PROMPTS
    formats: tuple[str, ...] | None = None
    try:
        picture = picture_file(message.get("image"), "image")
        if "prompt" not in message:
            raise PromptError("there is no prompt", place="prompt", remedy=SEE)
        file = _prompt_file(parser.encoded(message["prompt"], "prompt"), parse)
        formats = _formats(message["formats"]) if "formats" in message else None
    except InputError as error:
        errors.append(error)
    return RedisRequest(
        picture=b"" if errors else picture,
        file=file,
        sender=sender,
        prompt=message.get("prompt"),
        formats=formats,
        error=errors[0] if errors else None,
    )


def parse_fields(fields: Mapping[bytes, bytes], parse: Parse) -> RedisRequest:
    """Parse a stream entry. Never raises: what is wrong with the entry is the request's `error`.

    Its fields are `image` (the file's bytes) and `prompt` (JSON), or `message` (a pub/sub message);
    and `id` and `formats`, which win over those of the message.
    """
    sender = None
    try:
        sender = _sender(fields[b"id"].decode("utf-8", "replace")) if b"id" in fields else None
        formats = _formats(_split_names(fields[b"formats"])) if b"formats" in fields else None
        if b"message" in fields:
            request = parse_message(fields[b"message"], parse)
            return RedisRequest(
                picture=request.picture,
                file=request.file,
                sender=sender or request.sender,
                prompt=request.prompt,
                formats=formats or request.formats,
                error=request.error,
            )
        if not fields.get(b"image"):
            raise PictureError("there is no picture", place="image", remedy=SEE)
        if b"prompt" not in fields:
            raise PromptError("there is no prompt", place="prompt", remedy=SEE)
        file = _prompt_file(fields[b"prompt"], parse)
        return RedisRequest(fields[b"image"], file, sender, formats=formats)
    except InputError as error:
        return RedisRequest(sender=sender, error=error)


def _sender(value: object) -> str:
    if not isinstance(value, str | int) or isinstance(value, bool) or not str(value):
        raise InputError("is neither a text nor a whole number", place="id", remedy=SEE)
    text = str(value)
    if len(text.encode("utf-8", "replace")) > MAX_ID_BYTES:
        raise InputError(
            f"is longer than {MAX_ID_BYTES:,} bytes", place="id", remedy="send a shorter one"
        )
    return text


def _prompt_file(data: bytes, parse: Parse) -> PromptFile:
    try:
        return parse(data)
    except PromptError as error:
        error.place = f"prompt, {error.place}" if error.place else "prompt"
        raise


def _split_names(data: bytes) -> object:
    """Return the names of `a,b`, or the value of a JSON list; None where that is malformed."""
    text = data.decode("utf-8", "replace").strip()
    if not text.startswith("["):
        return [name.strip() for name in text.split(",") if name.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _formats(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise InputError(
            "is not a list of formats", place="formats", remedy='["mask", "opex"], or mask,opex'
        )
    return tuple(value)


# ── out ──


def format_of(output: OutputFile) -> str:
    """Return the name of an output file's format: `.mask.1.png` → `mask`.

    Suffixes begin with that name; `core.protocols.Format` has the rule.
    """
    return file_name(output).partition(".")[0]


def file_name(output: OutputFile) -> str:
    """Return the name of an output file in an answer: `.mask.png` → `mask.png`."""
    return output.suffix.lstrip(".")


def select_outputs(
    request: RedisRequest, outputs: Sequence[OutputFile], available: Collection[str] = ()
) -> list[OutputFile]:
    """Return the output files of the formats that the sender selected, or all of them.

    `available`: the worker's formats. One of these may have made no file: `mask: per-object` makes
    none for a picture without objects.

    Raises InputError for a selected format that this worker does not make.
    """
    if request.formats is None:
        return list(outputs)
    known = {format_of(output) for output in outputs}.union(available)
    missing = [name for name in request.formats if name not in known]
    if missing:
        raise InputError(
            f"{shown(missing[0])!r} is not a format of this worker",
            place="formats",
            remedy=f"this worker makes {', '.join(sorted(known))}",
        )
    return [output for output in outputs if format_of(output) in request.formats]


def encode_prediction(
    request: RedisRequest, outputs: Sequence[OutputFile], segmenter: Mapping[str, Any]
) -> bytes:
    """Return the pub/sub answer with these output files.

    `mask` and `contours` are Waikato's keys. `objects` are OPEX's, one for each contour, with
    label, score and holes. `documents` holds all other files in base64. `segmenter` overrides the
    keys of `meta.segmenter`.
    """
    by_suffix = {output.suffix: output.body for output in outputs}
    opex = json.loads(by_suffix.pop(OPEX, b"{}"))
    objects, opex_meta = opex.get("objects", []), opex.get("meta", {})
    mask = by_suffix.pop(MASK, None)
    answer: dict[str, Any] = {
        "contours": [entry["polygon"]["points"] for entry in objects],
        "mask": _base64(mask) if mask is not None else BLANK,
        "meta": {"segmenter": _segmenter(segmenter, opex_meta), **_request_meta(request)},
        "objects": objects,
    }
    if notes := opex_meta.get("notes"):
        answer["meta"]["notes"] = notes
    if by_suffix:
        answer["documents"] = {
            suffix.lstrip("."): _base64(body) for suffix, body in by_suffix.items()
        }
    return json.dumps(answer).encode()


def _segmenter(overrides: Mapping[str, Any], opex_meta: Mapping[str, str]) -> dict[str, Any]:
    family, model = opex_meta.get("family", ""), opex_meta.get("model")
    fields = {
        "type": "sam" if family == "sam1" else family or "sam",
        "model_type": model,
        "model_file": model,
    }
    return fields | {key: value for key, value in overrides.items() if value is not None}


def encode_refusal(
    request: RedisRequest, error: SamPollError, segmenter: Mapping[str, Any]
) -> bytes:
    """Return the pub/sub answer to a request that cannot be answered.

    It has a `mask` of one pixel and no `contours`, because Waikato's receiver fails on an answer
    without both keys.
    """
    meta = {"segmenter": _segmenter(segmenter, {}), **_request_meta(request)}
    answer = {"error": error_fields(error), "contours": [], "mask": BLANK, "meta": meta}
    try:
        return json.dumps(answer).encode()
    except RecursionError:  # a prompt that was read just so is a level deeper here
        meta["prompt"] = None
        return json.dumps(answer).encode()


def error_fields(error: SamPollError) -> dict[str, str | None]:
    """Return an error with the keys of the folder's error file."""
    return {
        "code": error.code,
        "reason": error.reason,
        "place": error.place,
        "remedy": error.remedy,
    }


def _request_meta(request: RedisRequest) -> dict[str, Any]:
    sender_id = {"id": request.sender} if request.sender is not None else {}
    return {"prompt": request.prompt} | sender_id


def _base64(body: bytes) -> str:
    return base64.b64encode(body).decode("ascii")
