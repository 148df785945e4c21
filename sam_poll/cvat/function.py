"""The detector of `integrations.cvat.sdk`, under the path that users give to `cvat-cli`."""

from sam_poll.integrations.cvat.sdk.function import create

__all__ = ["create"]
