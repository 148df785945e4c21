"""The share's protocol: folders, claims, error reports, and the `JobSource` on top of them.

- `source`: the `JobSource` of a share: the life cycle of its scans. Its parts:
  `claim_recovery` surveys `work/`; `job_claimer` claims, and holds what cannot be claimed;
  `active_claims` are the claims of running jobs; `job_finisher` ends jobs (`hand_back`: those of a
  cluster's worker);
  `unreadable_pictures` are tried again. `context`: what these parts have in common.
- `job_factory`: from pending files and abandoned claims to jobs. `pending_job`: what a scan finds;
  `prompt_reader`: its prompt; `mask_search`: the mask files that it names; `job_builder`: its job;
  `names_in_done`: its names in `done/` and `out/`.
- `layout`: the five folders. `folder_options`: the settings. `file_kinds`: kinds of files by name.
- `intake`: finding pending jobs. `claims`: the protocol of owning them.
- `path_holds`: paths that cannot be used now; `path_errors`: which errors concern a path only.
- `mount_check`: whether the share is mounted and usable.
- `annotation_expander`: one annotation file, many prompts; `annotation_reader`: its content;
  `annotated_pictures`: its pictures.
- `mosaic_workspace`: a large picture's unfinished tiles.
- `error_report`: reports in `failed/`. `status`: what `sam-poll status` shows.
- `file_index`: the files of a folder, kept in memory, for those who look again and again.
"""
