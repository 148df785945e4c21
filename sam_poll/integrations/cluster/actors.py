"""The workers of a cluster as an application of Dramatiq's own command.

    dramatiq sam_poll.integrations.cluster.actors --processes 1 --threads 16

Settings come from `SAM_POLL_CONFIG` and the other environment variables, as for `sam-poll cluster
worker`. Importing this module makes Dramatiq's broker; the engine is loaded, and the actors are
declared, when a process starts its threads.
"""

from __future__ import annotations

import os
import signal

import dramatiq

from sam_poll.config import settings
from sam_poll.core.errors import SamPollError
from sam_poll.integrations import message_broker
from sam_poll.integrations.cluster.service import make_broker
from sam_poll.runtime.console import print_error
from sam_poll.runtime.service import Service


def _stop_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


try:
    _settings = settings.load(None)
    _address = message_broker.find_url(os.environ, None, None)
    _broker = make_broker(_settings, _address, Service(_settings), _stop_process)
except SamPollError as error:
    print_error(error)
    raise SystemExit(error.exit_code) from None
dramatiq.set_broker(_broker)
