"""CVAT's Nuclio functions: requests in, answers out; the handlers in docker/nuclio only hand on.

One service for a process, made at its start: the network of `MODEL` (and `MODEL_CFG`, or any setting as `SAM_POLL_…`),
with the daemon's memory plan. What is the request's fault is answered 400, what is ours 500, each with the reason as
JSON; CVAT shows the status only, so the reason is in the function's log, too.

What can still go wrong here: after a device failure the answer is 500 and the process ends a second later, to be
started anew by Nuclio; requests that wait at that moment get no answer.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sam_poll.cvat import refusal, request, text
from sam_poll.errors import DeviceError, ExitCode, InputError, SamPollError, SettingsError, TooLargeError
from sam_poll.predictor import Known, Predictor
from sam_poll.types import Everything, Mask

END_AFTER_S = 1.0  # for the answer to get out before the process ends
LABEL = "LABEL"  # environment: the one label of what a detector finds
POINTS_PER_SIDE = "POINTS_PER_SIDE"  # … of the grid of clicks that finds everything
MOST_POINTS = 128  # … as in prompt files
STARTSWITH_BOX = "STARTSWITH_BOX"  # … set: an old server sends the box as the first two positive points


def end_process() -> None:
    """Ends this process soon: the device is gone, and only a new process gets it back."""
    timer = threading.Timer(END_AFTER_S, os._exit, (int(ExitCode.DEVICE),))
    timer.daemon = True
    timer.start()


@dataclass(frozen=True)
class Service:
    """Answers events of Nuclio with a predictor. `end` is called when the device has failed for good."""

    predictor: Predictor
    label: str = "object"
    asked: Everything = field(default_factory=Everything)
    box_first: bool = False
    end: Callable[[], None] = end_process

    @classmethod
    def open(cls, logger: Any, env: Mapping[str, str] = os.environ) -> Service:
        """A service as the environment wants it, its network loaded. SamPollError, which is logged, too."""
        from sam_poll import app, settings

        try:
            options = _options(env)
            predictor = app.predictor_of(settings.load(None, env=env))
        except SamPollError as error:
            logger.error(f"the function cannot start: {error}")
            raise
        info = predictor.info
        logger.info(f"{info.name} on {info.device}, {info.step}: ready")
        return cls(predictor, **options)

    def interact(self, context: Any, event: Any) -> Any:
        """An interactor: `{"mask": [[0,255,…],…]}`, the whole picture row by row.

        Nothing clicked: everything is segmented. `mask` is then all that was found, taken together, and `objects` has
        each by itself, in few words.
        """

        def answer(asked: request.Asked, known: Known) -> str:
            if asked.prompt is not None:
                return text.interacted(self.predictor.predict(known, [asked.prompt]), known.size, clicked=True)
            return text.interacted(self._everything(asked, known), known.size, clicked=False)

        return self._answered(context, event, answer)

    def detect(self, context: Any, event: Any) -> Any:
        """A detector: a list of masks, of the one label, with their confidence. `threshold` is the least of it."""
        return self._answered(context, event, lambda asked, known: text.detected(self._everything(asked, known)))

    def embed(self, context: Any, event: Any) -> Any:
        """SAM1 for CVAT's decoder in the browser: `{"blob": base64 of float32 1×256×64×64}`. Clicks are not looked at:
        the browser has them."""

        def answer(asked: request.Asked, known: Known) -> str:
            return text.embedded(self.predictor.image_embedding(known))

        return self._answered(context, event, answer, clicks=False)

    def _everything(self, asked: request.Asked, known: Known) -> list[Mask]:
        wanted = self.asked if asked.threshold is None else replace(self.asked, iou=asked.threshold)
        return self.predictor.everything(known, wanted, self.label)

    def _answered(
        self, context: Any, event: Any, answer: Callable[[request.Asked, Known], str], *, clicks: bool = True
    ) -> Any:
        started = time.monotonic()
        try:
            asked = request.read(event.body, label=self.label, box_first=self.box_first, clicks=clicks)
            known = self.predictor.embed(asked.picture)
            body = answer(asked, known)
        except DeviceError as error:
            context.logger.error(f"{error}; the process ends, to be started anew")
            self.end()
            return refusal.response(context, 500, error)
        except TooLargeError as error:
            context.logger.error(str(error))
            return refusal.response(context, 500, error)
        except InputError as error:
            context.logger.warn(f"refused: {error}")
            return refusal.response(context, 400, error)
        except Exception as error:  # noqa: BLE001  one request's surprise must not end the function
            context.logger.error(f"unexpected: {traceback.format_exc()}")
            return refusal.response(context, 500, SamPollError(f"unexpected {type(error).__name__}: {error}"))
        size, took_ms = known.size, (time.monotonic() - started) * 1000
        context.logger.info(f"{size.width}×{size.height} answered in {took_ms:.0f} ms")
        return context.Response(body=body, headers={}, content_type="application/json", status_code=200)


def _options(env: Mapping[str, str]) -> dict[str, Any]:
    """`LABEL`, `POINTS_PER_SIDE` and `STARTSWITH_BOX` of the environment. SettingsError."""
    options: dict[str, Any] = {"box_first": env.get(STARTSWITH_BOX, "").lower() in ("1", "true", "yes", "on")}
    if label := env.get(LABEL, "").strip():
        options["label"] = label
    if points := env.get(POINTS_PER_SIDE, "").strip():
        if not points.isdecimal() or not 1 <= int(points) <= MOST_POINTS:
            raise SettingsError(f"{points!r} is not a number from 1 to {MOST_POINTS}", place=POINTS_PER_SIDE)
        options["asked"] = Everything(points_per_side=int(points))
    return options
