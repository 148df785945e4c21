"""Claims: directories in `work/` that say who owns a job's files, moved there from `in/`.

- `model`: the name of a claim, and the list of all claims. `store`: taking, taking over, ending.
- `heartbeat`: this worker's heartbeat file. `liveness`: when another worker counts as dead.
- `cleanup`: the janitor. `deferrals`: jobs that were put back and wait.

Everything that is ever in `work/`. W: who writes it. R: who reads it. D: who deletes it, and when.
"Janitor" is `cleanup.Janitor` of any daemon; a "lease" is `lease_s` (60 s) since it first saw the
name. "With the claim": when the claim ends, by `ClaimStore.close` of its owner. A name that ends
with `/` is a folder with all that it contains.

At the top:

- `.sam_poll-share`: the share's number, which tells the share from its empty mountpoint.
  W: `mount_check.Sentinel`, at the first start, and again when it was deleted. R: `Sentinel.check`,
  before each scan, and before a claim counts as lost; `sam-poll doctor`. D: none.
- `.sam_poll-share-<number>.tmp`: that file before it has its name.
  W: `Sentinel`. R: none. D: `Sentinel`, at once; after a crash the janitor, after a lease.
- `.sam_poll-probe`: proof that a file can be moved through all five folders.
  W: `mount_check.check_folders`, at each start, from `in/`. R: none. D: `check_folders`, at once,
  by moving it on; after a crash that of the next start.
- `.sam_poll-probe-<number>`: the same, where the usual name is taken.
  W: as above. R: none. D: `check_folders`, at once; after a crash it stays.
- `.sam_poll-try-<number>.tmp`: proof that `work/` and one other folder can be written.
  W: `path_errors`, when a path cannot be used, where a file without a name is not possible.
  R: none. D: `path_errors`, at once; after a crash the janitor, after a lease.
- `.sam_poll-worker-<worker>.json`: a worker's heartbeat, locked while the worker lives.
  W: `heartbeat.WorkerHeartbeat`, every 5 s. R: `liveness`, for the scans of the others,
  `sam-poll status` and `sam-poll doctor`; `runtime.daemon`, to compare formats. D: the worker, at
  its end, if it holds no claim; the janitor, when the worker is dead and no claim bears its name.
- `.sam_poll-<worker>-<number>.tmp`: that file before it is locked and has its name.
  W: `WorkerHeartbeat`. R: none. D: it is renamed at once; after a crash the janitor,
  after a lease.
- `.sam_poll-mosaic`: the folder of all unfinished mosaics (below).
  W: `mosaic_workspace`, with the first mosaic. R: the same, in each scan. D: the janitor, when it
  is empty.

Claims, in the folder that their files have in `in/`:

- `<folder>`: a folder as in `in/`.
  W: `ClaimStore.take`, with the first claim of a file in it. R: `model.list_work`, in each scan.
  D: the janitor, when it has been empty for a lease.
- `<folder>/.<name>`: a claim's name, made by mkdir: one claim of a file at a time.
  W: `ClaimStore.take`. R: `model.list_work`; `annotation_expander`, which looks for a picture.
  D: its owner, with the claim; any daemon that finds it empty (janitor, `ClaimStore.take`).
- `<folder>/.<name>/<claim>`: the claim; its name is a `ClaimState`.
  W: `ClaimStore.take`; renamed by its owner when the job ends or is given back, and by the daemon
  that takes it over. R: as above. D: its owner, with the claim.
- `<folder>/.<name>/<claim>/<file>`: pictures, sidecars, mask files, prompts, annotation files.
  W: `ClaimStore.take` and `add`, `intake.beside`: moved here from `in/`. R: the owner's pipeline;
  other daemons that help with a mosaic read its picture. D: its owner, which moves it to `done/`,
  `failed/` or `in/` (answered files are deleted where the settings say so).
- `<folder>/.<name>/<claim>/.answered<suffix>`: one of several prompts has been answered.
  W: `ClaimStore.mark_answered`. R: `ClaimStore.take_over`. D: its owner, with the claim.
- `<folder>/.<name>/<claim>/.shares_stem`: another picture has this one's stem.
  W: `ClaimStore.mark_stem`, of a daemon that runs nothing itself. R: `ClaimStore.take_over`.
  D: its owner, with the claim.
- `<folder>/.<name>/<claim>/.held`: what is not to be offered again at once (`deferrals`).
  W: `ClaimStore.hand_back`, of a cluster's worker. R: `ClaimStore.note`, of the daemon that gets
  the claim back. D: its owner, with the claim; `take_over`, where the claim was not given back.
- `<folder>/.<name>/<claim>/.report`: why the job is rejected.
  W: `ClaimStore.write_report`. R: `close`, `part`, `take_over`. D: these move it to `failed/`,
  after the job's files; `take_over` deletes it where the job was not rejected after all.
- `<folder>/.<name>/<claim>/.making/`: prompts made of an annotation file, not yet complete.
  W: `annotation_expander`. R: none. D: the same, when it begins again, or by renaming it to
  `.prompts`; its owner, with the claim.
- `<folder>/.<name>/<claim>/.prompts/`: the same, complete; each file is moved to `in/`.
  W: `annotation_expander`. R: the same. D: its owner, with the claim.
- `<folder>/.<name>/<claim>/.sam_poll-<number>.tmp`: an answer before it has its name in `out/`.
  W: `FolderSource.deliver` (`core.files.AtomicFiles`). R: none. D: the same, by renaming it to
  `out/`; after a crash `take_over`.

An unfinished mosaic, `<mosaic>` = `.sam_poll-mosaic/<key of the claim>-<key of the prompt>`:

- `<mosaic>`: it outlives the claim, and daemons that are idle take a part in it.
  W: `MosaicWorkspace.prepare`. R: any daemon that helps. D: its owner, when the job has ended
  (`MosaicWorkspace.remove`); any daemon, when no claim and no file in `in/` has needed it for a
  lease (`MosaicWorkspace.sweep`). All that it contains is deleted with it.
- `<mosaic>/open.json`: whose it is, where its picture is, and the request.
  W: `MosaicWorkspace.prepare`. R: helpers, `sweep`. D: only with the folder.
- `<mosaic>/advanced`: a tile was made since the claim was last taken over.
  W: `mosaic.job`. R: `ClaimStore.take_over`, which then counts attempts from 1. D: the same.
- `<mosaic>/job.json`: what the tiles depend on.
  W: `mosaic.tile_store`. R: the same. D: only with the folder.
- `<mosaic>/<name>.lock`: locks `begin` and `end`, held while it is begun or completed.
  W: `mosaic.tile_store`. R: the same. D: only with the folder.
- `<mosaic>/<kind>`: the tiles that depend on one `job.json`.
  W: `mosaic.tile_store`. R: the same. D: the same, when the mosaic is begun again in another way.
- `<mosaic>/<kind>/tile-<number>.npz`: a finished tile.
  W: `mosaic.tile_store`. R: the same. D: the same, where it cannot be read; else with the folder.
- `<mosaic>/<kind>/tile-<number>.lock`: the lock of the daemon that makes a tile.
  W: `mosaic.tile_store`. R: the same. D: only with the folder.
- `<mosaic>/made-<number>/`: outputs that are being put together.
  W: `mosaic.tile_store`, `labels`, `polygons`. R: `FolderSource.deliver`. D: `tile_store`, before
  others are made.
- `<mosaic>/.sam_poll-<number>.tmp`: `open.json` or `job.json` before it has its name.
  W: `core.files.write_whole`. R: none. D: the same, at once; after a crash with the folder.
- `<mosaic>/<kind>/.sam_poll-<number>.tmp`: a tile before it has its name.
  W: `mosaic.tile_store`. R: none. D: the same, at once; after a crash with the folder.

Anything else was put there by other programs or by hand. Regular files outside of claims are moved
to `in/` by the janitor, except those whose name begins with a dot. Links stay, and so do folders
whose name begins with a dot and that contain something.
"""
