"""The base class of all engines that run torch: uploads batches, groups prompts, returns logits.

Half precision: the image encoder's weights are stored in half precision (they are nearly all of
the weights, so a small GPU holds a model twice as large), and encoder and decoder run under
autocast, which keeps layer norms and softmax in float32. The prompt encoder stays in float32,
outside autocast: its positional encoding multiplies coordinates by 2π times random numbers, and
the 8 significant bits of bfloat16 would move a click by several pixels.

Out-of-memory errors and device faults leave this module as torch raises them;
`memory.adaptive` handles them.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from loguru import logger
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from sam_poll.core.errors import ModelError
from sam_poll.core.protocols import Embedding
from sam_poll.core.types import (
    ConceptRequest,
    Exemplar,
    InputTransform,
    Logits,
    ModelInfo,
    ModelInput,
    PackedEmbedding,
    PackedMask,
    Picture,
    Prompt,
    RgbArray,
    Size,
)
from sam_poll.engines import concepts, devices, packing
from sam_poll.engines.kernels import cpu_linear
from sam_poll.engines.kernels.mask_filter import filter_masks
from sam_poll.engines.memory.batching import chunks, prompt_groups
from sam_poll.engines.memory.cuda_errors import classify_device_error
from sam_poll.engines.memory.plan import MemoryStep
from sam_poll.imaging import automatic_masks, rough_shapes
from sam_poll.imaging.masks import to_network

Weights = Callable[[], dict[str, Tensor]]
# Side of the mask input in tokens of the embedding (segment_anything.build_sam and its kin)
MASK_INPUT_SCALE = 4


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The embedding of one picture, on the device that computed it.

    `image` is 1×C×h×w. `high_res` holds the two finer levels of SAM2 and EdgeTAM (1×C/8×4h×4w and
    1×C/4×2h×2w), what the HQ token's mask of SAM-HQ is computed from (1×C/8×4h×4w), and is empty
    for SAM1 and MobileSAM. `precision` is that of the network.
    """

    frame: InputTransform
    image: Tensor
    high_res: tuple[Tensor, ...] = ()
    precision: str = ""

    @property
    def nbytes(self) -> int:
        """Return the number of bytes that the embedding occupies on its device."""
        return sum(tensor.nbytes for tensor in (self.image, *self.high_res))

    def array(self) -> np.ndarray:
        """Return `image` as a float32 array in host memory."""
        return self.image.float().contiguous().cpu().numpy()


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """Prompts of one shape, in pixels of the network's input.

    `points` is n×k×2, `labels` n×k, `boxes` n×4 or None where the prompts have no box. `masks` are
    rough shapes as logits at the decoder's resolution, n×1×h×w; None where the prompts have none.
    """

    points: Tensor
    labels: Tensor
    boxes: Tensor | None
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.points)


class ConvertedEncoder(Protocol):
    """The image encoder of an engine in another runtime, for one side and precision on a CPU."""

    runtime: str
    side: int
    precision: str

    def __call__(self, square: Tensor) -> tuple[Tensor, ...]:
        """Return what `EncoderModule` returns. Raises any error of the runtime."""
        ...


class EncoderModule(torch.nn.Module):
    """The image encoder of any engine as one module, for conversion into another runtime.

    Its input is the encoder's (float32, n×3×side×side, normalised), its output a tuple: `image`
    and each of `high_res` of `Features`.
    """

    def __init__(self, engine: TorchEngine) -> None:
        super().__init__()
        self.network = engine.model  # its weights are those of this module, too
        self._encode = engine._encode

    def forward(self, square: Tensor) -> tuple[Tensor, ...]:
        """Encode `square`."""
        image, high_res = self._encode(square)
        return (image, *high_res)


def resize_pixels(pixels: RgbArray, size: Size) -> RgbArray:
    """Return `pixels` (uint8, h×w×3) resized to `size` by antialiased bilinear interpolation.

    The interpolation works on uint8, which is 26 times faster than on float32 at full size
    (measured).
    """
    # torch refuses arrays with negative strides and warns about read-only memory.
    pixels = np.require(pixels, requirements=["C", "W"])
    if pixels.shape[:2] == (size.height, size.width):
        return pixels
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    return (
        resize(image, [size.height, size.width], antialias=True)
        .permute(1, 2, 0)
        .contiguous()
        .numpy()
    )


class TorchEngine:
    """An engine (`core.protocols.Engine`) that runs one torch module.

    A subclass implements the methods that depend on the network. `apply`, `free` and
    `memory_report` implement `memory.adaptive.AdjustableEngine`.

    `weights` reads the checkpoint once more, which restores float32 after half precision.
    """

    family: ClassVar[str]
    native_side: int

    def __init__(
        self, model: Any, step: MemoryStep, *, name: str, weights: Weights | None = None
    ) -> None:
        self.model = model.eval()
        cpu_linear.install(self.model)
        self.name = name
        self._weights = weights
        self._converted: ConvertedEncoder | None = None
        # True once the weights have been in half precision since they were last read.
        self._rounded = False
        # The step that the whole model is set to; None in the middle of a change.
        self._ready: MemoryStep | None = None
        self._dense_pe: dict[tuple[int, int], Tensor] = {}
        # The form of the embeddings made so far, by precision and side.
        self._layouts: dict[tuple[str, int], packing.Layout] = {}
        self.apply(step)

    # ── implemented by the subclass of each network ──

    def frame_for(self, size: Size, side: int) -> InputTransform:
        """Return how a picture of `size` maps to the network's square input of `side` pixels."""
        raise NotImplementedError

    def _set_side(self, side: int) -> None:
        """Set the model up for an encoder input of `side` pixels."""
        raise NotImplementedError

    def _square(self, pictures: Sequence[ModelInput]) -> Tensor:
        """Return the encoder's input: float32, n×3×side×side, normalised, on the device."""
        raise NotImplementedError

    def _encode(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return `image` and `high_res` of `Features` for the whole batch."""
        raise NotImplementedError

    def _image_encoder(self) -> Any:
        """Return the module whose weights are stored in the step's precision."""
        return self.model.image_encoder

    def _prompt_encoder(self) -> Any:
        raise NotImplementedError

    def _set_prompt_side(self, grid: tuple[int, int], side: int) -> None:
        """Set the prompt encoder up for an embedding of `grid` tokens, made at `side` pixels."""
        encoder = self._prompt_encoder()
        encoder.image_embedding_size = grid
        encoder.input_image_size = (side, side)
        encoder.mask_input_size = (MASK_INPUT_SCALE * grid[0], MASK_INPUT_SCALE * grid[1])

    def _new_positions(self) -> Tensor:
        """Return the dense positional encoding, 1×C×h×w, for the grid that was set last."""
        return self._prompt_encoder().get_dense_pe()

    def _sparse(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        """Return the prompt encoder's sparse and dense embeddings."""
        raise NotImplementedError

    def _masks(
        self, features: Features, pe: Tensor, sparse: Tensor, dense: Tensor, many: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the mask decoder's logits (n×m×h×w) and predicted IoUs (n×m).

        m is 3 if `many`, else 1; with SAM-HQ always 1.
        """
        raise NotImplementedError

    # ── core.protocols.Engine ──

    @property
    def info(self) -> ModelInfo:
        """Return the model's name and the step that it runs on."""
        step, encoder = self.step, self._converted_for_step()
        return ModelInfo(
            name=self.name,
            family=self.family,
            side=step.side,
            device=step.device,
            precision=step.precision,
            step=f"{step}, encoder in {encoder.runtime}" if encoder else str(step),
            runtime=encoder.runtime if encoder else "torch",
        )

    @property
    def batch(self) -> int:
        """Return the largest number of pictures in one call of the encoder."""
        return self.step.batch

    def prepare(self, picture: Picture) -> ModelInput:
        """Return the picture resized for the encoder. Safe to call from any thread."""
        frame = self.frame_for(picture.size, self.step.side)
        return ModelInput(resize_pixels(picture.pixels, frame.region), frame, picture.digest)

    @torch.inference_mode()
    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        """Return one embedding per picture, in order, encoding at most `batch` at once."""
        self._make_current()
        inputs = [self._at_current_side(picture) for picture in pictures]
        return [
            embedding
            for chunk in chunks(inputs, self.step.batch)
            for embedding in self._encode_chunk(chunk)
        ]

    @torch.inference_mode()
    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]:
        """Return the best mask of each prompt by predicted IoU, in order.

        Prompts of one shape share calls of the decoder, so that none needs padding.
        """
        self._make_current()
        features = self._on_device(embedding)
        answers: dict[int, Logits] = {}
        for indices in prompt_groups(prompts):
            ambiguous = prompts[indices[0]].ambiguous
            for chunk in chunks(indices, self.step.prompts_per_call):
                batch = self._prompt_batch([prompts[index] for index in chunk], features)
                answers.update(
                    zip(chunk, self._decode_chunk(features, batch, ambiguous), strict=True)
                )
        return [answers[index] for index in range(len(prompts))]

    @torch.inference_mode()
    def candidates(
        self,
        embedding: Embedding,
        points: Sequence[tuple[float, float]],
        *,
        iou: float,
        stability: float,
    ) -> list[PackedMask]:
        """Return those of the masks of each point that reach both thresholds.

        There are three masks of a point, with SAM-HQ one. The others do not leave the device.
        """
        self._make_current()
        features = self._on_device(embedding)
        masks: list[PackedMask] = []
        for chunk in chunks(points, self.step.prompts_per_call):
            coordinates = self._coordinates(chunk, features.frame)[:, None]
            labels = torch.ones((len(chunk), 1), dtype=torch.int32, device=self.device)
            batch = PromptBatch(coordinates, labels, None)
            logits, scores = self._predict(features, batch, many=True)
            kept = filter_masks(
                logits.flatten(0, 1), scores.flatten(), features.frame, iou, stability
            )
            planes, ious, stabilities = (tensor.cpu().numpy() for tensor in kept)
            for plane, score, mask_stability in zip(
                planes, ious.tolist(), stabilities.tolist(), strict=True
            ):
                packed = automatic_masks.pack(plane, score, mask_stability, features.frame)
                if packed:
                    masks.append(packed)
        return masks

    def pack(self, embedding: Embedding) -> PackedEmbedding:
        """Copy an embedding to main memory, in half precision (`packing.pack_level`)."""
        features = self._features(embedding)
        levels = tuple(packing.pack_level(level) for level in (features.image, *features.high_res))
        frame = features.frame
        return PackedEmbedding(frame.size, frame.side, features.precision, levels)

    def unpack(self, packed: PackedEmbedding) -> Embedding | None:
        """Return a packed embedding as `Features` on the CPU; `decode` moves it to the device.

        None where this engine has made no embedding of that form.
        """
        layout = self._layouts.get((packed.precision, packed.side))
        if layout != packing.layout_of(packed):
            return None
        image, *high_res = (packing.unpack_level(level) for level in packed.levels)
        frame = self.frame_for(packed.size, packed.side)
        return Features(frame, image, tuple(high_res), packed.precision)

    def check_concept(self, request: ConceptRequest) -> None:
        """Raise PromptError: most networks take points and boxes only."""
        raise concepts.refusal(self.name, request)

    def find(
        self,
        embedding: Embedding,
        texts: Sequence[str],
        exemplars: Sequence[Exemplar],
        *,
        threshold: float,
        most: int,
    ) -> list[list[PackedMask]]:
        """Raise PromptError, as `check_concept`."""
        raise concepts.refusal(self.name, ConceptRequest(tuple(texts), tuple(exemplars)))

    def on_memory_pressure(self, evict: Callable[[], bool]) -> None:
        """Do nothing: `AdaptiveEngine`, which wraps this engine, handles out-of-memory errors."""

    # ── memory.adaptive.AdjustableEngine ──

    def apply(self, step: MemoryStep) -> None:
        """Switch to `step`. Embeddings made before can still be decoded.

        If the switch fails with any error, the next call of `apply`, with any step, repairs the
        half-changed model.
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
        else:
            # Converted before it is moved: a model may be too large for the device in float32.
            self._rounded = True
            self._set_weights(getattr(torch, step.precision))
            self.model.to(self.device)
        self._set_weights(getattr(torch, step.precision))
        self._dense_pe.clear()
        self._set_side(step.side)
        self._ready = step

    def _make_current(self) -> None:
        """Make the engine's GPU the current one of this thread.

        Autocast and Triton use the current GPU, which would be GPU 0 otherwise.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _set_weights(self, dtype: torch.dtype) -> None:
        # Convolutions on a GPU are faster in the channels-last layout. On a CPU the layout makes
        # no difference (measured: within 2 %).
        layout = torch.channels_last if self.device.type == "cuda" else torch.preserve_format
        self._image_encoder().to(dtype=dtype, memory_format=layout)

    def _restore(self) -> None:
        """Restore the float32 weights from the checkpoint.

        Where the checkpoint cannot be read, the rounded weights stay, converted to float32.
        """
        self.model.float()
        if not self._weights:
            self._rounded = False
            return
        try:
            weights = self._weights()
        except ModelError as error:
            logger.warning(
                "{}: the float32 weights cannot be restored, continuing with rounded weights: {}",
                self.name,
                error,
            )
        else:
            self._set_side(self.native_side)
            # Not strict: keys and shapes were checked when the checkpoint was first loaded.
            self.model.load_state_dict(weights, strict=False)
            # TinyViT derives its attention biases from the weights in evaluation mode.
            self.model.eval()
        self._rounded = False

    def compile(self) -> None:
        """Compile the image encoder with `torch.compile`; where that fails, run it uncompiled.

        Without a compiler that is known at once; torch finds it out after a minute of tracing.

        Each new combination of precision, side and batch size (one, or any larger) is compiled at
        its first use, which takes up to several minutes. The decoder is not compiled, because its
        shapes vary with the prompts.
        """
        missing = devices.missing_compiler(self.step.device)
        if missing:
            logger.warning(
                "{}: the network cannot be compiled and runs uncompiled: there is no {}",
                self.name,
                missing,
            )
            return
        encoder = self._image_encoder()
        eager = encoder.forward
        compiled = torch.compile(eager)

        def forward(*args: Any) -> Any:
            try:
                return compiled(*args)
            except Exception as error:
                if classify_device_error(error):
                    raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning(
                "{}: the network cannot be compiled and runs uncompiled: {}", self.name, reason
            )
            encoder.forward = eager
            return eager(*args)

        encoder.forward = forward

    def use(self, encoder: ConvertedEncoder) -> None:
        """Encode with `encoder` on the steps that it was made for, and in torch on all others."""
        self._converted = encoder

    def embed(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return `image` and `high_res` of `Features` for the input `square` of the encoder."""
        if encoder := self._converted_for_step():
            try:
                image, *high_res = encoder(square)
            except Exception as error:  # noqa: BLE001 - other runtimes have error classes of their own
                self._converted = None
                logger.warning(
                    "{}: {} failed, continuing in torch: {}",
                    self.name,
                    encoder.runtime,
                    (str(error).strip().splitlines() or [type(error).__name__])[0],
                )
            else:
                return image, tuple(high_res)
        with self._autocast():
            return self._encode(square)

    def free(self) -> None:
        """Return cached, unused memory to the GPU."""
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def memory_report(self) -> str:
        """Describe the free memory of the host, or name the device, for an error message."""
        if self.device.type != "cpu":
            return "the device's memory"
        try:
            free, total = (
                os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") / 2**20
                for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
            )
        except (AttributeError, ValueError, OSError):
            # macOS has no SC_AVPHYS_PAGES; Windows has no sysconf.
            return "the host's memory"
        return f"{free:.0f} of {total:.0f} MiB of the host's memory free"

    # ── internals ──

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.step.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=getattr(torch, self.step.precision))

    def _converted_for_step(self) -> ConvertedEncoder | None:
        """Return the converted encoder, where it was made for the current step."""
        encoder, step = self._converted, self.step
        if encoder and step.network == (encoder.precision, encoder.side, "cpu"):
            return encoder
        return None

    def _at_current_side(self, picture: ModelInput) -> ModelInput:
        """Return `picture` resized to the current side: it may be older than a change of step."""
        if picture.frame.side == self.step.side:
            return picture
        frame = self.frame_for(picture.frame.size, self.step.side)
        return replace(picture, pixels=resize_pixels(picture.pixels, frame.region), frame=frame)

    def _upload(self, pixels: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(pixels)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _encode_chunk(self, pictures: Sequence[ModelInput]) -> Iterable[Features]:
        image, high_res = self.embed(self._square(pictures))
        precision = self.step.precision
        self._layouts[precision, self.step.side] = packing.layout_of_batch((image, *high_res))
        if len(pictures) == 1:
            yield Features(pictures[0].frame, image, tuple(high_res), precision)
            return
        for index, picture in enumerate(pictures):
            row = slice(index, index + 1)
            # Cloned, so that keeping one picture's embedding does not keep its whole batch.
            levels = tuple(level[row].clone() for level in high_res)
            yield Features(picture.frame, image[row].clone(), levels, precision)

    def _features(self, embedding: Embedding) -> Features:
        if not isinstance(embedding, Features):
            raise TypeError(f"not an embedding of this engine: {type(embedding).__name__}")
        return embedding

    def _on_device(self, embedding: Embedding) -> Features:
        """Return the embedding on the engine's current device."""
        features = self._features(embedding)
        if features.image.device == self.device:
            return features
        high_res = tuple(level.to(self.device) for level in features.high_res)
        return replace(features, image=features.image.to(self.device), high_res=high_res)

    def _prompt_batch(self, prompts: Sequence[Prompt], features: Features) -> PromptBatch:
        count, frame = len(prompts), features.frame
        points = [(point.x, point.y) for prompt in prompts for point in prompt.points]
        labels = np.array(
            [[point.label for point in prompt.points] for prompt in prompts], dtype=np.int32
        )
        corners = [
            corner
            for prompt in prompts
            if (box := prompt.box)
            for corner in ((box.x0, box.y0), (box.x1, box.y1))
        ]
        return PromptBatch(
            points=self._coordinates(points, frame).reshape(count, len(prompts[0].points), 2),
            labels=torch.from_numpy(labels).to(self.device),
            boxes=self._coordinates(corners, frame).reshape(count, 4) if corners else None,
            masks=self._mask_inputs(prompts, features),
        )

    def _mask_inputs(self, prompts: Sequence[Prompt], features: Features) -> Tensor | None:
        """Return the rough shapes of prompts, n×1×h×w float32, on the device; None without any."""
        # All networks have a mask input of four times the embedding's side.
        side = MASK_INPUT_SCALE * features.image.shape[-1]
        planes = [
            rough_shapes.mask_input(prompt.shape, features.frame, side)
            for prompt in prompts
            if prompt.shape
        ]
        return torch.from_numpy(np.stack(planes))[:, None].to(self.device) if planes else None

    def _coordinates(self, points: Sequence[tuple[float, float]], frame: InputTransform) -> Tensor:
        """Return points as n×2 float32 in pixels of the network's input, on the device."""
        return torch.from_numpy(to_network(points, frame).astype(np.float32)).to(self.device)

    def _predict(
        self, features: Features, prompts: PromptBatch, many: bool
    ) -> tuple[Tensor, Tensor]:
        """Return logits (n×m×h×w) and predicted IoUs (n×m), as `_masks` does."""
        pe = self._pe_for(features)
        sparse, dense = self._sparse(prompts)
        with self._autocast():
            return self._masks(features, pe, sparse, dense, many)

    def _decode_chunk(
        self, features: Features, prompts: PromptBatch, many: bool
    ) -> Iterable[Logits]:
        logits, iou = self._predict(features, prompts, many)
        best = iou.argmax(dim=1)
        rows = torch.arange(len(best), device=best.device)
        pixels = logits[rows, best].float().cpu().numpy()
        scores = iou[rows, best].float().cpu().tolist()
        return [Logits(pixels[row], scores[row], features.frame) for row in range(len(scores))]

    def _pe_for(self, features: Features) -> Tensor:
        """Return the dense positional encoding for the side that the embedding was made at.

        Sets the prompt encoder to that side, too.
        """
        height, width = features.image.shape[-2:]
        self._set_prompt_side((height, width), features.frame.side)
        if (height, width) not in self._dense_pe:
            self._dense_pe[height, width] = self._new_positions()
        return self._dense_pe[height, width]
