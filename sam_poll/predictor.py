"""The synchronous way in: one caller at a time gets one answer, for CVAT's functions and whoever else calls.

The same parts as the pipeline: pictures decoded at the network's scale, embeddings kept by content, prompts fitted, the
memory plan of the engine. From any thread; a lock sees to it that one at a time is on the device.

What can still go wrong here: a call on the device cannot be broken off, and all others wait for it. After a
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

from sam_poll import everything, geometry, images, prompts
from sam_poll.embeddings import Embeddings
from sam_poll.errors import DeviceError, InputError, PictureError, TooLargeError
from sam_poll.types import (
    Embedding,
    Engine,
    Everything,
    Field,
    Mask,
    ModelInfo,
    Picture,
    Pixels,
    Prepared,
    Prompt,
    Size,
)

PICTURES = 16  # remembered as the network wants them, 3 MB each at a side of 1024: a click does not decode them again
BROWSER_SIDE = 64  # of the embedding that CVAT's decoder in the browser takes: SAM1 at 1024 pixels


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """A picture that can be asked about. Its embedding lies with the predictor, where memory may take it away again;
    then it is made anew from `prepared`."""

    prepared: Prepared
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> Size:
        """Of the upright picture at full resolution."""
        return self.prepared.frame.size

    @property
    def digest(self) -> str:
        """The picture's content, hex."""
        return self.prepared.digest


class Predictor:
    """Answers prompts about pictures, one call at a time, from any thread.

    `cache_mib` of embeddings are kept, and the last always. Pictures of more than `max_pixels` are refused.
    """

    def __init__(self, engine: Engine, *, cache_mib: int = 512, max_pixels: int = images.DEFAULT_MAX_PIXELS) -> None:
        self._engine, self._max_pixels = engine, max_pixels
        self._embeddings = Embeddings(cache_mib << 20)
        engine.relieve_by(self._embeddings.let_go)
        self._pictures: OrderedDict[str, Known] = OrderedDict()
        self._lock, self._pictures_lock = threading.Lock(), threading.Lock()
        self._fatal: DeviceError | None = None

    @property
    def info(self) -> ModelInfo:
        """Which network answers, and how it runs now."""
        return self._engine.info

    def embed(self, picture: bytes | Pixels) -> Known:
        """Makes a picture known: a file's bytes, or upright RGB pixels (uint8, H×W×3). PictureError.

        The same content again costs neither decoding nor encoding, as long as it is remembered.
        """
        digest = images.digest_of(picture) if isinstance(picture, bytes) else _digest_of_pixels(picture)
        with self._pictures_lock:
            known = self._pictures.get(digest)
            if known:
                self._pictures.move_to_end(digest)
        if known is None or known.prepared.frame.side < self.info.side:  # it was made when there was less memory
            known = self._read(picture, digest)
            with self._pictures_lock:
                self._pictures[digest] = known
                while len(self._pictures) > PICTURES:
                    self._pictures.popitem(last=False)
        with self._device():
            self._embedding(known)
        return known

    def predict(self, known: Known, asked: Sequence[Prompt]) -> list[Mask]:
        """One mask for each prompt, in order. PromptError where one does not fit the picture."""
        fitted = prompts.fit(asked, known.size)
        with self._device():
            logits = self._engine.decode(self._embedding(known), fitted)
        return [geometry.mask_of(found, prompt.label) for found, prompt in zip(logits, fitted, strict=True)]

    def everything(self, known: Known, asked: Everything | None = None, label: str = "object") -> list[Mask]:
        """All objects that are found without a prompt, the best first."""
        asked = asked or Everything()
        with self._device():
            found = everything.segment(self._engine, self._embedding(known), asked)
        return everything.masks(found, asked, label)

    def image_embedding(self, known: Known) -> Field:
        """SAM1's embedding of the picture, float32, 1×256×64×64, for a decoder that runs elsewhere (CVAT's browser).

        InputError for another network; TooLargeError while memory is too short for a side of 1024.
        """
        check_decodable_elsewhere(self.info)
        with self._device():
            made = self._embedding(known).array()
        return for_browsers(made, self.info)

    @contextmanager
    def _device(self) -> Iterator[None]:
        """One thread at a time; after the device has failed, nobody."""
        with self._lock:
            if self._fatal:
                raise self._fatal
            try:
                yield
            except DeviceError as error:
                self._fatal = error
                raise

    def _read(self, picture: bytes | Pixels, digest: str) -> Known:
        if isinstance(picture, bytes):
            decoded = images.decode_for(picture, self.info, max_pixels=self._max_pixels, digest=digest)
        else:
            decoded = Picture(picture, _size_of(picture, self._max_pixels), digest)
        return Known(self._engine.prepare(decoded), decoded.notes)

    def _embedding(self, known: Known) -> Embedding:
        """On the device thread. Kept by the side that it was made at, which follows memory."""
        kept = self._embeddings.get((known.digest, self.info.side))
        if kept:
            return kept.embedding
        (made,) = self._engine.encode([known.prepared])
        self._embeddings.put((known.digest, made.frame.side), made, known.notes)
        return made


def check_decodable_elsewhere(info: ModelInfo) -> None:
    """InputError for a network whose embeddings nobody else can decode."""
    if info.family == "sam2":
        raise InputError(
            f"the embedding of {info.name} cannot be handed out: SAM2 has no decoder elsewhere that takes it",
            remedy="use a SAM1 network (sam_vit_b, sam_vit_l, sam_vit_h)",
        )


def for_browsers(made: Field, info: ModelInfo) -> Field:
    """An embedding as CVAT's decoder in the browser takes it: float32, 1×256×64×64. TooLargeError while memory is too
    short for a side of 1024."""
    if made.shape != (1, 256, BROWSER_SIDE, BROWSER_SIDE):
        raise TooLargeError(
            f"the embedding was made at a side of {info.side}, as {made.shape[2]} × {made.shape[3]}; "
            f"its decoder takes {BROWSER_SIDE} × {BROWSER_SIDE}",
            remedy="free memory on the device; the side should be 1024",
        )
    return np.ascontiguousarray(made, dtype=np.float32)


def _digest_of_pixels(pixels: Pixels) -> str:
    """The content of an array, hex: never that of a file."""
    digest = hashlib.sha256(f"pixels {pixels.shape} ".encode(), usedforsecurity=False)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _size_of(pixels: Pixels, max_pixels: int) -> Size:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        shape = " × ".join(map(str, pixels.shape))
        raise PictureError(f"not RGB pixels: {shape} of {pixels.dtype}", remedy="give H × W × 3 of uint8")
    height, width, _ = pixels.shape
    if height * width > max_pixels:
        raise PictureError(
            f"{width} × {height} is more than {max_pixels:,} pixels",
            remedy="raise limits.picture_mpx if it is meant to be so large",
        )
    return Size(width, height)
