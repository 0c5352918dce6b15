"""The HTTP application in one process, without Ray."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI
from sse_starlette.sse import AppStatus

from serve.api.connection import allow_many_connections, connection_class
from serve.api.memory import map_large_blocks
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.runtime import Runtime
from serve.stages import build_local_runtime

MAX_HEADER_BYTES = 16 * 1024


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, on_ready: Callable[[], None] | None, on_stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_ready, self._on_stop = on_ready, on_stop

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests, and let those that run come to their end within the drain timeout."""
        self._on_stop()
        await super().shutdown(sockets=sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started and self._on_ready is not None:
            self._on_ready()


def build_app(runtime: Runtime, config: ServeConfig, *, echo_request_id: bool = True) -> FastAPI:
    """The application over a runtime, for a process that serves it; with the demo page where it is wanted."""
    map_large_blocks()
    app = create_app(runtime, config, echo_request_id=echo_request_id)
    if not config.ui:
        return app
    from serve.page.launch import mount_page

    return mount_page(app, config)


def run_in_process(
    config: ServeConfig,
    on_ready: Callable[[], None] | None = None,
    on_loaded: Callable[[int], None] | None = None,
) -> None:
    """Load the model into this process and serve until SIGINT or SIGTERM; running requests may finish first.

    Args:
        on_ready: Called when requests are accepted.
        on_loaded: Called before that, with the size of the KV cache in bytes.
    """
    allow_many_connections()
    runtime = build_local_runtime(config)
    if on_loaded is not None:
        on_loaded(runtime.kv_bytes)
    # On a stop, streams finish by themselves within the drain timeout instead of being cut at once.
    AppStatus.disable_automatic_graceful_drain()
    app = build_app(runtime, config)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        log_config=None,
        access_log=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        http=connection_class(config.header_timeout_s, config.send_timeout_s, app.state.room),
        ws="none",
        timeout_graceful_shutdown=int(config.drain_timeout_s),
        server_header=False,
    )
    # uvicorn raises the signal again after its shutdown, for the handler from before; ours makes the exit code 0.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(settings, on_ready, runtime.drain).run()
    finally:
        runtime.close()
