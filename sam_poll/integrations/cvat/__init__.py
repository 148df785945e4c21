"""CVAT: import prompts, push tasks, add masks and found objects to them, functions for its SDK.

What needs the package `httpx` (extra `cvat`) imports it inside a function; `sdk` alone needs
`cvat_sdk`.

- `import_prompts`: `sam-poll cvat prompts`; `sources`, `archives`, `image_lookup`: the annotation
  files and pictures that it reads.
- `masks`: `sam-poll cvat masks`; `plan`: which shapes are segmented.
- `find`: `sam-poll cvat find`; `find_plan`: what is searched for.
- `warm`: `sam-poll cvat warm`.
- `scope`, `task_source`, `frame_runner`: what these three share: the jobs of the task, its frames
  as a job source, their way through the pipeline. `task_command`: the steps of the first two.
- `push`: `sam-poll cvat push`; `answers`: what it pushes; `task_creation`: tasks with pictures.
- `journal`, `upload`: computed shapes on disk, and their upload, each once.
- `client`, `transport`, `credentials`, `response_checks`, `shapes`: requests to the server.
- `sdk`: functions that CVAT's own programs call.

Limitations: for the functions of `sdk`, the SDK must have the server's version; with another one,
requests may be refused.
"""
