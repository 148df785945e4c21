"""A large picture, read window by window: RGB, where it holds anything, and how it lies on the map.

What can still go wrong here: JPEG and PNG are decoded line by line from the top; where a row of tiles does not fit into
GDAL's cache, each tile decodes all that is above it again (a tiled GeoTIFF has no such trouble). Of more than three
bands the first three are taken for red, green and blue.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from sam_poll.errors import PictureError
from sam_poll.mosaic.tiles import Area
from sam_poll.types import Bitmap, Pixels, Size

CACHE_MIB = 128  # of GDAL's, whose default is a twentieth of the machine's memory: a row of tiles of 40,000 pixels
_SAMPLE = 1024  # pixels a side of the reduced picture that other than 8-bit values are stretched by
_TAIL = 2  # per cent of values cut off at both ends when they are stretched


class Source:
    """An open picture. `crs` is None and `transform` the identity where it lies on no map."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self.size = Size(dataset.width, dataset.height)
        self.crs, self.transform, self.nodata = dataset.crs, dataset.transform, dataset.nodata
        colours = [n for n, kind in enumerate(dataset.colorinterp, 1) if kind != ColorInterp.alpha] or [1]
        self._bands = colours[:3] if len(colours) >= 3 else colours[:1]
        self._palette = _palette(dataset)
        self._stretch = None if self._palette is not None or dataset.dtypes[0] == "uint8" else self._ends()

    def read(self, area: Area) -> tuple[Pixels, Bitmap]:
        """RGB (uint8, H×W×3), and which pixels hold anything (bool H×W: not nodata, not transparent). PictureError."""
        window = Window(area.x0, area.y0, area.width, area.height)
        try:
            bands = self._dataset.read(self._bands, window=window)
            valid = self._dataset.dataset_mask(window=window) > 0
        except RasterioError as error:
            raise PictureError(f"pixels from {area.x0}, {area.y0} on cannot be read: {_words(error)}") from error
        if np.issubdtype(bands.dtype, np.floating):
            valid &= np.isfinite(bands).all(axis=0)
        return self._shown(bands), valid

    def _shown(self, bands: npt.NDArray[Any]) -> Pixels:
        if self._palette is not None:
            return np.ascontiguousarray(self._palette[bands[0]])
        if self._stretch is not None:
            low, high = (ends[:, None, None] for ends in self._stretch)
            with np.errstate(invalid="ignore"):
                parts = np.nan_to_num((bands.astype(np.float32) - low) / (high - low), nan=0.0)
            bands = (parts.clip(0, 1) * 255).astype(np.uint8)
        if len(bands) == 1:
            bands = np.repeat(bands, 3, axis=0)
        return np.ascontiguousarray(np.moveaxis(bands, 0, 2))

    def _ends(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The values that become black and white: the same for all tiles, or seams would show."""
        scale = min(1.0, _SAMPLE / max(self.size))
        shape = max(1, int(self.size.height * scale)), max(1, int(self.size.width * scale))
        bands = self._dataset.read(self._bands, out_shape=(len(self._bands), *shape)).astype(np.float32)
        valid = self._dataset.dataset_mask(out_shape=shape) > 0
        low, high = [], []
        for band in bands:
            values = band[valid & np.isfinite(band)]
            ends = np.percentile(values, [_TAIL, 100 - _TAIL]) if len(values) else (0, 1)
            low.append(ends[0])
            high.append(max(ends[1], np.nextafter(np.float32(ends[0]), np.float32(np.inf))))
        return np.array(low, np.float32), np.array(high, np.float32)


def _palette(dataset: Any) -> npt.NDArray[np.uint8] | None:
    if dataset.colorinterp[0] != ColorInterp.palette or dataset.dtypes[0] != "uint8":
        return None
    table = np.zeros((256, 3), np.uint8)
    for value, colour in dataset.colormap(1).items():
        table[value] = colour[:3]
    return table


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """The picture, open. PictureError where it is none, or would have to be turned first."""
    with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE_MIB):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            dataset = rasterio.open(path)
        except RasterioError as error:
            raise PictureError(f"it cannot be opened: {_words(error)}", place=str(path)) from error
        with dataset:
            if not dataset.count:
                raise PictureError("it holds several pictures, and none by itself", place=str(path))
            if np.issubdtype(dataset.dtypes[0], np.complexfloating):
                raise PictureError("complex values cannot be shown", place=str(path))
            if dataset.tags().get("EXIF_Orientation", "1") not in ("0", "1"):
                raise PictureError(
                    "the camera has left a note that it is to be turned",
                    place=str(path),
                    remedy="save it upright: `magick IN -auto-orient OUT`",
                )
            yield Source(dataset)


def _words(error: Exception) -> str:
    return " ".join(str(error.__cause__ or error).split())
