"""What SAM1 and SAM2 have in common on a torch device: batches up, prompts grouped, small logits down, steps changed.

Half precision: the image encoder's weights are stored in half (they are nearly all of the weights, so a small card
holds twice the model), and encoder and decoder run under autocast, which keeps layer norms and softmax in float32.
The prompt encoder stays in float32 outside autocast: its positional encoding multiplies coordinates by 2π·random
numbers, where bfloat16's 8 bits would move a click by several pixels.

What can still go wrong here: out of memory and device faults, raised as torch's own; `adaptive` handles them.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from loguru import logger
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from sam_poll import everything
from sam_poll.engines import cpu_linear
from sam_poll.engines.chunks import chunks, prompt_groups
from sam_poll.engines.faults import kind_of
from sam_poll.engines.memory import Step
from sam_poll.engines.sieve import sieved
from sam_poll.errors import ModelError
from sam_poll.geometry import to_network
from sam_poll.types import Candidate, Embedding, Frame, Logits, ModelInfo, Picture, Pixels, Prepared, Prompt, Size

Weights = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What the encoder made of one picture, on the device it was made on.

    `image` is 1×C×h×w, `high_res` SAM2's two finer levels (1×C/8×4h×4w and 1×C/4×2h×2w), empty for SAM1.
    """

    frame: Frame
    image: Tensor
    high_res: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes for tensor in (self.image, *self.high_res))

    def array(self) -> np.ndarray:
        """`image`, float32, on the host."""
        return self.image.float().contiguous().cpu().numpy()


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of one shape, in the network's pixels: points n×k×2 and labels n×k, boxes n×4 (None: no box)."""

    points: Tensor
    labels: Tensor
    boxes: Tensor | None

    def __len__(self) -> int:
        return len(self.points)


def resized(pixels: Pixels, size: Size) -> Pixels:
    """`pixels` (uint8, h×w×3) at `size`, antialiased bilinear on uint8: 26 times faster than float32 at full size."""
    pixels = np.require(pixels, requirements=["C", "W"])  # torch takes no reversed and warns of read-only memory
    if pixels.shape[:2] == (size.height, size.width):
        return pixels
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return resize(image, [size.height, size.width], antialias=True).permute(1, 2, 0).contiguous().numpy()


class TorchEngine:
    """`types.Engine` on one torch module. Subclasses know the network; see `adaptive.Steppable` for the rest.

    `weights` reads the checkpoint again: the way back from half precision to float32.
    """

    family: ClassVar[str]
    native_side: int

    def __init__(self, model: Any, step: Step, *, name: str, weights: Weights | None = None) -> None:
        self.model = model.eval()
        cpu_linear.install(self.model)
        self.name = name
        self._weights = weights
        self._rounded = False  # weights have been in half precision since they were last read
        self._ready: Step | None = None  # the step that everything is set to; None in the middle of a change
        self._dense_pe: dict[tuple[int, int], Tensor] = {}
        self.apply(step)

    # ── what a network must say ──

    def frame_for(self, size: Size, side: int) -> Frame:
        """How the network's square of `side` lies on a picture of `size`."""
        raise NotImplementedError

    def _set_side(self, side: int) -> None:
        raise NotImplementedError

    def _square(self, pictures: Sequence[Prepared]) -> Tensor:
        """The encoder's input: float32, n×3×side×side, normalised, on the device."""
        raise NotImplementedError

    def _encode(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """`image` and `high_res` of `Features` for the whole batch."""
        raise NotImplementedError

    def _prompt_encoder(self) -> Any:
        raise NotImplementedError

    def _sparse(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """The prompt encoder's sparse and dense embeddings."""
        raise NotImplementedError

    def _masks(
        self, features: Features, pe: Tensor, sparse: Tensor, dense: Tensor, many: bool
    ) -> tuple[Tensor, Tensor]:
        """Logits n×m×h×w and predicted IoU n×m of the mask decoder; m is 3 if `many`, else 1."""
        raise NotImplementedError

    # ── types.Engine ──

    @property
    def info(self) -> ModelInfo:
        step = self.step
        return ModelInfo(
            name=self.name,
            family=self.family,
            side=step.side,
            device=step.device,
            precision=step.precision,
            step=str(step),
        )

    @property
    def batch(self) -> int:
        return self.step.batch

    def prepare(self, picture: Picture) -> Prepared:
        frame = self.frame_for(picture.size, self.step.side)
        return Prepared(resized(picture.pixels, frame.region), frame, picture.digest)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
        """One embedding for each picture, in order, at most `batch` of them at once in the network."""
        self._make_current()
        fitted = [self._fitted(picture) for picture in pictures]
        return [embedding for chunk in chunks(fitted, self.step.batch) for embedding in self._encode_chunk(chunk)]

    @torch.inference_mode()
    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]:
        """One chosen mask for each prompt, in order. Prompts of one shape share decoder calls, so none is padded."""
        self._make_current()
        features = self._here(embedding)
        found: dict[int, Logits] = {}
        for indices in prompt_groups(prompts):
            ambiguous = prompts[indices[0]].ambiguous
            for chunk in chunks(indices, self.step.prompts_per_call):
                batch = self._prompt_batch([prompts[index] for index in chunk], features.frame)
                found.update(zip(chunk, self._decode_chunk(features, batch, ambiguous), strict=True))
        return [found[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def candidates(
        self, embedding: Embedding, points: Sequence[tuple[float, float]], *, iou: float, stability: float
    ) -> list[Candidate]:
        """Of the three masks of each point those that reach both thresholds; only they leave the device."""
        self._make_current()
        features = self._here(embedding)
        found: list[Candidate] = []
        for chunk in chunks(points, self.step.prompts_per_call):
            places = self._coordinates(chunk, features.frame)[:, None]
            labels = torch.ones((len(chunk), 1), dtype=torch.int32, device=self.device)
            logits, scores = self._predict(features, PromptBatch(places, labels, None), many=True)
            kept = sieved(logits.flatten(0, 1), scores.flatten(), features.frame, iou, stability)
            planes, ious, stabilities = (tensor.cpu().numpy() for tensor in kept)
            for plane, score, steady in zip(planes, ious.tolist(), stabilities.tolist(), strict=True):
                if packed := everything.pack(plane, score, steady, features.frame):
                    found.append(packed)
        return found

    def relieve_by(self, let_go: Callable[[], bool]) -> None:
        """Out of memory is answered around it, by `AdaptiveEngine`."""

    # ── adaptive.Steppable ──

    def apply(self, step: Step) -> None:
        """Runs on `step` from now on. Embeddings made before still decode.

        When it fails, with whatever error, the next `apply` of any step mends what was left half done.
        """
        before, self.step = self._ready, step
        if before and before.network == step.network:
            return
        self._ready = None
        self.device = torch.device(step.device)
        self._make_current()
        if step.precision == "float32":
            self.model.to(self.device)
            if self._rounded:
                self._restore()
        else:  # rounded first: what is too large for the device in float32 never gets there
            self._rounded = True
            self._set_weights(getattr(torch, step.precision))
            self.model.to(self.device)
        self._set_weights(getattr(torch, step.precision))
        self._dense_pe.clear()
        self._set_side(step.side)
        self._ready = step

    def _make_current(self) -> None:
        """Our card becomes this thread's: what asks for the current one (autocast, Triton) would begin on card 0."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _set_weights(self, dtype: torch.dtype) -> None:
        # Channels last: convolutions of a card are faster so. On a CPU it makes no difference (within 2 %).
        layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        self.model.image_encoder.to(dtype=dtype, memory_format=layout)

    def _restore(self) -> None:
        """Float32 weights again; the rounded ones only where there is no checkpoint to read any more."""
        self.model.float()
        if not self._weights:
            self._rounded = False
            return
        try:
            weights = self._weights()
        except ModelError as error:
            logger.warning("{}: going on with rounded weights: {}", self.name, error)
        else:
            self._set_side(self.native_side)
            self.model.load_state_dict(weights, strict=False)  # checked when it was first read
        self._rounded = False

    def compile(self) -> None:
        """From the next encode on, the image encoder runs as torch compiles it; where that fails, as before.

        Each new combination of precision, side and size of the batch (one, or any larger) is compiled when it first
        comes up, which takes up to minutes. The decoder is left alone: its shapes follow the prompts.
        """
        encoder = self.model.image_encoder
        eager = encoder.forward
        compiled = torch.compile(eager)

        def forward(*args: Any) -> Any:
            try:
                return compiled(*args)
            except Exception as error:
                if kind_of(error):
                    raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("{}: the network cannot be compiled and runs as it is: {}", self.name, reason)
            encoder.forward = eager
            return eager(*args)

        encoder.forward = forward

    def free(self) -> None:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def memory_report(self) -> str:
        if self.device.type != "cpu":
            return "the device's memory"
        try:
            free, total = (
                os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") / 2**20 for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
            )
        except (AttributeError, ValueError, OSError):  # macOS does not tell the first, Windows neither
            return "the host's memory"
        return f"{free:.0f} of {total:.0f} MiB of the host's memory free"

    # ── inside ──

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.step.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.step.precision))

    def _fitted(self, picture: Prepared) -> Prepared:
        """`picture` at the side we run on now: it may have been prepared before a change of step."""
        if picture.frame.side == self.step.side:
            return picture
        frame = self.frame_for(picture.frame.size, self.step.side)
        return replace(picture, pixels=resized(picture.pixels, frame.region), frame=frame)

    def _upload(self, pixels: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _encode_chunk(self, pictures: Sequence[Prepared]) -> Iterable[Features]:
        with self._autocast():
            image, high_res = self._encode(self._square(pictures))
        # Cloned, so that keeping one picture's embedding does not keep its whole batch.
        own = torch.Tensor.clone if len(pictures) > 1 else lambda tensor: tensor
        for index, picture in enumerate(pictures):
            here = slice(index, index + 1)
            yield Features(picture.frame, own(image[here]), tuple(own(level[here]) for level in high_res))

    def _here(self, embedding: Embedding) -> Features:
        """The embedding on the device we run on now."""
        if not isinstance(embedding, Features):
            raise TypeError(f"not an embedding of this engine: {type(embedding).__name__}")
        if embedding.image.device == self.device:
            return embedding
        high_res = tuple(level.to(self.device) for level in embedding.high_res)
        return replace(embedding, image=embedding.image.to(self.device), high_res=high_res)

    def _prompt_batch(self, prompts: Sequence[Prompt], frame: Frame) -> PromptBatch:
        count = len(prompts)
        points = [(point.x, point.y) for prompt in prompts for point in prompt.points]
        labels = np.array([[point.label for point in prompt.points] for prompt in prompts], dtype=np.int32)
        corners = [
            corner for prompt in prompts if (box := prompt.box) for corner in ((box.x0, box.y0), (box.x1, box.y1))
        ]
        return PromptBatch(
            points=self._coordinates(points, frame).reshape(count, len(prompts[0].points), 2),
            labels=torch.from_numpy(labels).to(self.device),
            boxes=self._coordinates(corners, frame).reshape(count, 4) if corners else None,
        )

    def _coordinates(self, points: Sequence[tuple[float, float]], frame: Frame) -> Tensor:
        """n×2 in the network's pixels, on the device."""
        return torch.from_numpy(to_network(points, frame).astype(np.float32)).to(self.device)

    def _predict(self, features: Features, prompts: PromptBatch, many: bool) -> tuple[Tensor, Tensor]:
        """Logits n×m×h×w and predicted IoU n×m; m is 3 if `many`, else 1."""
        pe = self._pe_for(features)
        sparse, dense = self._sparse(prompts)
        with self._autocast():
            return self._masks(features, pe, sparse, dense, many)

    def _decode_chunk(self, features: Features, prompts: PromptBatch, many: bool) -> Iterable[Logits]:
        logits, iou = self._predict(features, prompts, many)
        best = iou.argmax(dim=1)
        rows = torch.arange(len(best), device=best.device)
        pixels = logits[rows, best].float().cpu().numpy()
        scores = iou[rows, best].float().cpu().tolist()
        return [Logits(pixels[row], scores[row], features.frame) for row in range(len(scores))]

    def _pe_for(self, features: Features) -> Tensor:
        """The dense positional encoding, with the prompt encoder set to the side that the embedding was made at."""
        height, width = features.image.shape[-2:]
        encoder = self._prompt_encoder()
        encoder.image_embedding_size = (height, width)
        encoder.input_image_size = (features.frame.side, features.frame.side)
        encoder.mask_input_size = (4 * height, 4 * width)
        if (height, width) not in self._dense_pe:
            self._dense_pe[height, width] = encoder.get_dense_pe()
        return self._dense_pe[height, width]
