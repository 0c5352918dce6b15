"""Download from an http(s) address, without access to hosts inside the operator's network.

Each URL is read by one parser. Its host is resolved once, every address of it has to be public, and the socket connects
to an address that was checked. Redirects are checked in the same way. Proxies, cookies, credentials and content
encodings are not used.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import httpcore
import httpx

from mm.config import SourcePolicy
from mm.data.media import Kind
from mm.errors import MediaError
from mm.media.limits import MediaBudget

PORTS = {"http": 80, "https": 443}
CONNECT_TIMEOUT_S = 3.0
REDIRECTS = (301, 302, 303, 307, 308)
EMBEDS_IPV4 = tuple(
    ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")
)
"""IPv6 ranges that a gateway may translate to IPv4 addresses of its network."""


def download(url: str, kind: Kind, policy: SourcePolicy, budget: MediaBudget) -> bytes:
    """The body at `url`.

    Raises:
        MediaError: `remote_disabled`, `domain_not_allowed`, `bad_source`, `fetch_failed` or `too_many_bytes`.
    """
    if not policy.allowed_domains:
        raise MediaError("remote_disabled", kind)
    deadline = time.monotonic() + policy.fetch_timeout_s
    target = parse(url, kind, policy)
    for _ in range(policy.max_redirects + 1):
        answer = _get(target, kind, budget, deadline)
        if isinstance(answer, bytes):
            return answer
        target = parse(answer, kind, policy)
    raise MediaError("fetch_failed", kind)


def parse(url: str | httpx.URL, kind: Kind, policy: SourcePolicy) -> httpx.URL:
    """The URL as it will be requested, if its form and host are allowed.

    Raises:
        MediaError: `bad_source` or `domain_not_allowed`.
    """
    text = str(url)
    # Some parsers read a backslash as "/" and drop white space. With both refused, all parsers agree.
    if not text.isascii() or not text.isprintable() or any(c in text for c in '\\ "<>^`{|}'):
        raise MediaError("bad_source", kind)
    try:
        parsed = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise MediaError("bad_source", kind) from None
    if parsed.scheme not in PORTS or not parsed.host or parsed.userinfo or "@" in parsed.netloc.decode("ascii"):
        raise MediaError("bad_source", kind)
    if (parsed.port or PORTS[parsed.scheme]) not in PORTS.values():
        raise MediaError("bad_source", kind)
    host = parsed.host.lower().rstrip(".")
    if "*" not in policy.allowed_domains and host not in {domain.lower() for domain in policy.allowed_domains}:
        raise MediaError("domain_not_allowed", kind)
    return parsed


def is_public(address: str) -> bool:
    """Whether an IP address is reachable from the whole Internet, in any notation."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        elif ip.scope_id or any(ip in network for network in EMBEDS_IPV4):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def resolve(host: str, port: int, timeout_s: float) -> list[str]:
    """All addresses of `host`. The system's resolver has no timeout, so it runs in a thread."""
    found: list[str] = []

    def look_up() -> None:
        try:
            found.extend(str(answer[4][0]) for answer in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError):  # ValueError: a label that is too long for the resolver's encoding
            return

    thread = threading.Thread(target=look_up, name="mm-resolve", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return list(dict.fromkeys(found))


def _get(url: httpx.URL, kind: Kind, budget: MediaBudget, deadline: float) -> bytes | httpx.URL:
    """The body, or the address of a redirect."""
    address = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    headers = [
        ("Host", url.netloc.decode("ascii")),
        ("Accept", "*/*"),
        ("Accept-Encoding", "identity"),
        ("User-Agent", "mm"),
    ]
    try:
        with (
            httpcore.ConnectionPool(ssl_context=_tls(), network_backend=_CheckedBackend(kind, deadline)) as pool,
            pool.stream("GET", address, headers=headers) as response,
        ):
            fields = {name.lower(): value for name, value in response.headers}
            if response.status in REDIRECTS and b"location" in fields:
                return url.join(fields[b"location"].decode("ascii"))
            if response.status != 200 or fields.get(b"content-encoding", b"identity") != b"identity":
                raise MediaError("fetch_failed", kind)
            return _body(response, fields.get(b"content-length", b""), kind, budget)
    except (
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.TimeoutException,
        httpx.InvalidURL,
        OSError,
        ValueError,
    ):
        raise MediaError("fetch_failed", kind) from None


def _body(response: httpcore.Response, announced: bytes, kind: Kind, budget: MediaBudget) -> bytes:
    if announced.isdigit():
        budget.check_bytes(kind, int(announced[:18]))
    body = bytearray()
    for chunk in response.iter_stream():
        body += chunk
        budget.check_bytes(kind, len(body))
    return bytes(body)


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects to checked addresses only. Each socket operation gets the time that is left of the download's."""

    def __init__(self, kind: Kind, deadline: float) -> None:
        self._kind, self._deadline = kind, deadline
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = resolve(host, port, _left(self._deadline))
        if not all(is_public(address) for address in addresses):
            raise MediaError("domain_not_allowed", self._kind)
        for address in addresses[:4]:
            try:
                stream = self._inner.connect_tcp(address, port, min(CONNECT_TIMEOUT_S, _left(self._deadline)))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue
            return _DeadlineStream(stream, self._deadline)
        raise httpcore.ConnectError

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Any = None
    ) -> httpcore.NetworkStream:
        raise httpcore.ConnectError


class _DeadlineStream(httpcore.NetworkStream):
    """A connection that ends at the deadline, also when the server sends its bytes slowly."""

    def __init__(self, inner: httpcore.NetworkStream, deadline: float) -> None:
        self._inner, self._deadline = inner, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _DeadlineStream(
            self._inner.start_tls(ssl_context, server_hostname, _left(self._deadline)), self._deadline
        )

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise httpcore.ReadTimeout
    return left_s
