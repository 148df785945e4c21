"""From a job to its outputs: decode pool → device thread → finish pool → back to the job's source.

- `pipeline`: joins the stages. `options`: their sizes. `task`: a job on its way through them.
- The stages: `intake`, `decode_stage`, `device_loop`, `tiled_jobs`, `finish_stage`. `rough_masks`:
  the mask files that a prompt names.
- What they share: `run_context` (one run, and what an error does to a job), `completion` (how a job
  ends), `device_queue`, `exclusive_job`, `embedding_cache`; `stored_embeddings` and `disk_cache`:
  embeddings that stay.
- `predictor`: the same steps for one picture at a time, in-process.
- `worker_pool`: one process for each device. `worker_supervisor`: starts a device's processes.
  `worker_state`: what the two share. `worker_process`: such a process. `channel`, `messages`: what
  it exchanges with its parent.
"""
