"""What torch reports of itself and of the GPUs, as JSON, in a process that may hang.

Limitations: a GPU that answers all queries may still fail at its first kernel; the trial shows it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from sam_poll.core.errors import SamPollError
from sam_poll.diagnostics.doctor.findings import error_as_json
from sam_poll.engines import devices

MIB = 2**20


def gather(before: Mapping[str, str | None], after: Mapping[str, str | None]) -> dict[str, Any]:
    """`before` and `after`: the variables of threads, before torch was imported and now."""
    import torch

    info: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "changed": {name: (was, after[name]) for name, was in before.items() if was != after[name]},
        "mps": _or_default(torch.backends.mps.is_available, False),
        "cudnn": _or_default(torch.backends.cudnn.version, None),
    }
    with warnings.catch_warnings(
        record=True
    ) as caught:  # why there is no card, torch says as a warning
        warnings.simplefilter("always")
        info["available"] = _or_default(torch.cuda.is_available, False)
        info["warnings"] = [
            str(warning.message).splitlines()[0] for warning in caught if str(warning.message)
        ]
    info["architectures"] = _or_default(torch.cuda.get_arch_list, [])
    count = _or_default(torch.cuda.device_count, 0) if info["available"] else 0
    info["cards"] = [_card(index) for index in range(count)]
    return info


def _card(index: int) -> dict[str, Any]:
    """Return the data of one GPU; unknown items are missing, `error` says why it cannot be used."""
    import torch

    card: dict[str, Any] = {"device": f"cuda:{index}"}
    try:
        card["name"] = torch.cuda.get_device_name(index)
        card["capability"] = ".".join(map(str, torch.cuda.get_device_capability(index)))
        chosen = devices.choose(f"cuda:{index}", "auto")
        card["precision"] = chosen.precision
        free, total = torch.cuda.mem_get_info(index)
        card |= {"free_mib": free / MIB, "total_mib": total / MIB}
    except SamPollError as error:
        card["error"] = error_as_json(error)
    except Exception as error:  # noqa: BLE001  whatever a broken driver raises
        card["error"] = {"reason": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    return card


def _or_default(question: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return question()
    except Exception:  # noqa: BLE001  as in _card
        return otherwise
