"""The data types that all packages share: prompts, pictures, jobs, masks, results.

The module does no I/O and imports only `errors` and `safe_path`, so that every module may import
it. Values are frozen; those with arrays compare by identity (`eq=False`), because `==` on arrays
has no single result.

Limitations: the arrays inside frozen values are not frozen themselves; code that receives one must
not write into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Event
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from sam_poll.core.errors import SamPollError
from sam_poll.core.safe_path import SafePath

RgbArray: TypeAlias = npt.NDArray[np.uint8]  # H×W×3, RGB
BoolArray: TypeAlias = npt.NDArray[np.bool_]  # H×W
FloatArray: TypeAlias = npt.NDArray[np.float32]  # h×w logits


class Size(NamedTuple):
    """Width and height in pixels of an upright (EXIF-rotated) picture."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Point:
    """A click, in pixels of the upright picture at full resolution.

    `label` 1 is foreground, 0 background.
    """

    x: float
    y: float
    label: int = 1


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels, `x0 < x1` and `y0 < y1`.

    Coordinates are those of edges, as in CVAT and COCO: a full-frame box is 0, 0, width, height.
    """

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, slots=True)
class Polygon:
    """A rough outline of an object: its corners (x, y), at least three, in edge coordinates.

    Parts that it encloses twice are outside (even-odd rule).
    """

    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A rough mask of a whole picture of `size`: COCO's run lengths.

    `counts` are those of alternating runs of pixels outside and inside, column by column, the first
    outside. Their sum is width × height, and at least one pixel is inside.
    """

    size: Size
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A rough mask in a file beside the picture, before it is read.

    `name` is what the prompt calls it, `path` where it is; None: not searched yet.
    """

    name: str
    path: SafePath | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """One object: points, a box, a rough shape, or any of them together.

    `shape` is given to the network beside the box; where there is no box, `prompts.parser.fit`
    adds the shape's. `mask_file` becomes the shape when the picture is decoded. `notes` describe
    changes that made the prompt usable (a box clipped to the picture); they are copied to the
    result.
    """

    label: str = "object"
    points: tuple[Point, ...] = ()
    box: Box | None = None
    notes: tuple[str, ...] = ()
    shape: Polygon | RunLengths | None = None
    mask_file: MaskFile | None = None

    @property
    def ambiguous(self) -> bool:
        """Whether the prompt is a single point, which may mean a part or the whole.

        The network then predicts three masks, of which the best is taken; with a box, a shape or
        several points it predicts one (advice of the SAM repositories).
        """
        return self.box is None and self.shape is None and len(self.points) == 1


@dataclass(frozen=True, slots=True)
class AutomaticMaskRequest:
    """A request to segment everything in a picture, without a prompt.

    `points_per_side` is the size of the grid of clicks, `min_area` the smallest mask in pixels,
    `iou` and `stability` the thresholds of the two scores, `crops` the number of layers of enlarged
    crops.
    """

    points_per_side: int = 32
    min_area: int = 100
    iou: float = 0.8
    stability: float = 0.9
    crops: int = 0


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A box in the picture around an object that is of the kind to find (`label` 1), or not (0)."""

    box: Box
    label: int = 1


@dataclass(frozen=True, slots=True)
class ConceptRequest:
    """A request to find all objects of a kind, which words, exemplars, or both describe.

    The objects of each of `texts` are labelled with it; those of exemplars alone with `label`.
    Exemplars go with one text at most. `threshold` is the score that an object must exceed,
    `max_objects` the largest number of objects of each text, the best ones. `notes` as in `Prompt`.
    """

    texts: tuple[str, ...] = ()
    exemplars: tuple[Exemplar, ...] = ()
    label: str = "object"
    threshold: float = 0.5
    max_objects: int = 100
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Mosaic:
    """A request to segment a picture larger than memory, tile by tile: everything, or by text.

    `tile` is the side of a tile, `padding` the margin seen around it, in pixels. `first` are the
    options of the first of up to `passes` passes over a tile; passes end when `target_coverage` of
    the tile has a label. With `concept`, which has texts and no exemplars, its objects are found
    instead, all of them; of the other options only `min_area` of `first` applies then.
    """

    first: AutomaticMaskRequest = AutomaticMaskRequest()
    tile: int = 1024
    padding: int = 128
    passes: int = 1
    target_coverage: float = 0.95
    concept: ConceptRequest | None = None


Request: TypeAlias = (
    tuple[Prompt, ...] | AutomaticMaskRequest | ConceptRequest | Mosaic
)  # What a prompt file requests


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded picture.

    `pixels` is uint8, h×w×3, RGB, upright, possibly at a reduced scale (exactly 1/2, 1/4 or 1/8 of
    a JPEG, rounded up); `size` is the full resolution, to which all coordinates refer. `digest` is
    the SHA-256 of the file (hex).
    """

    pixels: RgbArray
    size: Size
    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class InputTransform:
    """How a picture is placed in the network's square input.

    `size` is the picture at full resolution, `side` the side of the square. `region` is the part of
    the square, from its upper left corner, that the picture fills: SAM1 scales the longest side to
    `side` and pads, so one side of the region is shorter; SAM2 scales both sides, so the region is
    the whole square. `two_step`: logits are first enlarged to side × side and cut to the region,
    then enlarged to the picture (SAM1); otherwise they are enlarged to the picture in one step
    (SAM2).
    """

    size: Size
    side: int
    region: Size
    two_step: bool


@dataclass(frozen=True, slots=True, eq=False)
class ModelInput:
    """A picture as input of the network.

    uint8, region.height × region.width × 3, RGB, not yet normalised.
    """

    pixels: RgbArray
    frame: InputTransform
    digest: str


@dataclass(frozen=True, slots=True, eq=False)
class PackedLevel:
    """One tensor of a `PackedEmbedding`.

    `data` are its values in C order, little endian, as `dtype` (`float16` or `bfloat16`).
    `computed` is the type that the network computed, and expects.
    """

    data: memoryview
    dtype: str
    computed: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class PackedEmbedding:
    """An embedding in main memory, in half precision, as it is kept on a disk.

    `size` is the picture at full resolution, `side` that of the encoder's input in pixels,
    `precision` that of the network.
    """

    size: Size
    side: int
    precision: str
    levels: tuple[PackedLevel, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """One mask as it leaves the device: float32, h×w, at the decoder's low resolution.

    Values above 0 are object. `score` is the predicted IoU.
    """

    pixels: FloatArray
    score: float
    frame: InputTransform


@dataclass(frozen=True, slots=True, eq=False)
class PackedMask:
    """One of the many masks of automatic mask generation, packed (`imaging.automatic_masks.pack`).

    It holds only the part of the logits that determines the mask. `box` encloses the set pixels at
    the picture's full resolution (whole numbers). `score` is the predicted IoU, or the score of a
    found object; `stability` the IoU of the masks cut at logits 1 and -1 (1 where it is not
    measured). `plane` is the decoder's low resolution, and `crop` (left, top, width, height) the
    part of it that contains the mask. `inside` are the signs in that crop, one bit a pixel
    (numpy.packbits), `edge` the logits along the mask's edge, float32, row by row.
    `size` is that of the whole picture, and `corner` the position in it of the frame's picture,
    which may be a crop (`AutomaticMaskRequest.crops`).
    """

    box: Box
    score: float
    stability: float
    frame: InputTransform
    plane: Size
    crop: tuple[int, int, int, int]
    inside: npt.NDArray[np.uint8]
    edge: FloatArray
    size: Size
    corner: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of main memory."""
        return self.inside.nbytes + self.edge.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """One object's mask: a bool crop of its own bounding box at the picture's full resolution.

    `pixels` is h×w with its upper left corner at (left, top) of the picture; every edge row and
    column has at least one set pixel. An empty mask has shape 0×0. `score` is the predicted IoU.
    """

    label: str
    score: float
    left: int
    top: int
    pixels: BoolArray

    @property
    def area(self) -> int:
        """Number of set pixels."""
        return int(np.count_nonzero(self.pixels))


_PADDING_FAMILIES = frozenset({"sam1", "sam-hq", "mobile-sam"})


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The network that answers.

    `step` names the current step of the memory plan (`bfloat16 1024` …).
    """

    name: str
    family: str  # "sam1" | "sam2" | "sam-hq" | "mobile-sam" | "edgetam" | "sam3"
    side: int
    device: str
    precision: str
    step: str = ""
    peak_mib: float | None = None
    runtime: str = "torch"

    @property
    def stretches(self) -> bool:
        """Whether both sides of a picture are scaled to `side`.

        SAM1 and what is derived from it scale the longer side and pad the other.
        """
        return self.family not in _PADDING_FAMILIES


# A file in a tiled job's scratch folder: the last attempt completed at least one piece.
ADVANCED = "advanced"


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """The work of one prompt file.

    - `id`: path below the input folder without extension (`cam1/dog`).
    - `name`: the picture's name in CVAT (`done/cam1/dog.jpg`).
    - `source_ref`: private to the job's source.
    - `error`: set when the source knows already that the job must be rejected (an invalid prompt).
    - `sha256` (lower case hex), `nbytes`, `image_size`: what the prompt says of the picture's file
      and size.
    - `attempt`: number of this run; above 1, an earlier run ended its process, and the job runs
      alone.
    - `formats`: output formats of this job; None: those of the pipeline.
    - `min_decode_side`: minimum side in pixels of the decoded picture, for a format that draws on
      it; 0: none does.
    - `embedding`: return the picture's embedding as well.
    - `keep`: make sure that the picture's embedding is in the disk cache.
    - `cancelled`: set when the client does not wait any more.
    - `scratch`: folder for the finished pieces of a mosaic; it outlives the run, and helpers may
      write to it.
    - `is_helper`: the job belongs to another process, which delivers it; this one only does a part
      of the work, and is requeued in the end.
    - `notes`: remarks of the source, which are copied to the result.
    """

    id: str
    name: str
    picture: SafePath | bytes
    prompts: Request
    source_ref: Any = None
    error: SamPollError | None = None
    sha256: str | None = None
    nbytes: int | None = None
    image_size: Size | None = None
    generation: int = 1
    attempt: int = 1
    formats: tuple[str, ...] | None = None
    min_decode_side: int = 0
    embedding: bool = False
    keep: bool = False
    cancelled: Event | None = None
    scratch: SafePath | None = None
    is_helper: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The answer to a job: one mask for each prompt, in the order of the prompts.

    Of an automatic mask request and a concept request there are no prompts, and the masks are
    sorted by score, highest first. `prompts` are those used (clipped); `picture` is the decoded
    picture for the overlay, possibly at a reduced scale; `timings` are milliseconds by stage;
    `notes` are remarks for the reader (a clipped box). `embedding` is set where the job requests
    it: float32, 1×C×h×w, at the side of `model`. `kept` is the name of the embedding's file in the
    disk cache, of a job with `keep`; None where it could not be written.
    """

    job_id: str
    name: str
    size: Size
    masks: tuple[Mask, ...]
    prompts: tuple[Prompt, ...]
    model: ModelInfo
    picture: Picture | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    embedding: FloatArray | None = None
    kept: str | None = None


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One output file of a job.

    `suffix` is appended to the job's id (`.mask.png`). A body too large for the memory is in `file`
    instead, in the job's `scratch`; only sources that set `scratch` support this. `notes` list what
    the format could not hold, such as an object too small for a polygon; they are logged.
    """

    suffix: str
    media_type: str
    body: bytes
    file: SafePath | None = None
    notes: tuple[str, ...] = ()
