"""Error responses of a Nuclio function: an HTTP status, and the reason as JSON.

CVAT shows its user the status only. The reason is for the function's log, and for other clients.
"""

from __future__ import annotations

import json
from typing import Any

from sam_poll.core.errors import SamPollError


def response(context: Any, status: int, error: SamPollError) -> Any:
    """Return Nuclio's response: `{"error", "place", "remedy"}`, without those that are empty."""
    fields = {"error": error.reason, "place": error.place, "remedy": error.remedy}
    body = json.dumps({key: value for key, value in fields.items() if value})
    return context.Response(
        body=body, headers={}, content_type="application/json", status_code=status
    )
