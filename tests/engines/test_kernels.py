"""Replaced attention and linear layers: the results of the libraries' own."""

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

from sam_poll.engines import devices
from sam_poll.engines.kernels import attention, cpu_linear

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
def test_mlp_gives_the_same_result_as_torch(kind: str, half: bool) -> None:
    plain = mlp(kind)
    ours = copy.deepcopy(plain)
    cpu_linear.install(ours)
    if half:
        plain, ours = plain.bfloat16(), ours.bfloat16()
    x = torch.randn(2, 9, 7, 32)[:, :8]  # not contiguous, as a window
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        expected, found = plain(x), ours(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(
        found, expected, atol=0.02 if half else 1e-5, rtol=0.02 if half else 1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_linear_falls_back_to_torch_for_a_dtype_without_onednn(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As bfloat16 without AVX-512, and float16 on nearly every CPU: every job would fail."""
    real = cpu_linear._onednn

    def refuses(x: Any, weight: Any, bias: Any, after: str) -> Any:
        if weight.dtype != torch.float32:
            raise RuntimeError(
                "could not create a primitive descriptor for the inner product forward propagation"
            )
        return real(x, weight, bias, after)

    monkeypatch.setattr(cpu_linear, "_onednn", refuses)
    cpu_linear._supports_cached.cache_clear()
    plain = mlp("sam2").to(dtype)
    ours = copy.deepcopy(plain)
    cpu_linear.install(ours)
    x = torch.randn(4, 32)
    try:
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(ours(x), plain(x), atol=0, rtol=0)
    finally:
        cpu_linear._supports_cached.cache_clear()


@torch.inference_mode()
def test_linear_computes_float16_on_any_cpu() -> None:
    plain = mlp("sam1").half()
    ours = copy.deepcopy(plain)
    cpu_linear.install(ours)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(ours(x), plain(x), atol=0.01, rtol=0.01)


@torch.inference_mode()
def test_linear_leaves_float32_weights_under_autocast_to_torch() -> None:
    """As in the mask decoder, whose float32 weights run in half precision."""
    plain = nn.Linear(32, 16)
    ours = copy.deepcopy(plain)
    cpu_linear.install(ours)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x), plain(x), atol=0, rtol=0)


def test_mlp_uses_the_fused_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = cpu_linear._onednn

    def spied(x: Any, weight: Any, bias: Any, after: str) -> Any:
        asked.append(after)
        return real(x, weight, bias, after)

    ours = mlp("sam2")
    cpu_linear.install(ours)
    assert cpu_linear._supports_cached(torch.float32)  # cached before calls are counted
    monkeypatch.setattr(cpu_linear, "_onednn", spied)
    with torch.inference_mode():
        ours(torch.randn(4, 32))
    assert asked == ["gelu", "gelu", "none"]


def test_install_changes_nothing_where_torch_lacks_the_operator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    ours = mlp("sam2")
    cpu_linear.install(ours)
    assert not any("forward" in vars(module) for module in ours.modules())


@pytest.mark.parametrize("bias_mib", [0, 1, 128])
@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 9)])
@torch.inference_mode()
def test_attention_gives_the_library_result_for_any_number_of_heads_at_once(
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
def test_attention_without_relative_positions_gives_the_library_result() -> None:
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
    assert (found.float() - exact).norm() <= 1.5 * (
        fused.float() - exact
    ).norm() + 0.01 * exact.norm()


@torch.inference_mode()
def test_sam2_global_attention_gives_the_library_result() -> None:
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
def test_cpu_precision_follows_instructions_and_network_side(
    bf16: bool, amx: bool, side: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert devices.cpu_precision(side) == precision


def test_allocator_settings_enable_expandable_segments_unless_the_user_set_any(
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
