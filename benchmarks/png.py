"""`python -m benchmarks.png`: PNGs of 20-megapixel masks by zlib and by ISA-L, side by side.

Processor milliseconds, the least of several runs, and bytes. The pixels are read again, and
compared.

Limitations: files are not written.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np

from benchmarks.interactor import ellipse, ragged
from sam_poll.imaging import png_writer


def cpu_ms(run: Callable[[], bytes], repeats: int) -> tuple[float, bytes]:
    """Return the least processor milliseconds of several runs, and the last result."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        result = run()
        found.append(1000 * (time.process_time() - started))
    return min(found), result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    if not png_writer.HAS_ISAL:
        parser.error("isal is not installed (pip install 'sam_poll[fast]')")
    print("| object | library | ms | kB |\n|---|---|---:|---:|")
    objects = {"a small ellipse": ellipse(0.1), "a large one": ellipse(0.8), "ragged": ragged()}
    for name, mask in objects.items():
        frame = mask.astype(np.uint8) * 255
        for library in ("zlib", "isal"):
            png_writer.HAS_ISAL = library == "isal"
            png_writer._piece.cache_clear()
            png_writer.encode(frame)
            ms, body = cpu_ms(lambda frame=frame: png_writer.encode(frame), repeats)  # type: ignore[misc]
            read = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
            assert read is not None
            assert np.array_equal(read, frame)
            print(f"| {name} | {library} | {ms:.1f} | {len(body) / 1000:.0f} |")


if __name__ == "__main__":
    main()
