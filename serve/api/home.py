"""`GET /`: a small page for a person who opens the printed address in a browser."""

from __future__ import annotations

from html import escape

from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse

from mm.models.shipped import REAL_MODEL, limits_of
from serve.config import ServeConfig

POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mm: {name}</title>
<style>
  :root {{ color-scheme: light dark }}
  body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 3rem auto; padding: 0 1rem }}
  pre {{ overflow-x: auto; padding: 1rem; border: 1px solid #8888; border-radius: 6px; font-size: 14px }}
  h1 {{ font-size: 1.5rem; margin-bottom: 0 }}
  td {{ padding: .15rem 1.5rem .15rem 0; vertical-align: top }}
</style>
<h1>mm</h1>
<p>This server answers questions about pictures and clips with the model <b>{name}</b>. {limits}</p>
<p>Any OpenAI client works with the base URL <code>{url}/v1</code>. From a terminal:</p>
<pre>{curl}</pre>
<table>
<tr><td>/v1/chat/completions, /v1/responses, /v1/embeddings</td><td>what OpenAI clients use</td></tr>
<tr><td><a href="{prefix}/v1/models">/v1/models</a></td><td>what is served</td></tr>
<tr><td><a href="{prefix}/openapi.json">/openapi.json</a></td><td>every route and field</td></tr>
<tr><td><a href="{prefix}/health">/health</a></td><td>whether requests are answered</td></tr>
<tr><td><a href="{prefix}/metrics">/metrics</a></td><td>figures for Prometheus</td></tr>
</table>
<p>The demo page compares full and reduced answers: {demo}</p>
"""


def add_home(app: FastAPI, config: ServeConfig) -> None:
    """Add the page to the application. It needs no key: it names the model and shows no secret."""

    @app.get("/", include_in_schema=False)
    async def home(http: HttpRequest) -> HTMLResponse:
        url = str(http.base_url).rstrip("/")
        return HTMLResponse(
            render_home(config, url, http.scope.get("root_path", "")), headers={"content-security-policy": POLICY}
        )


def render_home(config: ServeConfig, url: str, prefix: str = "") -> str:
    """The page's HTML.

    Args:
        url: The address that the browser used, without a slash at its end.
        prefix: The path below which the application is served.
    """
    name = config.names[0]
    limits = limits_of(config.model.model)
    key = " -H 'Authorization: Bearer YOUR_KEY'" if config.api_keys else ""
    curl = (
        f"curl {url}/v1/chat/completions \\\n  -H 'Content-Type: application/json'{key} -d '\n"
        f'{{"model": "{name}", "max_tokens": 64,\n'
        ' "messages": [{"role": "user", "content": "What can you do?"}]}\''
    )
    advice = f"{escape(limits)} For those serve a general model: <code>mm serve {REAL_MODEL}</code>" if limits else ""
    demo = f'<a href="{escape(prefix)}/ui">/ui</a>' if config.ui else f"<code>mm demo --url {escape(url)}</code>"
    shown = {"name": escape(name), "url": escape(url), "curl": escape(curl), "prefix": escape(prefix)}
    return PAGE.format(limits=advice, demo=demo, **shown)
