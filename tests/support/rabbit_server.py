"""A RabbitMQ server for tests: one for each test process, because a start takes seconds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from tests.conftest import wait_until
from tests.support import optional
from tests.support.ports import free_ports

# Debian's /usr/sbin/rabbitmq-server changes to another user.
BINARY = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
_START_S = 180.0  # on a machine with other work; else 5


class RabbitServer:
    """A server on free ports of this machine, with its data in a folder of its own.

    `kill` loses no message that was confirmed.
    """

    def __init__(self, folder: Path) -> None:
        if not BINARY.exists():
            optional.lacking("rabbitmq-server", "rabbitmq-server")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port, names, cluster = free_ports(3)
        self.url = f"amqp://guest:guest@127.0.0.1:{self.port}"
        (folder / "enabled_plugins").write_text("[].")
        self._environment = {
            **os.environ,
            "HOME": str(folder),  # of the cookie
            "ERL_EPMD_PORT": str(names),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"test{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(cluster),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "logs"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none",
        }
        self._process: subprocess.Popen[bytes] | None = None
        # Erlang's name server; the first node would start one that outlives it.
        self._names = subprocess.Popen(
            ["epmd", "-port", str(names), "-address", "127.0.0.1"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def start(self) -> None:
        with (self.folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [str(BINARY)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                start_new_session=True,  # a script, and Erlang in its group
            )
        wait_until(self._answers, timeout=_START_S)

    def _answers(self) -> bool:
        assert self._process is not None
        said = (self.folder / "output").read_text()
        assert self._process.poll() is None, said[-2000:]
        return "completed with" in said

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def kill(self) -> None:
        """End the server as `kill -9` does."""
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Delete the server's data on the disk."""
        shutil.rmtree(self.folder / "data", ignore_errors=True)

    def __enter__(self) -> RabbitServer:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._names.kill()
        self._names.wait()
