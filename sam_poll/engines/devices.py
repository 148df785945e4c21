"""Choice of device and precision: the settings, checked against what torch supports here.

Limitations: a driver that is installed but broken is noticed only when the first kernel runs.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import MutableMapping
from dataclasses import dataclass
from importlib.metadata import version

from sam_poll.core.errors import ModelError

_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"

PRECISIONS = ("auto", "float32", "bfloat16", "float16")

# Compute capabilities, from NVIDIA's CUDA C++ Programming Guide.
AMPERE = (8, 0)  # the first with bfloat16 in hardware
VOLTA = (7, 0)  # the first with tensor cores, which make float16 faster than float32
TURING = (7, 5)  # the oldest that torch's builds for CUDA 12.8 and later have kernels for

# Smallest native side, in pixels, that runs in bfloat16 on a CPU (measurements: `cpu_precision`).
# Of smaller sides only 256 was measured, where bfloat16 is no faster.
CPU_HALF_SIDE = 1024


@dataclass(frozen=True, slots=True)
class Device:
    """A device that torch can use.

    `name` is torch's name of it, `precision` the precision to run in, `half` the half precision
    that it is good at (None: none).
    """

    name: str
    precision: str
    half: str | None


def choose(device: str, precision: str) -> Device:
    """Return the device and precision to use for the two settings, either of which may be `auto`.

    Raises ModelError where there is no such device or precision.
    """
    import torch

    if precision not in PRECISIONS:
        raise ModelError(
            f"there is no precision `{precision}`", remedy=f"use one of {', '.join(PRECISIONS)}"
        )
    name = _named(device, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not name.startswith("cuda"):
        # On a CPU `auto` also depends on the size of the network: see `cpu_precision`.
        return Device(name, "float32" if precision == "auto" else precision, None)
    capability = _supported(name)
    half = "bfloat16" if capability >= AMPERE else "float16"
    auto = half if capability >= VOLTA else "float32"
    return Device(name, auto if precision == "auto" else precision, half)


def cpu_precision(side: int) -> str:
    """Return the precision that `auto` means on a CPU, for a network of native side `side`.

    It is bfloat16 where the CPU has instructions for it and the network is large, else float32.

    Measured with sam2.1_hiera_tiny on one core of Zen 4 (avx512_bf16), 6 interleaved runs, minimum
    (median):

    - Encoder: sam2's own modules in float32 4.61 (4.71) s, this project's in float32 4.06 (4.10) s,
      in bfloat16 2.47 (2.58) s. Two threads, sam2's modules: from float32 to bfloat16
      2.94 → 1.80 s.
    - Decoder, on a busier machine: 155 → 115 ms.
    - Pixels of a mask that differ: docs/models.md; `benchmarks/precision.py` measures it.
    - The bundled model, side 256: encoder 15 → 16 ms, decoder 7 → 7 ms. So small networks stay in
      float32.
    - Two pictures in one batch are slower than two in turn (5.8 instead of 4.3 s each). Neither
      channels_last (within 2 %) nor flushing denormals helps.
    """
    import torch

    # Private functions of torch.cpu; not every version has both.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_bfloat16 = any(getattr(torch.cpu, name, bool)() for name in probes)
    return "bfloat16" if has_bfloat16 and side >= CPU_HALF_SIDE else "float32"


def _named(device: str, *, cuda: bool, mps: bool) -> str:
    """Return torch's name of the device; `cuda` and `mps` say which kinds are available."""
    if device == "auto":
        if cuda:
            return "cuda:0"
        return "mps" if mps else "cpu"
    if device == "cpu" or (device == "mps" and mps):
        return device
    if re.fullmatch(r"cuda(:\d+)?", device):
        if not cuda:
            raise ModelError(
                "no CUDA device can be used",
                place=f"device {device}",
                remedy="check `nvidia-smi` and that torch is a CUDA build; or set `device: cpu`",
            )
        return device if ":" in device else "cuda:0"
    reason = "this machine has no Apple GPU" if device == "mps" else "there is no such device"
    raise ModelError(reason, place=f"device {device}", remedy="use auto, cpu, cuda, cuda:0 or mps")


def _supported(name: str) -> tuple[int, int]:
    """Return the compute capability of the GPU. ModelError where torch has no kernels for it."""
    import torch

    index = int(name.partition(":")[2])
    count = torch.cuda.device_count()
    if index >= count:
        raise ModelError(
            f"there are {count} CUDA devices",
            place=f"device {name}",
            remedy=f"use cuda:0 … cuda:{count - 1}",
        )
    major, minor = torch.cuda.get_device_capability(index)
    if not _has_kernels((major, minor), torch.cuda.get_arch_list()):
        gpu = torch.cuda.get_device_name(index)
        build = f"torch {torch.__version__} (CUDA {torch.version.cuda})"
        remedy = "install a build of torch that supports it"
        if (major, minor) < TURING:
            remedy = (
                "install the CUDA 12.6 build, the last for Volta, Pascal and Maxwell: "
                "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126"
            )
        raise ModelError(
            f"{build} has no kernels for the {gpu} (compute capability {major}.{minor})",
            place=f"device {name}",
            remedy=f"{remedy}; or set `device: cpu`",
        )
    return major, minor


def _has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Return whether a build for `architectures` runs on a GPU of `capability`.

    The rule is CUDA's (Programming Guide, "Binary Compatibility" and "PTX Compatibility"): sm_XY
    runs on GPUs of major version X and a minor version of at least Y; compute_XY is compiled at run
    time for any GPU that is not older.
    """
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
    return not architectures  # a build that lists none (ROCm) is assumed to fit


def allocator_settings(environment: MutableMapping[str, str]) -> None:
    """Set torch's CUDA allocator to expandable segments, which reduces fragmentation.

    Call it before torch is imported. A value that the environment already holds is kept.

    Torch before 2.9 reads only PYTORCH_CUDA_ALLOC_CONF. Torch 2.9.1 reads PYTORCH_ALLOC_CONF, too,
    but not for this setting (pytorch issue 183387, fixed in 2.11). Later versions (tried: 2.15)
    read PYTORCH_ALLOC_CONF first, and the older name where the newer one is not set.
    """
    if any(name in environment for name in (_ALLOCATOR, _OLD_ALLOCATOR)):
        return
    release = tuple(int(part) for part in re.findall(r"\d+", version("torch"))[:2])
    variable = _ALLOCATOR if release >= (2, 11) else _OLD_ALLOCATOR
    environment[variable] = "expandable_segments:True"


def limit_memory(name: str, budget_mib: int | None, reserve_mib: int) -> None:
    """Make torch raise OutOfMemoryError above `budget_mib` of GPU memory.

    Without a budget the limit is all of the GPU's memory except `reserve_mib`.
    """
    import torch

    total_mib = torch.cuda.get_device_properties(name).total_memory / 2**20
    limit_mib = budget_mib if budget_mib else total_mib - reserve_mib
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, limit_mib / total_mib)), name)


def missing_compiler(device: str) -> str | None:
    """Return what `torch.compile` needs on `device` and does not find, with a remedy; else None.

    On a CPU it writes C++, by default for g++. On a GPU Triton builds a starter in C. The images
    have neither.
    """
    if device == "cpu":
        wanted = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
        variable, package = "CXX", "g++"
    elif device.startswith("cuda"):
        wanted = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
        variable, package = "CC", "gcc"
    else:
        return None
    if any(shutil.which(name) for name in wanted):
        return None
    names = " or ".join(wanted)
    return f"{names}: apt install {package}, name a compiler in {variable}, or set `compile: false`"
