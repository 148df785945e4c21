"""Masks of prompts that are not saved yet, by the network that would answer them.

The embedding of a picture is kept, so that a further click takes only the decoder's time.

Limitations: after the device has failed there are no previews until the page is started again.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol, TypeAlias

from loguru import logger

from sam_poll.config.settings import Contours
from sam_poll.core.errors import ModelError, SamPollError
from sam_poll.core.types import ConceptRequest, Job, Prompt
from sam_poll.integrations.http import responses
from sam_poll.integrations.http.errors import UnavailableError
from sam_poll.integrations.http.source import HttpSource, Outcome, PendingResponse
from sam_poll.pipeline.predictor import Predictor

PreviewRequest: TypeAlias = "tuple[Prompt, ...] | ConceptRequest"
"""What is previewed: the objects of prompts, or all objects of a kind."""


class Previewer(Protocol):
    """Makes previews, from any thread."""

    def prepare(self) -> None:
        """Begin to load what is needed; an editor was opened."""

    def preview(self, picture: bytes, request: PreviewRequest) -> bytes:
        """Return the masks of a request as `responses.preview_body`. Raises SamPollError."""


class ModelPreviewer:
    """Previews by a network of this process, which `load` loads when the first editor is opened."""

    def __init__(self, load: Callable[[], Predictor], contours: Contours) -> None:
        self._load = load
        self._contours = contours
        self._lock = threading.Lock()
        self._predictor: Predictor | None = None
        self._error: SamPollError | None = None

    def prepare(self) -> None:
        """Load the network on a thread of its own."""
        threading.Thread(target=self._try_to_load, name="load-model", daemon=True).start()

    def preview(self, picture: bytes, request: PreviewRequest) -> bytes:
        """Return the masks of a request; waits while the network is being loaded."""
        predictor = self._loaded()
        known = predictor.embed(picture)
        if isinstance(request, ConceptRequest):
            found, _ = predictor.find(known, request)
        else:
            found = predictor.predict(known, request)
        return responses.preview_body(found, predictor.info, self._contours)

    def _try_to_load(self) -> None:
        try:
            self._loaded()
        except SamPollError as error:
            logger.warning("there are no previews: {}", error)
        except Exception as error:  # noqa: BLE001  the page works without previews
            logger.opt(exception=True).error("the model cannot be loaded: {}", error)

    def _loaded(self) -> Predictor:
        with self._lock:
            if self._error:
                raise self._error
            if self._predictor is None:
                try:
                    self._predictor = self._load()
                except SamPollError as error:
                    self._error = error
                    raise
                except Exception as error:
                    self._error = ModelError(
                        f"the model cannot be loaded: {error}", remedy="run `sam-poll doctor`"
                    )
                    raise
            return self._predictor


class SourcePreviewer:
    """Previews by the pipeline of a running `sam-poll serve`."""

    def __init__(self, source: HttpSource, timeout_s: float) -> None:
        self._source = source
        self._timeout_s = timeout_s

    def prepare(self) -> None:
        """Do nothing: the server's network is loaded."""

    def preview(self, picture: bytes, request: PreviewRequest) -> bytes:
        """Return the masks of a request, as a request of the server's."""
        answers: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        pending = PendingResponse(answers.put)
        job = Job("preview", "preview", picture, request, formats=(responses.PREVIEW,))
        with self._source.place():
            self._source.offer(job, pending)
            try:
                outcome = answers.get(timeout=self._timeout_s)
            except queue.Empty:
                raise UnavailableError(
                    f"there was no preview within {self._timeout_s:g} s", remedy="try again"
                ) from None
            finally:
                self._source.give_up(pending)
        if isinstance(outcome, SamPollError):
            raise outcome
        return outcome[0].body
