"""A server for jobs: it answers about a picture with the hash of its bytes, refuses other files, and can be full."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BAD = b"bad"


class RowsServer(ThreadingHTTPServer):
    """Counts its requests; every `full_each`-th is refused with 429."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, delay_s: float = 0.0, full_each: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.delay_s, self.full_each = delay_s, full_each
        self.bodies: list[dict[str, Any]] = []
        self.num_refused = 0
        self.lock = threading.Lock()
        self.on_request: Callable[[int], None] = lambda count: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def answer_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RowsServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            count = len(self.server.bodies)
            is_full = self.server.full_each and count % self.server.full_each == 0
            self.server.num_refused += bool(is_full)
        self.server.on_request(count)
        time.sleep(self.server.delay_s)
        if is_full:
            self._send(429, {"error": {"message": "full", "code": "overloaded"}}, {"retry-after": "0"})
            return
        content = body["messages"][0]["content"]
        if isinstance(content, str):
            self._send(200, _completion(content.upper()))
            return
        url = next(part[part["type"]]["url"] for part in content if part["type"] != "text")
        data = base64.b64decode(url.partition(",")[2])
        if data.startswith(BAD):
            self._send(400, {"error": {"message": "no picture", "code": "media_undecodable"}})
        else:
            self._send(200, _completion(answer_of(data)))

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        try:
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True


def _completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
    return {"id": "chatcmpl-1", "object": "chat.completion", "choices": choices, "usage": usage, "model": "fake"}


@contextmanager
def rows_server(**options: Any) -> Iterator[RowsServer]:
    server = RowsServer(**options)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
