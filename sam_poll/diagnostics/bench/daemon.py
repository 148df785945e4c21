"""`sam-poll` as a child process of the benchmark: it ends with the benchmark."""

from __future__ import annotations

import runpy

from sam_poll.core import child_process

if __name__ == "__main__":
    child_process.end_with_parent()
    runpy.run_module("sam_poll", run_name="__main__", alter_sys=True)
