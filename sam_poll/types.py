"""The words everybody uses: what a prompt, a picture, a job, a mask, a result is; and the three seams.

Nothing here does I/O or knows another module but `errors` and `safe_path`, so everything may import it. Values are
frozen; those that carry arrays compare by identity (`eq=False`), because `==` on arrays has no single answer.

What can still go wrong here: the arrays inside frozen values are not frozen themselves; whoever gets one must not
write into it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from sam_poll.errors import SamPollError
from sam_poll.safe_path import SafePath

Pixels: TypeAlias = npt.NDArray[np.uint8]  # H×W×3, RGB
Bitmap: TypeAlias = npt.NDArray[np.bool_]  # H×W
Field: TypeAlias = npt.NDArray[np.float32]  # h×w logits


class Size(NamedTuple):
    """Width and height in pixels of an upright (EXIF-rotated) picture."""

    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Point:
    """A click, in pixels of the upright picture at full resolution. `label` 1 is foreground, 0 background."""

    x: float
    y: float
    label: int = 1


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels, `x0 < x1` and `y0 < y1`, edges as in CVAT and COCO (a full-frame box is 0, 0, W, H)."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True, slots=True)
class Prompt:
    """One object: points, a box, or both together refining one object.

    `notes` say what was changed to make the prompt usable (a box clipped to the picture), for the result's reader.
    """

    label: str = "object"
    points: tuple[Point, ...] = ()
    box: Box | None = None
    notes: tuple[str, ...] = ()

    @property
    def ambiguous(self) -> bool:
        """One lone point may mean a part or a whole: ask the network for three masks and take the best.
        With a box or several points, ask for one (advice of the SAM repositories)."""
        return self.box is None and len(self.points) == 1


@dataclass(frozen=True, slots=True)
class Everything:
    """No prompt: segment all there is."""

    points_per_side: int = 32
    min_area: int = 100
    iou: float = 0.8
    stability: float = 0.9
    crops: int = 0


@dataclass(frozen=True, slots=True)
class Mosaic:
    """No prompt, and a picture larger than memory: segment all there is, tile by tile (`sam_poll.mosaic`).

    `tile` is a tile's side, `padding` what is seen around it, in pixels. `first` is asked in the first of up to
    `passes` passes over a tile, which end where `target_coverage` of it has a label.
    """

    first: Everything = Everything()
    tile: int = 1024
    padding: int = 128
    passes: int = 1
    target_coverage: float = 0.95


Wanted: TypeAlias = tuple[Prompt, ...] | Everything | Mosaic  # what a prompt file asks for


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A decoded picture.

    `pixels` is uint8, h×w×3, RGB, upright, possibly at a reduced scale (an exact 1/2, 1/4 or 1/8 of a JPEG, rounded
    up); `size` is the full resolution, which all coordinates refer to. `digest` names the file's bytes (hex).
    """

    pixels: Pixels
    size: Size
    digest: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Frame:
    """How the network's square lies on the picture.

    `size` is the picture at full resolution. `side` is the side of the square the network sees. `region` is the part of
    the square, from its upper left corner, that the picture fills: SAM1 scales the longest side to `side` and pads, so
    one of region's sides is shorter; SAM2 squeezes both sides, so region is the whole square.
    `two_step`: logits are first enlarged to side × side and cut to region, then enlarged to the picture (SAM1's way);
    otherwise they are enlarged to the picture at once (SAM2's way).
    """

    size: Size
    side: int
    region: Size
    two_step: bool


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A picture as the network wants it: uint8, region.height × region.width × 3, RGB, not yet normalised."""

    pixels: Pixels
    frame: Frame
    digest: str


class Embedding(Protocol):
    """What the encoder made of a picture; only the engine that made it looks inside."""

    @property
    def frame(self) -> Frame: ...
    @property
    def nbytes(self) -> int: ...
    def array(self) -> Field:
        """The coarsest level as it is, for readers who decode it themselves: float32, 1×C×h×w, on the host. Called on
        the device thread."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Logits:
    """One chosen mask as it leaves the device: float32, h×w, at the decoder's low resolution; above 0 is object.
    `score` is the predicted IoU."""

    pixels: Field
    score: float
    frame: Frame


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One of the many masks of everything mode, packed: what of its logits decides the mask, and nothing else
    (`everything.pack`).

    `box` encloses its set pixels at the picture's full resolution (whole numbers). `score` is the predicted IoU;
    `stability` the IoU of the mask cut at logit 1 with the one cut at -1. `plane` is the decoder's low resolution, and
    `crop` (left, top, width, height) the part of it where the mask lies. Of that crop `inside` are the signs, one bit a
    pixel (numpy.packbits), `edge` the logits along the mask's edge, float32, row by row.
    `size` is the whole picture's, and `corner` where the frame's picture lies in it: that may be a crop
    (`Everything.crops`).
    """

    box: Box
    score: float
    stability: float
    frame: Frame
    plane: Size
    crop: tuple[int, int, int, int]
    inside: npt.NDArray[np.uint8]
    edge: Field
    size: Size
    corner: tuple[int, int] = (0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of main memory."""
        return self.inside.nbytes + self.edge.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """One object's mask: a bool crop of its own bounding box at the picture's full resolution.

    `pixels` is h×w with its upper left corner at (left, top) of the picture; every edge row and column holds at least
    one set pixel. An empty mask has shape 0×0. `score` is the predicted IoU.
    """

    label: str
    score: float
    left: int
    top: int
    pixels: Bitmap

    @property
    def area(self) -> int:
        """Set pixels."""
        return int(np.count_nonzero(self.pixels))


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which network answers. `step` says how the memory plan runs it (`bfloat16 1024` …)."""

    name: str
    family: str  # "sam1" | "sam2"
    side: int
    device: str
    precision: str
    step: str = ""
    peak_mib: float | None = None


ADVANCED = "advanced"  # a file in a job's scratch: a piece of it was done since it was last taken up


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One prompt file's worth of work. `id` is its path below the input folder without its ending (`cam1/dog`);
    `name` is the picture as CVAT will know it (`done/cam1/dog.jpg`); only its door reads `origin`. `fault` is set when
    the door already knows that the job must be rejected (a prompt that cannot be understood). `sha256` (lower case hex)
    and `nbytes` are what the picture's file must be, `image_size` what its size must be, where the prompt says so.
    `attempt` counts the runs that this one is the latest of: above 1, an earlier one ended its process, and the job is
    run alone.

    `notes` say what its door has to say about the answer, for the result's reader.

    `formats` names the formats this job is answered in; None: those of the pipeline. A format of these that draws on
    the picture wants it decoded with sides of at least `cover` pixels; 0: none of them draws. `embedding`: hand the
    picture's embedding out, too. `gone` is set when nobody waits for the answer any more.

    `scratch` is a folder for what is done of a mosaic: it outlives the run, and others may work in it, too. `helps`:
    the job is another's, who answers it; this one only takes a part of the work, and is released in the end."""

    id: str
    name: str
    picture: SafePath | bytes
    prompts: Wanted
    origin: Any = None
    fault: SamPollError | None = None
    sha256: str | None = None
    nbytes: int | None = None
    image_size: Size | None = None
    generation: int = 1
    attempt: int = 1
    formats: tuple[str, ...] | None = None
    cover: int = 0
    embedding: bool = False
    gone: Event | None = None
    scratch: SafePath | None = None
    helps: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The answer to a job: one mask for each prompt, in the prompts' order.

    Where everything was asked for there are no prompts, and the masks come by predicted IoU, the best first.
    `prompts` are as used (clipped); `picture` is the decoded picture (for the overlay; maybe at reduced scale);
    `timings` are milliseconds by stage; `notes` say what a reader should know (a clipped box). `embedding` is there
    where the job has asked for it: float32, 1×C×h×w, at the side of `model`.
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
    embedding: Field | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """The bytes of one output file. `suffix` is appended to the job's id (`.mask.png`). Where they may be too many for
    the memory they lie in `file`, in the job's `scratch`; only doors that give one know of that. `notes` say what the
    format could not hold, such as an object too small for a polygon; they are logged."""

    suffix: str
    media_type: str
    body: bytes
    file: SafePath | None = None
    notes: tuple[str, ...] = ()


class Door(Protocol):
    """Where jobs come from and answers go. Each job gets one of `deliver`, `reject`, `release`, `defer`, `abandon`,
    from any thread.

    `jobs` claims a job when it is asked for the next one, and ends when `stop` is set or no job can come any more.
    Closing it gives back what it has claimed and not handed out.
    `deliver` and `reject` raise OSError when the surroundings are sick; the caller tries again or releases.
    LostError from any of them: the job is not this door's any more, and needs no further call.
    `release` gives the job back, as if it had not been claimed; with `trouble` reading it, not to be offered at once.
    `defer` gives it back because its picture is not complete, or not the one meant; the door offers it again when the
    picture has changed, and rejects it with `error` when it has not for a while.
    `abandon`: the process that worked on it has ended, maybe because of it; it is offered again, as a further attempt.
    """

    def jobs(self, stop: Event) -> Generator[Job, None, None]: ...
    def deliver(self, job: Job, documents: Sequence[Document]) -> None: ...
    def reject(self, job: Job, error: SamPollError) -> None: ...
    def release(self, job: Job, trouble: OSError | None = None) -> None: ...
    def defer(self, job: Job, error: SamPollError) -> None: ...
    def abandon(self, job: Job) -> None: ...


class Engine(Protocol):
    """A network. `prepare` is called from any thread, the other calls from the one device thread only.

    `candidates` takes each of `points` (x, y in the picture's pixels) for a click on an object, and gives those of its
    three masks whose predicted IoU and stability score reach `iou` and `stability`, in the points' order. A threshold
    of 0 lets all pass that set a pixel.
    """

    @property
    def info(self) -> ModelInfo: ...
    @property
    def batch(self) -> int:
        """How many pictures `encode` takes at once now, at most."""
        ...

    def prepare(self, picture: Picture) -> Prepared: ...
    def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]: ...
    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]: ...
    def candidates(
        self, embedding: Embedding, points: Sequence[tuple[float, float]], *, iou: float, stability: float
    ) -> list[Candidate]: ...
    def relieve_by(self, let_go: Callable[[], bool]) -> None:
        """Register what gives up memory that is only held to be faster (kept embeddings) and returns whether there was
        any. It is called on the device thread when memory runs out, before anything is stepped down."""
        ...


class Pieces(Protocol):
    """A job that is too long to be done in one go. `take` and `documents` may raise whatever ends a job."""

    def take(self, engine: Engine) -> bool | None:
        """Do one piece, on the device thread. False: all are done; None: others are at what is left."""
        ...

    def documents(self) -> Sequence[Document]:
        """The answer, when all pieces are done; on the finish pool."""
        ...

    @property
    def found(self) -> int:
        """How many objects are in the answer."""
        ...

    def close(self) -> None:
        """Let go of files and memory, however it ends. From any thread; twice is fine."""
        ...


class Format(Protocol):
    """Turns a result into the files of one output format. Pure: bytes out, no I/O."""

    def __call__(self, result: Result) -> Sequence[Document]: ...
