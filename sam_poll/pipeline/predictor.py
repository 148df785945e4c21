"""Synchronous predictions: one caller at a time gets one answer (CVAT functions, nuclio, scripts).

The same parts as in the pipeline: pictures decoded at the network's scale, embeddings cached by
content, prompts checked against the picture, the engine's memory plan. Callable from any thread; a
lock lets one at a time use the device.

Limitations: a call on the device cannot be interrupted, and all others wait for it. After a
`DeviceError` every further call raises it again: the process must be replaced.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sam_poll.core.errors import DeviceError, DeviceOutOfMemoryError, InputError, PictureError
from sam_poll.core.protocols import Embedding, Engine
from sam_poll.core.stats import Stats
from sam_poll.core.types import (
    AutomaticMaskRequest,
    ConceptRequest,
    FloatArray,
    Mask,
    ModelInfo,
    ModelInput,
    Picture,
    Prompt,
    RgbArray,
    Size,
)
from sam_poll.imaging import automatic_masks, decode, found_objects, masks
from sam_poll.pipeline.disk_cache import DiskCache
from sam_poll.pipeline.embedding_cache import CachedEmbedding, EmbeddingCache
from sam_poll.pipeline.stored_embeddings import StoredEmbeddings
from sam_poll.prompts import parser

# Prepared pictures that are kept, 3 MB each at a side of 1024: a further click does not decode
# again.
PICTURES = 16
# Side of the embedding that CVAT's decoder in the browser takes: that of SAM1 at 1024 pixels.
BROWSER_SIDE = 64
# Family → why a decoder elsewhere, as CVAT's in the browser, cannot take its embeddings. Those of
# MobileSAM are made for the decoder of sam_vit_h, with which its encoder was trained, and which is
# CVAT's.
_NOT_DECODABLE = {
    "sam2": "no decoder outside this program takes one of SAM2",
    "edgetam": "no decoder outside this program takes one of EdgeTAM",
    "sam3": "no decoder outside this program takes one of SAM3",
    "sam-hq": (
        "its masks need an early feature map of the encoder, too, "
        "which decoders of SAM1 do not take"
    ),
}


@dataclass(frozen=True, slots=True, eq=False)
class PreparedImage:
    """A picture that is ready for predictions.

    `size` is that of the upright picture at full resolution, `digest` that of its content, hex. Its
    embedding is in the predictor's cache; if it is evicted there, it is made again from `prepared`,
    or from `source` where it was found on the disk, so that the picture was not decoded.
    """

    size: Size
    digest: str
    notes: tuple[str, ...] = ()
    prepared: ModelInput | None = None
    source: bytes | RgbArray | None = None


class Predictor:
    """Answers prompts about pictures, one call at a time, from any thread.

    - `cache_mib`: memory for embeddings; the last one is always kept.
    - `max_pixels`: pictures with more are rejected.
    - `disk_cache`: embeddings that stay; None: none do.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        cache_mib: int = 512,
        max_pixels: int = decode.DEFAULT_MAX_PIXELS,
        disk_cache: DiskCache | None = None,
    ) -> None:
        self._engine = engine
        self._max_pixels = max_pixels
        self._embeddings = EmbeddingCache(cache_mib << 20)
        engine.on_memory_pressure(self._embeddings.evict)
        self._stored = StoredEmbeddings(engine, disk_cache, Stats().cached)
        self._pictures: OrderedDict[str, PreparedImage] = OrderedDict()
        self._lock = threading.Lock()
        self._pictures_lock = threading.Lock()
        self._fatal: DeviceError | None = None

    @property
    def info(self) -> ModelInfo:
        """The loaded network, and how it runs now."""
        return self._engine.info

    def embed(self, picture: bytes | RgbArray) -> PreparedImage:
        """Prepare a picture: a file's bytes, or upright RGB pixels (uint8, H×W×3).

        The same content again costs neither decoding nor encoding, as long as it is cached.
        Raises PictureError.
        """
        if isinstance(picture, bytes):
            digest = decode.digest_of(picture)
        else:
            digest = _digest_of_pixels(picture)
        with self._pictures_lock:
            known = self._pictures.get(digest)
            if known:
                self._pictures.move_to_end(digest)
        # A smaller side than the engine's: it was prepared when there was less memory.
        if known is None or (known.prepared and known.prepared.frame.side < self.info.side):
            known = self._read(picture, digest)
            with self._pictures_lock:
                self._pictures[digest] = known
                while len(self._pictures) > PICTURES:
                    self._pictures.popitem(last=False)
        with self._device():
            self._embedding(known)
        return known

    def predict(self, known: PreparedImage, prompts: Sequence[Prompt]) -> list[Mask]:
        """Return one mask for each prompt, in order.

        Raises PromptError when a prompt does not fit the picture.
        """
        fitted = parser.fit(prompts, known.size)
        with self._device():
            logits = self._engine.decode(self._embedding(known), fitted)
        return [
            masks.mask_of(one, prompt.label) for one, prompt in zip(logits, fitted, strict=True)
        ]

    def everything(
        self,
        known: PreparedImage,
        request: AutomaticMaskRequest | None = None,
        label: str = "object",
    ) -> list[Mask]:
        """Return the masks of all objects that are found without a prompt, the best first."""
        request = request or AutomaticMaskRequest()
        with self._device():
            packed = automatic_masks.segment(self._engine, self._embedding(known), request)
        return automatic_masks.masks(packed, request, label)

    def check_concept(self, request: ConceptRequest) -> None:
        """Raise PromptError when the network takes no such request, whatever the picture is."""
        self._engine.check_concept(request)

    def find(
        self, known: PreparedImage, request: ConceptRequest
    ) -> tuple[list[Mask], tuple[str, ...]]:
        """Return the masks of all objects of a kind, the best first, and notes on them.

        The label of each is its text. Raises PromptError when the network takes no such request, or
        the request does not fit the picture.
        """
        fitted = parser.fit_request(request, known.size)
        assert isinstance(fitted, ConceptRequest)
        self.check_concept(fitted)
        with self._device():
            found = found_objects.search(self._engine, self._embedding(known), fitted)
        notes = found_objects.notes_on_same_masks(found.objects)
        return found_objects.masks(found.objects), fitted.notes + found.notes + notes

    def image_embedding(self, known: PreparedImage) -> FloatArray:
        """Return SAM1's embedding of a picture for a decoder elsewhere (CVAT's browser).

        float32, 1×256×64×64. Raises InputError for another network, and DeviceOutOfMemoryError
        while memory is too short for a side of 1024.
        """
        check_decodable_elsewhere(self.info)
        with self._device():
            embedding = self._embedding(known).array()
        return for_browsers(embedding, self.info)

    @contextmanager
    def _device(self) -> Iterator[None]:
        """Hold the device for one thread; after the device has failed, raise its error again."""
        with self._lock:
            if self._fatal:
                raise self._fatal
            try:
                yield
            except DeviceError as error:
                self._fatal = error
                raise

    def _read(self, picture: bytes | RgbArray, digest: str) -> PreparedImage:
        found = self._find(digest)
        if found:
            size = found.embedding.frame.size
            return PreparedImage(size, digest, found.notes, source=picture)
        return self._prepare(picture, digest)

    def _find(self, digest: str) -> CachedEmbedding | None:
        """Return an embedding from the disk, and cache it in memory."""
        stored = self._stored.find(digest, self.info, self._max_pixels)
        if stored is None:
            return None
        self._embeddings.put((digest, stored.key.side), *stored.cached)
        return stored.cached

    def _prepare(self, picture: bytes | RgbArray, digest: str) -> PreparedImage:
        if isinstance(picture, bytes):
            decoded = decode.decode_for(
                picture, self.info, max_pixels=self._max_pixels, digest=digest
            )
        else:
            decoded = Picture(picture, _size_of(picture, self._max_pixels), digest)
        prepared = self._engine.prepare(decoded)
        return PreparedImage(decoded.size, digest, decoded.notes, prepared)

    def _embedding(self, known: PreparedImage) -> Embedding:
        # The key has the side that the embedding was made at, which depends on the free memory.
        cached = self._embeddings.get((known.digest, self.info.side))
        cached = cached or self._find(known.digest)
        if cached:
            return cached.embedding
        prepared = known.prepared
        if prepared is None:
            assert known.source is not None
            prepared = self._prepare(known.source, known.digest).prepared
            assert prepared is not None
        (embedding,) = self._engine.encode([prepared])
        if self._stored.enabled:
            stored = self._stored.take(known.digest, embedding, known.notes)
            self._stored.keep(stored)
            embedding = stored.cached.embedding
        self._embeddings.put((known.digest, embedding.frame.side), embedding, known.notes)
        return embedding


def check_decodable_elsewhere(info: ModelInfo) -> None:
    """Raise InputError for a network whose embeddings no decoder elsewhere takes."""
    reason = _NOT_DECODABLE.get(info.family)
    if reason:
        raise InputError(
            f"the embedding of {info.name} cannot be handed out: {reason}",
            remedy="use a SAM1 network (sam_vit_b, sam_vit_l, sam_vit_h), or mobile_sam",
        )


def for_browsers(embedding: FloatArray, info: ModelInfo) -> FloatArray:
    """Return an embedding as CVAT's decoder in the browser takes it: float32, 1×256×64×64.

    Raises DeviceOutOfMemoryError while memory is too short for a side of 1024.
    """
    if embedding.shape != (1, 256, BROWSER_SIDE, BROWSER_SIDE):
        rows, columns = embedding.shape[2:4]
        raise DeviceOutOfMemoryError(
            f"the embedding was made at a side of {info.side}, as {rows} × {columns}; "
            f"its decoder takes {BROWSER_SIDE} × {BROWSER_SIDE}",
            remedy="free memory on the device; the side should be 1024",
        )
    return np.ascontiguousarray(embedding, dtype=np.float32)


def _digest_of_pixels(pixels: RgbArray) -> str:
    """Return the digest of an array's content, hex, which never equals a file's digest."""
    digest = hashlib.sha256(f"pixels {pixels.shape} ".encode(), usedforsecurity=False)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _size_of(pixels: RgbArray, max_pixels: int) -> Size:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        shape = " × ".join(map(str, pixels.shape))
        raise PictureError(
            f"not RGB pixels: {shape} of {pixels.dtype}", remedy="give H × W × 3 of uint8"
        )
    height, width, _ = pixels.shape
    if height * width > max_pixels:
        raise PictureError(
            f"{width} × {height} is more than {max_pixels:,} pixels",
            remedy="raise limits.picture_mpx if the picture is meant to be so large",
        )
    return Size(width, height)
