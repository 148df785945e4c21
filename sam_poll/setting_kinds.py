"""The kinds of values that settings have: what each accepts, and what is said where it is something else.

Each check raises `complaints.refuse`, whose reason and remedy travel through pydantic unchanged.

What can still go wrong here: a value is checked for itself; whether a path leads anywhere, or a port is free, shows
when it is used.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field

from sam_poll import formats
from sam_poll.complaints import nearest, quoted, refuse

LOOPBACK = "127.0.0.1"
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_HOST_NAME = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+|\[[0-9A-Fa-f:.]+\]")
_ORIGIN = re.compile(r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?/?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_ADDRESS = re.compile(r"(?:([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):)?([0-9]{1,5})")


def _expand(path: Path) -> Path:
    text = str(path)
    if _CONTROL.search(text):
        raise refuse("holds control characters")
    if re.search(r"\$\{?[A-Za-z_]", text):
        raise refuse(f"{quoted(text)} holds a variable, which nobody replaces here", "write the path out; ~ is fine")
    try:
        return path.expanduser()
    except RuntimeError:
        raise refuse(f"{quoted(text)} names a home folder that is not known", "write the path out") from None


def _filled(value: object) -> object:
    if isinstance(value, str) and not value.strip():
        raise refuse("is blank")
    return value


def _name_or_path(text: str) -> str:
    return str(_expand(Path(text))) if text.startswith("~") or _CONTROL.search(text) else text


def _device(text: str) -> str:
    if re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", text) is None:
        raise refuse(f"not a device: {quoted(text)}", "auto, cpu, mps, cuda or cuda:0 (the card's number)")
    return text


def _format(text: str) -> str:
    known = formats.names()
    if text not in known:
        guess = nearest(text, known)
        raise refuse(
            f"there is no format {quoted(text)}",
            f"did you mean {guess}?" if guess else f"there are: {', '.join(known)}",
        )
    return text


def _bare_port(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _address(text: str, least: int = 1) -> str:
    found = _ADDRESS.fullmatch(text)
    if found is None or not least <= int(found[2]) <= 65535:
        raise refuse(f"not an address: {quoted(text)}", "127.0.0.1:9464 (host:port), or the port alone")
    return f"{found[1] or LOOPBACK}:{int(found[2])}"


def _any_port(text: str) -> str:
    return _address(text, 0)  # 0: one that is free, named in the log


def _host_name(text: str) -> str:
    if _HOST_NAME.fullmatch(text) is None:
        raise refuse(f"not a host name: {quoted(text)}", "sam.example.org, or an IP address; without a port")
    return text.strip("[]").lower()


def _origin(text: str) -> str:
    found = _ORIGIN.fullmatch(text.lower())
    if found is None:
        raise refuse(f"not an origin: {quoted(text)}", "https://example.org or http://10.0.0.5:3000, without a path")
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" if port in (None, _DEFAULT_PORTS[scheme]) else f"{scheme}://{host}:{port}"


def _pattern(text: str) -> str:
    """A pattern of names, or of paths relative to the input folder."""
    if not text.strip("/ ") or _CONTROL.search(text):
        raise refuse(f"not a pattern: {quoted(text)}", "thumbs, *_preview.jpg, or cam1/raw")
    if "\\" in text:
        raise refuse(f"holds a backslash: {quoted(text)}", "folders are separated by /")
    return text


def once_each(values: tuple[str, ...]) -> tuple[str, ...]:
    twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
    if twice is not None:
        raise refuse(f"names {twice} twice", "keep one of them")
    return values


def auto_alone(value: object) -> object:
    return ("auto",) if value == "auto" else value


def each_card_once(values: tuple[str, ...]) -> tuple[str, ...]:
    # Several processes on one card would take its memory from each other; on the CPU they only share the cores.
    cards = tuple(value for value in values if value != "cpu")
    if "auto" in values and len(values) > 1:
        raise refuse("`auto` is not one of several", "devices: auto, without a list, takes every card")
    if "cuda" in values and len(cards) > 1:
        raise refuse("`cuda` is not one of several", "number the cards: [cuda:0, cuda:1]")
    once_each(cards)
    return values


HostName: TypeAlias = Annotated[str, AfterValidator(_host_name)]
HostNames: TypeAlias = Annotated[tuple[HostName, ...], Field(strict=False), AfterValidator(once_each)]
Origin: TypeAlias = Annotated[str, AfterValidator(_origin)]
Origins: TypeAlias = Annotated[tuple[Origin, ...], Field(strict=False), AfterValidator(once_each)]


def without_brackets(text: str, *, patterns: bool) -> str:
    """A list as YAML writes it, without its brackets. Those of `patterns` are kept: `[ab]*`, `[ab]`, `x[1],[2]y`."""
    inner = text[1:-1]
    is_list = text.startswith("[") and text.endswith("]") and not set("[]") & set(inner)
    return inner if is_list and (not patterns or "," in inner or not inner.strip()) else text


Auto: TypeAlias = Literal["auto"]
Folder: TypeAlias = Annotated[Path, Field(strict=False), BeforeValidator(_filled), AfterValidator(_expand)]
File: TypeAlias = Folder
Name: TypeAlias = Annotated[str, BeforeValidator(_filled), AfterValidator(_name_or_path)]
Pattern: TypeAlias = Annotated[str, AfterValidator(_pattern)]
Device: TypeAlias = Annotated[str, AfterValidator(_device)]
FormatName: TypeAlias = Annotated[str, AfterValidator(_format)]
Positive: TypeAlias = Annotated[float, Field(gt=0)]
NotNegative: TypeAlias = Annotated[float, Field(ge=0)]
Count: TypeAlias = Annotated[int, Field(ge=1)]
Threads: TypeAlias = Annotated[int, Field(ge=1, le=256)]
Address: TypeAlias = Annotated[str, BeforeValidator(_bare_port), AfterValidator(_address)]  # normalised to host:port
Listen: TypeAlias = Annotated[str, BeforeValidator(_bare_port), AfterValidator(_any_port)]  # the same
