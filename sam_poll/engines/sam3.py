"""The SAM 3 engine, built on `transformers`: words and exemplars, points and boxes.

SAM 3 is two networks over one image encoder: a detector in the manner of DETR, which finds all
objects that a text or exemplars describe, and SAM 2's decoder (the tracker's), which segments what
points and boxes show. A checkpoint is a folder in the form of `facebook/sam3`.

The library's post-processing makes masks of the picture's size as 64-bit integers, all at once.
This engine takes the low-resolution masks instead, and cuts them as the library does: it enlarges
probabilities, not logits, and keeps what is above one half.

Limitations: the side of the input is fixed, because the positions in the image encoder are made
for it. The number of queries of the detector cannot be halved either, so memory steps are half
precision, fewer texts a call, and the CPU.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Sam3Model, Sam3Processor, Sam3TrackerModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from sam_poll.core.protocols import Embedding
from sam_poll.core.types import (
    ConceptRequest,
    Exemplar,
    InputTransform,
    ModelInput,
    PackedMask,
    Size,
)
from sam_poll.engines import concepts, pretrained, prompts_as_objects
from sam_poll.engines.base import Features, PromptBatch, TorchEngine
from sam_poll.engines.memory.batching import chunks
from sam_poll.engines.memory.plan import MemoryStep, cpu_step
from sam_poll.imaging import automatic_masks

# The text that the detector was trained with for exemplars alone (transformers.Sam3Processor).
VISUAL = "visual"
# Levels of the image encoder that either head uses; a fourth one of half the size is not used.
LEVELS = 3
# Texts whose features are kept, 32 KiB each.
KEPT_TEXTS = 1024


class ImageEncoder(nn.Module):
    """The image encoder of SAM 3 with the necks of both heads."""

    def __init__(self, detector: Any, tracker: Any) -> None:
        super().__init__()
        vision = detector.vision_encoder
        self.backbone = vision.backbone
        self.detector_neck = vision.neck.fpn_layers[:LEVELS]
        self.tracker_neck = tracker.vision_encoder.neck.fpn_layers[:LEVELS]
        # The projections of the finer levels, made once a picture instead of at every click.
        self.projections = nn.ModuleList(
            [tracker.mask_decoder.conv_s0, tracker.mask_decoder.conv_s1]
        )
        self.no_memory = tracker.no_memory_embedding

    def forward(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the tracker's coarsest level, and its finer levels and the detector's levels."""
        tokens = self.backbone(square).last_hidden_state  # n×hw×C
        grid = int(tokens.shape[1] ** 0.5)
        plane = tokens.transpose(1, 2).unflatten(2, (grid, grid))
        fine, middle, image = (layer(plane) for layer in self.tracker_neck)
        finer = tuple(
            project(level) for project, level in zip(self.projections, (fine, middle), strict=True)
        )
        del fine, middle
        # A picture is a video frame without memory. The library (5.24) adds this to the level that
        # is not used; SAM 3's own predictor adds it to this one.
        image = image + self.no_memory.view(1, -1, 1, 1)
        return image, (*finer, *(layer(plane) for layer in self.detector_neck))


class Float32(nn.Module):
    """A module that computes in float32, also under autocast.

    The boxes of exemplars need it: bfloat16 moves a coordinate by up to 0.4 % of the picture's
    side, and torchvision's `roi_align` refuses it under autocast.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **arguments: Any) -> Any:
        """Call the module with its floating-point tensors, and tuples of them, in float32."""
        device = next(self.inner.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.inner(**{key: _in_float32(value) for key, value in arguments.items()})


def _in_float32(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_in_float32(one) for one in value)
    return value.float() if value.is_floating_point() else value


class Sam3Network(nn.Module):
    """Both heads of SAM 3 over one image encoder.

    `means` and `deviations` are those of the colours (RGB, 0 to 255) that the network takes,
    `tokenizer` that of its texts.
    """

    def __init__(self, detector: Any, tracker: Any, processor: Any) -> None:
        super().__init__()
        self.image_size = int(detector.config.image_size)
        self.image_encoder = ImageEncoder(detector, tracker)
        self.position_encoding = detector.vision_encoder.neck.position_encoding
        detector.vision_encoder = None
        tracker.vision_encoder = None
        detector.geometry_encoder = Float32(detector.geometry_encoder)
        self.detector = detector
        self.tracker = tracker
        self.tokenizer = processor.tokenizer
        self.max_tokens = int(detector.config.text_config.max_position_embeddings)
        pictures = processor.image_processor
        self.means = [255 * value for value in pictures.image_mean]
        self.deviations = [255 * value for value in pictures.image_std]


def read(folder: Path) -> Sam3Network:
    """Return the network in a folder, float32, on the CPU. Raises ModelError."""
    detector = pretrained.load(Sam3Model, folder)
    tracker = pretrained.load(Sam3TrackerModel, folder)
    try:
        with pretrained.quiet():
            processor = Sam3Processor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library's errors share no base class
        raise pretrained.unreadable(error, str(folder)) from error
    return Sam3Network(detector, tracker, processor)


def read_tracker(folder: Path) -> Any:
    """Return the `Sam3TrackerModel` in a folder, with as many levels as it uses. As `read`.

    With more levels the library (5.24) adds its embedding of "no memory" to the one that it drops.
    """
    tracker = pretrained.load(Sam3TrackerModel, folder)
    neck = tracker.vision_encoder.neck
    neck.fpn_layers = neck.fpn_layers[:LEVELS]
    return tracker


def reader(folder: Path) -> Callable[[], dict[str, Tensor]]:
    """Return a function that reads the weights of the network in a folder once more."""
    return lambda: read(folder).state_dict()


@dataclass(frozen=True, slots=True, eq=False)
class TextFeatures:
    """A text as the detector takes it: features 1×tokens×C, and which tokens are text, 1×tokens."""

    features: Tensor
    mask: Tensor


class Sam3Engine(TorchEngine):
    """An engine (`core.protocols.Engine`) that runs a `Sam3Network`.

    `high_res` of its `Features` has the tracker's two finer levels and the detector's levels.
    """

    family: ClassVar[str] = "sam3"

    def __init__(
        self,
        model: Sam3Network,
        step: MemoryStep | None = None,
        *,
        name: str = "sam3",
        **keywords: Any,
    ) -> None:
        self.native_side = model.image_size
        self._texts: OrderedDict[str, TextFeatures] = OrderedDict()
        super().__init__(model, step or cpu_step(self.native_side), name=name, **keywords)

    def frame_for(self, size: Size, side: int) -> InputTransform:
        """Stretch the whole picture to the square, as Sam3ImageProcessor does."""
        return InputTransform(size=size, side=side, region=Size(side, side), two_step=False)

    def apply(self, step: MemoryStep) -> None:
        """Switch to `step`. Features of texts are made again where the network changes."""
        if self._ready is None or self._ready.network != step.network:
            self._texts.clear()
        super().apply(step)

    # ── words and exemplars ──

    def check_concept(self, request: ConceptRequest) -> None:
        """Raise PromptError for a text of more tokens than the network takes."""
        for index, text in enumerate(request.texts):
            tokens = len(self.model.tokenizer(text)["input_ids"])
            if tokens > self.model.max_tokens:
                raise concepts.too_long(request, index, tokens, self.model.max_tokens)

    @torch.inference_mode()
    def find(
        self,
        embedding: Embedding,
        texts: Sequence[str],
        exemplars: Sequence[Exemplar],
        *,
        threshold: float,
        most: int,
    ) -> list[list[PackedMask]]:
        """Return the objects of each text whose score exceeds `threshold`, best first.

        At most `most` of each. Masks of other objects do not leave the device.
        """
        self._make_current()
        features = self._on_device(embedding)
        boxes = self._exemplars(exemplars, features.frame)
        found: list[list[PackedMask]] = []
        for chunk in chunks(texts, self.step.prompts_per_call):
            output = self._detect(features, chunk, boxes)
            scores = _scores(output)
            for row in range(len(chunk)):
                found.append(
                    _packed(output.pred_masks[row], scores[row], features.frame, threshold, most)
                )
        return found

    def _detect(self, features: Features, texts: Sequence[str], boxes: Mapping[str, Tensor]) -> Any:
        """Return the detector's output for a picture and each of `texts`."""
        count = len(texts)
        encoded = [self._text_features(text or VISUAL) for text in texts]
        levels = features.high_res[-LEVELS:]
        positions = [
            self.model.position_encoding(level.shape, level.device, level.dtype) for level in levels
        ]
        vision = Sam3VisionEncoderOutput(
            fpn_hidden_states=_for_each(levels, count),
            fpn_position_encoding=_for_each(positions, count),
        )
        text = BaseModelOutputWithPooling(
            pooler_output=torch.cat([one.features for one in encoded])
        )
        repeated = {key: tensor.expand(count, *tensor.shape[1:]) for key, tensor in boxes.items()}
        with self._autocast():
            return self.model.detector(
                vision_embeds=vision,
                text_embeds=text,
                attention_mask=torch.cat([one.mask for one in encoded]),
                **repeated,
            )

    def _text_features(self, text: str) -> TextFeatures:
        """Return a text's features, from the cache where they are in it."""
        if text in self._texts:
            self._texts.move_to_end(text)
            return self._texts[text]
        tokens = self.model.tokenizer(
            text, padding="max_length", max_length=self.model.max_tokens, return_tensors="pt"
        ).to(self.device)
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with self._autocast():
            output = self.model.detector.get_text_features(input_ids=ids, attention_mask=mask)
        made = TextFeatures(output.pooler_output, mask)
        self._texts[text] = made
        if len(self._texts) > KEPT_TEXTS:
            self._texts.popitem(last=False)
        return made

    def _exemplars(self, exemplars: Sequence[Exemplar], frame: InputTransform) -> dict[str, Tensor]:
        """Return the detector's arguments for exemplars: centres and sizes, 0 to 1, and labels."""
        if not exemplars:
            return {}
        corners = np.array(
            [[box.x0, box.y0, box.x1, box.y1] for box in (one.box for one in exemplars)]
        ) / np.array([*frame.size, *frame.size])
        low, high = corners[:, :2], corners[:, 2:]
        boxes = np.concatenate([(low + high) / 2, high - low], axis=1).astype(np.float32)
        labels = np.array([one.label for one in exemplars], dtype=np.int64)
        return {
            "input_boxes": torch.from_numpy(boxes)[None].to(self.device),
            "input_boxes_labels": torch.from_numpy(labels)[None].to(self.device),
        }

    # ── points and boxes, and the image encoder ──

    def _set_side(self, side: int) -> None:
        if side != self.native_side:
            raise ValueError(f"SAM 3 has no side of {side}")
        self._mean = torch.tensor(self.model.means, device=self.device).view(1, 3, 1, 1)
        self._deviation = torch.tensor(self.model.deviations, device=self.device).view(1, 3, 1, 1)

    def _set_weights(self, dtype: torch.dtype) -> None:
        # The text encoder has nearly as many weights as the image encoder. Buffers stay as they
        # are: the positions in the image encoder are fractions that bfloat16 cannot hold.
        for module in (self.model.image_encoder, self.model.detector.text_encoder):
            for weights in module.parameters():
                weights.data = weights.data.to(dtype)

    def _square(self, pictures: Sequence[ModelInput]) -> Tensor:
        pixels = self._upload(np.stack([picture.pixels for picture in pictures]))  # n×side×side×3
        return (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._deviation

    def _encode(self, square: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        image, levels = self.model.image_encoder(square)
        return image, levels

    def _set_prompt_side(self, grid: tuple[int, int], side: int) -> None:
        """Do nothing: the prompt encoder is made for the one side."""

    def _new_positions(self) -> Tensor:
        return self.model.tracker.get_image_wide_positional_embeddings()

    def _sparse(self, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
        return prompts_as_objects.sparse(self.model.tracker.prompt_encoder, prompts)

    def _masks(
        self, features: Features, pe: Tensor, sparse: Tensor, dense: Tensor, many: bool
    ) -> tuple[Tensor, Tensor]:
        decoder, finer = self.model.tracker.mask_decoder, features.high_res[:-LEVELS]
        return prompts_as_objects.masks(decoder, features.image, finer, pe, sparse, dense, many)


def _for_each(levels: Sequence[Tensor], count: int) -> Any:
    """Return levels of one picture for `count` texts.

    The library leaves out the last level that it is given, that of half the size; here it is None.
    """
    return (*(level.expand(count, -1, -1, -1) for level in levels), None)


def _scores(output: Any) -> Tensor:
    """Return the scores of all queries, n×queries: that of the object times that of the kind.

    The second is the probability that the picture has an object of the kind at all.
    """
    return output.pred_logits.float().sigmoid() * output.presence_logits.float().sigmoid()


def _packed(
    masks: Tensor, scores: Tensor, frame: InputTransform, threshold: float, most: int
) -> list[PackedMask]:
    """Return the best objects of one text, packed; `masks` are logits, queries×h×w."""
    best, order = scores.sort(descending=True, stable=True)
    kept = order[best > threshold][:most]
    # As the library cuts masks: probabilities are enlarged, and cut at one half.
    planes = (masks[kept].float().sigmoid() - 0.5).cpu().numpy()
    packed = []
    for plane, score in zip(planes, scores[kept].tolist(), strict=True):
        # The stability of these masks is not defined; 1 passes any threshold.
        one = automatic_masks.pack(plane, score, 1.0, frame)
        if one:  # a find without a pixel is no object
            packed.append(one)
    return packed
