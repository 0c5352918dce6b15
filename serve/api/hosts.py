"""Which names and web pages may reach a server.

A web page that a user of this machine visits can send requests to servers on it. It can also let its own name lead to
this machine (DNS rebinding), and then read the answers. Browsers say which name they asked for (`Host`) and which page
asks (`Origin`, `Sec-Fetch-Site`), so both attacks are refused by what these headers say. Clients that are not browsers
send no `Origin`, and reach a server by its address, by `localhost`, or by a name that the operator allows.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.api.errors import HostNotAllowed, OriginNotAllowed, error_response, send_response

HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+(?:%[\w.~%-]+)?\]|[^\[\]:@/\\\s]+)(?::(?P<port>[0-9]{1,5}))?")
DEFAULT_PORTS = {"http": 80, "https": 443}
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class HostPolicy:
    """Decides by a request's headers whether it may be answered.

    An address instead of a name is always allowed: nobody can make an address of a name lead elsewhere. So are
    `localhost` and the name that the server listens on. A server that other machines can reach also answers to this
    machine's own name.

    Args:
        bound: What the server listens on.
        hosts: Further names. "*.example.org" allows every name below; "*" allows all.
        origins: Web pages beside those of this server, such as "https://example.org"; "*" allows all.
    """

    def __init__(self, bound: str, hosts: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        names = {bound, *hosts} if bound in LOOPBACK_NAMES else {bound, socket.gethostname(), *hosts}
        self._names = frozenset(_normalised(name) for name in names)
        self._origins = frozenset(origin.lower().rstrip("/") for origin in origins)

    def check(self, headers: Headers) -> None:
        """Refuse a request for a foreign name or from a foreign page.

        Raises:
            HostNotAllowed, OriginNotAllowed: With the option that allows it.
        """
        for host in headers.getlist("host"):
            if not self._is_known(host):
                raise HostNotAllowed(host)
        if "*" in self._origins:
            return
        origins = headers.getlist("origin")
        for origin in origins:
            if origin.lower() not in self._origins and not _is_same(origin, headers.get("host", "")):
                raise OriginNotAllowed(origin)
        if not origins and _is_from_other_site(headers):
            raise OriginNotAllowed("a web page of another site")

    def _is_known(self, host: str) -> bool:
        if "*" in self._names:
            return True
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = _normalised(found["name"])
        if name == "localhost" or name.endswith(".localhost") or name in self._names:
            return True
        return _is_address(name) or any(known.startswith("*.") and name.endswith(known[1:]) for known in self._names)


def _normalised(name: str) -> str:
    return name.lower().removesuffix(".").strip("[]")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_same(origin: str, host: str) -> bool:
    """Whether a page comes from the host that it asks. The scheme may differ behind a proxy that ends TLS."""
    try:
        page = urlsplit(origin)
        port = page.port or DEFAULT_PORTS.get(page.scheme)
    except ValueError:
        return False
    asked = HOST.fullmatch(host)
    if asked is None or page.hostname is None:
        return False
    asked_port = int(asked["port"]) if asked["port"] else DEFAULT_PORTS.get(page.scheme)
    return (_normalised(page.hostname), port) == (_normalised(asked["name"]), asked_port)


def _is_from_other_site(headers: Headers) -> bool:
    """Whether a browser says so. Following a link to this server is allowed; it sends nothing but the address."""
    site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode", "")
    return site in ("cross-site", "same-site") and mode != "navigate"


class KnownHosts:
    """Refuses requests that `policy` does not allow. Web sockets are refused by closing them."""

    def __init__(self, app: ASGIApp, policy: HostPolicy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            try:
                self._policy.check(Headers(scope=scope))
            except (HostNotAllowed, OriginNotAllowed) as error:
                if scope["type"] == "http":
                    await send_response(error_response(error), send)
                else:
                    await send({"type": "websocket.close", "code": 1008, "reason": "not allowed"})
                return
        await self._app(scope, receive, send)
