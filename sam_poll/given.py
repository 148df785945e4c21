"""What is given on the command line becomes settings, for the commands that work on a share.

What can still go wrong here: nothing of its own; `settings` says what is wrong with a setting.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam_poll.errors import UsageError

if TYPE_CHECKING:
    from sam_poll.settings import Settings


def settings_of(source: Path | None, config: Path | None, **flags: Any) -> Settings:
    """The settings of a folder, a file, or the file that lies here; flags that are None are not given. UsageError,
    SettingsError."""
    from sam_poll import settings

    if source is None and config is None and not os.environ.get("SAM_POLL_CONFIG"):
        config = Path("config.yaml")
        if not config.is_file():
            raise UsageError(
                "neither a folder nor settings are given", remedy="`sam-poll watch IN OUT`, or `-c config.yaml`"
            )
    given = {key: value for key, value in flags.items() if value is not None}
    return settings.load(config, flags={"input": source, **given} if source else given)
