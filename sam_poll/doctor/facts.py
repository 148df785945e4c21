"""What torch says of itself and of the cards, as JSON: asked in a process of its own, because a driver may hang.

What can still go wrong here: a card that answers every question may still fail at its first kernel; the trial tells.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from sam_poll.doctor.findings import error_told
from sam_poll.engines import devices
from sam_poll.errors import SamPollError

MIB = 2**20


def gather(before: Mapping[str, str | None], after: Mapping[str, str | None]) -> dict[str, Any]:
    """`before` and `after`: the variables of threads, before torch was imported and now."""
    import torch

    found: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "changed": {name: (was, after[name]) for name, was in before.items() if was != after[name]},
        "mps": _asked(torch.backends.mps.is_available, False),
        "cudnn": _asked(torch.backends.cudnn.version, None),
    }
    with warnings.catch_warnings(record=True) as caught:  # why there is no card, torch says as a warning
        warnings.simplefilter("always")
        found["available"] = _asked(torch.cuda.is_available, False)
        found["warnings"] = [str(warning.message).splitlines()[0] for warning in caught if str(warning.message)]
    found["architectures"] = _asked(torch.cuda.get_arch_list, [])
    count = _asked(torch.cuda.device_count, 0) if found["available"] else 0
    found["cards"] = [_card(index) for index in range(count)]
    return found


def _card(index: int) -> dict[str, Any]:
    """One card; what cannot be asked is missing, and `error` says why it cannot be used."""
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
        card["error"] = error_told(error)
    except Exception as error:  # noqa: BLE001  whatever a broken driver raises
        card["error"] = {"reason": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    return card


def _asked(question: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return question()
    except Exception:  # noqa: BLE001  as in _card
        return otherwise
