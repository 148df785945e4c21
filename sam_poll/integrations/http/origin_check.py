"""Check the name by which a request calls the server, and the web page that it comes from.

Any web page open in a browser of this machine can reach a server on 127.0.0.1: directly, or by a
name of the page's own domain that resolves to 127.0.0.1 (DNS rebinding). The header `Host` reveals
the second, `Origin` and `Sec-Fetch-Site` the first. Programs that are not browsers send neither of
the last two.

Limitations: old browsers send no `Sec-Fetch-Site`; all send `Origin` with a POST to another origin.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from sam_poll.core.validation import quoted
from sam_poll.integrations.http.errors import HostError, OriginError

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/\s]+)(:[0-9]{0,5})?", re.ASCII)
# Methods that change nothing, and whose answers other origins cannot read.
_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_OWN_SITES = ("same-origin", "none")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_ORIGIN_REMEDY = "add the page's origin to serve.origins (https://example.org)"


@dataclass(frozen=True, slots=True)
class Callers:
    """The values of `Host` and `Origin` that requests may have.

    `hosts`: names besides the loopback ones, in lower case; None allows any name.
    """

    hosts: frozenset[str] | None
    origins: frozenset[str]

    @classmethod
    def of(
        cls, listen: str, bound: str, hosts: Collection[str], origins: Collection[str]
    ) -> Callers:
        """Return the callers of a server with these settings.

        `listen` is `serve.listen` (host:port), `bound` the IP address that the socket is bound to.

        A server that other machines reach has a token, which a page under a false name does not
        know: there any name is allowed, unless the settings give `hosts`.
        """
        if not hosts and not ipaddress.ip_address(bound).is_loopback:
            return cls(None, frozenset(origins))
        own_name = listen.rpartition(":")[0].strip("[]").lower()
        return cls(frozenset({own_name, *hosts}), frozenset(origins))

    def check(self, scope: Scope) -> None:
        """Check a request's headers.

        Raises HostError for a name that is not this server's, OriginError for a request that may
        change something and comes from a page of another origin.
        """
        headers = Headers(scope=scope)
        host = headers.get("host")  # optional in HTTP/1.0 only, which no browser uses
        if host is not None and not self._is_own_host(host.lower()):
            raise HostError(
                f"{quoted(host)} is not a name of this server",
                place="Host",
                remedy="add the name to serve.hosts, or call the server by its own name",
            )
        if scope["method"] not in _SAFE_METHODS:
            self._check_origin(headers, host or "")

    def _is_own_host(self, host: str) -> bool:
        if self.hosts is None:
            return True
        match = _HOST.fullmatch(host)
        if not match:
            return False
        name = match[1].strip("[]").rstrip(".")
        return name in self.hosts or name == "localhost" or _is_loopback(name)

    def _check_origin(self, headers: Headers, host: str) -> None:
        origins = headers.getlist("origin")
        if origins and all(origin.lower() in self.origins for origin in origins):
            return
        for origin in origins:
            if _authority(origin) != _without_default_port(host, origin):
                raise OriginError(
                    f"the request comes from a web page of {quoted(origin)}",
                    place="Origin",
                    remedy=_ORIGIN_REMEDY,
                )
        site = headers.get("sec-fetch-site", "none")
        if site not in _OWN_SITES:
            raise OriginError(
                f"the request comes from a web page of another site ({quoted(site)})",
                place="Sec-Fetch-Site",
                remedy=_ORIGIN_REMEDY,
            )


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _authority(origin: str) -> str | None:
    """`https://Example.org` → `example.org`; None for `null` and other values without a scheme."""
    scheme, separator, authority = origin.lower().partition("://")
    return authority if separator and scheme in _DEFAULT_PORTS else None


def _without_default_port(host: str, origin: str) -> str:
    """Return the header `Host` as an origin writes it: without the port of the origin's scheme."""
    scheme = origin.lower().partition("://")[0]
    return host.lower().removesuffix(_DEFAULT_PORTS.get(scheme, ":"))
