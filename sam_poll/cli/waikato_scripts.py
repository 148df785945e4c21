"""What Waikato's scripts of the families of networks have in common, and where they differ.

`sam_predict_poll` stands for their scripts for SAM and SAM 2, `samhq_predict_poll` for those for
SAM-HQ; the same for `…_predict_redis`, `…_test_redis_send` and `…_test_redis_recv`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scripts:
    """One set of Waikato's scripts.

    - `prefix`: of the commands' names. `title`: the networks, for help texts.
    - `types`: values of `--model_type`, each with the type in this program (`sam1.TYPES`).
    - `any_type`: the type where the flag is not given; None: any network.
    - `has_config`: whether they have the flag `--config`.
    - `segmenter`: `type` in the metadata of their messages; None: by the network.
    """

    prefix: str
    title: str
    types: Mapping[str, str]
    any_type: str | None = None
    has_config: bool = False
    segmenter: str | None = None

    def add_model_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags that name the model."""
        add = parser.add_argument
        add(
            "--model",
            metavar="FILE",
            required=True,
            help="checkpoint, or a name from `sam-poll models list`",
        )
        add(
            "--model_type",
            choices=list(self.types),
            help=f"{self.title.partition('/')[0]}: type of the checkpoint",
        )
        if self.has_config:
            add("--config", metavar="FILE", help="SAM 2: the model's yaml")
        add("--device", help="device: auto, cpu, cuda, cuda:0 …", default="auto")

    def settings_of(self, flags: argparse.Namespace) -> dict[str, str | None]:
        """Return the settings that the flags of `add_model_flags` mean."""
        config = flags.config if self.has_config else None
        return {"model": flags.model, "model_cfg": config, "device": flags.device}

    def model_type_of(self, flags: argparse.Namespace) -> str | None:
        """Return the type that the weights must have; None: any."""
        return self.types[flags.model_type] if flags.model_type else self.any_type


# `default` is vit_h in the registries of segment-anything and segment-anything-hq.
SAM = Scripts(
    prefix="sam",
    title="SAM/SAM 2",
    types={"default": "vit_h", "vit_h": "vit_h", "vit_l": "vit_l", "vit_b": "vit_b"},
    has_config=True,
)
SAM_HQ = Scripts(
    prefix="samhq",
    title="SAM-HQ",
    types={
        "default": "sam_hq_vit_h",
        "vit_h": "sam_hq_vit_h",
        "vit_l": "sam_hq_vit_l",
        "vit_b": "sam_hq_vit_b",
        "vit_tiny": "sam_hq_vit_tiny",
    },
    any_type="sam_hq",
    segmenter="sam-hq",
)
