"""`sam-poll doctor` on demand: one run at a time, in a process of its own.

Limitations: the model is not loaded (`--quick`), because a daemon may need the memory.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sam_poll.core import child_process

_LIMIT_S = 300.0


@dataclass(frozen=True, slots=True)
class DoctorState:
    """The last run: `running`, or `finished` (wall-clock time) with its findings or its error."""

    running: bool = False
    finished: float | None = None
    findings: tuple[dict[str, Any], ...] = ()
    error: str | None = None


@dataclass(slots=True)
class Doctor:
    """Runs the command with `arguments` (`-c config.yaml`), which name the share."""

    arguments: Sequence[str]
    state: DoctorState = field(default_factory=DoctorState)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Start a run, unless one is running."""
        with self._lock:
            if self.state.running:
                return
            self.state = DoctorState(running=True)
        threading.Thread(target=self._run, name="doctor", daemon=True).start()

    def _run(self) -> None:
        try:
            self.state = self._findings()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            self.state = DoctorState(finished=time.time(), error=f"doctor cannot be run: {error}")

    def _findings(self) -> DoctorState:
        command = child_process.command("sam_poll", "doctor", "--json", "--quick", *self.arguments)
        # An empty folder: the command would take a config.yaml of the current one.
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(  # noqa: S603  this program
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                timeout=_LIMIT_S,
            )
        document = json.loads(done.stdout)
        found = document.get("findings", [])
        return DoctorState(
            finished=time.time(),
            findings=tuple(finding for finding in found if isinstance(finding, dict)),
            error=document.get("error", {}).get("reason") if "error" in document else None,
        )
