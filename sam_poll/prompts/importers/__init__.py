"""Read annotations made elsewhere, by CVAT and other programs, as prompts.

No module does I/O; pictures are known by name and size only.

- `cvat_xml`, `coco`, `datumaro`, `yolo`, `opex`, `labelme` (JSON), `voc` (Pascal VOC's XML and
  LabelMe's): one reader each.
- `shapes`: the types that every reader uses, and which shapes are one object.
- `common`: helpers of the readers.
- `prompt_files`: recognises the kind of a file, and writes prompt files.
"""
