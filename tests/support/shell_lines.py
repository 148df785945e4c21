"""Command lines in the docs, parsed by the commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer.main

from sam_poll.cli import main, waikato_poll
from sam_poll.cli.waikato_scripts import SAM, SAM_HQ

PROGRAM: Any = typer.main.get_command(main.app)


def commands(
    group: Any = PROGRAM, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


def parse(words: list[str]) -> None:
    """As the program would; whatever is wrong is raised."""
    for scripts in (SAM, SAM_HQ):
        if words[0] == f"{scripts.prefix}_predict_poll":
            waikato_poll.parser(scripts).parse_args(words[1:])
            return
    command, rest = PROGRAM, words[1:]
    while hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(" ".join(words), list(rest))
