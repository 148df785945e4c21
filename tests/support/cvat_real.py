"""The SDK's client for tests on a real CVAT server."""

from __future__ import annotations

from typing import Any

from sam_poll.integrations.cvat.credentials import Credentials


def logged_in_sdk(address: str, who: Credentials) -> Any:
    """Return a client that is logged in.

    `cvat_sdk.make_client` compares versions first, and fails if the answer of an older server lacks
    fields: SDK 2.80 cannot read `/api/server/about` of a 2.23.
    """
    from cvat_sdk import Client
    from cvat_sdk.core.client import AccessTokenCredentials

    client = Client(address, check_server_version=False)
    client.login(AccessTokenCredentials(who.token) if who.token else (who.user, who.password))
    return client
