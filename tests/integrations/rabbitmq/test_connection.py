"""RabbitMQ's addresses and errors, as users meet them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from pika import exceptions
from typer.testing import CliRunner

from sam_poll.cli import main
from sam_poll.core.errors import SettingsError, ShareError
from sam_poll.integrations import message_broker
from sam_poll.integrations.message_broker import find_url
from sam_poll.integrations.rabbitmq.connection import RabbitConnection
from tests.conftest import Share
from tests.support.ports import free_port
from tests.support.rabbit_server import RabbitServer

SECRET = "w0rd-of-mine"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://queue", "amqp://queue:5672/"),
        (f"amqp://user:{SECRET}@queue:5673/jobs?heartbeat=10", "amqp://queue:5673/jobs"),
        ("amqps://[::1]/%2Fa", "amqps://[::1]:5671//a"),
        ("redis://queue", "redis://queue:6379/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_broker_is_chosen_by_its_address_which_is_shown_without_secrets(
    url: str, shown: str
) -> None:
    found = find_url({message_broker.URL: url}, None, None)
    assert found.shown == shown
    assert SECRET not in repr(found)


def test_broker_of_the_flag_comes_before_that_of_the_environment(tmp_path: Path) -> None:
    env = {"SAM_POLL_BROKER_URL": "amqp://of-env", "SAM_POLL_REDIS_URL": "redis://of-redis"}
    file = tmp_path / "url"
    file.write_text("amqp://of-file\n")
    file.chmod(0o600)
    assert find_url(env, "amqp://of-flag", None).shown == "amqp://of-flag:5672/"
    assert find_url(env, None, file).shown == "amqp://of-file:5672/"
    assert find_url(env, None, None).shown == "amqp://of-env:5672/"
    del env["SAM_POLL_BROKER_URL"]
    assert find_url(env, None, None).shown == "redis://of-redis:6379/0"
    assert find_url({}, None, None).shown == "redis://localhost:6379/0"


@pytest.mark.parametrize(
    "url",
    [
        "http://queue",
        "amqp://",
        f"amqp://user:{SECRET}/x@queue",
        f"amqp://user:{SECRET}#x@queue",
        "amqp://queue/a/b",
        "amqp://queue:port",
        "redis://queue/jobs",
        "amqp://que ue",
    ],
)
def test_what_is_no_address_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(SettingsError) as refused:
        find_url({message_broker.URL: url}, None, None)
    assert SECRET not in str(refused.value)
    assert "SAM_POLL_BROKER_URL" in str(refused.value)
    assert "amqp://" in str(refused.value)


@pytest.mark.parametrize("role", ["watch", "worker"])
def test_unreachable_server_ends_the_command_with_75_and_a_remedy(share: Share, role: str) -> None:
    url = f"amqp://user:{SECRET}@127.0.0.1:{free_port()}"
    given = ["cluster", role, str(share.input), *(["-m", "fake"] if role == "worker" else [])]
    ended = CliRunner().invoke(main.app, given, env={"SAM_POLL_BROKER_URL": url})
    assert ended.exit_code == 75, ended.output
    assert "RabbitMQ is unreachable" in ended.output
    assert "SAM_POLL_BROKER_URL" in ended.output
    assert SECRET not in ended.output
    assert "Traceback" not in ended.output


def test_options_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(SettingsError) as refused:
        RabbitConnection(find_url({message_broker.URL: "amqp://q?heartbeat=soon"}, None, None))
    assert "options cannot be used" in str(refused.value)


@pytest.mark.parametrize(("there", "here"), [("guest:guest", f"guest:{SECRET}"), ("", "/nowhere")])
def test_refused_access_is_a_wrong_setting_and_a_dead_server_is_not(
    rabbit: RabbitServer, there: str, here: str
) -> None:
    url = rabbit.url.replace(there, here) if there else rabbit.url + here
    with pytest.raises(SettingsError) as refused:
        RabbitConnection(find_url({message_broker.URL: url}, None, None)).prove()
    assert "RabbitMQ refuses access" in str(refused.value)
    assert SECRET not in str(refused.value)
    RabbitConnection(find_url({message_broker.URL: rabbit.url}, None, None)).prove()


def test_server_that_hangs_up_is_unreachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"amqp://127.0.0.1:{silent.getsockname()[1]}?socket_timeout=0.3&stack_timeout=0.5"
        with pytest.raises(ShareError):
            RabbitConnection(find_url({message_broker.URL: url}, None, None)).prove()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (exceptions.ConnectionBlockedTimeout("expired"), "takes no messages: its memory or its"),
        (
            exceptions.ChannelClosedByBroker(403, "ACCESS_REFUSED - access to queue 'a' refused"),
            "refuses access: (403",
        ),
        (
            exceptions.ChannelClosedByBroker(406, "PRECONDITION_FAILED - queue 'a' is another"),
            "refuses the command: (406",
        ),
        (exceptions.ConnectionClosedByBroker(320, "CONNECTION_FORCED"), "is unreachable: (320"),
    ],
)
def test_server_that_answers_is_not_called_unreachable(error: Exception, reason: str) -> None:
    connection = RabbitConnection(find_url({message_broker.URL: "amqp://q"}, None, None))
    assert f"RabbitMQ {reason}" in str(connection.unavailable(error).strerror)


def test_queues_of_one_refused_user_are_one_alarm() -> None:
    connection = RabbitConnection(find_url({message_broker.URL: "amqp://q"}, None, None))
    reasons = {
        connection.unavailable(
            exceptions.ChannelClosedByBroker(403, f"ACCESS_REFUSED - access to queue '{name}'")
        ).strerror
        for name in ("share-first", "share-rest.DQ")
    }
    assert len(reasons) == 1
