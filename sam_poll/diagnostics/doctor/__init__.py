"""`sam-poll doctor`: problems of this machine, this model and this share, with remedies.

`run` runs all checks: `settings_check`, `machine`, `gpus`, `checkpoint`, `share` and `inotify`. The
trial runs in its own process (`trial_process` starts `trial`): `torch_info`, `test_prediction`,
`memory_plan`, `compare`. `findings` and `report` hold and show the results.

Limitations: a finding holds for this moment and this user; a daemon of another user, or in a
container, has other rights, other limits and another environment.
"""
