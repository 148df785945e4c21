"""The segmentation networks, behind one protocol (`core.protocols.Engine`).

`catalog.resolve` turns a model's name or path into a `ModelSpec`; `load` turns that into an
engine. Importing this package does not import torch, `load` does, so that `sam-poll --help`
starts fast.

- `catalog`, `download`, `hub`: names of models, and their verified download.
- `loader`, `checkpoint`, `model_config`: from a model's name to an engine that is ready to work.
- `openvino_encoder`, `openvino_convert`: the image encoder in OpenVINO, on CPUs.
- `devices`: choice of device and precision.
- `base`, `stretched`, `sam1`, `sam2`, `sam_hq`, `edgetam`, `sam3`: the engines. `concepts`:
  refusals of concept requests. `fake`: one without torch. `reference`: the official predictors.
- `pretrained`: models of the library `transformers` from folders. `prompts_as_objects`: how its
  decoders take prompts. `packing`: embeddings as bytes, for the disk cache.
- `memory`: the device memory that is needed, and the steps down where there is less.
- `kernels`: faster replacements for parts of the networks.
"""

from sam_poll.engines.catalog import ModelSpec, identity, resolve
from sam_poll.engines.loader import load

__all__ = ["ModelSpec", "identity", "load", "resolve"]
