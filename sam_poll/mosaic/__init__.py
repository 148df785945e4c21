"""Pictures larger than memory: segmented tile by tile and joined into one raster and polygons.

- `run`: a mosaic from start to finish. `job`: the same as a job of the pipeline.
- `assembly`: the tiles, shared with other processes, then the outputs. `helpers`: processes for
  further devices.
- `raster`, `grid`, `hints`: the picture, its division into tiles, what it does not declare.
- `segment_tile`, `tile_store`: one tile, and the finished tiles on disk.
- `neighbour_fill`, `seams`, `labels`, `polygons`: from the labels of the tiles to the outputs.

Limitations: the warning filters below apply to the whole process, because
`warnings.catch_warnings` is not thread-safe and a daemon processes mosaics in many threads.
"""

import warnings

# rasterio: a picture need not be georeferenced.
warnings.filterwarnings("ignore", "Dataset has no geotransform")
# rasterio: tiles are traced in pixels.
warnings.filterwarnings("ignore", "The given matrix is equal to Affine.identity")
# pyogrio: polygons of a picture without a CRS have none either.
warnings.filterwarnings("ignore", "'crs' was not provided")
# Pillow warns of broken EXIF data; errors in the picture itself are reported by GDAL.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
