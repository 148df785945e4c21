"""The server's addresses: each request becomes a job, waits for its end, and is answered.

Reading bodies and putting answers together is done by a few threads, so that the loop only waits.

What can still go wrong here: the answer is there when its caller has gone; it is dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

from sam_poll import __version__, metrics, predictor
from sam_poll.errors import DeviceError, SamPollError, UnforeseenError
from sam_poll.health import Signs
from sam_poll.prompts import PromptFile
from sam_poll.serve import answers, asked, schemas
from sam_poll.serve.door import Exchange, HttpDoor, Outcome, loading, stopping
from sam_poll.serve.refusals import (
    GONE,
    AddressError,
    MethodError,
    RefusalError,
    SlowError,
    UnavailableError,
    response,
)
from sam_poll.types import Document, Job

_PIECE = 256 << 10  # of an answer: what one who reads slowly leaves in memory
_READERS = 4


@dataclass(frozen=True)
class Terms:
    """What the server keeps to. `parse` reads prompts; `formats` are for those who name none; those of `bundles` may
    make several documents; a picture is decoded with sides of at least `cover` for the overlay."""

    parse: Callable[[bytes], PromptFile]
    formats: tuple[str, ...]
    bundles: frozenset[str]
    cover: int
    timeout_s: float


class Pieces(Response):
    """A document that is sent piece by piece, no faster than it is read, and no longer than `limit_s`."""

    def __init__(self, body: bytes, media_type: str, limit_s: float) -> None:
        super().__init__(body, media_type=media_type)
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(self._send(send), self._limit_s)
        except asyncio.TimeoutError:  # the connection is closed by who sees that the answer is not whole
            logger.warning("an answer has not been read within {:g} s: given up", self._limit_s)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = memoryview(self.body)
        for at in range(0, max(1, len(body)), _PIECE):
            more = at + _PIECE < len(body)
            await send({"type": "http.response.body", "body": bytes(body[at : at + _PIECE]), "more_body": more})


class Server:
    """The endpoints."""

    def __init__(self, door: HttpDoor, signs: Signs, terms: Terms, stop: Callable[[], bool]) -> None:
        self._door, self._signs, self._terms, self._stop = door, signs, terms, stop
        self._readers = ThreadPoolExecutor(_READERS, "requests")
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(metrics.Numbers(signs, door))

    # ── what is asked ──

    async def predict(self, request: Request) -> Response:
        """A picture and prompts as in a prompt file; answered in the formats that are asked for."""

        def job(found: asked.Asked) -> Job:
            wanted = found.formats or self._terms.formats
            return _job(found, wanted, cover=self._terms.cover if "overlay" in wanted else 0)

        def reply(job: Job, documents: Sequence[Document]) -> Response:
            assert job.formats is not None
            if len(job.formats) == 1 and job.formats[0] not in self._terms.bundles:
                return self._only(job, documents)
            return Pieces(answers.bundle(job.name, documents), "application/json", self._terms.timeout_s)

        return await self._answered(request, partial(asked.predict, parse=self._terms.parse), job, reply)

    async def interact(self, request: Request) -> Response:
        """CVAT's interactor: clicks, a box, or both → the mask of the whole picture; nothing → everything."""
        return await self._answered(request, asked.interact, lambda a: _job(a, (answers.INTERACT,)), self._only)

    async def features(self, request: Request) -> Response:
        """CVAT's SAM1: the picture's embedding, which the browser decodes."""
        if self._signs.info:
            predictor.check_decodable_elsewhere(self._signs.info)

        def job(found: asked.Asked) -> Job:
            return _job(found, (answers.FEATURES,), embedding=True)

        return await self._answered(request, partial(asked.interact, clicks=False), job, self._only)

    # ── what it looks like inside ──

    async def health(self) -> Response:
        """Live: nothing hangs. Ready: the network is loaded and requests are answered. 503 while one of them is not."""
        signs, door = self._signs, self._door
        info, now = signs.info, signs.stats.now()
        live = "stuck" not in signs.alarms
        ready = live and self._refusal() is None
        body = {
            "live": live,
            "ready": ready,
            "version": __version__,
            "model": info and {key: getattr(info, key) for key in ("name", "family", "device", "precision", "side")},
            "memory": info and {"step": info.step, "peak_mib": info.peak_mib, "out_of_memory": signs.ooms},
            "requests": {
                "places": door.places,
                "taken": door.inside,
                "waiting": door.waiting,
                "at_work": now.at_work,
                "answered": now.answered,
                "rejected": now.rejected,
            },
        }
        return JSONResponse(body, 200 if ready else 503)

    async def metrics(self) -> Response:
        """The numbers for Prometheus."""
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    # ── on the way ──

    def _only(self, job: Job, documents: Sequence[Document]) -> Response:
        (document,) = documents
        kind = document.media_type + ("; charset=utf-8" if document.media_type.startswith("text/") else "")
        return Pieces(document.body, kind, self._terms.timeout_s)

    def _refusal(self) -> RefusalError | None:
        if self._stop():
            return stopping()
        return None if self._door.serving and self._signs.info else loading()

    async def _answered(
        self,
        request: Request,
        read: Callable[[str, bytes], asked.Asked],
        job: Callable[[asked.Asked], Job],
        reply: Callable[[Job, Sequence[Document]], Response],
    ) -> Response:
        deadline = time.monotonic() + self._terms.timeout_s
        loop = asyncio.get_running_loop()
        try:
            if refusal := self._refusal():
                raise refusal
            body = await self._body(request, deadline)
            found = await loop.run_in_executor(self._readers, read, request.headers.get("content-type", ""), body)
            del body
            made = job(found)
            outcome = await self._outcome(request, made, deadline)
            if isinstance(outcome, SamPollError):
                raise outcome
            return await loop.run_in_executor(self._readers, reply, made, outcome)
        except ClientDisconnect:
            logger.info("a request's caller has gone")
            return Response(status_code=GONE)
        except SamPollError as error:
            if not isinstance(error, (UnforeseenError, DeviceError)):  # the log has these
                logger.info("{} refused: {}", request.url.path, error)
            return response(error)
        except Exception as error:  # noqa: BLE001  one request's surprise must not end the others
            logger.opt(exception=True).error("unexpected {}", type(error).__name__)
            return response(UnforeseenError(f"unexpected {type(error).__name__}", remedy="look at the server's log"))

    async def _body(self, request: Request, deadline: float) -> bytes:
        try:
            return await asyncio.wait_for(request.body(), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            reason = f"the body is not all there after {self._terms.timeout_s:g} s"
            raise SlowError(reason, place="body", remedy="send it faster; the limit is serve.timeout_s") from None

    async def _outcome(self, request: Request, job: Job, deadline: float) -> Outcome:
        """How the job ends; its caller may leave before."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Outcome] = loop.create_future()

        def settle(outcome: Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        def tell(outcome: Outcome) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, outcome)

        exchange = Exchange(tell)
        left = asyncio.ensure_future(_left(request))
        try:
            self._door.offer(job, exchange)
            waits: set[asyncio.Future[Any]] = {future, left}
            limit = max(0.0, deadline - time.monotonic())
            await asyncio.wait(waits, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if future.done():
                return future.result()
            if left.done():
                raise ClientDisconnect
            reason = f"not answered within {self._terms.timeout_s:g} s"
            remedy = "ask again when there is less to do; the limit is serve.timeout_s"
            raise UnavailableError(reason, remedy=remedy, wait_s=self._terms.timeout_s / 2)
        finally:
            self._door.give_up(exchange)
            left.cancel()


async def _left(request: Request) -> None:
    """Until the caller has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _job(found: asked.Asked, wanted: tuple[str, ...], *, cover: int = 0, embedding: bool = False) -> Job:
    file = found.file
    return Job(
        PurePosixPath(found.name).with_suffix("").as_posix(),
        found.name,
        found.picture,
        file.prompts,
        sha256=file.image_sha256,
        nbytes=file.image_bytes,
        image_size=file.image_size,
        formats=wanted,
        cover=cover,
        embedding=embedding,
    )


def application(door: HttpDoor, signs: Signs, terms: Terms, stop: Callable[[], bool]) -> FastAPI:
    """The addresses, and /openapi.json, which describes them."""
    server = Server(door, signs, terms, stop)
    # No pages of its own: they would load scripts from elsewhere.
    made = FastAPI(title="sam_poll", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for path, endpoint in (
        ("/predict", server.predict),
        ("/interact", server.interact),
        ("/features", server.features),
    ):
        made.add_api_route(path, endpoint, methods=["POST"], response_class=Response, **schemas.route(path))
    for path, look in (("/health", server.health), ("/metrics", server.metrics)):
        made.add_api_route(path, look, methods=["GET"], response_class=Response, **schemas.route(path))

    async def refuse(request: Request, error: Any) -> Response:
        return response(error)

    async def no_such(request: Request, error: Any) -> Response:
        kind = MethodError if error.status_code == 405 else AddressError
        remedy = "/openapi.json has all there are"
        return response(kind("there is no such thing here", place=request.url.path[:200], remedy=remedy), error.headers)

    made.add_exception_handler(SamPollError, refuse)
    made.add_exception_handler(HTTPException, no_such)
    schemas.describe(made)
    return made
