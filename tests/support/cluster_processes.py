"""Watchers and workers of a cluster as processes on a share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from tools.chaos_share import HERE, Daemon, environment


class Part(Daemon):
    """`sam-poll cluster watch` or `cluster worker` as a process, observed as in the chaos runs."""

    def __init__(
        self, role: str, share: Path, server: Any, *flags: str, lag_ms: float = 0, **env: Any
    ) -> None:
        """`lag_ms`: maximum delay of each operation on the share, as on a network share."""
        Daemon._serial += 1
        self.share, self.role = share, role
        self.log = share.parent / "logs" / f"{Daemon._serial:05d}.log"
        self.killed = self.asked = False
        self.thaw_at = None
        self._seen = False
        model = ["-m", "fake", "-f", "mask", "-f", "opex"] if role == "worker" else []
        module = "tools.chaos_daemon" if lag_ms else "sam_poll"
        command = [
            sys.executable,
            "-m",
            module,
            "cluster",
            role,
            str(share / "in"),
            *model,
            *flags,
            "--log",
            "json",
        ]
        env = {
            "SAM_POLL_BROKER_URL": server.url,
            **({"CHAOS_SHARE": share, "CHAOS_LAG_MS": lag_ms} if lag_ms else {}),
            **env,
        }
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(**env),
                cwd=HERE,
            )
