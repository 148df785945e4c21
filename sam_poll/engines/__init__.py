"""The networks, behind one protocol (`types.Engine`), and how to get one: `catalog.resolve` names it, `load` makes it.

Importing this package does not import torch; `load` does, so that `sam-poll --help` stays fast. What can still go
wrong here: everything that can go wrong with a checkpoint, a config and a device; `load` says which.
"""

from sam_poll.engines.catalog import ModelSpec, identity, resolve
from sam_poll.engines.loader import load

__all__ = ["ModelSpec", "identity", "load", "resolve"]
