"""Attention and linear layers that we compute another way: the same numbers as the libraries' own."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sam2.modeling.backbones.hieradet import MultiScaleAttention
from sam2.modeling.sam2_utils import MLP
from segment_anything.modeling.common import MLPBlock
from segment_anything.modeling.image_encoder import Attention
from torch import nn

from sam_poll.engines import attention, cpu_linear, devices

pytestmark = pytest.mark.skipif(not cpu_linear.usable(), reason="needs an x86 CPU with oneDNN")


def mlp(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "sam1":
        return MLPBlock(32, 128)
    activation = nn.GELU if kind == "sam2" else nn.ReLU
    return MLP(32, 128, 16, 3, activation=activation, sigmoid_output=kind == "sigmoid")


@pytest.mark.parametrize("kind", ["sam1", "sam2", "relu", "sigmoid"])
@pytest.mark.parametrize("half", [False, True])
@torch.inference_mode()
def test_an_mlp_gives_what_it_gave(kind: str, half: bool) -> None:
    plain = mlp(kind)
    ours = copy.deepcopy(plain)
    cpu_linear.install(ours)
    if half:
        plain, ours = plain.bfloat16(), ours.bfloat16()
    x = torch.randn(2, 9, 7, 32)[:, :8]  # not contiguous, as a cut window
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected, found = plain(x), ours(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, atol=0.02 if half else 1e-5, rtol=0.02 if half else 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_a_width_that_onednn_refuses_on_this_cpu_goes_the_plain_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 without AVX-512, float16 nearly everywhere: every job would fail."""
    real = cpu_linear._onednn

    def refuses(x: Any, weight: Any, bias: Any, after: str) -> Any:
        if weight.dtype != torch.float32:
            raise RuntimeError("could not create a primitive descriptor for the inner product forward propagation")
        return real(x, weight, bias, after)

    monkeypatch.setattr(cpu_linear, "_onednn", refuses)
    cpu_linear._known.cache_clear()
    plain = mlp("sam2").to(dtype)
    ours = copy.deepcopy(plain)
    cpu_linear.install(ours)
    x = torch.randn(4, 32)
    try:
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(ours(x), plain(x), atol=0, rtol=0)
    finally:
        cpu_linear._known.cache_clear()


@torch.inference_mode()
def test_float16_on_this_cpu_is_computed_one_way_or_the_other() -> None:
    plain = mlp("sam1").half()
    ours = copy.deepcopy(plain)
    cpu_linear.install(ours)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(ours(x), plain(x), atol=0.01, rtol=0.01)


@torch.inference_mode()
def test_weights_in_float32_under_autocast_are_cast_by_torch() -> None:
    """The mask decoder's: stored in float32, run in half."""
    plain = nn.Linear(32, 16)
    ours = copy.deepcopy(plain)
    cpu_linear.install(ours)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), plain(x), atol=0, rtol=0)


def test_mlps_are_really_computed_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = cpu_linear._onednn

    def spied(x: Any, weight: Any, bias: Any, after: str) -> Any:
        asked.append(after)
        return real(x, weight, bias, after)

    ours = mlp("sam2")
    cpu_linear.install(ours)
    assert cpu_linear._known(torch.float32)  # asked once, before anything is counted
    monkeypatch.setattr(cpu_linear, "_onednn", spied)
    with torch.inference_mode():
        ours(torch.randn(4, 32))
    assert asked == ["gelu", "gelu", "none"]


def test_where_torch_lacks_the_operator_everything_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    ours = mlp("sam2")
    cpu_linear.install(ours)
    assert not any("forward" in vars(module) for module in ours.modules())


@pytest.mark.parametrize("bias_mib", [0, 1, 128])
@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 9)])
@torch.inference_mode()
def test_attention_gives_what_it_gave_however_many_heads_go_at_once(
    bias_mib: int, height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = Attention(48, num_heads=4, use_rel_pos=True, input_size=(height, width))
    for positions in (module.rel_pos_h, module.rel_pos_w):
        positions.normal_()
    x = torch.randn(3, height, width, 48)
    monkeypatch.setattr(attention, "BIAS_MIB", bias_mib)
    torch.testing.assert_close(attention.attend(module, x), module(x), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_attention_without_positions_is_computed_too() -> None:
    torch.manual_seed(0)
    module = Attention(48, num_heads=4, use_rel_pos=False)
    x = torch.randn(2, 5, 5, 48)
    torch.testing.assert_close(attention.attend(module, x), module(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_attention_by_rows_is_as_near_to_float32_as_torchs_own_in_bfloat16(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 1100, 32) for _ in range(3))
    bias = torch.randn(1, 2, 1100, 1100) if biased else None
    exact = nn.functional.scaled_dot_product_attention(q, k, v, bias)
    half = [None if part is None else part.bfloat16() for part in (q, k, v, bias)]
    assert attention._by_rows(q.bfloat16())
    assert not attention._by_rows(q)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.attention(*half)  # type: ignore[arg-type]
    fused = nn.functional.scaled_dot_product_attention(*half)  # type: ignore[arg-type]
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).norm() <= 1.5 * (fused.float() - exact).norm() + 0.01 * exact.norm()


@torch.inference_mode()
def test_sam2s_global_attention_gives_what_it_gave() -> None:
    torch.manual_seed(0)
    module = MultiScaleAttention(32, 64, num_heads=4)
    x = torch.randn(2, 6, 5, 32)
    torch.testing.assert_close(attention.attend_hiera(module, x), module(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("bf16", "amx", "side", "precision"),
    [
        (False, False, 1024, "float32"),
        (True, False, 1024, "bfloat16"),
        (False, True, 1024, "bfloat16"),
        (True, True, 256, "float32"),
    ],
)
def test_auto_on_a_cpu_follows_its_instructions_and_the_networks_side(
    bf16: bool, amx: bool, side: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert devices.cpu_precision(side) == precision


def test_the_allocator_is_told_to_grow_its_segments_unless_the_user_said_something(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    names = {
        "2.5.1": old,
        "2.8.0+cu126": old,
        "2.9.1": old,
        "2.10.0": old,
        "2.11.0": new,
        "2.15.0+cu132": new,
        "3.0": new,
    }
    for release, name in names.items():
        monkeypatch.setattr(devices, "version", lambda _, release=release: release)
        environment: dict[str, str] = {}
        devices.allocator_settings(environment)
        assert environment == {name: "expandable_segments:True"}
    for name in (old, new):
        environment = {name: "max_split_size_mb:64"}
        devices.allocator_settings(environment)
        assert environment == {name: "max_split_size_mb:64"}
