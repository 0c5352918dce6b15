"""HTTP connections of the server in one process, with limits on slow clients.

uvicorn waits without end for the header of a request and for a client that reads nothing. On Ray the proxy holds the
connections, with limits of its own.
"""

from __future__ import annotations

import asyncio
import resource
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.api.errors import ErrorResponse

MAX_FILES = 65_536


def connection_class(header_timeout_s: float, send_timeout_s: float) -> type[H11Protocol]:
    """The class of a server's connections.

    Args:
        header_timeout_s: From the first byte of a request, or from the connection's start, to the end of the header.
        send_timeout_s: After this time a client that reads nothing of what waits for it is cut off.
    """

    class Limited(Connection):
        pass

    Limited.header_timeout_s, Limited.send_timeout_s = header_timeout_s, send_timeout_s
    return Limited


class Connection(H11Protocol):
    """A connection that ends when its client is too slow."""

    header_timeout_s = 20.0
    send_timeout_s = 60.0
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._send_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_timer = self.loop.call_later(self.send_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._send_timer is not None:
            self._send_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP in the same form as any other error."""
        self._end(HTTPStatus.BAD_REQUEST, "invalid_http", "the request is not valid HTTP, or its header is too large")

    def _watch_head(self) -> None:
        """Begin or end the wait for a request's header."""
        is_due = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if is_due and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._end_late_head)
        elif not is_due and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_late_head(self) -> None:
        message = f"the request's header did not arrive within {self.header_timeout_s:g} seconds"
        self._end(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", message)

    def _end(self, status: HTTPStatus, code: str, message: str) -> None:
        if self.transport.is_closing():
            return
        error = ErrorResponse(status=status, type="invalid_request_error", code=code, message=message)
        fields = f"content-type: application/json\r\ncontent-length: {len(error.content)}\r\nconnection: close"
        head = f"HTTP/1.1 {int(status)} {status.phrase}\r\n{fields}\r\n\r\n"
        self.transport.write(head.encode() + error.content)
        self.transport.close()


def allow_many_connections() -> None:
    """Raise the number of files that this process may open. A connection is one, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
