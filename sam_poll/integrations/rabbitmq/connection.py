"""Connect to a RabbitMQ server, and translate errors of its client library into this project's."""

from __future__ import annotations

import errno
import re

import pika
from pika import exceptions
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from sam_poll.core.alarms import Alarms
from sam_poll.core.errors import SettingsError, ShareError
from sam_poll.core.text import shown
from sam_poll.integrations.server import ServerConnection, ServerUnavailableError, ServerUrl

ALARM = "rabbitmq"
"""Kind of the alarm that is active while the server cannot be used."""
_ANSWER_S = 30.0
_NOT_ALLOWED = (403, 530)  # ACCESS_REFUSED, NOT_ALLOWED of AMQP 0-9-1


class RabbitConnection(ServerConnection):
    """What is known of one server. Its alarm `rabbitmq` is active while it cannot be used.

    `heartbeat_s`: seconds between two signs of life, after two of which without one the server
    gives the messages of a client to another; an option of the URL overrules it. Raises
    SettingsError for options of the URL that cannot be used.
    """

    alarm = ALARM
    errors = (exceptions.AMQPError, AMQPConnectorException, OSError)

    def __init__(
        self, address: ServerUrl, alarms: Alarms | None = None, *, heartbeat_s: int = 30
    ) -> None:
        super().__init__(address, alarms)
        try:
            self.parameters = pika.URLParameters(address.url)
        except (TypeError, ValueError) as error:
            raise SettingsError(
                address.redact(f"its options cannot be used: {error}"),
                place=address.shown,
                remedy="docs/scale.md names the options after the ?",
            ) from None
        if self.parameters.heartbeat is None:
            self.parameters.heartbeat = heartbeat_s
        # A server that is short of memory or disk stops reading from clients that publish.
        self.parameters.blocked_connection_timeout = _ANSWER_S

    def prove(self) -> None:
        """Check that the server answers.

        Raises ShareError if it is unreachable, SettingsError if it refuses access.
        """
        try:
            with self.translated_errors():
                pika.BlockingConnection(self.parameters).close()
        except ServerUnavailableError as error:
            reason, place = str(error.strerror), self.address.shown
            if error.errno == errno.EACCES:
                remedy = "correct user, password and virtual host of the URL, or the user's rights"
                raise SettingsError(reason, place=place, remedy=remedy) from None
            remedy = "start it, or name another server: --broker, --url-file, SAM_POLL_BROKER_URL"
            raise ShareError(reason, place=place, remedy=remedy) from None

    def unavailable(self, error: Exception) -> ServerUnavailableError:
        """Return the error of this project for one of the library, or of the network.

        Its `errno` is the kind of the reason: ENOTCONN unreachable, EACCES access refused, ENOSPC
        memory or disk full, EIO a command refused.
        """
        cause = _cause_of(error)
        # Without the queue's name: what differs from queue to queue is one cause, and one alarm.
        text = re.sub(r"queue '[^']*'", "queue …", str(cause) or type(cause).__name__)
        message = self.address.redact(shown(text))
        if isinstance(cause, exceptions.ConnectionBlockedTimeout):
            return ServerUnavailableError(
                errno.ENOSPC, "RabbitMQ takes no messages: its memory or its disk is nearly full"
            )
        # The library tells of a refused login in a text, and guesses one where the server dies.
        if getattr(cause, "reply_code", 0) in _NOT_ALLOWED or any(
            f"({code})" in message for code in _NOT_ALLOWED
        ):
            return ServerUnavailableError(errno.EACCES, f"RabbitMQ refuses access: {message}")
        if isinstance(cause, exceptions.ChannelClosedByBroker):  # the connection is as good as ever
            return ServerUnavailableError(errno.EIO, f"RabbitMQ refuses the command: {message}")
        return ServerUnavailableError(errno.ENOTCONN, f"RabbitMQ is unreachable: {message}")


def _cause_of(error: BaseException) -> BaseException:
    """Return the innermost error: the library's own around it have no text, most of them."""
    inner = [*error.args, *getattr(error, "exceptions", ()), getattr(error, "exception", None)]
    causes = [one for one in inner if isinstance(one, BaseException)]
    return _cause_of(causes[-1]) if causes else error
