"""What a running daemon reports of itself: counts, alarms, heartbeats of its loops, its model.

One `Telemetry` object goes to the job source, the pipeline or worker pool, the health monitor, the
metrics and `sam-poll status`; each writes or reads its own part.
"""

from __future__ import annotations

from typing import Any, Protocol

from sam_poll import __version__
from sam_poll.core.alarms import Alarms
from sam_poll.core.stats import LoopHeartbeat, Stats
from sam_poll.core.types import ModelInfo


class LoadedModel(Protocol):
    """An engine, or a worker pool of several."""

    @property
    def info(self) -> ModelInfo: ...


class Telemetry:
    """Counts, alarms, loop heartbeats and the model of one process.

    - `intake`, `device`: heartbeats of the loop that takes jobs in and of the one that feeds the
      network.
    - `engine`: None until the network is loaded.
    - `formats`: formats of the answers; empty where nothing is answered, or each request names its
      own.
    """

    def __init__(
        self,
        *,
        stats: Stats | None = None,
        alarms: Alarms | None = None,
        intake: LoopHeartbeat | None = None,
        device: LoopHeartbeat | None = None,
    ) -> None:
        self.stats = stats or Stats()
        self.alarms = alarms or Alarms()
        self.intake = intake or LoopHeartbeat()
        self.device = device or LoopHeartbeat()
        self.engine: LoadedModel | None = None
        self.formats: tuple[str, ...] = ()

    @property
    def info(self) -> ModelInfo | None:
        """The loaded model; None until it is loaded."""
        return self.engine.info if self.engine else None

    @property
    def ooms(self) -> int:
        """How many times the device has run out of memory."""
        return int(getattr(self.engine, "ooms", 0))

    def state(self) -> dict[str, Any]:
        """Return the JSON object that `sam-poll status` shows for this daemon."""
        now = self.stats.now()
        info = self.info
        return {
            "version": __version__,
            "model": info.name if info else None,
            "device": info.device if info else None,
            "step": info.step if info else None,
            "peak_mib": info.peak_mib if info else None,
            "rate": round(now.rate, 2),
            "formats": list(self.formats),
            "answered": now.answered,
            "rejected": now.rejected,
            "at_work": now.at_work,
            "alarms": [
                {"kind": alarm.kind, "message": alarm.message, "seconds": round(alarm.seconds, 1)}
                for alarm in self.alarms.active()
            ],
        }
