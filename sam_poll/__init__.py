"""Drop a picture and a prompt into a folder; get its masks and contours back, ready for CVAT.

The Python interface is `load` and the classes it leads to (`sam_poll.runtime.api`). They are
imported when they are first used: the package itself imports nothing, so that `sam-poll --help`
answers at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam_poll.runtime.api import Model, PredictedObject, Prediction, load

__all__ = ["Model", "PredictedObject", "Prediction", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from sam_poll.runtime import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
