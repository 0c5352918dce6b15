"""HTTP connections of the server in one process: limits on slow clients, and refusals that cost little.

uvicorn waits without end for the header of a request and for a client that reads nothing. On Ray the proxy holds the
connections, with limits of its own.

A server that is asked for ten times what it can do spends its time on refusals: parsing, routing and middleware take
milliseconds in the process that computes. So while there is no room, a connection refuses by the first bytes of a
request, before they are parsed. What it does not know for sure is parsed, and refused later.
"""

from __future__ import annotations

import asyncio
import re
import resource
import uuid
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from serve.api.errors import ErrorResponse, error_response
from serve.api.leftovers import DROP_BYTES, DROP_S
from serve.api.room import LIMITED_PATHS, Place, Room, busy

MAX_FILES = 65_536
BEGINNING = re.compile(rb"POST ([^ ?\r\n]{1,64})(?:\?[^ \r\n]*)? HTTP/1\.[01]\r\n")
LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,12})[ \t]*(?=\r\n)", re.IGNORECASE)
REQUEST_ID = re.compile(rb"\r\nx-request-id:[ \t]*([A-Za-z0-9._:-]{1,128})[ \t]*\r\n", re.IGNORECASE)
PARSED = re.compile(rb"\r\n(transfer-encoding|origin):", re.IGNORECASE)
"""Fields of requests that are parsed: their body's end, or the headers that a web page needs, are not told at once."""
WAITS = re.compile(rb"\r\nexpect:", re.IGNORECASE)


def connection_class(header_timeout_s: float, send_timeout_s: float, room: Room | None = None) -> type[H11Protocol]:
    """The class of a server's connections.

    Args:
        header_timeout_s: From the first byte of a request, or from the connection's start, to the end of the header.
        send_timeout_s: After this time a client that reads nothing of what waits for it is cut off.
        room: Of the application. While it is full, requests that compute are refused. None leaves that to it.
    """

    class Limited(Connection):
        pass

    Limited.header_timeout_s, Limited.send_timeout_s, Limited.room = header_timeout_s, send_timeout_s, room
    return Limited


class Connection(H11Protocol):
    """A connection that ends when its client is too slow."""

    header_timeout_s = 20.0
    send_timeout_s = 60.0
    room: Room | None = None
    _place: Place | None = None
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _drop_timer: asyncio.TimerHandle | None = None
    _num_dropped = 0  # bytes of a refused request that are still to come

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        if self._drop_timer is not None:
            self._drop(len(data))
            return
        num_left = bytes_left(data) if self.room is not None and self._is_between_requests else None
        if self.room is None or num_left is None:
            super().data_received(data)
        elif self.room.is_full:
            self._refuse(self.room, data, num_left)
        elif num_left > 0:
            super().data_received(data)
        else:
            self._receive_whole(self.room.take(), data)
        self._watch_head()

    def _receive_whole(self, place: Place, data: bytes) -> None:
        before, self._place = self.scope, place
        super().data_received(data)
        if self.scope is before:  # it could not be parsed
            place.leave_unused()
        else:
            self.scope.setdefault("state", {})["place"] = place

    def on_response_complete(self) -> None:
        self._leave()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        for timer in (self._head_timer, self._send_timer, self._drop_timer):
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

    def _leave(self) -> None:
        if self._place is not None:
            self._place.leave_unused()
            self._place = None

    @property
    def _is_between_requests(self) -> bool:
        """Whether the next byte begins a request, and nothing is being answered."""
        is_idle = self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE
        return is_idle and not self.conn.trailing_data[0] and not self.transport.is_closing()

    def _refuse(self, room: Room, data: bytes, num_left: int) -> None:
        """Answer 429, and close the connection once the client has sent the rest of its request.

        A connection that is closed while bytes of the client are unread is reset, and the client loses the answer.
        """
        room.count_refused()
        given = REQUEST_ID.search(data)
        self._write(error_response(busy()), given[1].decode() if given else uuid.uuid4().hex)
        self._unset_keepalive_if_required()
        self._drop_timer = self.loop.call_later(DROP_S, self.transport.abort)
        self._num_dropped = num_left
        self._drop(0)

    def _drop(self, num_bytes: int) -> None:
        self._num_dropped -= num_bytes
        if self._num_dropped <= 0:
            self.transport.close()

    def _end(self, status: HTTPStatus, code: str, message: str) -> None:
        if self.transport.is_closing():
            return
        self._write(ErrorResponse(status=status, type="invalid_request_error", code=code, message=message), None)
        self.transport.close()

    def _write(self, error: ErrorResponse, request_id: str | None) -> None:
        """Send an error as the last answer of this connection."""
        status, content = HTTPStatus(error.status), error.content
        fields = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
        fields |= error.headers | ({} if request_id is None else {"x-request-id": request_id})
        lines = [f"HTTP/1.1 {int(status)} {status.phrase}", *(f"{name}: {value}" for name, value in fields.items())]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + content)


def bytes_left(data: bytes) -> int | None:
    """How much of a request's body comes after its first bytes; None where the request has to be parsed.

    Args:
        data: Where the request begins.
    """
    begins, end = BEGINNING.match(data), data.find(b"\r\n\r\n")
    if begins is None or begins[1] not in LIMITED_PATHS or end < 0:
        return None
    head = data[: end + 2]
    lengths = LENGTH.findall(head)
    if len(lengths) != 1 or PARSED.search(head) or int(lengths[0]) > DROP_BYTES:
        return None
    return 0 if WAITS.search(head) else int(lengths[0]) - (len(data) - end - 4)


def allow_many_connections() -> None:
    """Raise the number of files that this process may open. A connection is one, and the usual limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(MAX_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
