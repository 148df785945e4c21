"""Merge the output files of many jobs into one annotation file: `cvat`, `coco` and `yolo`.

`common` has what these share.
"""
