"""Start what the page needs, and serve it.

Other web pages cannot use the page's routes; see `serve.api.hosts`.

That nothing is loaded from outside rests on four things: usage statistics are off, fonts are the system's, the page is
never shared through a tunnel, and a content security policy makes the browser refuse what an answer or an upload might
still ask for.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mm.config import MiB, ModelConfig
from mm.errors import InvalidOption, MmError
from serve.config import ServeConfig, check_hosts
from serve.page.choices import with_drafters
from serve.page.samples import SAMPLES_FOLDER, load_samples

if TYPE_CHECKING:
    import gradio as gr
    from fastapi import FastAPI

    from serve.page.client import Client

log = logging.getLogger(__name__)

START_TIMEOUT_S = 30.0
UI_PATH = "/ui"
"""Where `mm serve --ui` has the page."""

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; frame-src 'none'; base-uri 'self'; form-action 'self'"
)
"""Gradio's own page needs inline scripts; what they may reach is this server."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Which server the page asks, and where the page is.

    Attributes:
        url: A running server; None starts one in this process, on a free port of 127.0.0.1.
        api_key: Sent to that server, if it wants one.
        server: What is started without a `url`; its host and port are not used.
        host, port: Where the page is bound; port 0 takes a free one.
        allowed_hosts, allowed_origins: See `ServeConfig`; here they are about the page.
        samples: Folder with `samples.json`; without it the page offers no samples.
        max_file_bytes: Largest upload. A server takes bodies of 32 MiB by default, and base64 adds a third.
        timeout_s: Longest wait for one answer.
    """

    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    server: ServeConfig = field(default_factory=lambda: ServeConfig(model=with_drafters(ModelConfig())))
    host: str = "127.0.0.1"
    port: int = 7860
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    samples: Path = SAMPLES_FOLDER
    max_file_bytes: int = 20 * MiB
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        check_hosts("demo", self.allowed_hosts, self.allowed_origins)
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise InvalidOption("demo", "url", f"was {self.url!r}; it has to begin with http:// or https://")


class MissingExtra(MmError):
    """The page needs a package that is not installed."""

    code = "missing_extra"

    def __str__(self) -> str:
        return "the demo page needs Gradio: pip install 'mm-serving[demo]'"


def run_demo(config: DemoConfig) -> None:
    """Serve the page until interrupted.

    Raises:
        MmError: The model cannot be loaded, the port is taken, or Gradio is missing.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_bound(config.host, config.port))
        app = stack.enter_context(demo_app(config))
        log.info("the page is at http://%s:%d", *listener.getsockname()[:2])
        _server(app).run(sockets=[listener])


@contextlib.contextmanager
def demo_app(config: DemoConfig) -> Iterator[FastAPI]:
    """The page as an application. The server that it asks runs while the context is open."""
    try:
        from serve.page.page import build_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise MissingExtra from None
    from serve.page.client import Client

    with contextlib.ExitStack() as stack:
        url = config.url or stack.enter_context(_own_server(config.server))
        client = Client(url, api_key=config.api_key, timeout_s=config.timeout_s)
        stack.callback(client.close)
        if config.url is None:
            _warm_up(client)
        yield _in_loop(lambda: mounted(build_page(client, samples=load_samples(config.samples)), config))


def _in_loop(build: Callable[[], FastAPI]) -> FastAPI:
    """What `build` returns, built while an event loop runs: without one Gradio opens its own, and never closes them."""

    async def built() -> FastAPI:
        return build()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(built())
    return build()


def mounted(page: gr.Blocks, config: DemoConfig) -> FastAPI:
    """The page at `/` of an application of ours, so that nothing of Gradio's launcher runs."""
    from fastapi import FastAPI

    from serve.api.hosts import HostPolicy, KnownHosts

    app = FastAPI(openapi_url=None)
    app.add_middleware(_Headers)
    app.add_middleware(KnownHosts, policy=HostPolicy(config.host, config.allowed_hosts, config.allowed_origins))
    return _mount(app, page, config, "/")


def mount_page(app: FastAPI, config: ServeConfig) -> FastAPI:
    """The application with the page at `/ui`, which asks this very server."""
    from starlette.responses import RedirectResponse

    from serve.page.client import Client
    from serve.page.page import build_page

    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    page_config = DemoConfig(url=f"http://{host}:{config.port}", host=config.host)

    def build() -> FastAPI:
        page = build_page(Client(str(page_config.url)), samples=load_samples(page_config.samples))
        return _mount(app, page, page_config, UI_PATH)

    whole = _in_loop(build)
    whole.add_route(UI_PATH, lambda _: RedirectResponse(f"{UI_PATH}/"), include_in_schema=False)
    for route in whole.routes:
        if getattr(route, "path", None) == UI_PATH:
            cast(Any, route).app = _Headers(cast(Any, route).app)
    return whole


def _mount(app: FastAPI, page: gr.Blocks, config: DemoConfig, path: str) -> FastAPI:
    import gradio as gr

    from serve.page.theme import CSS, theme

    # Gradio checks that a path which a request names was uploaded, but only of a page that its own launcher started.
    page.has_launched = True
    samples = [str(sample.path) for sample in load_samples(config.samples)]
    return gr.mount_gradio_app(
        app,
        page,
        path=path,
        footer_links=[],
        run_history=False,
        allowed_paths=samples,
        max_file_size=config.max_file_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=theme(),
        css=CSS,
    )


class _Headers:
    """Adds the security headers to every response. Plain ASGI, so that streamed responses are not buffered."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)


@contextlib.contextmanager
def _own_server(config: ServeConfig) -> Iterator[str]:
    """A server of the public HTTP API in this process; its address."""
    from serve.api.routes import create_app
    from serve.stages import build_local_runtime

    runtime = build_local_runtime(config)
    try:
        with serving(create_app(runtime, config)) as url:
            yield url
    finally:
        runtime.close()


def _warm_up(client: Client) -> None:
    """Send one question: the first answer after a start is slower, and the page always asks for the full one first."""
    from PIL import Image

    from serve.page.request import Question, Upload

    grey = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(grey, "PNG")
    client.ask(Question(text="?", upload=Upload(name="grey.png", mime="image/png", data=grey.getvalue()), max_tokens=4))


@contextlib.contextmanager
def serving(app: FastAPI, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """`app` served from a thread while the context is open; its address."""
    with _bound(host, port) as listener:
        server = _server(app)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            _await_start(server, thread)
            yield "http://{}:{}".format(*listener.getsockname()[:2])
        finally:
            server.should_exit = True
            thread.join(START_TIMEOUT_S)


def _server(app: Any) -> Any:
    import uvicorn

    settings = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, ws="none", timeout_graceful_shutdown=2
    )
    return uvicorn.Server(settings)


def _await_start(server: Any, thread: threading.Thread) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise InvalidOption("demo", "server", "did not start; see the log")
        time.sleep(0.01)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, so that a taken port is known before anything is loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            reason = error.strerror or "cannot be used"
            raise InvalidOption("demo", "port", f"{host}:{port} {reason.lower()}; choose another with --port") from None
        yield listener
