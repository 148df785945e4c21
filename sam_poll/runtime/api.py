"""The Python interface: load a network once, predict masks, use them as arrays or save them.

    import sam_poll

    model = sam_poll.load("sam2.1_hiera_tiny")
    result = model.predict("dog.jpg", {"points": [{"x": 260, "y": 200, "label": 1}]})
    result.objects[0].mask        # bool, height × width
    result.save("answers", formats=["mask", "coco"])

`load`, `Model`, `Prediction` and `PredictedObject` are public, as `sam_poll.load` and so on, with
the errors in `sam_poll.core.errors`. Everything else in the package is internal and may change in
any version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sam_poll.config import settings as settings_
from sam_poll.core.errors import PictureError, PromptError, ShareError
from sam_poll.core.files import write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import (
    AutomaticMaskRequest,
    BoolArray,
    ConceptRequest,
    FloatArray,
    Mask,
    ModelInfo,
    Mosaic,
    Picture,
    Prompt,
    Result,
    RgbArray,
    Size,
)
from sam_poll.formats import coco, registry
from sam_poll.imaging import decode, source_file
from sam_poll.imaging.contours import contours
from sam_poll.imaging.masks import paste
from sam_poll.pipeline.predictor import Predictor
from sam_poll.pipeline.task import NOTHING_FOUND
from sam_poll.prompts import parser
from sam_poll.runtime import builders

Image: TypeAlias = "str | PathLike[str] | bytes | RgbArray"
_DEFAULT_NAME = "image"


def load(
    model: str | PathLike[str] | None = None,
    *,
    device: str | None = None,
    precision: str | None = None,
    config: str | PathLike[str] | None = None,
    **settings: Any,
) -> Model:
    """Load a network; it stays loaded as long as the returned model is referenced.

    - `model`: a name of `sam-poll models list`, or the path of a checkpoint. Default: that of the
      settings.
    - `device`: `auto` (default), `cpu`, `cuda`, `cuda:0`, `mps`.
    - `precision`: `auto` (default), `float32`, `bfloat16`, `float16`.
    - `config`: a config.yaml, as for the commands.
    - `settings`: further settings of docs/settings.md by name, groups as mappings:
      `memory={"budget_mib": 3000}`. Environment variables (`SAM_POLL_…`) count, too; arguments are
      strongest.

    Raises SettingsError for settings that are wrong, and ModelError for a network that is missing
    or cannot be loaded. Nothing is downloaded.
    """
    named = {"model": model, "device": device, "precision": precision}
    flags = {
        name: str(value) if isinstance(value, PathLike) else value
        for name, value in (*named.items(), *settings.items())
        if value is not None
    }
    chosen = settings_.load(Path(config) if config else None, flags=flags)
    return Model(builders.predictor_of(chosen), chosen)


class Model:
    """A loaded network, made by `load`.

    `predict` may be called from any thread; one call uses the device at a time.
    """

    def __init__(self, predictor: Predictor, settings: settings_.Settings) -> None:
        self._predictor = predictor
        self._settings = settings

    @property
    def info(self) -> ModelInfo:
        """The network's name, family, device, precision, input side and step of the memory plan."""
        return self._predictor.info

    def predict(
        self, image: Image, prompts: Mapping[str, Any], *, name: str | None = None
    ) -> Prediction:
        """Predict one mask for each object that is prompted for.

        - `image`: a path, the bytes of a file, or upright RGB pixels (uint8, H×W×3). Mind that
          OpenCV's `imread` returns BGR. The last images are remembered: a further prompt for the
          same content takes the decoder only.
        - `prompts`: what a prompt file contains (docs/prompts.md); values may be numpy's numbers
          and arrays. `{"everything": True}` segments everything, `{"text": "dog"}` all objects of
          a kind, with a model that takes words.
        - `name`: name of the image in outputs. Default: that of its path.

        Coordinates are pixels of the upright image at its full size. Raises PromptError and
        PictureError, with place, reason and remedy; DeviceError where the device has failed: then
        this process must be replaced.
        """
        file = parser.parse(_json(prompts))
        if isinstance(file.prompts, Mosaic):
            raise PromptError(
                "a mosaic is not predicted in one piece",
                place="mosaic",
                remedy="use `sam-poll mosaic`",
            )
        content, own_name = _content(image)
        name = name or own_name
        try:
            known = self._predictor.embed(content)
        except PictureError as error:
            error.place = error.place or name
            raise
        parser.check_size(file.image_size, known.size)
        notes: tuple[str, ...] = known.notes
        used: tuple[Prompt, ...] = ()
        if isinstance(file.prompts, AutomaticMaskRequest):
            masks = self._predictor.everything(known, file.prompts)
            notes += () if masks else (NOTHING_FOUND,)
        elif isinstance(file.prompts, ConceptRequest):
            masks, found_notes = self._predictor.find(known, file.prompts)
            notes += found_notes
        else:
            used = parser.fit(file.prompts, known.size)
            masks = self._predictor.predict(known, used)
            notes += tuple(note for prompt in used for note in prompt.notes)
        result = Result(
            job_id=Path(name).stem,
            name=name,
            size=known.size,
            masks=tuple(masks),
            prompts=used,
            model=self.info,
            notes=notes,
        )
        return Prediction(result, content, self._settings)


class Prediction:
    """The answer for one image. Made by `Model.predict`."""

    def __init__(
        self, result: Result, content: bytes | RgbArray, settings: settings_.Settings
    ) -> None:
        self._result = result
        self._content = content
        self._settings = settings

    @cached_property
    def objects(self) -> tuple[PredictedObject, ...]:
        """The objects, in the order of the prompts; without prompts by score, highest first."""
        return tuple(PredictedObject(mask, self.size) for mask in self._result.masks)

    @property
    def size(self) -> Size:
        """Width and height in pixels of the upright image."""
        return self._result.size

    @property
    def model(self) -> ModelInfo:
        """The network that answered."""
        return self._result.model

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the reader, such as a box that was clipped to the image."""
        return self._result.notes

    @property
    def masks(self) -> BoolArray:
        """All masks: bool, objects × height × width. One byte a pixel and object."""
        masks = np.zeros((len(self.objects), self.size.height, self.size.width), dtype=bool)
        for number, one in enumerate(self.objects):
            masks[number] = one.mask
        return masks

    def save(
        self,
        folder: str | PathLike[str],
        formats: Sequence[str] = ("mask", "opex"),
        *,
        name: str | None = None,
    ) -> list[Path]:
        """Write output files, as the daemon does, and return their paths.

        The files are `<name>.mask.png` and so on, whole or not at all; existing ones are replaced.
        `name` is a path below the folder, without extension; default: the image's name. Folders
        are made as needed.

        Raises SettingsError for an unknown format, ValueError for a name that leads out of the
        folder, and ShareError where a file cannot be written.
        """
        formats = [formats] if isinstance(formats, str) else formats
        makers = builders.formats_of(self._settings, formats)
        result = self._drawable() if registry.draws(formats) else self._result
        base = SafePath.at(Path(folder)) / (name or result.job_id)
        paths = []
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            for document in (document for make in makers for document in make(result)):
                path = base.with_name(base.name + document.suffix)
                write_whole(path, document.body)
                paths.append(path.path)
        except OSError as error:
            raise ShareError(
                f"the outputs cannot be written: {error.strerror or error}", place=str(folder)
            ) from error
        return paths

    def _drawable(self) -> Result:
        """Return the result with the decoded image, for formats that draw on it."""
        if isinstance(self._content, bytes):
            picture = decode.decode_for(
                self._content,
                self.model,
                min_decode_side=builders.min_decode_side_of(self._settings),
                max_pixels=builders.max_pixels_of(self._settings),
            )
        else:
            picture = Picture(self._content, self.size, "")
        return replace(self._result, picture=picture)


@dataclass(frozen=True, slots=True, eq=False)
class PredictedObject:
    """One object of a prediction."""

    _mask: Mask
    _size: Size

    @property
    def label(self) -> str:
        """The label of its prompt."""
        return self._mask.label

    @property
    def score(self) -> float:
        """The predicted IoU, about 0 to 1."""
        return self._mask.score

    @property
    def area(self) -> int:
        """Number of set pixels."""
        return self._mask.area

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The box around the set pixels: x0, y0, x1, y1; x1 and y1 are one behind the last pixel.

        All 0 where the mask is empty.
        """
        height, width = self._mask.pixels.shape
        return self._mask.left, self._mask.top, self._mask.left + width, self._mask.top + height

    @property
    def mask(self) -> BoolArray:
        """The mask of the whole image: bool, height × width."""
        return paste(self._mask, self._size)

    def rle(self) -> dict[str, Any]:
        """Return the mask in COCO's compressed run lengths: `size` [height, width], `counts`."""
        return coco.rle(self._mask, self._size)

    def polygons(
        self, *, tolerance_px: float = 1.0, min_area_px: float = 16
    ) -> list[tuple[FloatArray, list[FloatArray]]]:
        """Return each connected part's outline and its holes, the largest part first.

        Polygons are float32, N×2 (x, y), not closed, in pixels of the image, through the centres of
        border pixels, at most about `tolerance_px` from them. Parts and holes smaller than
        `min_area_px` are left out.
        """
        parts = contours(self._mask, tolerance_px=tolerance_px, min_area_px=min_area_px)
        return [
            (part.points.astype(np.float32), [hole.astype(np.float32) for hole in part.holes])
            for part in parts
        ]


def _content(image: Image) -> tuple[bytes | RgbArray, str]:
    """Return an image's bytes or pixels, and its name. Raises PictureError."""
    if isinstance(image, bytes):
        return image, _DEFAULT_NAME
    if isinstance(image, np.ndarray):
        # A copy: it may be drawn on later, by `save`, when the caller has changed the original.
        return image.copy(), _DEFAULT_NAME
    path = Path(image)
    # The daemon follows no links, but a caller may name one.
    file = SafePath.beside(path.resolve())
    try:
        return source_file.read(file)[0], path.name
    except OSError as error:
        raise source_file.unreadable_error(error, str(path)) from error


def _json(prompts: Mapping[str, Any]) -> bytes:
    """Return what a prompt file with this content would contain. Raises PromptError."""
    try:
        return json.dumps(prompts, default=_plain).encode()
    except (TypeError, ValueError) as error:
        raise PromptError(
            f"not the content of a prompt file: {error}", place=parser.TOP, remedy=parser.SEE
        ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no value of JSON")
