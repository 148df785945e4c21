"""The commands: their flags, their exit codes, and no password anywhere."""

from __future__ import annotations

import base64
import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from loguru import logger
from typer.testing import CliRunner

from sam_poll import cli, redis_waikato, settings
from sam_poll.doors import redis_link
from sam_poll.doors.redis_link import Link, find, of
from sam_poll.doors.redis_messages import MAX_ID_BYTES
from sam_poll.doors.redis_pubsub import PubSubDoor
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import ExitCode, SettingsError, ShareError
from tests.conftest import picture_bytes, wait_until
from tests.redis_server import PROMPT, Server, stream_worker

ROOT = Path(__file__).parent.parent
SECRET = "p@ss/w0rd?#:%"
QUOTED = "p%40ss%2Fw0rd%3F%23%3A%25"
NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as made:
        yield made


def run(*arguments: str, **env: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["redis", *arguments], env={"SAM_POLL_REDIS_URL": "", **env})
    return result.exit_code, result.output


# ── where it is ──


def test_a_server_that_is_not_there_is_one_line_and_worth_trying_again() -> None:
    for flags in ((), ("--stream",)):
        code, said = run(*flags, "--url", NOBODY, "-m", "fake")
        assert code == ExitCode.SHARE == 75
        assert said.count("error: ") == 1
        assert "127.0.0.1:1/0: Redis is away" in said
        assert "Traceback" not in said


def test_the_url_is_that_of_the_flag_the_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("redis://of-file:1/2\n")
    file.chmod(0o600)
    env = {"SAM_POLL_REDIS_URL": "rediss://of-env"}
    assert find(env, "unix:///run/redis.sock", None).shown == "unix:///run/redis.sock"
    assert find(env, None, file).shown == "redis://of-file:1/2"
    assert find(env).shown == "rediss://of-env:6379/0"
    assert find({}).shown == "redis://localhost:6379/0"
    with pytest.raises(SettingsError, match="both given"):
        find(env, "redis://a", file)


def test_the_urls_variable_is_no_unknown_setting() -> None:
    settings.load(None, env={"SAM_POLL_REDIS_URL": "redis://h"})


@pytest.mark.parametrize(
    "url",
    [
        "http://h",
        "h:6379",
        "redis://",
        "redis://h:port",
        "redis://h/name",
        "redis://:a/b@h",
        "redis://u:a/b@h",
        "redis://u:a#b@h",
        "redis://u:a?b@h",
        "redis://u:12/b@h:6379/0",
        "redis://h 1",
        "unix://",
        "redis://h\n1",
    ],
)
def test_an_odd_url_is_refused_without_a_part_of_it(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        of(url, "--url")
    assert str(refused.value).startswith("--url: is no URL of a Redis server (redis://[user:password@]")
    rest = str(refused.value).replace(redis_link._FORM, "")
    assert url not in rest


def test_an_option_that_the_library_does_not_know_is_a_mistake_in_the_settings() -> None:
    with pytest.raises(SettingsError, match="options cannot be used"):
        Link(of("redis://h?bogus=1", "x"))


# ── what may be seen ──


def test_no_password_is_ever_shown(
    tmp_path: Path, logged: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger.add(logged.append, level="TRACE", format="{level} {message} {exception}")
    said: list[str] = []
    file = tmp_path / "url"
    with Server(tmp_path / "redis", password="right") as server:
        wrong = f"redis://:{QUOTED}@127.0.0.1:{server.port}/0"
        file.write_text(wrong)
        file.chmod(0o644)
        ways: list[tuple[tuple[str, ...], dict[str, str], int]] = [
            (("--url", wrong), {}, 78),
            (("--url-file", str(file)), {}, 78),
            ((), {"SAM_POLL_REDIS_URL": wrong}, 78),
            (("--url", f"redis://127.0.0.1:{server.port}", "--password-env", "MINE"), {"MINE": SECRET}, 78),
            (("--url", f"redis://:{QUOTED}@127.0.0.1:1"), {}, 75),
            (("--url", f"redis://:{SECRET}@127.0.0.1:1"), {}, 78),
            (("--url", f"redis://127.0.0.1:1?password={QUOTED}"), {}, 75),
            (("--url", f"redis://127.0.0.1:1?bogus={QUOTED}&password={QUOTED}"), {}, 78),
        ]
        for flags, env, code in ways:
            for stream in ((), ("--stream",)):
                got, text = run(*flags, *stream, "-m", "fake", "--log-level", "DEBUG", **env)
                assert got == code, (flags, text)
                said.append(text)
        monkeypatch.setenv("MINE", SECRET)
        base = ["--redis_host", "127.0.0.1", "--redis_in", "a", "--redis_out", "b", "--model", "fake", "--verbose"]
        for more in (("--redis_password", SECRET), ("--redis_password_env", "MINE")):
            with pytest.raises(SettingsError) as refused:
                redis_waikato.predict([*base, "--redis_port", str(server.port), *more])
            said.append(str(refused.value))
            with pytest.raises(ShareError) as away:
                redis_waikato.predict([*base, "--redis_port", "1", *more])
            said.append(str(away.value))
        link = Link(of(wrong, "x"))
        said += [repr(link.address), str(link.address), repr(link.client)]
    said += [*map(str, logged), *capsys.readouterr()]
    whole = "\n".join(said)
    assert "does not let us in" in whole
    assert "list of processes" in whole
    for form in (SECRET, QUOTED, "p@ss", "w0rd"):
        assert form not in whole, form


def test_a_servers_words_are_blanked_where_they_repeat_the_password() -> None:
    address = of(f"redis://:{QUOTED}@h?ssl_password=other", "x")
    assert address.hidden(f"{SECRET} {QUOTED} other") == "… … …"


def test_a_variable_without_a_password_is_said() -> None:
    code, said = run("--url", NOBODY, "--password-env", "NOT_THERE_AT_ALL")
    assert code == ExitCode.SETTINGS
    assert "NOT_THERE_AT_ALL: holds no password" in said


# ── TLS ──


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with: apt install openssl")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1"]
    command = ["openssl", "req", "-x509", *made, "-keyout", str(key), "-out", str(cert), *names]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return key, cert


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("flags", [("redis",), ("redis", "--stream"), ("cluster", "worker", "IN")])
def test_tls_is_not_waited_for_where_a_server_speaks_none(tmp_path: Path, flags: tuple[str, ...]) -> None:
    folder = tmp_path / "share" / "in"
    folder.mkdir(parents=True)
    given = [str(folder) if flag == "IN" else flag for flag in flags]
    with Server(tmp_path / "redis", password=SECRET) as server:
        url = f"rediss://:{QUOTED}@127.0.0.1:{server.port}/0"
        begin = time.monotonic()
        result = CliRunner().invoke(cli.app, [*given, "-m", "fake"], env={"SAM_POLL_REDIS_URL": url})
        took = time.monotonic() - begin
    assert result.exit_code == ExitCode.SETTINGS, result.output
    said = " ".join(result.output.split())
    assert "speaks no TLS, which rediss:// wants" in said
    assert "write redis://" in said
    assert QUOTED not in said
    assert took < 20  # of which a handshake has five


def test_a_server_that_answers_nothing_is_away_in_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(ShareError, match="no TLS handshake"):
            Link(of(f"rediss://127.0.0.1:{silent.getsockname()[1]}", "x")).prove()
        assert time.monotonic() - begin < 20


def test_a_server_that_is_not_there_is_away_with_tls_as_without() -> None:
    for scheme in ("redis", "rediss"):
        with pytest.raises(ShareError, match="is away"):
            Link(of(f"{scheme}://127.0.0.1:1", "x")).prove()


def test_tls_by_url_and_a_certificate_that_nobody_vouches_for_is_refused(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    port = free_port()
    key, cert = certificate
    lines = [f"tls-port {port}", f"tls-cert-file {cert}", f"tls-key-file {key}", "tls-auth-clients no"]
    with Server(tmp_path / "redis", *lines):
        Link(of(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}", "x")).prove()
        with pytest.raises(ShareError, match="certificate") as caught:
            Link(of(f"rediss://127.0.0.1:{port}/0", "x")).prove()
        assert "ssl_ca_certs" in (caught.value.remedy or "")
        with pytest.raises(SettingsError, match="speaks TLS, and redis:// does not") as told:
            Link(of(f"redis://127.0.0.1:{port}/0", "x")).prove()
        assert "rediss://" in (told.value.remedy or "")


def test_a_server_that_wants_a_certificate_of_ours_speaks_tls(tmp_path: Path, certificate: tuple[Path, Path]) -> None:
    key, cert = certificate
    port = free_port()
    lines = [f"tls-port {port}", f"tls-cert-file {cert}", f"tls-key-file {key}", f"tls-ca-cert-file {cert}"]
    for versions in ('"TLSv1.2"', '"TLSv1.3"'):
        with Server(tmp_path / versions.strip('"'), *lines, f"tls-protocols {versions}"):
            own = f"&ssl_certfile={cert}&ssl_keyfile={key}"
            Link(of(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}{own}", "x")).prove()
            with pytest.raises(ShareError, match="is away"):
                Link(of(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}", "x")).prove()


# ── flags ──


def test_all_of_waikatos_flags_are_known() -> None:
    wanted = {
        redis_waikato.predict_parser: "--redis_host --redis_port --redis_password --redis_password_env --redis_db "
        "--redis_in --redis_out --redis_timeout --model --model_type --config --device --verbose",
        redis_waikato.send_parser: "-H --host -p --port -d --database -c --channel -I --image -P --prompt",
        redis_waikato.recv_parser: "-H --host -p --port -d --database -c --channel -o --output_dir -f --file_prefix",
    }
    for parser, flags in wanted.items():
        known = {option for action in parser()._actions for option in action.option_strings}
        assert set(flags.split()) <= known
        assert parser().format_help()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--in", "a", "--out", "a"), "taken for questions"),
        (("--in", ""), "--in: is empty"),
        (("--keep",), "add --stream"),
        (("--group", "x"), "add --stream"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_asked(flags: tuple[str, ...], words: str) -> None:
    code, said = run("--url", NOBODY, *flags)
    assert (code, words in said) == (ExitCode.USAGE, True), said


def test_a_prompt_file_that_is_no_json_is_not_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.json").write_text("{")
    (tmp_path / "a.jpg").write_bytes(picture_bytes())
    flags = ["-c", "in", "-p", "1", "-I", str(tmp_path / "a.jpg"), "-P", str(tmp_path / "p.json")]
    with pytest.raises(Exception, match="is not JSON"):
        redis_waikato.send(flags)


# ── whole processes ──


def started(module: str, function: str, *arguments: str) -> subprocess.Popen[str]:
    code = f"import sys; from {module} import {function}; sys.argv[0] = 'x'; {function}()"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    return said


def test_the_drop_in_answers_and_stops_when_asked(server: Server) -> None:
    flags = ["--redis_host", "127.0.0.1", "--redis_port", str(server.port), "--redis_in", "a", "--redis_out", "b"]
    process = started("sam_poll.redis_waikato", "predict_main", *flags, "--model", "fake", "--model_type", "default")
    try:
        wait_until(lambda: server.client.pubsub_numpat() == 1 or process.poll() is not None, 60)
        heard = server.client.pubsub()
        heard.subscribe("b")
        assert heard.get_message(timeout=10)["type"] == "subscribe"
        said = {"image": base64.b64encode(picture_bytes()).decode(), "prompt": PROMPT}
        assert server.client.publish("a", json.dumps(said)) == 1
        answer: dict[str, Any] = {}
        wait_until(lambda: answer.update(heard.get_message(timeout=1) or {}) or answer, 60)
        heard.close()
    finally:
        log = ended(process)
    segmenter = json.loads(answer["data"])["meta"]["segmenter"]
    assert (segmenter["model_type"], segmenter["model_file"]) == ("default", "fake")
    assert "stopped: 1 job answered" in log


def test_the_command_answers_a_stream_and_gives_back_what_is_not_done_when_asked_to_stop(server: Server) -> None:
    server.add("one", picture_bytes())
    process = started("sam_poll.cli", "main", "redis", "--stream", "--url", server.url, "-m", "fake", "-f", "cvat")
    try:
        wait_until(lambda: server.ids() == ["one"] or process.poll() is not None, 60)
    finally:
        log = ended(process)
    assert json.loads(server.answers()[0]["documents"]) == ["cvat.xml"]
    assert f"answering group sam_poll of the stream sam:in on redis://127.0.0.1:{server.port}/0" in log
    assert server.client.xinfo_consumers("sam:in", "sam_poll") == []


# ── the page ──

PAGE = (ROOT / "docs" / "redis.md").read_text(encoding="utf-8")


def test_the_pages_snippet_asks_and_gets_its_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(redis, "Redis", lambda: server.client)
        exec(compile(code, "docs/redis.md", "exec"), names)
    with stream_worker(server):
        names["ask"]("mine", picture_bytes(), PROMPT)
        names["ask"]("other", b"nothing", PROMPT)
        coming = names["answers"]()
        got = {answer["id"]: answer for answer in (next(coming), next(coming))}
        names["ask"]("last", picture_bytes(), PROMPT)
        assert next(coming)["id"] == b"last"
    assert got[b"mine"]["mask.png"].startswith(b"\x89PNG")
    assert got[b"other"]["reason"]
    assert server.ids() == ["last"]  # the others were deleted when the next one was asked for


def test_the_page_names_every_flag_of_the_drop_ins() -> None:
    for parser in (redis_waikato.predict_parser, redis_waikato.send_parser, redis_waikato.recv_parser):
        for action in parser()._actions:
            flag = action.option_strings[-1]
            assert flag == "--help" or f"`{flag}`" in PAGE, flag


def test_the_pages_lines_of_the_drop_ins_parse() -> None:
    parsers = {
        "sam_predict_redis": redis_waikato.predict_parser,
        "sam_test_redis_send": redis_waikato.send_parser,
        "sam_test_redis_recv": redis_waikato.recv_parser,
    }
    lines = [line.split() for line in re.findall(r"^(sam_\w+redis\w* -.*)$", PAGE, re.MULTILINE)]
    assert {line[0] for line in lines} == set(parsers)
    for name, *words in lines:
        parsers[name]().parse_args(words)


def test_the_page_states_the_bounds_as_they_are(server: Server) -> None:
    given = inspect.signature(PubSubDoor.__init__).parameters
    assert f"At most {given['keep'].default} messages and {given['keep_mib'].default} MiB wait" in PAGE
    assert f"at most {MAX_ID_BYTES:,} bytes" in PAGE
    longest = redis_link._LONGEST_PAUSE_S
    assert f"pauses of {redis_link._FIRST_PAUSE_S:g} to {longest:g} s" in PAGE


def test_the_rights_that_the_page_names_are_enough(server: Server) -> None:
    (rights,) = re.findall(r"the worker needs `([^`]+)`", PAGE)
    server.client.execute_command("ACL", "SETUSER", "worker", "on", ">word", "~sam:*", "-@all", *rights.split())
    server.add("a", picture_bytes())
    server.url = f"redis://worker:word@127.0.0.1:{server.port}/0"
    gate, idle = threading.Event(), [0]

    def renewed() -> bool:
        idle.append(server.client.xpending_range("sam:in", "sam_poll", "-", "+", 1)[0]["time_since_delivered"])
        return idle[-1] < idle[-2]

    with stream_worker(server, FakeEngine(gate=gate), lease_s=0.4) as worker:
        wait_until(server.pending)
        wait_until(renewed)
        assert not worker.signs.alarms.active()
        gate.set()
        wait_until(lambda: server.ids() == ["a"])
    assert server.client.xinfo_consumers("sam:in", "sam_poll") == []
