"""How a Nuclio function says no: an HTTP status, and the reason as JSON.

CVAT shows its user the status only; the reason is for the function's log and for who calls the function by hand.
What can still go wrong here: nothing.
"""

from __future__ import annotations

import json
from typing import Any

from sam_poll.errors import SamPollError


def response(context: Any, status: int, error: SamPollError) -> Any:
    """Nuclio's response: `{"error", "place", "remedy"}`, as far as they are known."""
    words = {"error": error.reason, "place": error.place, "remedy": error.remedy}
    body = json.dumps({key: value for key, value in words.items() if value})
    return context.Response(body=body, headers={}, content_type="application/json", status_code=status)
