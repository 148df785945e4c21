#!/usr/bin/env python3
"""Drop a picture and its prompt: copy each under a temporary name, then rename it.

    python examples/drop_pair.py dog.jpg dog.json /mnt/share/in/cam1

A renamed file is known to be complete, so the job starts within 0.1 s; after a plain `cp` the daemon
waits until the file has not changed for a while. The picture is dropped first, so that the prompt
need not wait for it.
"""

import os
import shutil
import sys
from pathlib import Path


def drop(source: Path, folder: Path) -> Path:
    """Copy `source` into `folder` under its own name; raise FileExistsError if that exists."""
    target = folder / source.name
    if target.exists():
        raise FileExistsError(f"{target} is already there")
    temporary = folder / f".{source.name}.{os.getpid()}.part"
    try:
        # Not copy2: with the old modification time `sam-poll status` would show a wrong waiting time.
        shutil.copyfile(source, temporary)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


def main() -> None:
    """Drop the picture and the prompt of the command line into the folder."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    picture, prompt, folder = map(Path, sys.argv[1:])
    if not prompt.name.startswith(picture.stem + "."):
        sys.exit(f"{prompt.name} does not match its picture: call it {picture.stem}.json")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (picture, prompt):
            print(drop(file, folder))
    except OSError as error:
        sys.exit(f"not dropped: {error}")


if __name__ == "__main__":
    main()
