"""Pictures and masks as arrays: decoding, headers, masks at full resolution, contours, PNG writing.

- `decode`, `headers`, `heif`, `damage`, `source_file`, `tiff_kinds`, `tiff_samples`,
  `pillow_decoder`: from a file's bytes to an upright RGB array.
- `sidecars`: georeference files beside a picture.
- `masks`: from low-resolution logits to a mask at full resolution. `contours`, `outlines`: polygons
  of a mask.
- `automatic_masks`: masks of everything in a picture. `found_objects`: those of all objects of a
  kind. `rough_shapes`: polygons and masks of prompts as the network takes them; `mask_reader`:
  masks that are pictures. `png_writer`: grey PNGs.
"""
