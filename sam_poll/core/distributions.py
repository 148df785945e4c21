"""The versions of installed distributions, without importing them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

# Distributions with the module `sam2`; installed together, they overwrite each other's files.
SAM2 = ("sam2", "rf-sam-2")


def version_of(name: str) -> str | None:
    """Return the version of a distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def installed(*names: str) -> dict[str, str]:
    """Return the versions of those of `names` that are installed, in this order."""
    return {name: found for name in names if (found := version_of(name))}
