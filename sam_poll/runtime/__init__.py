"""A running program: objects made from settings, start and stop, and what a person sees of it.

- `builders`: settings become engines, formats, folders.
- `service`: the life cycle of every long-running command. `daemon`: `watch` and `predict`.
- `api`: the Python interface, `sam_poll.load`.
- `signals`: SIGTERM and SIGINT. `console`, `metrics`, `health`: log and progress, Prometheus,
  liveness.
- `file_list`: the job source of `predict`, for files named on the command line.
"""
