"""`sam_predict_redis`, `sam_test_redis_send`, `…_recv`: drop-ins for Waikato's scripts.

`samhq_predict_redis` and so on are the same for SAM-HQ. Flags and messages are those of Waikato's
scripts of these names. A channel to listen to may be a pattern (`images.*`), as with these scripts.

Limitations: those of pub/sub (`integrations.redis.pubsub`); and a password given by
`--redis_password` can be read by every user of the machine.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import typer
from loguru import logger

from sam_poll.cli import error_handling
from sam_poll.cli.error_handling import reports
from sam_poll.cli.waikato_scripts import SAM, SAM_HQ, Scripts
from sam_poll.core import streams
from sam_poll.core.errors import ExitCode, InputError, UsageError
from sam_poll.core.files import free_suffix, write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown

_WAIT_S = 0.5


# ── sam_predict_redis ──


def predict_parser(scripts: Scripts = SAM) -> argparse.ArgumentParser:
    """Return a parser of all flags of Waikato's scripts."""
    parser = _parser(
        f"{scripts.prefix}_predict_redis", f"{scripts.title} prediction through Redis."
    )
    add = parser.add_argument
    add("--redis_host", metavar="HOST", default="localhost", help="Redis server")
    add("--redis_port", metavar="PORT", type=int, default=6379, help="port of the server")
    add(
        "--redis_password",
        metavar="PASSWORD",
        help="password; other users see it in the list of processes",
    )
    add(
        "--redis_password_env",
        metavar="NAME",
        help="environment variable with the password",
    )
    add("--redis_db", metavar="DB", type=int, default=0, help="number of the database")
    add("--redis_in", metavar="CHANNEL", required=True, help="channel, or pattern, to listen to")
    add("--redis_out", metavar="CHANNEL", required=True, help="channel for predictions")
    add("--redis_timeout", metavar="NUM", type=float, default=0.01, help="accepted and ignored")
    scripts.add_model_flags(parser)
    add("--verbose", action="store_true", help="log more")
    return parser


def predict(arguments: Sequence[str] | None = None, scripts: Scripts = SAM) -> ExitCode:
    """Do what Waikato's script does with these arguments. Raises SamPollError."""
    from sam_poll.config import settings

    flags = predict_parser(scripts).parse_args(arguments)
    values = {
        **scripts.settings_of(flags),
        "formats": ["mask", "opex"],
        "log": "text",
        "log_level": "DEBUG" if flags.verbose else "INFO",
    }
    loaded = settings.load(None, env={}, flags=values)
    if flags.redis_in == flags.redis_out:
        raise UsageError(
            "is the same as --redis_in: answers would be taken for requests",
            place="--redis_out",
            remedy="give another channel",
        )
    from sam_poll.integrations.redis import service

    address = _address(
        flags.redis_host,
        flags.redis_port,
        flags.redis_db,
        flags.redis_password,
        flags.redis_password_env,
    )
    return service.pubsub(
        loaded,
        address,
        flags.redis_in,
        flags.redis_out,
        segmenter={
            "type": scripts.segmenter,
            "model_type": flags.model_type,
            "model_file": flags.model,
        },
        model_type=scripts.model_type_of(flags),
    )


# ── sam_test_redis_send, sam_test_redis_recv ──


def send_parser(scripts: Scripts = SAM) -> argparse.ArgumentParser:
    """Return a parser of the flags of Waikato's script."""
    parser = _parser(
        f"{scripts.prefix}_test_redis_send",
        f"Send a picture and a prompt to {scripts.prefix}_predict_redis.",
    )
    _add_server_flags(parser)
    add = parser.add_argument
    add("-I", "--image", metavar="FILE", type=Path, required=True, help="picture")
    add(
        "-P", "--prompt", metavar="FILE", type=Path, required=True, help="JSON file with the prompt"
    )
    return parser


def send(arguments: Sequence[str] | None = None, scripts: Scripts = SAM) -> ExitCode:
    """Publish one message. Returns FAILED_JOBS if no client listens to the channel.

    Raises InputError if the prompt is not JSON, ShareError if the server is unreachable.
    """
    flags = send_parser(scripts).parse_args(arguments)
    connection = _connection(flags)
    try:
        prompt = json.loads(flags.prompt.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {shown(error)}", place=shown(flags.prompt)) from None
    message = {
        "image": base64.encodebytes(flags.image.read_bytes()).decode("ascii"),
        "prompt": prompt,
    }
    connection.prove()
    listeners = connection.call(lambda client: client.publish(flags.channel, json.dumps(message)))
    connection.close()
    typer.echo(f"sent to {flags.channel}; listeners: {listeners}", err=True)
    return ExitCode.OK if listeners else ExitCode.FAILED_JOBS


def recv_parser(scripts: Scripts = SAM) -> argparse.ArgumentParser:
    """Return a parser of the flags of Waikato's script, and `--count`."""
    parser = _parser(
        f"{scripts.prefix}_test_redis_recv",
        f"Receive the answers of {scripts.prefix}_predict_redis, and save them.",
    )
    _add_server_flags(parser)
    add = parser.add_argument
    add(
        "-o", "--output_dir", metavar="DIR", type=Path, required=True, help="folder for the answers"
    )
    add(
        "-f",
        "--file_prefix",
        metavar="FORMAT",
        default="%Y%m%d_%H%M%S.%f",
        help="file names without ending, as a format of Python's strftime",
    )
    add("--count", metavar="N", type=int, default=0, help="end after N messages; 0: never")
    return parser


def recv(arguments: Sequence[str] | None = None, scripts: Scripts = SAM) -> ExitCode:
    """Save answers, and print the names of the files.

    An answer becomes `<name>.png` and `<name>.json` (OPEX), a refusal `<name>.error.json`. Returns
    FAILED_JOBS if there was a refusal, or a message that is not an answer.
    """
    flags = recv_parser(scripts).parse_args(arguments)
    connection = _connection(flags)
    connection.prove()
    code = ExitCode.OK
    received = 0
    pubsub = connection.client.pubsub()
    with connection.translated_errors():
        pubsub.psubscribe(flags.channel)
    while not flags.count or received < flags.count:
        with connection.translated_errors():
            event = pubsub.get_message(timeout=_WAIT_S)
        if event is None:
            continue
        if event["type"] == "psubscribe":
            typer.echo(f"listening to {flags.channel}", err=True)
            continue
        received += 1
        if not _save(event["data"], flags.output_dir, flags.file_prefix):
            code = ExitCode.FAILED_JOBS
        if streams.reader_closed():
            break
    pubsub.close()
    connection.close()
    return code


def _save(data: bytes, folder: Path, pattern: str) -> bool:
    """Write a message's files. Returns False for a refusal, and for what is not an answer."""
    now = datetime.now().astimezone()
    target = SafePath.at(folder)
    name = now.strftime(pattern)
    name += free_suffix(target / (name + ending) for ending in (".png", ".json", ".error.json"))
    try:
        message = json.loads(data)
        if "error" in message:
            files = _refusal_files(message)
        else:
            files = _answer_files(message, name, now)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
        binascii.Error,
    ) as error:
        logger.warning("a message is not an answer ({}: {})", type(error).__name__, shown(error))
        return False
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    for ending, body in files.items():
        path = target / (name + ending)
        write_whole(path, body)
        typer.echo(shown(path))
    return ".error.json" not in files


def _refusal_files(message: Mapping[str, Any]) -> dict[str, bytes]:
    error = message["error"]
    reason = error.get("reason") if isinstance(error, dict) else error
    logger.warning("refused: {}", shown(reason))
    content = {"error": error, "meta": message.get("meta")}
    return {".error.json": json.dumps(content, indent=2).encode()}


def _answer_files(message: Mapping[str, Any], name: str, now: datetime) -> dict[str, bytes]:
    opex = {"timestamp": now.isoformat(), "id": name, "objects": _objects(message)}
    mask = base64.b64decode("".join(message["mask"].split()), validate=True)
    return {".png": mask, ".json": json.dumps(opex, indent=2).encode()}


def _objects(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return OPEX's objects: those of the message, or else one for each contour.

    Waikato's predictors send contours only.
    """
    if isinstance(message.get("objects"), list):
        return message["objects"]
    return [_object(contour) for contour in message["contours"] if contour]


def _object(contour: Sequence[Sequence[float]]) -> dict[str, Any]:
    columns = [point[0] for point in contour]
    rows = [point[1] for point in contour]
    box = {"top": min(rows), "left": min(columns), "bottom": max(rows), "right": max(columns)}
    return {"label": "object", "bbox": box, "polygon": {"points": list(contour)}}


# ── common ──


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name,
        description=f"{about} With the flags of Waikato's script.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-H", "--host", metavar="HOST", default="localhost", help="Redis server")
    add("-p", "--port", metavar="PORT", type=int, default=6379, help="port of the server")
    add("-d", "--database", metavar="DB", type=int, default=0, help="number of the database")
    add("--password_env", metavar="NAME", help="environment variable with the password")
    add("-c", "--channel", metavar="CHANNEL", required=True, help="channel")


def _connection(flags: argparse.Namespace) -> Any:
    from sam_poll.integrations.redis.connection import RedisConnection
    from sam_poll.runtime.console import set_up_log

    set_up_log("text", "WARNING")
    address = _address(flags.host, flags.port, flags.database, None, flags.password_env)
    return RedisConnection(address)


def _address(
    host: str, port: int, database: int, password: str | None, variable: str | None
) -> Any:
    """Return the server's URL.

    A password wins over the one in the environment variable, as with Waikato's scripts.
    """
    from sam_poll.integrations.redis.connection import parse_url, password_from_env

    if password:
        logger.warning(
            "other users can read the password in the list of processes; "
            "use --redis_password_env instead"
        )
    elif variable:
        password = password_from_env(os.environ, variable)
    name = f"[{host}]" if ":" in host else host
    return parse_url(f"redis://{name}:{port}/{database}", "command line", password)


def predict_main() -> None:
    """Run the command `sam_predict_redis`. Its errors look like those of `sam-poll`."""
    error_handling.run(reports(predict))


def send_main() -> None:
    """Run the command `sam_test_redis_send`."""
    error_handling.run(reports(send))


def recv_main() -> None:
    """Run the command `sam_test_redis_recv`."""
    error_handling.run(reports(recv))


def hq_predict_main() -> None:
    """Run the command `samhq_predict_redis`."""
    error_handling.run(reports(partial(predict, scripts=SAM_HQ)))


def hq_send_main() -> None:
    """Run the command `samhq_test_redis_send`."""
    error_handling.run(reports(partial(send, scripts=SAM_HQ)))


def hq_recv_main() -> None:
    """Run the command `samhq_test_redis_recv`."""
    error_handling.run(reports(partial(recv, scripts=SAM_HQ)))
