"""The kinds of values that settings have: what each accepts, and the error for anything else.

Each check raises `core.validation.validation_error`, whose reason and remedy pass through pydantic
unchanged. Limitations: a value is checked by itself. Whether a path exists or a port is free shows
when it is used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from sam_poll.core.errors import SettingsError
from sam_poll.core.validation import nearest, quoted, validation_error
from sam_poll.formats import registry

LOOPBACK = "127.0.0.1"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+|\[[0-9A-Fa-f:.]+\]")
_ORIGIN = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?/?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_ADDRESS = re.compile(r"(?:([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):)?([0-9]{1,5})")


def _expand(path: Path) -> Path:
    text = str(path)
    if _CONTROL.search(text):
        raise validation_error("contains control characters")
    if re.search(r"\$\{?[A-Za-z_]", text):
        raise validation_error(
            f"{quoted(text)} holds a variable, which is not replaced",
            "write the path in full; ~ is replaced",
        )
    try:
        return path.expanduser()
    except RuntimeError:
        raise validation_error(
            f"{quoted(text)} names a home folder that does not exist", "write the path in full"
        ) from None


def _filled(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise validation_error("is blank")
    return value


def _name_or_path(text: str) -> str:
    return str(_expand(Path(text))) if text.startswith("~") or _CONTROL.search(text) else text


def _device(text: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", text) is None:
        raise validation_error(
            f"not a device: {quoted(text)}",
            "auto, cpu, mps, cuda or cuda:0 (the number of the GPU)",
        )
    return text


def _format(text: str) -> str:
    known = registry.names()
    if text not in known:
        guess = nearest(text, known)
        raise validation_error(
            f"there is no format {quoted(text)}",
            f"did you mean {guess}?" if guess else f"there are: {', '.join(known)}",
        )
    return text


def _bare_port(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _address(text: str, least: int = 1) -> str:
    match = _ADDRESS.fullmatch(text)
    if match is None or not least <= int(match[2]) <= 65535:
        raise validation_error(
            f"not an address: {quoted(text)}", "127.0.0.1:9464 (host:port), or the port alone"
        )
    return f"{match[1] or LOOPBACK}:{int(match[2])}"


def port_error(address: str, error: Exception, place: str) -> SettingsError:
    """Return the error for a port that cannot be opened at `host:port`, the value of `place`."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SettingsError(
        f"no port can be opened at {address}: {reason}",
        place=place,
        remedy="choose another one; `ss -ltnp` names the process that has it",
    )


def _any_port(text: str) -> str:
    return _address(text, 0)  # 0: any free port, which the log names


def _host_name(text: str) -> str:
    if _HOST_NAME.fullmatch(text) is None:
        raise validation_error(
            f"not a host name: {quoted(text)}", "sam.example.org, or an IP address; without a port"
        )
    return text.strip("[]").lower()


def _origin(text: str) -> str:
    match = _ORIGIN.fullmatch(text.lower())
    if match is None:
        raise validation_error(
            f"not an origin: {quoted(text)}",
            "https://example.org or http://10.0.0.5:3000, without a path",
        )
    scheme, host, port = match.groups()
    if port in (None, _DEFAULT_PORTS[scheme]):
        return f"{scheme}://{host}"
    return f"{scheme}://{host}:{port}"


def _pattern(text: str) -> str:
    """Check a pattern of names, or of paths relative to the input folder."""
    if not text.strip("/ ") or _CONTROL.search(text):
        raise validation_error(
            f"not a pattern: {quoted(text)}", "thumbs, *_preview.jpg, or cam1/raw"
        )
    if "\\" in text:
        raise validation_error(f"contains a backslash: {quoted(text)}", "separate folders by /")
    return text


def once_each(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the values; refuse a value that is listed twice."""
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise validation_error(f"lists {twice} twice", "remove one of them")
    return values


def auto_alone(value: object) -> object:
    """Return `auto` as a tuple of one, any other value unchanged."""
    return ("auto",) if value == "auto" else value


def each_card_once(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the devices; refuse a GPU that is listed twice, and `auto` or `cuda` in a list."""
    # Several processes on one GPU would compete for its memory; on the CPU they only share cores.
    cards = tuple(value for value in values if value != "cpu")
    if "auto" in values and len(values) > 1:
        raise validation_error(
            "`auto` cannot be one of several", "write `devices: auto`, which uses every GPU"
        )
    if "cuda" in values and len(cards) > 1:
        raise validation_error(
            "`cuda` cannot be one of several", "number the GPUs: [cuda:0, cuda:1]"
        )
    once_each(cards)
    return values


HostName: TypeAlias = Annotated[str, AfterValidator(_host_name)]
HostNames: TypeAlias = Annotated[
    tuple[HostName, ...], Field(strict=False), AfterValidator(once_each)
]
Origin: TypeAlias = Annotated[str, AfterValidator(_origin)]
Origins: TypeAlias = Annotated[tuple[Origin, ...], Field(strict=False), AfterValidator(once_each)]


def without_brackets(text: str, *, patterns: bool) -> str:
    """Return a list in YAML's notation without its brackets: `[a, b]` becomes `a, b`.

    With `patterns`, brackets that belong to a glob are kept: `[ab]*`, `[ab]`, `x[1],[2]y`.
    """
    inner = text[1:-1]
    is_list = text.startswith("[") and text.endswith("]") and not set("[]") & set(inner)
    if not is_list:
        return text
    may_be_glob = patterns and "," not in inner and inner.strip()
    return text if may_be_glob else inner


Auto: TypeAlias = Literal["auto"]
Folder: TypeAlias = Annotated[
    Path, Field(strict=False), BeforeValidator(_filled), AfterValidator(_expand)
]
File: TypeAlias = Folder
Name: TypeAlias = Annotated[str, BeforeValidator(_filled), AfterValidator(_name_or_path)]
Pattern: TypeAlias = Annotated[str, AfterValidator(_pattern)]
Device: TypeAlias = Annotated[str, AfterValidator(_device)]
FormatName: TypeAlias = Annotated[str, AfterValidator(_format)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Threads: TypeAlias = Annotated[int, Field(ge=1, le=256)]
Address: TypeAlias = Annotated[
    str, BeforeValidator(_bare_port), AfterValidator(_address)
]  # normalised to host:port; port 0 is refused
Listen: TypeAlias = Annotated[
    str, BeforeValidator(_bare_port), AfterValidator(_any_port)
]  # normalised to host:port; port 0 is any free port
