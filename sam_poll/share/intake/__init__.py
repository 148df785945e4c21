"""Finding jobs in `in/`: which files are complete, which belong together, which are left alone.

- `scanner`: one scan, made of the steps below. `next_scan`: when the next one is due.
- `events`: what the system says about changes. `directory_index`, `stat_cache`, `inventory`: what
  is known from earlier scans. `stability`: whether a file is complete.
- `pairing`: which picture a name is for. `pair_table`, `prompt_texts`: which picture each prompt is
  for. `done_lookup`: pictures in `done/`.
- `ready_pairs`, `lone_pictures`, `lone_prompts`: what is ready. `deferred_jobs`: what waits.
  `offers`: what is offered.
- `waiting`, `near_names`: files without a partner, and names that nearly match. `beside`: a
  mosaic's sidecars. `ignored`: patterns of files that are left alone.
"""
