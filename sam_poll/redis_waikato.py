"""`sam_predict_redis`, `sam_test_redis_send`, `sam_test_redis_recv`: drop-ins for Waikato's scripts of these names.

Their flags, their messages, our engine. As with theirs a channel may be a pattern (`images.*`) where it is listened to.

What can still go wrong here: what pub/sub loses (`doors.redis_pubsub`); and a password on a command line, as their
`--redis_password` has it, can be read by every user of the machine.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from loguru import logger

from sam_poll import reporting, streams
from sam_poll.errors import ExitCode, InputError, UsageError
from sam_poll.fs import free_suffix, shown, write_whole
from sam_poll.reporting import reports
from sam_poll.safe_path import SafePath

_WAIT_S = 0.5


# ── sam_predict_redis ──


def predict_parser() -> argparse.ArgumentParser:
    """Their flags, all of them, and those of SAM 2's script."""
    add = (made := _parser("sam_predict_redis", "SAM/SAM 2 prediction through Redis.")).add_argument
    add("--redis_host", metavar="HOST", default="localhost", help="the server")
    add("--redis_port", metavar="PORT", type=int, default=6379, help="its port")
    add("--redis_password", metavar="PASSWORD", help="the password; others see it in the list of processes")
    add("--redis_password_env", metavar="NAME", help="the environment variable that holds the password")
    add("--redis_db", metavar="DB", type=int, default=0, help="the database")
    add("--redis_in", metavar="CHANNEL", required=True, help="the channel, or pattern, to listen to")
    add("--redis_out", metavar="CHANNEL", required=True, help="the channel for predictions")
    add("--redis_timeout", metavar="NUM", type=float, default=0.01, help="taken and not needed")
    add("--model", metavar="FILE", required=True, help="checkpoint, or a name of `sam-poll models list`")
    add("--model_type", choices=["default", "vit_h", "vit_l", "vit_b"], help="SAM 1: the type of the checkpoint")
    add("--config", metavar="FILE", help="SAM 2: the model's yaml")
    add("--device", default="auto", help="device to run on: auto, cpu, cuda, cuda:0 …")
    add("--verbose", action="store_true", help="log more")
    return made


def predict(arguments: Sequence[str] | None = None) -> ExitCode:
    """Work as their script would. Raises SamPollError."""
    from sam_poll import settings

    given = predict_parser().parse_args(arguments)
    flags = {
        "model": given.model,
        "model_cfg": given.config,
        "device": given.device,
        "formats": ["mask", "opex"],
        "log": "text",
        "log_level": "DEBUG" if given.verbose else "INFO",
    }
    chosen = settings.load(None, env={}, flags=flags)
    if given.redis_in == given.redis_out:
        raise UsageError("answers would be taken for questions", place="--redis_out", remedy="another channel")
    from sam_poll import redis_run

    address = _address(
        given.redis_host, given.redis_port, given.redis_db, given.redis_password, given.redis_password_env
    )
    kind = "vit_h" if given.model_type == "default" else given.model_type  # as in segment-anything's registry
    segmenter = {"model_type": given.model_type, "model_file": given.model}
    return redis_run.pubsub(chosen, address, given.redis_in, given.redis_out, segmenter=segmenter, model_type=kind)


# ── sam_test_redis_send, sam_test_redis_recv ──


def send_parser() -> argparse.ArgumentParser:
    """Their flags."""
    made = _parser("sam_test_redis_send", "Send a picture and a prompt to sam_predict_redis.")
    _server(made)
    made.add_argument("-I", "--image", metavar="FILE", type=Path, required=True, help="the picture")
    made.add_argument("-P", "--prompt", metavar="FILE", type=Path, required=True, help="the JSON file with the prompt")
    return made


def send(arguments: Sequence[str] | None = None) -> ExitCode:
    """Send one message. InputError: the prompt is no JSON; ShareError: no server; both end the command."""
    given = send_parser().parse_args(arguments)
    link = _link(given)
    try:
        prompt = json.loads(given.prompt.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON: {shown(error)}", place=shown(given.prompt)) from None
    message = {"image": base64.encodebytes(given.image.read_bytes()).decode("ascii"), "prompt": prompt}
    link.prove()
    heard = link.ask(lambda client: client.publish(given.channel, json.dumps(message)))
    link.close()
    typer.echo(f"sent to {given.channel}; listeners: {heard}", err=True)
    return ExitCode.OK if heard else ExitCode.FAILED_JOBS


def recv_parser() -> argparse.ArgumentParser:
    """Their flags, and `--count`."""
    made = _parser("sam_test_redis_recv", "Receive what sam_predict_redis answers, and save it.")
    _server(made)
    add = made.add_argument
    add("-o", "--output_dir", metavar="DIR", type=Path, required=True, help="folder for what comes")
    what = "names of the files without ending, as Python's strftime has it"
    add("-f", "--file_prefix", metavar="FORMAT", default="%Y%m%d_%H%M%S.%f", help=what)
    add("--count", metavar="N", type=int, default=0, help="end after so many messages; 0: never")
    return made


def recv(arguments: Sequence[str] | None = None) -> ExitCode:
    """Save each answer as `<name>.png` and `<name>.json` (OPEX), each refusal as `<name>.error.json`; print the names.

    FAILED_JOBS where a refusal, or something that is no answer, was among them.
    """
    given = recv_parser().parse_args(arguments)
    link = _link(given)
    link.prove()
    code, taken = ExitCode.OK, 0
    with link.told():
        pubsub = link.client.pubsub()
        pubsub.psubscribe(given.channel)
        while not given.count or taken < given.count:
            message = pubsub.get_message(timeout=_WAIT_S)
            if message is None:
                continue
            if message["type"] == "psubscribe":
                typer.echo(f"listening to {given.channel}", err=True)
                continue
            taken += 1
            if not _save(message["data"], given.output_dir, given.file_prefix):
                code = ExitCode.FAILED_JOBS
            if streams.unread():
                break
        pubsub.close()
    link.close()
    return code


def _save(data: bytes, folder: Path, pattern: str) -> bool:
    """Write what a message holds. False: it was a refusal, or nothing that could be understood."""
    now = datetime.now().astimezone()
    name = now.strftime(pattern)
    place = SafePath.at(folder)
    name += free_suffix(place / (name + ending) for ending in (".png", ".json", ".error.json"))
    try:
        said = json.loads(data)
        if "error" in said:
            files = {".error.json": json.dumps({"error": said["error"], "meta": said.get("meta")}, indent=2).encode()}
            reason = said["error"].get("reason") if isinstance(said["error"], dict) else said["error"]
            logger.warning("refused: {}", shown(reason))
        else:
            opex = {"timestamp": now.isoformat(), "id": name, "objects": _objects(said)}
            mask = base64.b64decode("".join(said["mask"].split()), validate=True)
            files = {".png": mask, ".json": json.dumps(opex, indent=2).encode()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, binascii.Error) as error:
        logger.warning("this is no answer ({}: {})", type(error).__name__, shown(error))
        return False
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    for ending, body in files.items():
        path = place / (name + ending)
        write_whole(path, body)
        typer.echo(shown(path))
    return ".error.json" not in files


def _objects(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """OPEX's objects: as they came, or one of each contour, which is all that Waikato's predictors send."""
    if isinstance(said.get("objects"), list):
        return said["objects"]
    return [_object(contour) for contour in said["contours"] if contour]


def _object(contour: Sequence[Sequence[float]]) -> dict[str, Any]:
    columns, rows = [point[0] for point in contour], [point[1] for point in contour]
    box = {"top": min(rows), "left": min(columns), "bottom": max(rows), "right": max(columns)}
    return {"label": "object", "bbox": box, "polygon": {"points": list(contour)}}


# ── what they share ──


def _parser(name: str, about: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=name,
        description=f"{about} With the flags of Waikato's script.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _server(made: argparse.ArgumentParser) -> None:
    add = made.add_argument
    add("-H", "--host", metavar="HOST", default="localhost", help="the server")
    add("-p", "--port", metavar="PORT", type=int, default=6379, help="its port")
    add("-d", "--database", metavar="DB", type=int, default=0, help="the database")
    add("--password_env", metavar="NAME", help="the environment variable that holds the password")
    add("-c", "--channel", metavar="CHANNEL", required=True, help="the channel")


def _link(given: argparse.Namespace) -> Any:
    from sam_poll.console import set_up_log
    from sam_poll.doors.redis_link import Link

    set_up_log("text", "WARNING")
    return Link(_address(given.host, given.port, given.database, None, given.password_env))


def _address(host: str, port: int, database: int, password: str | None, variable: str | None) -> Any:
    """A password that is given wins over that of the variable, as with theirs."""
    from sam_poll.doors.redis_link import of, secret

    if password:
        logger.warning("others can read the password in the list of processes; --redis_password_env hides it")
    elif variable:
        password = secret(os.environ, variable)
    name = f"[{host}]" if ":" in host else host
    return of(f"redis://{name}:{port}/{database}", "command line", password)


def predict_main() -> None:
    """The `sam_predict_redis` command; its errors look like those of `sam-poll`."""
    reporting.run(reports(predict))


def send_main() -> None:
    """The `sam_test_redis_send` command."""
    reporting.run(reports(send))


def recv_main() -> None:
    """The `sam_test_redis_recv` command."""
    reporting.run(reports(recv))
