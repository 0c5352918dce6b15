"""Below a route prefix the same paths are open and the same are closed, and the page's links lead there."""

from __future__ import annotations

import re

import httpx
import pytest
from fastapi import FastAPI

from serve.api.guard import Guard
from serve.api.home import add_home
from serve.api.hosts import HostPolicy
from serve.config import ServeConfig


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.add_middleware(Guard, hosts=HostPolicy("127.0.0.1"), api_keys=("secret",))
    add_home(app, ServeConfig())

    @app.get("/health")
    @app.get("/metrics")
    async def answer() -> dict[str, str]:
        return {}

    return app


@pytest.mark.parametrize("prefix", ["", "/tiny"])
async def test_open_paths_are_open_below_a_prefix_and_others_are_not(app, prefix):
    transport = httpx.ASGITransport(app=app, root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        paths = ("/", "/health", "/metrics", "/health/x")
        statuses = [(await client.get(prefix + path)).status_code for path in paths]
        assert statuses == [200, 200, 401, 401]
        page = (await client.get(f"{prefix}/")).text
        assert set(re.findall(r'href="([^"]+)"', page)) == {
            prefix + path for path in ("/v1/models", "/openapi.json", "/health", "/metrics")
        }
        assert f"http://127.0.0.1{prefix}/v1/chat/completions" in page
