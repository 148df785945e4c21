"""Small networks with random weights, and published architectures without weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam

from sam_poll.engines import edgetam, sam1, sam2, sam_hq
from sam_poll.engines.catalog import MODELS
from sam_poll.engines.kernels import attention

SMALL_SAM1 = {
    "depth": 2,
    "embed_dim": 32,
    "img_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "patch_size": 16,
    "global_attn_indexes": [1],
    "window_size": 3,
    "out_chans": 64,
}


def shaken(model: Sam, seed: int = 0) -> Sam:
    """Give the positions random values: in a new Sam they are zeros, which would hide their use."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.image_encoder.named_parameters():
            if "pos" in name:
                weights.normal_(std=0.5)
    return model


def small_sam1(side: int) -> Sam:
    torch.manual_seed(side)
    return shaken(sam1.build({**SMALL_SAM1, "img_size": side, "window_size": 5}))


SMALL_TINY_VIT = {
    "img_size": 1024,
    "num_classes": 4,
    "embed_dims": [16, 16, 32, 320],  # 320, because the library's stride depends on that number
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 4, 10],
    "window_sizes": [1, 7, 14, 7],
    "mlp_ratio": 2.0,
    "mbconv_expand_ratio": 2.0,
    "local_conv_size": 3,
    "drop_path_rate": 0.0,
}


def small_sam_hq(side: int) -> Any:
    """SAM-HQ with the encoder of `small_sam1`."""
    encoder = {**SMALL_SAM1, "img_size": side, "window_size": 5}
    torch.manual_seed(side)
    return shaken(sam_hq.build(sam_hq.Architecture(encoder, False, SMALL_SAM1["embed_dim"])))


def small_tiny_vit(*, hq: bool) -> Any:
    """MobileSAM, or SAM-HQ with its encoder, of a few channels.

    What a new TinyViT has zeros and ones for, which would hide its use, gets random values.
    """
    torch.manual_seed(int(hq))
    early_width = SMALL_TINY_VIT["embed_dims"][2] if hq else None
    model = sam_hq.build(sam_hq.Architecture(SMALL_TINY_VIT, True, early_width))
    with torch.no_grad():
        for name, weights in model.image_encoder.state_dict().items():
            if "attention_biases" in name or "running_mean" in name:
                weights.normal_(std=0.5)
            elif "running_var" in name or name.endswith("bn.weight"):
                weights.uniform_(0.5, 1.5)
    return model.train().eval()


def small_edgetam(side: int = 256) -> Any:
    """EdgeTAM with a backbone of timm that is meant for tests."""
    from transformers import EdgeTamConfig, TimmWrapperConfig

    width = 32
    backbone = TimmWrapperConfig(
        architecture="test_resnet",
        do_pooling=False,
        model_args={"in_chans": 3, "features_only": True, "out_indices": [1, 2, 3, 4]},
    )
    config = EdgeTamConfig(
        vision_config={
            "backbone_config": backbone,
            "backbone_channel_list": [96, 192, 48, 32],
            "backbone_feature_sizes": [[side // stride] * 2 for stride in (4, 8, 16)],
            "fpn_hidden_size": width,
        },
        prompt_encoder_config={"image_size": side, "hidden_size": width},
        mask_decoder_config={
            "hidden_size": width,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": width,
        },
    )
    torch.manual_seed(side)
    model = edgetam.build(config)
    torch.nn.init.normal_(model.no_memory_embedding)
    return model


def official_square(predictor: Any, pixels: np.ndarray) -> torch.Tensor:
    resized = torch.as_tensor(predictor.transform.apply_image(pixels)).permute(2, 0, 1)[None]
    return predictor.model.preprocess(resized)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_meta(name: str) -> Any:
    """Return a published architecture without weights."""
    if name == "yonigozlan/EdgeTAM-hf":
        model = edgetam.build(edgetam.published_config()).to("meta")
        edgetam.install(model.vision_encoder)
        return model
    if name.startswith("sam_hq") or name == "mobile_sam":
        model = sam_hq.build(sam_hq.published(name)).to("meta")
        sam_hq.install(model.image_encoder)
        if hasattr(model.image_encoder, "blocks"):
            attention.install(model.image_encoder)
        return model.eval()
    if name.startswith("sam_"):
        with torch.device("meta"):
            model = sam_model_registry[name.removeprefix("sam_")]()
        attention.install(model.image_encoder)
        return model.eval()
    config = str(MODELS[name].config)
    model = sam2.build(sam2.read_config(sam2.find_config(config)), config).to("meta")
    sam2.install(model.image_encoder)
    return model.eval()


@pytest.fixture(
    scope="module",
    params=[
        *("sam2.1_hiera_tiny", "sam2.1_hiera_base_plus", "sam_vit_b", "sam_vit_h"),
        *("mobile_sam", "sam_hq_vit_tiny", "sam_hq_vit_b", "yonigozlan/EdgeTAM-hf"),
    ],
)
def model(request: pytest.FixtureRequest) -> Any:
    return on_meta(request.param)
