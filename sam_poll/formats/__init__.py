"""Output formats: pure functions from a `Result` to `OutputFile`s.

A format does no I/O and reads no clock: the same result gives the same bytes (with the same
versions of the libraries that compress them).

- `registry`: the list of formats. Each has a module of its own, which does not import another one:
  `mask`, `opex`, `cvat`, `coco`, `yolo`, `overlay`.
- `common`: functions that several formats use.
- `merge`: joins the files of many jobs. `answer_reader`: reads the objects of one job back.
"""

from sam_poll.formats.registry import REGISTRY, FormatOptions, load, merged, names

__all__ = ["REGISTRY", "FormatOptions", "load", "merged", "names"]
