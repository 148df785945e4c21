"""Replacements for parts of the networks, with the same results in less time or memory.

- `attention`: attention in blocks.
- `cpu_linear`: matrix products on the CPU.
- `mask_filter`: selection of automatic masks by their scores, on the device.
"""
