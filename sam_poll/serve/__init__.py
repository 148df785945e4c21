"""SAM over HTTP: requests become jobs of the usual pipeline, batched across callers, and its documents their answers.

`run` starts and stops it, `web` has the addresses, `gate` stands before them, `door` between them and the pipeline.
"""
