"""An auto-annotation function for CVAT's SDK.

    cvat-cli task auto-annotate ID --function-module sam_poll.cvat.function -p model=str:sam2.1_hiera_tiny

Two modes: `everything` finds all there is to see (one label), `boxes` answers the boxes and points that a task or an
annotation file has with masks. Parameters are those of `Parameters`, given as `-p NAME=TYPE:VALUE`.

What can still go wrong here: a frame whose picture or prompts are refused gets no shapes, which is told in the log, so
that the others are not lost with it. Boxes drawn after the start are not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk import models
from loguru import logger

from sam_poll import prompts
from sam_poll.cvat import asked, sdk, shapes
from sam_poll.errors import InputError, PromptError, UsageError
from sam_poll.formats import FormatOptions, published_score
from sam_poll.formats.cvat import flat
from sam_poll.fs import shown
from sam_poll.predictor import Predictor
from sam_poll.types import Everything, Mask, Prompt, Size

SCORE_ID = 1  # of the attribute, in our own spec
_DEFAULT = Everything()
_NUMBERS = ("points_per_side", "min_area", "iou", "stability")
_OF_EVERYTHING = frozenset({*_NUMBERS, "label"})
_OF_BOXES = frozenset({"task", "host", "annotations"})


@dataclass(frozen=True, slots=True)
class Parameters:
    """What `-p` may say. `score`: declare the label attribute `score`, which the task must then have (or
    `--allow-unmatched-labels` be given); with `task` it is looked up. The numbers are those of everything mode."""

    mode: str = "everything"
    model: str = ""
    model_cfg: str = ""
    device: str = ""
    precision: str = ""
    config: str = ""
    label: str = "object"
    task: int = 0
    host: str = ""
    annotations: str = ""
    score: bool = False
    points_per_side: int = _DEFAULT.points_per_side
    min_area: int = _DEFAULT.min_area
    iou: float = _DEFAULT.iou
    stability: float = _DEFAULT.stability


def create(**parameters: Any) -> Detector:
    """The function, its network loaded. FunctionError, which `cvat-cli` tells in one line."""
    with sdk.told():
        wanted = sdk.read(Parameters, parameters)
        source = _source(wanted, frozenset(parameters))
        predictor = sdk.predictor(
            config=wanted.config,
            model=wanted.model,
            model_cfg=wanted.model_cfg,
            device=wanted.device,
            precision=wanted.precision,
        )
        return Detector(predictor, source)


@dataclass(frozen=True, slots=True)
class Source:
    """What is asked of each frame: `everything`, or the `boxes` where there are some. `labels` are all that can come
    back; those in `scored` have a score."""

    labels: tuple[str, ...]
    scored: frozenset[str] = frozenset()
    everything: Everything = _DEFAULT
    boxes: asked.Boxes | None = None


class Detector:
    """A detection function as the SDK wants it: `spec` and `detect`."""

    def __init__(self, predictor: Predictor, source: Source) -> None:
        self._predictor, self._source = predictor, source
        self._ids = {name: number for number, name in enumerate(source.labels, 1)}
        self._missed = False

    @property
    def spec(self) -> cvataa.DetectionFunctionSpec:
        """The labels, each of type mask: a task whose label allows rectangles only is refused before anything runs."""
        labels = []
        for name, number in self._ids.items():
            scores = [cvataa.text_attribute_spec(shapes.SCORE, SCORE_ID)] if name in self._source.scored else []
            labels.append(cvataa.label_spec(name, number, type="mask", attributes=scores))
        return cvataa.DetectionFunctionSpec(labels=labels)

    def detect(self, context: Any, image: Any) -> list[models.LabeledShapeRequest]:
        """One frame's masks, or polygons where the caller wants them; nothing below its threshold."""
        name, least = context.frame_name, context.conf_threshold
        with sdk.told():
            try:
                found = self._masks(name, image, least)
            except InputError as error:
                logger.warning("{}: nothing is annotated: {}", shown(name), shown(error))
                return []
        made: list[models.LabeledShapeRequest] = []
        for mask in found:
            if not mask.pixels.size:
                logger.warning("{}: the mask of {!r} is empty", shown(name), mask.label)
            elif least is None or mask.score >= least:
                made += self._shapes(mask, "polygon" if context.conv_mask_to_poly else "mask")
        return made

    def _masks(self, name: str, image: Any, least: float | None) -> list[Mask]:
        source = self._source
        if source.boxes is None:
            wanted = source.everything if least is None else replace(source.everything, iou=least)
            return self._predictor.everything(self._predictor.embed(sdk.content(image)), wanted, source.labels[0])
        ask = source.boxes.of(name)
        if ask is None:
            if not self._missed:
                logger.warning("{}: no boxes are known for it; others like it are not told", shown(name))
            self._missed = True
            return []
        pixels = sdk.content(image)
        size = sdk.size_of(pixels)
        fitting = [prompt for prompt in ask(size) if _fits(prompt, size, name)]
        return self._predictor.predict(self._predictor.embed(pixels), fitting) if fitting else []

    def _shapes(self, mask: Mask, form: shapes.Form) -> Sequence[models.LabeledShapeRequest]:
        said = published_score(mask.score) if mask.label in self._source.scored else None
        options = FormatOptions()
        lists = shapes.points_of(
            mask, form, flat(mask), tolerance_px=options.tolerance_px, min_area_px=options.min_area_px
        )
        make: Callable[..., models.LabeledShapeRequest] = cvataa.mask if form == "mask" else cvataa.polygon
        made = []
        for points in lists:  # attributes of its own for each: the SDK changes what it is given
            scores = [] if said is None else [models.AttributeValRequest(spec_id=SCORE_ID, value=str(said))]
            made.append(make(self._ids[mask.label], [float(value) for value in points], attributes=scores))
        return made


def _fits(prompt: Prompt, size: Size, name: str) -> bool:
    """Whether a prompt can be answered. One that cannot is told, and takes no others along."""
    try:
        prompts.fit((prompt,), size)
    except PromptError as error:
        logger.warning("{}: {!r} is left out: {}", shown(name), prompt.label, shown(error))
        return False
    return True


def _source(wanted: Parameters, given: frozenset[str]) -> Source:
    """What the parameters ask for. UsageError where they contradict each other; what reading boxes raises."""
    if wanted.mode not in ("everything", "boxes"):
        raise UsageError(f"there is no mode {wanted.mode!r}", place="-p mode", remedy="everything, or boxes")
    unfit = given & (_OF_EVERYTHING if wanted.mode == "boxes" else _OF_BOXES)
    if unfit:
        raise UsageError(f"has no meaning in mode {wanted.mode}", place=f"-p {min(unfit)}", remedy="leave it out")
    if wanted.mode == "everything":
        if not wanted.label.strip():
            raise UsageError("is empty", place="-p label", remedy="the name of a label of the task")
        scored = frozenset({wanted.label}) if wanted.score else frozenset()
        return Source(
            (wanted.label,), scored, everything=sdk.everything(**{name: getattr(wanted, name) for name in _NUMBERS})
        )
    if bool(wanted.task) == bool(wanted.annotations):
        raise UsageError(
            "the boxes must come from one place",
            place="-p mode",
            remedy="give either task=int:ID, or annotations=str:FILE",
        )
    boxes = asked.of_task(wanted.task, wanted.host) if wanted.task else asked.of_file(Path(wanted.annotations))
    scored = frozenset(boxes.labels) if wanted.score else boxes.scored
    return Source(boxes.labels, scored, boxes=boxes)
