"""Check by which name a request calls the server, and from which web page it comes.

A server on 127.0.0.1 is reached by every web page that is open in a browser of the machine: directly, or under a name
of the page's own that has been pointed to 127.0.0.1 (DNS rebinding). The `Host` header gives the second away, `Origin`
and `Sec-Fetch-Site` the first. Programs send neither of the last two.

Limitations: old browsers send no `Sec-Fetch-Site`; all send `Origin` with a POST to another origin.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from sam_poll.complaints import quoted
from sam_poll.serve.refusals import HostError, OriginError

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/\s]+)(:[0-9]{0,5})?", re.ASCII)
_SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing, and whose answers other origins cannot read
_OWN_SITES = ("same-origin", "none")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}


@dataclass(frozen=True, slots=True)
class Callers:
    """What requests may say of host and origin. `hosts`: names beside the loopback ones; None: any."""

    hosts: frozenset[str] | None
    origins: frozenset[str]

    @classmethod
    def of(cls, listen: str, bound: str, hosts: Collection[str], origins: Collection[str]) -> Callers:
        """Return those of a server that listens at `listen` (host:port) and is bound to the IP address `bound`.

        Where other machines reach it there is a token, which a page under a false name does not have: there any name
        will do, unless the settings give `hosts`.
        """
        if not hosts and not ipaddress.ip_address(bound).is_loopback:
            return cls(None, frozenset(origins))
        own = listen.rpartition(":")[0].strip("[]").lower()
        return cls(frozenset({own, *hosts}), frozenset(origins))

    def check(self, scope: Scope) -> None:
        """Raise HostError for a name that is not ours, OriginError for a POST of another origin's page."""
        headers = Headers(scope=scope)
        host = headers.get("host")  # only HTTP/1.0 may leave it out, which no browser speaks
        if host is not None and not self._is_ours(host.lower()):
            reason = f"this server is not known as {quoted(host)}"
            raise HostError(reason, place="Host", remedy="name it in serve.hosts, or call the server by its own name")
        if scope["method"] not in _SAFE:
            self._check_origin(headers, host or "")

    def _is_ours(self, host: str) -> bool:
        if self.hosts is None:
            return True
        found = _HOST.fullmatch(host)
        if not found:
            return False
        name = found[1].strip("[]").rstrip(".")
        return name in self.hosts or name == "localhost" or _is_loopback(name)

    def _check_origin(self, headers: Headers, host: str) -> None:
        given = headers.getlist("origin")
        if given and all(origin.lower() in self.origins for origin in given):
            return
        strange = [origin for origin in given if _authority(origin) != _without_default(host, origin)]
        if strange:
            raise OriginError(f"this is a page of {quoted(strange[0])}", place="Origin", remedy=_ALLOW)
        site = headers.get("sec-fetch-site", "none")
        if site not in _OWN_SITES:
            raise OriginError(f"this is another site's page ({quoted(site)})", place="Sec-Fetch-Site", remedy=_ALLOW)


_ALLOW = "serve.origins names those whose pages may ask (https://example.org)"


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _authority(origin: str) -> str | None:
    """`https://Example.org` → `example.org`; None for `null` and whatever is no origin."""
    scheme, separator, authority = origin.lower().partition("://")
    return authority if separator and scheme in _DEFAULT_PORTS else None


def _without_default(host: str, origin: str) -> str:
    """The Host header as an origin of the same scheme writes it: without the scheme's own port."""
    scheme = origin.lower().partition("://")[0]
    return host.lower().removesuffix(_DEFAULT_PORTS.get(scheme, ":"))
