"""An interaction function for CVAT's agents: one object's mask from clicks and a box, with no Nuclio.

    cvat-cli function create-native NAME --function-module sam_poll.cvat.interactor -p model=str:…
    cvat-cli function run-agent ID --function-module sam_poll.cvat.interactor -p model=str:…

Nothing clicked: everything is segmented, and each object comes back by itself, which is what CVAT can show.
What can still go wrong here: an SDK before 2.7x has no interaction functions; that is told at the start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk import models

from sam_poll.cvat import sdk
from sam_poll.errors import PromptError, SettingsError
from sam_poll.formats import published_score
from sam_poll.formats.cvat import flat
from sam_poll.predictor import Known, Predictor
from sam_poll.types import Box, Everything, Mask, Point, Prompt


@dataclass(frozen=True, slots=True)
class Parameters:
    """What `-p` may say."""

    model: str = ""
    model_cfg: str = ""
    device: str = ""
    precision: str = ""
    config: str = ""
    points_per_side: int = Everything().points_per_side


def create(**parameters: Any) -> Interactor:
    """The function, its network loaded. FunctionError, which `cvat-cli` tells in one line."""
    with sdk.told():
        wanted = sdk.read(Parameters, parameters)
        if not hasattr(cvataa, "InteractionFunctionSpec"):
            raise SettingsError(
                "this cvat-sdk has no interaction functions",
                remedy="a newer one, where the server is new enough; else the Nuclio functions in docker/nuclio",
            )
        predictor = sdk.predictor(
            config=wanted.config,
            model=wanted.model,
            model_cfg=wanted.model_cfg,
            device=wanted.device,
            precision=wanted.precision,
        )
        return Interactor(predictor, sdk.everything(points_per_side=wanted.points_per_side))


class Interactor:
    """An interaction function as the SDK wants it: `spec`, `preprocess_image`, `detect`."""

    def __init__(self, predictor: Predictor, everything: Everything | None = None) -> None:
        self._predictor, self._everything = predictor, everything or Everything()

    @property
    def spec(self) -> Any:
        """Points of both kinds and a box, none of them needed."""
        return cvataa.InteractionFunctionSpec(min_pos_points=0, min_neg_points=0, min_bounding_boxes=0)

    def preprocess_image(self, context: Any, image: Any) -> Known:
        """The picture, encoded: what a further click on it does not cost again."""
        with sdk.told():
            return self._predictor.embed(sdk.content(image))

    def detect(self, context: Any, pp_image: Known, prompts: Any) -> list[Any]:
        """The object's mask with its confidence; each object's where nothing was clicked. Empty masks are none."""
        with sdk.told():
            prompt = _prompt(prompts)
            if prompt is None:
                masks = self._predictor.everything(pp_image, self._everything)
            else:
                masks = self._predictor.predict(pp_image, [prompt])
            return [_shape(mask) for mask in masks if mask.pixels.size]


def _prompt(asked: Any) -> Prompt | None:
    """None: nothing was clicked. PromptError for background points alone."""
    points = tuple(Point(x, y, 1) for x, y in asked.pos_points) + tuple(Point(x, y, 0) for x, y in asked.neg_points)
    box = None
    if asked.bounding_box is not None:
        (ax, ay), (bx, by) = asked.bounding_box
        box = Box(min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))
    if points and box is None and not asked.pos_points:
        raise PromptError("there are negative points only", place="neg_points", remedy="add a positive point, or a box")
    return Prompt(points=points, box=box) if points or box else None


def _shape(mask: Mask) -> Any:
    said = published_score(mask.score)
    kind = cvataa.InteractionResultAttributes.CONFIDENCE
    confidence = [] if said is None else [models.AttributeValRequest(spec_id=int(kind), value=str(said))]
    return cvataa.InteractionResultShape(
        type="mask", points=[float(value) for value in flat(mask)], attributes=confidence
    )
