"""Rasters that name other files."""

from __future__ import annotations

from pathlib import Path


def virtual(path: Path, source: str, size: tuple[int, int] = (90, 60)) -> Path:
    """Return a GDAL VRT of three bands, each of one band of a file."""
    bands = ""
    for n in (1, 2, 3):
        bands += f'<VRTRasterBand dataType="Byte" band="{n}">'
        bands += f'<SimpleSource><SourceFilename relativeToVRT="1">{source}</SourceFilename>'
        bands += f"<SourceBand>{n}</SourceBand></SimpleSource></VRTRasterBand>"
    path.write_text(
        f'<VRTDataset rasterXSize="{size[0]}" rasterYSize="{size[1]}">{bands}</VRTDataset>'
    )
    return path
