"""The server's endpoints: a request becomes a job, waits for its end, and is answered.

Bodies are parsed, and answers put together, by a few threads, so that the event loop only waits.

Limitations: an answer is dropped if its client disconnects after the network has begun with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from fastapi import FastAPI, Request
from loguru import logger
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sam_poll import __version__
from sam_poll.core.errors import DeviceError, InputError, InternalError, SamPollError
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Job, OutputFile
from sam_poll.formats import registry
from sam_poll.integrations.http import openapi, requests, responses
from sam_poll.integrations.http.errors import (
    CLIENT_CLOSED,
    MethodError,
    NotFoundError,
    RefusalError,
    RequestTimeoutError,
    UnavailableError,
    response,
)
from sam_poll.integrations.http.source import (
    HttpSource,
    Outcome,
    PendingResponse,
    loading_error,
    stopping_error,
)
from sam_poll.integrations.nuclio import answer_form
from sam_poll.pipeline import predictor
from sam_poll.prompts.parser import PromptFile
from sam_poll.runtime import metrics

_CHUNK_BYTES = 256 << 10  # of an answer: this much of it is buffered for a slow client
_THREADS = 4  # that parse bodies and put answers together; docs/serve.md states the number


@dataclass(frozen=True)
class ServerOptions:
    """Options of the endpoints, from the settings.

    `parse`: parses prompts. `formats`: the formats of requests that select none. `bundles`: the
    formats that may make several files. `min_decode_side`: side length in pixels that a picture is
    decoded to at least for the format `overlay`. `timeout_s`: time for a request in seconds, from
    its first byte to its answer. `keeps_embeddings`: there is a disk cache.
    """

    parse: Callable[[bytes], PromptFile]
    formats: tuple[str, ...]
    bundles: frozenset[str]
    min_decode_side: int
    timeout_s: float
    keeps_embeddings: bool = False


class ChunkedResponse(Response):
    """A body that is sent in pieces, no faster than its client reads, and for `limit_s` at most."""

    def __init__(self, body: bytes, media_type: str, limit_s: float) -> None:
        super().__init__(body, media_type=media_type)
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(self._send(send), self._limit_s)
        except asyncio.TimeoutError:
            # uvicorn closes the connection of an answer that is not complete.
            logger.warning("a client did not read its answer within {:g} s", self._limit_s)

    async def _send(self, send: Send) -> None:
        start = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        body = memoryview(self.body)
        for offset in range(0, max(1, len(body)), _CHUNK_BYTES):
            chunk = {
                "type": "http.response.body",
                "body": bytes(body[offset : offset + _CHUNK_BYTES]),
                "more_body": offset + _CHUNK_BYTES < len(body),
            }
            await send(chunk)


class Server:
    """The endpoints. Each public method is one of them."""

    def __init__(
        self,
        source: HttpSource,
        telemetry: Telemetry,
        options: ServerOptions,
        is_stopping: Callable[[], bool],
    ) -> None:
        self._source = source
        self._telemetry = telemetry
        self._options = options
        self._is_stopping = is_stopping
        self._threads = ThreadPoolExecutor(_THREADS, "requests")
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(metrics.MetricsCollector(telemetry, source))

    # ── predictions ──

    async def predict(self, request: Request) -> Response:
        """Answer POST /predict: a picture and prompts → output files of the selected formats."""

        def make_job(parsed: requests.PredictRequest) -> Job:
            formats = parsed.formats or self._options.formats
            side = self._options.min_decode_side if registry.draws(formats) else 0
            return _job(parsed, formats, min_decode_side=side)

        def make_response(job: Job, outputs: Sequence[OutputFile]) -> Response:
            assert job.formats is not None
            if len(job.formats) == 1 and job.formats[0] not in self._options.bundles:
                return self._single_file(job, outputs)
            body = responses.bundle(job.name, outputs)
            return ChunkedResponse(body, "application/json", self._options.timeout_s)

        parse = partial(requests.parse_predict, parse=self._options.parse)
        return await self._answer(request, parse, make_job, make_response)

    async def interact(self, request: Request) -> Response:
        """Answer POST /interact as CVAT's interactors do: clicks and a box → the object's mask.

        Without clicks and box: the masks of all objects. The form of the answer follows from the
        parameter `answer`, else from the version of CVAT that the `User-Agent` names.
        """

        def make_job(parsed: requests.PredictRequest) -> Job:
            word = request.query_params.get("answer", answer_form.AUTO)
            setting = answer_form.parse_setting(word, "answer", InputError)
            form = answer_form.form_for(request.headers.get("user-agent", ""), setting)
            return _job(parsed, (responses.INTERACT[form],))

        return await self._answer(request, requests.parse_interact, make_job, self._single_file)

    async def features(self, request: Request) -> Response:
        """Answer POST /features as CVAT's SAM1 function does: the picture's embedding.

        CVAT's browser decodes it. Raises InputError for a model that no browser decodes.
        """
        if self._telemetry.info:
            predictor.check_decodable_elsewhere(self._telemetry.info)

        def make_job(parsed: requests.PredictRequest) -> Job:
            return _job(parsed, (responses.FEATURES,), embedding=True)

        parse = partial(requests.parse_interact, clicks=False)
        return await self._answer(request, parse, make_job, self._single_file)

    async def warm(self, request: Request) -> Response:
        """Answer POST /warm: encode a picture and keep its embedding on the disk.

        Raises InputError where the settings keep none.
        """

        def make_job(parsed: requests.PredictRequest) -> Job:
            if not self._options.keeps_embeddings:
                raise InputError(
                    "this server keeps no embeddings on a disk",
                    place="cache.disk_mib",
                    remedy="set it in the server's settings",
                )
            return replace(_job(parsed, (responses.WARM,)), keep=True)

        return await self._answer(request, requests.parse_warm, make_job, self._single_file)

    # ── state of the server ──

    async def health(self) -> Response:
        """Answer GET /health with the server's state: 200 when it is ready, else 503.

        `live`: no loop hangs. `ready`: live, the model is loaded, and requests are accepted.
        """
        telemetry, source = self._telemetry, self._source
        info = telemetry.info
        stats = telemetry.stats.now()
        live = "stuck" not in telemetry.alarms
        ready = live and self._unavailable() is None
        model = memory = None
        if info:
            names = ("name", "family", "device", "precision", "side")
            model = {name: getattr(info, name) for name in names}
            memory = {
                "step": info.step,
                "peak_mib": info.peak_mib,
                "out_of_memory": telemetry.ooms,
            }
        body = {
            "live": live,
            "ready": ready,
            "version": __version__,
            "model": model,
            "memory": memory,
            "requests": {
                "places": source.places,
                "taken": source.inside,
                "waiting": source.waiting,
                "at_work": stats.at_work,
                "answered": stats.answered,
                "rejected": stats.rejected,
            },
        }
        return JSONResponse(body, 200 if ready else 503)

    async def metrics(self) -> Response:
        """Answer GET /metrics for Prometheus."""
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return Response(generate_latest(self._registry), headers=headers)

    # ── from request to response ──

    def _single_file(self, job: Job, outputs: Sequence[OutputFile]) -> Response:
        (output,) = outputs
        media_type = output.media_type
        if media_type.startswith("text/"):
            media_type += "; charset=utf-8"
        return ChunkedResponse(output.body, media_type, self._options.timeout_s)

    def _unavailable(self) -> RefusalError | None:
        """Return why requests are not accepted at present, or None."""
        if self._is_stopping():
            return stopping_error()
        if not self._source.serving or not self._telemetry.info:
            return loading_error()
        return None

    async def _answer(
        self,
        request: Request,
        parse: Callable[[str, bytes], requests.PredictRequest],
        make_job: Callable[[requests.PredictRequest], Job],
        make_response: Callable[[Job, Sequence[OutputFile]], Response],
    ) -> Response:
        """Have a request's job done. `parse` gets the content type and the body."""
        try:
            return await self._process(request, parse, make_job, make_response)
        except ClientDisconnect:
            logger.info("a client disconnected before its answer")
            return Response(status_code=CLIENT_CLOSED)
        except SamPollError as error:
            if not isinstance(error, (InternalError, DeviceError)):  # these are in the log already
                logger.info("{} refused: {}", request.url.path, error)
            return response(error)
        except Exception as error:  # noqa: BLE001  a bug in one request must not end the others
            name = type(error).__name__
            logger.opt(exception=True).error("unexpected {}", name)
            return response(InternalError(f"unexpected {name}", remedy="look at the server's log"))

    async def _process(
        self,
        request: Request,
        parse: Callable[[str, bytes], requests.PredictRequest],
        make_job: Callable[[requests.PredictRequest], Job],
        make_response: Callable[[Job, Sequence[OutputFile]], Response],
    ) -> Response:
        deadline = time.monotonic() + self._options.timeout_s
        loop = asyncio.get_running_loop()
        if unavailable := self._unavailable():
            raise unavailable
        body = await self._read_body(request, deadline)
        content_type = request.headers.get("content-type", "")
        parsed = await loop.run_in_executor(self._threads, parse, content_type, body)
        del body  # the picture is in `parsed`
        job = make_job(parsed)
        outcome = await self._wait_for_outcome(request, job, deadline)
        if isinstance(outcome, SamPollError):
            raise outcome
        return await loop.run_in_executor(self._threads, make_response, job, outcome)

    async def _read_body(self, request: Request, deadline: float) -> bytes:
        try:
            return await asyncio.wait_for(request.body(), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise RequestTimeoutError(
                f"the body is not complete after {self._options.timeout_s:g} s",
                place="body",
                remedy="send it faster, or raise serve.timeout_s",
            ) from None

    async def _wait_for_outcome(self, request: Request, job: Job, deadline: float) -> Outcome:
        """Offer a job to the pipeline; return how it ends.

        Raises ClientDisconnect if the client disconnects first, UnavailableError at the deadline.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()

        def settle(outcome: Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        def tell(outcome: Outcome) -> None:
            """Set the response, from a thread of the pipeline."""
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, outcome)

        pending = PendingResponse(tell)
        disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            self._source.offer(job, pending)
            waits: set[asyncio.Future[Any]] = {future, disconnected}
            limit_s = max(0.0, deadline - time.monotonic())
            await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            if disconnected.done():
                raise ClientDisconnect
            raise UnavailableError(
                f"not answered within {self._options.timeout_s:g} s",
                remedy="send it again when fewer requests wait, or raise serve.timeout_s",
                wait_s=self._options.timeout_s / 2,
            )
        finally:
            self._source.give_up(pending)
            disconnected.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _job(
    parsed: requests.PredictRequest,
    formats: tuple[str, ...],
    *,
    min_decode_side: int = 0,
    embedding: bool = False,
) -> Job:
    file = parsed.file
    return Job(
        PurePosixPath(parsed.name).with_suffix("").as_posix(),
        parsed.name,
        parsed.picture,
        file.prompts,
        sha256=file.image_sha256,
        nbytes=file.image_bytes,
        image_size=file.image_size,
        formats=formats,
        min_decode_side=min_decode_side,
        embedding=embedding,
    )


def create_app(
    source: HttpSource,
    telemetry: Telemetry,
    options: ServerOptions,
    is_stopping: Callable[[], bool],
) -> FastAPI:
    """Return the ASGI application: all endpoints, and /openapi.json, which describes them."""
    server = Server(source, telemetry, options, is_stopping)
    # FastAPI's own documentation pages would load scripts from other servers.
    app = FastAPI(
        title="sam_poll", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    posts = {
        "/predict": server.predict,
        "/interact": server.interact,
        "/features": server.features,
        "/warm": server.warm,
    }
    for path, post in posts.items():
        app.add_api_route(
            path, post, methods=["POST"], response_class=Response, **openapi.route(path)
        )
    for path, get in {"/health": server.health, "/metrics": server.metrics}.items():
        app.add_api_route(
            path, get, methods=["GET"], response_class=Response, **openapi.route(path)
        )

    async def refuse(request: Request, error: Any) -> Response:
        return response(error)

    async def refuse_path_or_method(request: Request, error: Any) -> Response:
        kind = MethodError if error.status_code == 405 else NotFoundError
        refusal = kind(
            "there is no such path, or not with this method",
            place=request.url.path[:200],
            remedy="/openapi.json lists paths and methods",
        )
        return response(refusal, error.headers)

    app.add_exception_handler(SamPollError, refuse)
    app.add_exception_handler(HTTPException, refuse_path_or_method)
    openapi.describe(app)
    return app
