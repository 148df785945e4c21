"""Which device and which precision: what the user asked for, checked against what torch was built for.

What can still go wrong here: a driver that is there but broken shows itself only at the first kernel.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib.metadata import version

from sam_poll.errors import ModelError

_ALLOCATOR, _OLD_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"

PRECISIONS = ("auto", "float32", "bfloat16", "float16")
AMPERE = (8, 0)  # the first with bfloat16 in hardware
CPU_HALF_SIDE = 1024  # pixels; below, only 256 was measured
VOLTA = (7, 0)  # the first whose float16 is faster than its float32


@dataclass(frozen=True, slots=True)
class Device:
    """A device that torch can use: its name for torch, the precision to run in, its half precision (None: none)."""

    name: str
    precision: str
    half: str | None


def choose(device: str, precision: str) -> Device:
    """`device` and `precision` may be `auto`."""
    import torch

    if precision not in PRECISIONS:
        raise ModelError(f"there is no precision `{precision}`", remedy=f"use one of {', '.join(PRECISIONS)}")
    name = _named(device, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not name.startswith("cuda"):
        # What `auto` is on a CPU, the size of the network decides too: `cpu_precision`.
        return Device(name, "float32" if precision == "auto" else precision, None)
    capability = _supported(name)
    half = "bfloat16" if capability >= AMPERE else "float16"
    auto = half if capability >= VOLTA else "float32"
    return Device(name, auto if precision == "auto" else precision, half)


def cpu_precision(side: int) -> str:
    """What `auto` means on a CPU, for a network of this native side: bfloat16 where its instructions are, else float32.

    Measured with sam2.1_hiera_tiny on one core of Zen 4 (avx512_bf16), 6 interleaved runs, minimum (median). The
    encoder: sam2's own modules in float32 4.61 (4.71) s, ours in float32 4.06 (4.10) s, in bfloat16 2.47 (2.58) s;
    two threads, plain modules: 2.94 → 1.80 s from float32 to bfloat16. The decoder, on a busier machine: 155 → 115
    ms. With random weights, whose logits are close to zero, 0.2 to 0.5 % of a mask's pixels differ. The bundled
    model, side 256: encoder 15 → 16 ms, decoder 7 → 7; so small networks stay in float32. Two pictures at once are
    slower than two in turn (5.8 instead of 4.3 s each), and neither channels_last (within 2 %) nor flushing denormals
    helps.
    """
    import torch

    supported = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # not in every torch
    fast = any(getattr(torch.cpu, name, bool)() for name in supported)
    return "bfloat16" if fast and side >= CPU_HALF_SIDE else "float32"


def _named(device: str, *, cuda: bool, mps: bool) -> str:
    if device == "auto":
        return "cuda:0" if cuda else "mps" if mps else "cpu"
    if device == "cpu" or (device == "mps" and mps):
        return device
    if re.fullmatch(r"cuda(:\d+)?", device):
        if not cuda:
            raise ModelError(
                "no CUDA device can be used",
                place=f"device {device}",
                remedy="look at `nvidia-smi`; torch must be a CUDA build; or set `device: cpu`",
            )
        return device if ":" in device else "cuda:0"
    remedy = "use auto, cpu, cuda, cuda:0 or mps"
    raise ModelError(
        "there is no such device" if device != "mps" else "no Apple GPU here", place=f"device {device}", remedy=remedy
    )


def _supported(name: str) -> tuple[int, int]:
    """The card's capability; an error with the remedy if this torch has no kernels for it."""
    import torch

    index, count = int(name.partition(":")[2]), torch.cuda.device_count()
    if index >= count:
        raise ModelError(
            f"there are {count} CUDA devices", place=f"device {name}", remedy=f"use cuda:0 … cuda:{count - 1}"
        )
    major, minor = torch.cuda.get_device_capability(index)
    if not _has_kernels((major, minor), torch.cuda.get_arch_list()):
        card = torch.cuda.get_device_name(index)
        build = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
        remedy = "install a build of torch that has it"
        if (major, minor) < VOLTA:
            remedy = (
                "install the CUDA 12.6 build, the last for Pascal and Maxwell: "
                "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126"
            )
        raise ModelError(
            f"{build} has no kernels for the {card} (compute capability {major}.{minor})",
            place=f"device {name}",
            remedy=f"{remedy}; or set `device: cpu`",
        )
    return major, minor


def _has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """CUDA's own rule: sm_XY runs on the same major, minor at least Y; compute_XY is compiled for anything newer."""
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = re.match(r"\d+", number)
        if not digits:
            continue
        built = divmod(int(digits.group()), 10)
        if kind == "compute" and built <= capability:
            return True
        if kind == "sm" and built[0] == capability[0] and built[1] <= capability[1]:
            return True
    return not architectures  # a build that does not say (ROCm) is trusted


def allocator_settings(environment: MutableMapping[str, str]) -> None:
    """Lets torch's CUDA allocator grow its segments, so that memory free in pieces is not lost. Before torch's import.

    Torch before 2.9 reads only PYTORCH_CUDA_ALLOC_CONF; 2.9.1 reads PYTORCH_ALLOC_CONF too, but not for this
    (pytorch issue 183387, mended in 2.11); later ones (tried: 2.15) read it first, and the older name where it is not
    set. Whoever has set either keeps it.
    """
    if not any(name in environment for name in (_ALLOCATOR, _OLD_ALLOCATOR)):
        release = tuple(int(part) for part in re.findall(r"\d+", version("torch"))[:2])
        environment[_ALLOCATOR if release >= (2, 11) else _OLD_ALLOCATOR] = "expandable_segments:True"


def limit_memory(name: str, budget_mib: int | None, reserve_mib: int) -> None:
    """Makes torch raise OutOfMemoryError at `budget_mib` (None: at all of the card but `reserve_mib`)."""
    import torch

    total_mib = torch.cuda.get_device_properties(name).total_memory / 2**20
    wanted = budget_mib if budget_mib else total_mib - reserve_mib
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, wanted / total_mib)), name)
