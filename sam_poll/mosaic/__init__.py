"""Pictures larger than memory: cut into tiles, each segmented, put together again as one raster and as polygons.

What can still go wrong here: the filters below are the whole process's. `warnings.catch_warnings` is not for threads,
and a daemon's mosaics run in many.
"""

import warnings

warnings.filterwarnings("ignore", "Dataset has no geotransform")  # rasterio: a picture need not lie on a map
warnings.filterwarnings("ignore", "The given matrix is equal to Affine.identity")  # … nor do tiles when they are traced
warnings.filterwarnings("ignore", "'crs' was not provided")  # pyogrio: nor need its polygons
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # what is broken in a file GDAL will say
