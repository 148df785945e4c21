"""The Nuclio functions of CVAT that run SAM; the handlers in docker/nuclio only call them.

One service for a process, created at its start: the network of `MODEL` (and `MODEL_CFG`, or any
setting as `SAM_POLL_…`), with the daemon's memory plan. An error of the request is answered with
HTTP 400, one of the function with 500, each with the reason as JSON. CVAT shows the status only, so
the reason is logged too.

Limitations: after a device failure the answer is 500 and the process exits a second later, to be
restarted by Nuclio; requests that wait at that moment get no answer.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from sam_poll.core.errors import (
    DeviceError,
    DeviceOutOfMemoryError,
    ExitCode,
    InputError,
    PromptError,
    SamPollError,
    SettingsError,
)
from sam_poll.core.types import AutomaticMaskRequest, ConceptRequest, Mask
from sam_poll.integrations.nuclio import answer_form, errors, requests, responses
from sam_poll.integrations.nuclio.answer_form import AnswerForm
from sam_poll.integrations.nuclio.requests import NuclioRequest
from sam_poll.pipeline.predictor import Predictor, PreparedImage
from sam_poll.prompts import parser

EXIT_DELAY_S = 1.0  # so that the answer is sent before the process exits
# Environment variables.
LABEL = "LABEL"  # the one label of a detector's objects
TEXTS = "TEXTS"  # what a detector finds, by words, separated by commas: its labels, too
POINTS_PER_SIDE = "POINTS_PER_SIDE"  # the grid of clicks that segments everything
STARTSWITH_BOX = "STARTSWITH_BOX"  # old servers send a box as the first two positive points
INTERACTOR_ANSWER = "INTERACTOR_ANSWER"  # the form of an interactor's answer: auto, mask, shapes
MAX_POINTS_PER_SIDE = 128  # as in prompt files

Answer = Callable[[NuclioRequest, PreparedImage], str]  # returns the body of the response


def exit_soon() -> None:
    """Exit this process after a short delay: only a new process can use the device again."""
    timer = threading.Timer(EXIT_DELAY_S, os._exit, (int(ExitCode.DEVICE),))
    timer.daemon = True
    timer.start()


@dataclass(frozen=True)
class Service:
    """Answers Nuclio's events with a predictor.

    `automatic` is the request if nothing was clicked, or `concept` where it is set; `box_first`: an
    old server sends a box as the first two positive points; `answer_form`: the form of an
    interactor's answer, None: the one for the server's version; `on_device_failure` is called when
    the device has failed for good.
    """

    predictor: Predictor
    label: str = "object"
    automatic: AutomaticMaskRequest = field(default_factory=AutomaticMaskRequest)
    concept: ConceptRequest | None = None
    box_first: bool = False
    answer_form: AnswerForm | None = None
    on_device_failure: Callable[[], None] = exit_soon

    @classmethod
    def open(cls, logger: Any, env: Mapping[str, str] = os.environ) -> Service:
        """Return a service with the settings of the environment, its network loaded.

        Raises SamPollError, which is logged too.
        """
        from sam_poll.config import settings
        from sam_poll.runtime import builders

        try:
            options = _options(env)
            predictor = builders.predictor_of(settings.load(None, env=env))
            if "concept" in options:
                with _texts_refused():
                    predictor.check_concept(options["concept"])
        except SamPollError as error:
            logger.error(f"the function cannot start: {error}")
            raise
        info = predictor.info
        logger.info(f"{info.name} on {info.device}, {info.step}: ready")
        return cls(predictor, **options)

    def interact(self, context: Any, event: Any) -> Any:
        """Return an interactor's response: run lengths for CVAT since 2.60, else a whole mask.

        If nothing was clicked, what a text or exemplars describe is found, or everything is
        segmented. Each object is a shape, or, in the older form, `mask` is the union of all
        objects, and `objects` has each of them.
        """
        form = answer_form.form_for(answer_form.user_agent(event), self.answer_form)

        def answer(request: NuclioRequest, prepared: PreparedImage) -> str:
            clicked = request.prompt is not None
            if request.prompt is None:
                masks = self._all_objects(request, prepared)
            else:
                masks = self.predictor.predict(prepared, [request.prompt])
            return responses.interactor_response(masks, prepared.size, clicked=clicked, form=form)

        return self._respond(context, event, answer)

    def detect(self, context: Any, event: Any) -> Any:
        """Return a detector's response: a list of masks with their labels and confidence.

        The request's `threshold` is the lowest confidence. The label is the text that an object was
        found by, or the one label of the function.
        """

        def answer(request: NuclioRequest, prepared: PreparedImage) -> str:
            return responses.detector_response(self._all_objects(request, prepared))

        return self._respond(context, event, answer)

    def embed(self, context: Any, event: Any) -> Any:
        """Return SAM1's embedding for CVAT's decoder in the browser.

        The response is `{"blob": base64 of float32 1×256×64×64}`. Clicks in the request are
        ignored: the browser has them.
        """

        def answer(request: NuclioRequest, prepared: PreparedImage) -> str:
            return responses.embedding_response(self.predictor.image_embedding(prepared))

        return self._respond(context, event, answer, clicks=False)

    def _all_objects(self, request: NuclioRequest, prepared: PreparedImage) -> list[Mask]:
        """Return the masks of all objects, or of those that request or function say to find."""
        concept = request.concept
        if concept is None and self.concept is not None:
            concept = self.concept
            if request.threshold is not None:
                concept = replace(concept, threshold=request.threshold)
        if concept is not None:
            masks, _ = self.predictor.find(prepared, concept)
            return masks
        automatic = self.automatic
        if request.threshold is not None:
            automatic = replace(automatic, iou=request.threshold)
        return self.predictor.everything(prepared, automatic, self.label)

    def _respond(self, context: Any, event: Any, answer: Answer, *, clicks: bool = True) -> Any:
        started = time.monotonic()
        try:
            request = requests.parse_request(
                event.body, label=self.label, box_first=self.box_first, clicks=clicks
            )
            prepared = self.predictor.embed(request.picture)
            body = answer(request, prepared)
        except DeviceError as error:
            context.logger.error(f"{error}; the process exits, to be restarted by Nuclio")
            self.on_device_failure()
            return errors.response(context, 500, error)
        except DeviceOutOfMemoryError as error:
            context.logger.error(str(error))
            return errors.response(context, 500, error)
        except InputError as error:
            context.logger.warn(f"request refused: {error}")
            return errors.response(context, 400, error)
        except Exception as error:  # noqa: BLE001  a bug that one request meets must not end the function
            context.logger.error(f"unexpected error: {traceback.format_exc()}")
            unexpected = SamPollError(f"unexpected {type(error).__name__}: {error}")
            return errors.response(context, 500, unexpected)
        size, elapsed_ms = prepared.size, (time.monotonic() - started) * 1000
        context.logger.info(f"{size.width}×{size.height} answered in {elapsed_ms:.0f} ms")
        return context.Response(
            body=body, headers={}, content_type="application/json", status_code=200
        )


def _options(env: Mapping[str, str]) -> dict[str, Any]:
    """Return the Service's options from the environment. Raises SettingsError."""
    options: dict[str, Any] = {
        "box_first": env.get(STARTSWITH_BOX, "").lower() in ("1", "true", "yes", "on")
    }
    if form := env.get(INTERACTOR_ANSWER, "").strip():
        options["answer_form"] = answer_form.parse_setting(form, INTERACTOR_ANSWER)
    if label := env.get(LABEL, "").strip():
        options["label"] = label
    if texts := env.get(TEXTS, "").strip():
        options["concept"] = _concept(texts)
    if points := env.get(POINTS_PER_SIDE, "").strip():
        if not points.isdecimal() or not 1 <= int(points) <= MAX_POINTS_PER_SIDE:
            raise SettingsError(
                f"{points!r} is not a number from 1 to {MAX_POINTS_PER_SIDE}", place=POINTS_PER_SIDE
            )
        options["automatic"] = AutomaticMaskRequest(points_per_side=int(points))
    return options


def _concept(texts: str) -> ConceptRequest:
    """Return the request for texts separated by commas. Raises SettingsError."""
    with _texts_refused():
        return parser.concept_of(text.strip() for text in texts.split(","))


@contextmanager
def _texts_refused() -> Iterator[None]:
    """Convert the refusal of a text of the environment to a SettingsError."""
    try:
        yield
    except PromptError as error:
        raise SettingsError(
            f"{error.place}: {error.reason}", place=TEXTS, remedy=error.remedy
        ) from None
