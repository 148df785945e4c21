"""`sam-poll bench`: a naive loop, the whole daemon and the bare network, measured side by side.

`command` and `run` run it; `plan` has its flags, `report` its tables. `dataset` and `checkpoints`
make its inputs. `processes` and `worker` run the contestants: `naive_loop`, `bare_network` and
`cpu_stages`. `runtimes` compares torch and OpenVINO.

Limitations: other work on the machine changes the figures; each has its spread beside it.
"""
