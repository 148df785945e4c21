"""Mosaics by the piece: time, peak memory, and how well the labels fit what was drawn. `python -m
benchmarks.mosaic`.

Each run is a process of its own, so that its peak is its own. `--library` loops `sam2`'s mask
generator over some of the same windows, same weights, grid and thresholds, and says how long a
megapixel takes there. `--alone` says how well the network sees such shapes where nothing is cut.
`--more cpu` makes it once more, with a second process that takes tiles beside the first."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

POINTS, STABILITY = 12, 0.7  # the bundled model's masks are not very stable
ALONE = (
    768,
    1280,
    1500,
)  # sides of windows: of tiles of 512 and of 1024, and the whole of the tests' mosaics


def run(
    picture: Path, output: Path, args: argparse.Namespace, more: tuple[str, ...] = ()
) -> dict[str, Any]:
    """One mosaic, in this process; `more` devices have a process each, and take tiles of it."""
    from sam_poll import engines
    from sam_poll.core.safe_path import SafePath
    from sam_poll.core.types import AutomaticMaskRequest
    from sam_poll.mosaic.helpers import HelperSpec, run_helpers
    from sam_poll.mosaic.run import MosaicOptions, mosaic
    from sam_poll.mosaic.segment_tile import Passes

    first = AutomaticMaskRequest(
        points_per_side=args.points, min_area=100, iou=0.8, stability=STABILITY
    )
    options = MosaicOptions(args.tile, args.padding, Passes(first), args.model)
    # as a GPU's engine and its weights would be, the network's own memory is there before and after
    engine = engines.load(engines.resolve(args.model), device=args.device)
    stages: dict[str, float] = {}
    last: list[Any] = [time.monotonic(), "tiles"]
    begun = time.monotonic()

    def on_tile(step: Any) -> None:
        now = time.monotonic()
        stages[last[1]] = stages.get(last[1], 0.0) + now - last[0]
        last[:] = [now, step.stage]

    source, place = SafePath.beside(picture), SafePath.at(output)
    helpers = [
        HelperSpec(
            name,
            source,
            place,
            options,
            partial(engines.load, engines.resolve(args.model), device=name),
        )
        for name in more
    ]
    with run_helpers(helpers, os.environ):
        stats = mosaic(source, place, options, lambda: engine, on_tile)
    wall = time.monotonic() - begun
    stages[last[1]] = stages.get(last[1], 0.0) + time.monotonic() - last[0]
    peak = _peak_mib()
    megapixels = stats["width"] * stats["height"] / 1e6
    return {
        "model": args.model,
        "device": engine.info.device,
        "side": stats["width"],
        "tile": args.tile,
        "padding": args.padding,
        "points_per_side": args.points,
        "wall_s": round(wall, 1),
        "s_per_megapixel": round(wall / megapixels, 3),
        "stages_s": {name: round(value, 1) for name, value in stages.items()},
        "peak_mib": round(peak),
        **{key: stats[key] for key in ("tiles", "coverage", "labels_before", "joins", "labels")},
    }


def _peak_mib() -> float:
    """Of this process alone: `ru_maxrss` begins with what its parent had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def library(picture: Path, args: argparse.Namespace) -> dict[str, Any]:
    """`sam2`'s generator over the first `--library` windows of the same picture."""
    import numpy as np
    from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

    from sam_poll.core.safe_path import SafePath
    from sam_poll.mosaic.grid import TileGrid
    from sam_poll.mosaic.raster import opened
    from tools import train_demo

    warnings.simplefilter("ignore")
    model: Any = train_demo.build(weights=train_demo.DEMO / "demo.pt").eval()
    made = SAM2AutomaticMaskGenerator(
        model, points_per_side=args.points, pred_iou_thresh=0.8, stability_score_thresh=STABILITY
    )
    side = model.image_size
    made.predictor._bb_feat_sizes = [
        (side // 4, side // 4),
        (side // 8, side // 8),
        (side // 16, side // 16),
    ]
    with opened(SafePath.beside(picture)) as source:
        cut = TileGrid(source.size, args.tile, args.padding)
        tiles = [
            cut[number]
            for number in np.linspace(0, len(cut) - 1, args.library).astype(int).tolist()
        ]
        begun = time.monotonic()
        for tile in tiles:
            made.generate(source.read(tile.window)[0])
        wall = time.monotonic() - begun
    megapixels = sum(tile.core.width * tile.core.height for tile in tiles) / 1e6
    peak = _peak_mib()
    return {
        "library": True,
        "tiles": len(tiles),
        "s_per_megapixel": round(wall / megapixels, 3),
        "peak_mib": round(peak),
    }


def truth(output: Path, drawn: Any, tile: int) -> dict[str, Any]:
    """How the labels fit what was drawn."""
    import numpy as np

    from tools import mosaics

    labels = mosaics.read(output / "labels.tif")
    found, over = mosaics.compare(drawn, labels), mosaics.crossing(drawn, tile)
    ious = np.array([match.iou for match in found.values()])
    return {
        "shapes": len(found),
        "mean_iou": round(float(ious.mean()), 4),
        "median_iou": round(float(np.median(ious)), 4),
        "below_0.9": int((ious < 0.9).sum()),
        "missed": int((ious < 0.5).sum()),
        "labels_of_several_shapes": sum(
            match.labels > 1 for match in mosaics.compare(labels, drawn).values()
        ),
        "crossing": len(over),
        "crossing_in_several_labels": sum(found[shape].labels > 1 for shape in over),
        "crossing_missed": sum(found[shape].labels == 0 for shape in over),
        "covered_of_shapes": round(float((labels[drawn > 0] > 0).mean()), 4),
    }


def alone(args: argparse.Namespace) -> dict[str, Any]:
    """How well each kind of shape is seen in the middle of a window of its own: no seam, nothing
    cut off.
    """
    import numpy as np

    from sam_poll import engines
    from sam_poll.core.types import AutomaticMaskRequest
    from sam_poll.mosaic.segment_tile import Passes, label_window
    from tools import mosaics

    engine = engines.load(engines.resolve(args.model), device=args.device)
    options = Passes(
        AutomaticMaskRequest(
            points_per_side=args.points, min_area=100, iou=0.8, stability=STABILITY
        )
    )
    found: dict[str, Any] = {}
    for kind in (*mosaics.KINDS, "ring"):
        drawn = mosaics.draw(args.seed, args.side, (kind,), tuple(args.radius))
        for window in ALONE:
            ious = []
            for shape in range(1, int(drawn.truth.max()) + 1):
                middle = [int(places.mean()) for places in np.nonzero(drawn.truth == shape)]
                begin = [max(0, min(place - window // 2, args.side - window)) for place in middle]
                where = slice(begin[0], begin[0] + window), slice(begin[1], begin[1] + window)
                truth = drawn.truth[where]
                seen = label_window(
                    engine,
                    drawn.pixels[where],
                    np.ones(truth.shape, bool),
                    options,
                    (slice(None), slice(None)),
                )
                ious.append(mosaics.compare(truth, seen.numbers)[shape].iou)
            found[f"{kind}, {window}"] = {
                "shapes": len(ious),
                "mean_iou": round(float(np.mean(ious)), 4),
                "worst_of_nine_tenths": round(float(np.quantile(ious, 0.1)), 4),
                "missed": sum(iou < 0.5 for iou in ious),
            }
    return found


def pictures(folder: Path, args: argparse.Namespace) -> None:
    """What docs/mosaic.md shows: labels over the scene, before and after the seams, drawn as white
    lines.
    """
    import cv2
    import numpy as np

    from sam_poll import engines
    from sam_poll.core.safe_path import SafePath
    from sam_poll.core.types import AutomaticMaskRequest, Size
    from sam_poll.mosaic.grid import Area, TileGrid
    from sam_poll.mosaic.labels import tables
    from sam_poll.mosaic.run import MosaicOptions, mosaic
    from sam_poll.mosaic.segment_tile import Passes
    from sam_poll.mosaic.tile_store import FOLDER, TileStore
    from tools import mosaics

    drawn = mosaics.draw(args.seed, args.side)
    before = np.zeros(drawn.truth.shape, np.int64)
    cut = TileGrid(Size(args.side, args.side), args.tile, args.padding)

    def on_tile(step: Any) -> None:
        if (step.stage, step.done) == ("seams", 0):
            folder = SafePath.at(output) / FOLDER
            state = TileStore(folder, json.loads((folder / "job.json").read_bytes()))
            known = tables(state, cut)
            for tile in cut:
                before[tile.core.within(Area(0, 0, *cut.size))] = known.of(
                    state.numbers(tile.number), tile.number
                )

    with tempfile.TemporaryDirectory() as temporary:
        picture, output = Path(temporary) / "a.tif", Path(temporary) / "out"
        mosaics.write(picture, drawn.pixels)
        engine = engines.load(engines.resolve(args.model), device=args.device)
        first = AutomaticMaskRequest(
            points_per_side=args.points, min_area=100, iou=0.8, stability=STABILITY
        )
        options = MosaicOptions(args.tile, args.padding, Passes(first), args.model)
        mosaic(SafePath.beside(picture), SafePath.at(output), options, lambda: engine, on_tile)
        after = mosaics.read(output / "labels.tif").astype(np.int64)
    for name, labels in (("before", before), ("after", after)):
        colours = (
            np.random.default_rng(4).integers(50, 256, (int(labels.max()) + 1, 3)).astype(np.uint8)
        )
        colours[0] = 0
        over = np.where(
            (labels > 0)[..., None],
            0.25 * drawn.pixels + 0.75 * colours[labels],
            drawn.pixels * 0.6,
        )
        for seam in range(args.tile, args.side, args.tile):
            over[seam - 3 : seam + 3] = over[:, seam - 3 : seam + 3] = 255
        small = cv2.resize(over.astype(np.uint8), (560, 560), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / f"mosaic-{name}.png"), small[..., ::-1])


def main() -> None:
    from tools import mosaics

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--padding", type=int, default=128)
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument(
        "--model", default="demo", help="a catalogue name, `demo`, or `fake`: all but the network"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--library", type=int, default=0, help="so many windows by the library's generator as well"
    )
    parser.add_argument(
        "--more",
        default="",
        help="once more with a process each for these devices beside: `cpu,cpu`",
    )
    parser.add_argument("--keep", type=Path, help="keep the picture and the outputs here")
    parser.add_argument(
        "--pictures", type=Path, help="only make the pictures of docs/mosaic.md, in this folder"
    )
    parser.add_argument(
        "--alone", action="store_true", help="only shapes that nothing cuts, by kind and window"
    )
    parser.add_argument(
        "--radius", type=float, nargs=2, default=mosaics.RADIUS, help="with --alone: of the shapes"
    )
    parser.add_argument("--child", nargs=2, metavar=("KIND", "PICTURE"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, picture = args.child
        more = tuple(args.more.split(",")) if kind == "crew" else ()
        made = (
            library(Path(picture), args)
            if kind == "library"
            else run(Path(picture), args.output, args, more)
        )
        print(json.dumps(made))
        return
    if args.alone:
        print(json.dumps(alone(args), indent=2))
        return
    if args.pictures:
        pictures(args.pictures, args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        drawn = mosaics.draw(args.seed, args.side)
        picture = folder / f"mosaic-{args.side}.tif"
        mosaics.write(picture, drawn.pixels)
        output = folder / f"{args.model}-{args.side}-{args.tile}"
        result = _child("run", picture, output)
        if args.model != "fake":
            result |= truth(output, drawn.truth, args.tile)
        if args.more:
            beside = _child("crew", picture, output.with_name(f"{output.name}-crew"))
            result["crew"] = {key: beside[key] for key in ("wall_s", "stages_s", "labels")}
            result["crew"]["times_as_fast"] = round(
                result["stages_s"]["tiles"] / beside["stages_s"]["tiles"], 2
            )
        if args.library:
            result["generator"] = _child("library", picture, output)
        print(json.dumps(result, indent=2))


def _child(kind: str, picture: Path, output: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.mosaic",
        *sys.argv[1:],
        "--child",
        kind,
        str(picture),
    ]
    done = subprocess.run(
        [*command, "--output", str(output)], check=True, stdout=subprocess.PIPE, text=True
    )
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    main()
