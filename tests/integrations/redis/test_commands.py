"""The Redis commands: flags, exit codes, TLS, and no password in any output."""

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
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from loguru import logger
from typer.testing import CliRunner

from sam_poll.cli import main, waikato_redis
from sam_poll.cli.waikato_scripts import SAM, SAM_HQ
from sam_poll.config import settings
from sam_poll.core import backoff
from sam_poll.core.errors import ExitCode, SettingsError, ShareError
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.redis import connection
from sam_poll.integrations.redis.connection import RedisConnection, find_url, parse_url
from sam_poll.integrations.redis.messages import MAX_ID_BYTES
from sam_poll.integrations.redis.pubsub import RedisPubSubSource
from tests.conftest import picture_bytes, wait_until
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.redis_server import PROMPT, Server, stream_worker

SECRET = "p@ss/w0rd?#:%"
QUOTED = "p%40ss%2Fw0rd%3F%23%3A%25"
NOBODY = "redis://127.0.0.1:1/0"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as made:
        yield made


def run(*arguments: str, **env: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        main.app, ["redis", *arguments], env={"SAM_POLL_REDIS_URL": "", **env}
    )
    return result.exit_code, result.output


# ── the URL ──


def test_command_reports_an_unreachable_server_in_one_line_and_ends_with_75() -> None:
    for flags in ((), ("--stream",)):
        code, output = run(*flags, "--url", NOBODY, "-m", "fake")
        assert code == ExitCode.SHARE == 75
        assert output.count("error: ") == 1
        assert "127.0.0.1:1/0: Redis is unreachable" in output
        assert "Traceback" not in output


def test_url_is_that_of_the_flag_the_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "url"
    file.write_text("redis://of-file:1/2\n")
    file.chmod(0o600)
    env = {"SAM_POLL_REDIS_URL": "rediss://of-env"}
    assert find_url(env, "unix:///run/redis.sock", None).shown == "unix:///run/redis.sock"
    assert find_url(env, None, file).shown == "redis://of-file:1/2"
    assert find_url(env).shown == "rediss://of-env:6379/0"
    assert find_url({}).shown == "redis://localhost:6379/0"
    with pytest.raises(SettingsError, match="both given"):
        find_url(env, "redis://a", file)


def test_url_variable_is_not_taken_for_a_setting() -> None:
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
def test_malformed_url_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse_url(url, "--url")
    assert (refused.value.place, refused.value.remedy) == ("--url", connection.URL_FORM)
    assert url not in refused.value.reason


def test_url_with_an_unknown_option_is_a_settings_error() -> None:
    with pytest.raises(SettingsError) as refused:
        RedisConnection(parse_url("redis://h?bogus=1", "x"))
    assert refused.value.place == "redis://h:6379/0"


# ── passwords ──


def test_password_is_in_no_output_log_or_error(
    tmp_path: Path,
    logged: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logger.add(logged.append, level="TRACE", format="{level} {message} {exception}")
    output: list[str] = []
    file = tmp_path / "url"
    with Server(tmp_path / "redis", password="right") as server:
        wrong = f"redis://:{QUOTED}@127.0.0.1:{server.port}/0"
        file.write_text(wrong)
        file.chmod(0o644)
        ways: list[tuple[tuple[str, ...], dict[str, str], int]] = [
            (("--url", wrong), {}, 78),
            (("--url-file", str(file)), {}, 78),
            ((), {"SAM_POLL_REDIS_URL": wrong}, 78),
            (
                ("--url", f"redis://127.0.0.1:{server.port}", "--password-env", "MINE"),
                {"MINE": SECRET},
                78,
            ),
            (("--url", f"redis://:{QUOTED}@127.0.0.1:1"), {}, 75),
            (("--url", f"redis://:{SECRET}@127.0.0.1:1"), {}, 78),
            (("--url", f"redis://127.0.0.1:1?password={QUOTED}"), {}, 75),
            (("--url", f"redis://127.0.0.1:1?bogus={QUOTED}&password={QUOTED}"), {}, 78),
        ]
        for flags, env, code in ways:
            for stream in ((), ("--stream",)):
                got, text = run(*flags, *stream, "-m", "fake", "--log-level", "DEBUG", **env)
                assert got == code, (flags, text)
                output.append(text)
        monkeypatch.setenv("MINE", SECRET)
        base = [
            "--redis_host",
            "127.0.0.1",
            "--redis_in",
            "a",
            "--redis_out",
            "b",
            "--model",
            "fake",
            "--verbose",
        ]
        for more in (("--redis_password", SECRET), ("--redis_password_env", "MINE")):
            with pytest.raises(SettingsError) as refused:
                waikato_redis.predict([*base, "--redis_port", str(server.port), *more])
            output.append(str(refused.value))
            with pytest.raises(ShareError) as away:
                waikato_redis.predict([*base, "--redis_port", "1", *more])
            output.append(str(away.value))
        opened = RedisConnection(parse_url(wrong, "x"))
        output += [repr(opened.address), str(opened.address), repr(opened.client)]
    output += [*map(str, logged), *capsys.readouterr()]
    whole = "\n".join(output)
    assert "Redis refuses access" in whole
    assert "list of processes" in whole
    for form in (SECRET, QUOTED, "p@ss", "w0rd"):
        assert form not in whole, form


def test_redact_blanks_every_form_of_the_passwords() -> None:
    address = parse_url(f"redis://:{QUOTED}@h?ssl_password=other", "x")
    assert address.redact(f"{SECRET} {QUOTED} other") == "… … …"


def test_password_variable_that_is_not_set_is_a_settings_error() -> None:
    code, output = run("--url", NOBODY, "--password-env", "NOT_THERE_AT_ALL")
    assert code == ExitCode.SETTINGS
    assert "NOT_THERE_AT_ALL: holds no password" in output


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


@pytest.mark.parametrize("flags", [("redis",), ("redis", "--stream"), ("cluster", "worker", "IN")])
def test_rediss_url_of_a_server_without_tls_fails_within_seconds(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    folder = tmp_path / "share" / "in"
    folder.mkdir(parents=True)
    given = [str(folder) if flag == "IN" else flag for flag in flags]
    with Server(tmp_path / "redis", password=SECRET) as server:
        url = f"rediss://:{QUOTED}@127.0.0.1:{server.port}/0"
        begin = time.monotonic()
        result = CliRunner().invoke(
            main.app, [*given, "-m", "fake"], env={"SAM_POLL_REDIS_URL": url}
        )
        took = time.monotonic() - begin
    assert result.exit_code == ExitCode.SETTINGS, result.output
    output = " ".join(result.output.split())
    assert "does not use TLS, which rediss:// requires" in output
    assert "write redis://" in output
    assert QUOTED not in output
    assert took < 20  # of which a handshake has five


def test_rediss_url_of_a_silent_server_fails_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(ShareError, match="no TLS handshake"):
            RedisConnection(parse_url(f"rediss://127.0.0.1:{silent.getsockname()[1]}", "x")).prove()
        assert time.monotonic() - begin < 20


def test_unreachable_server_is_reported_alike_with_and_without_tls() -> None:
    for scheme in ("redis", "rediss"):
        with pytest.raises(ShareError, match="unreachable"):
            RedisConnection(parse_url(f"{scheme}://127.0.0.1:1", "x")).prove()


def test_tls_certificate_that_is_not_trusted_is_refused(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    port = free_port()
    key, cert = certificate
    lines = [
        f"tls-port {port}",
        f"tls-cert-file {cert}",
        f"tls-key-file {key}",
        "tls-auth-clients no",
    ]
    with Server(tmp_path / "redis", *lines):
        RedisConnection(parse_url(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}", "x")).prove()
        with pytest.raises(ShareError, match="certificate") as caught:
            RedisConnection(parse_url(f"rediss://127.0.0.1:{port}/0", "x")).prove()
        assert "ssl_ca_certs" in (caught.value.remedy or "")
        with pytest.raises(SettingsError, match="expects TLS") as caught:
            RedisConnection(parse_url(f"redis://127.0.0.1:{port}/0", "x")).prove()
        assert "rediss://" in (caught.value.remedy or "")


def test_tls_server_that_requires_a_client_certificate_is_detected(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    key, cert = certificate
    port = free_port()
    lines = [
        f"tls-port {port}",
        f"tls-cert-file {cert}",
        f"tls-key-file {key}",
        f"tls-ca-cert-file {cert}",
    ]
    for versions in ('"TLSv1.2"', '"TLSv1.3"'):
        with Server(tmp_path / versions.strip('"'), *lines, f"tls-protocols {versions}"):
            own = f"&ssl_certfile={cert}&ssl_keyfile={key}"
            RedisConnection(
                parse_url(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}{own}", "x")
            ).prove()
            with pytest.raises(ShareError, match="unreachable"):
                RedisConnection(
                    parse_url(f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={cert}", "x")
                ).prove()


# ── flags ──


def test_drop_ins_accept_all_flags_of_waikatos_scripts() -> None:
    wanted = {
        waikato_redis.predict_parser: "--redis_host --redis_port --redis_password "
        "--redis_password_env --redis_db --redis_in --redis_out --redis_timeout "
        "--model --model_type --config --device --verbose",
        waikato_redis.send_parser: "-H --host -p --port -d --database -c --channel "
        "-I --image -P --prompt",
        waikato_redis.recv_parser: "-H --host -p --port -d --database -c --channel "
        "-o --output_dir -f --file_prefix",
    }
    for parser, flags in wanted.items():
        for scripts in (SAM, SAM_HQ):
            actions = parser(scripts)._actions
            known = {option for action in actions for option in action.option_strings}
            assert set(flags.split()) - known <= ({"--config"} if scripts is SAM_HQ else set())
            assert parser(scripts).prog.startswith(f"{scripts.prefix}_")
            assert parser(scripts).format_help()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--in", "a", "--out", "a"), "taken for requests"),
        (("--in", ""), "--in: is empty"),
        (("--keep",), "add --stream"),
        (("--group", "x"), "add --stream"),
    ],
)
def test_flags_that_contradict_each_other_are_a_usage_error(
    flags: tuple[str, ...], expected: str
) -> None:
    code, output = run("--url", NOBODY, *flags)
    assert (code, expected in output) == (ExitCode.USAGE, True), output


def test_send_refuses_a_prompt_file_that_is_not_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.json").write_text("{")
    (tmp_path / "a.jpg").write_bytes(picture_bytes())
    flags = ["-c", "in", "-p", "1", "-I", str(tmp_path / "a.jpg"), "-P", str(tmp_path / "p.json")]
    with pytest.raises(Exception, match="is not JSON"):
        waikato_redis.send(flags)


# ── whole processes ──


def started(module: str, function: str, *arguments: str) -> subprocess.Popen[str]:
    code = f"import sys; from {module} import {function}; sys.argv[0] = 'x'; {function}()"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 0, output
    return output


@pytest.mark.parametrize(
    ("function", "family"), [("predict_main", "fake"), ("hq_predict_main", "sam-hq")]
)
def test_drop_in_answers_messages_and_stops_on_sigterm(
    server: Server, function: str, family: str
) -> None:
    flags = [
        "--redis_host",
        "127.0.0.1",
        "--redis_port",
        str(server.port),
        "--redis_in",
        "a",
        "--redis_out",
        "b",
    ]
    process = started(
        "sam_poll.cli.waikato_redis",
        function,
        *flags,
        "--model",
        "fake",
        "--model_type",
        "default",
    )
    try:
        wait_until(lambda: server.client.pubsub_numpat() == 1 or process.poll() is not None, 60)
        heard = server.client.pubsub()
        heard.subscribe("b")
        assert heard.get_message(timeout=10)["type"] == "subscribe"
        message = {"image": base64.b64encode(picture_bytes()).decode(), "prompt": PROMPT}
        assert server.client.publish("a", json.dumps(message)) == 1
        answer: dict[str, Any] = {}
        wait_until(lambda: answer.update(heard.get_message(timeout=1) or {}) or answer, 60)
        heard.close()
    finally:
        log = ended(process)
    segmenter = json.loads(answer["data"])["meta"]["segmenter"]
    expected = {"type": family, "model_type": "default", "model_file": "fake"}
    assert segmenter == expected
    assert "stopped: 1 job answered" in log


def test_command_answers_a_stream_and_leaves_the_group_on_sigterm(
    server: Server,
) -> None:
    server.add("one", picture_bytes())
    process = started(
        "sam_poll.cli.main",
        "main",
        "redis",
        "--stream",
        "--url",
        server.url,
        "-m",
        "fake",
        "-f",
        "cvat",
    )
    try:
        wait_until(lambda: server.ids() == ["one"] or process.poll() is not None, 60)
    finally:
        log = ended(process)
    assert json.loads(server.answers()[0]["documents"]) == ["cvat.xml"]
    assert (
        f"answering group sam_poll of the stream sam:in on redis://127.0.0.1:{server.port}/0" in log
    )
    assert server.client.xinfo_consumers("sam:in", "sam_poll") == []


# ── docs/redis.md ──

PAGE = (ROOT / "docs" / "redis.md").read_text(encoding="utf-8")
WORDS = re.sub(r"\s+", " ", PAGE)


def test_page_example_sends_requests_and_reads_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_page_names_every_flag_of_the_drop_ins() -> None:
    for parser in (
        waikato_redis.predict_parser,
        waikato_redis.send_parser,
        waikato_redis.recv_parser,
    ):
        for action in parser()._actions:
            flag = action.option_strings[-1]
            assert flag == "--help" or f"`{flag}`" in PAGE, flag


def test_page_command_lines_of_the_drop_ins_parse() -> None:
    parsers: dict[str, Any] = {
        "samhq_predict_redis": partial(waikato_redis.predict_parser, SAM_HQ),
        "sam_predict_redis": waikato_redis.predict_parser,
        "sam_test_redis_send": waikato_redis.send_parser,
        "sam_test_redis_recv": waikato_redis.recv_parser,
    }
    lines = [line.split() for line in re.findall(r"^(sam\w+redis\w* -.*)$", PAGE, re.MULTILINE)]
    assert {line[0] for line in lines} == set(parsers)
    for name, *words in lines:
        parsers[name]().parse_args(words)


def test_page_states_the_limits_of_the_code(server: Server) -> None:
    given = inspect.signature(RedisPubSubSource.__init__).parameters
    assert (
        f"At most {given['keep'].default} messages and {given['keep_mib'].default} MiB wait"
        in WORDS
    )
    assert f"at most {MAX_ID_BYTES:,} bytes" in WORDS
    assert f"pauses of {backoff.FIRST_S:g} to {backoff.LONGEST_S:g} s" in WORDS


def test_page_lists_the_access_rights_that_a_worker_needs(server: Server) -> None:
    (rights,) = re.findall(r"the worker needs `([^`]+)`", WORDS)
    server.client.execute_command(
        "ACL", "SETUSER", "worker", "on", ">word", "~sam:*", "-@all", *rights.split()
    )
    server.add("a", picture_bytes())
    server.url = f"redis://worker:word@127.0.0.1:{server.port}/0"
    gate, idle = threading.Event(), [0]

    def renewed() -> bool:
        idle.append(
            server.client.xpending_range("sam:in", "sam_poll", "-", "+", 1)[0][
                "time_since_delivered"
            ]
        )
        return idle[-1] < idle[-2]

    with stream_worker(server, FakeEngine(gate=gate), lease_s=0.4) as worker:
        wait_until(server.pending)
        wait_until(renewed)
        assert not worker.telemetry.alarms.active()
        gate.set()
        wait_until(lambda: server.ids() == ["a"])
    assert server.client.xinfo_consumers("sam:in", "sam_poll") == []
