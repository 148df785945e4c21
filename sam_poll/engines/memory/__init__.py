"""The device memory that a network needs, and the fallback where there is less.

- `requirements`, `estimate`: bytes that a step needs, measured and computed.
- `plan`: the steps, those that reduce quality least first.
- `adaptive`: the engine that steps down after an out-of-memory error.
- `meter`, `peak_store`: measured peaks, kept from run to run.
- `batching`: prompts in groups.
- `cuda_errors`: which exceptions mean out of memory, and which a broken device.
"""
