#!/usr/bin/env python3
"""Drop a picture and its prompt so that nobody sees half of a file: copy under a temporary name, then rename.

    python examples/drop_pair.py dog.jpg dog.json /mnt/share/in/cam1

A rename is known to be whole, so the pair starts within 0.1 s; a plain `cp` waits until the file has been still for a
while. The picture goes first: a prompt never waits for it.
"""

import os
import shutil
import sys
from pathlib import Path


def drop(source: Path, folder: Path) -> Path:
    """Copy `source` into `folder` under its own name; FileExistsError if there is one."""
    target = folder / source.name
    if target.exists():
        raise FileExistsError(f"{target} is already there")
    temporary = folder / f".{source.name}.{os.getpid()}.part"
    try:
        shutil.copyfile(source, temporary)  # a new time of change, so that the oldest waiting job is told rightly
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def main() -> None:
    """Picture, prompt, folder."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    picture, prompt, folder = map(Path, sys.argv[1:])
    if not prompt.name.startswith(picture.stem + "."):
        sys.exit(f"{prompt.name} would not find its picture: call it {picture.stem}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (picture, prompt):
            print(drop(file, folder))
    except OSError as error:
        sys.exit(f"not dropped: {error}")


if __name__ == "__main__":
    main()
