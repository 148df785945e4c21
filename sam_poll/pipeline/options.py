"""Options of a pipeline: sizes of its thread pools and queues, limits."""

from __future__ import annotations

from dataclasses import dataclass

from sam_poll.core.types import Job
from sam_poll.imaging import decode


@dataclass(frozen=True)
class PipelineOptions:
    """Sizes and limits of a pipeline. The defaults suit 2 to 64 cores.

    On a CPU the device thread needs a core of its own; decoding and finishing take little time
    beside it.

    - `queue`: jobs that may wait between two stages.
    - `batch_wait_s`: longest wait of the device for pictures that are being decoded.
    - `cache_mib`: memory for embeddings of pictures already seen.
    - `min_decode_side`: least side in pixels of a decoded picture, even if the network needs less.
    - `pixels`: keep decoded pictures until the end, for a format that draws on them.
    - `drain_s`: time that jobs have to finish after `stop`.
    """

    decode_threads: int = 2
    finish_threads: int = 2
    queue: int = 4
    batch_wait_s: float = 0.005
    cache_mib: int = 512
    max_pixels: int = decode.DEFAULT_MAX_PIXELS
    min_decode_side: int = 0
    pixels: bool = True
    drain_s: float = 30.0

    def capacity(self, batch: int) -> int:
        """Return how many jobs may be in progress with an engine that takes `batch` pictures."""
        return self.decode_threads + self.queue + max(1, batch) + self.finish_threads

    def keeps_picture(self, job: Job) -> bool:
        """Return whether a format of `job` draws on its picture."""
        return self.pixels if job.formats is None else job.min_decode_side > 0

    def decode_side(self, job: Job) -> int:
        """Return the least side in pixels at which the formats of `job` want its picture."""
        return self.min_decode_side if job.formats is None else job.min_decode_side
