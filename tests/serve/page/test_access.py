"""What the page's server gives away, and to whom."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
from PIL import Image

from serve.page.launch import DemoConfig, demo_app, serving
from serve.page.samples import SAMPLES_FOLDER
from tests.serve.page.fake_server import fake_app


@pytest.mark.usefixtures("no_outbound")
def test_the_page_gives_away_no_files_and_names_no_other_host(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    with demo_app(DemoConfig(url="http://127.0.0.1:9")) as app, serving(app) as url, httpx.Client(base_url=url) as http:
        html = http.get("/").text
        assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//", html) == []
        for path in (secret, Path("/etc/passwd"), Path(__file__), SAMPLES_FOLDER / "make.py"):
            response = http.get(f"/gradio_api/file={path}")
            assert response.status_code in (403, 404)
        for path in ("/", "/config", "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/upload"):
            for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
                assert http.post(path, headers=headers, json={}).status_code == 403
                assert http.get(path, headers=headers).status_code == 403
        policy = http.get("/").headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http:" not in policy
        config = json.dumps(http.get("/config").json())
        assert '"analytics_enabled": false' in config


def test_a_request_cannot_name_a_file_of_the_machine(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (64, 64)).save(secret)
    with (
        serving(fake_app()) as server,
        demo_app(DemoConfig(url=server)) as app,
        serving(app) as url,
        httpx.Client(base_url=url, timeout=30) as http,
    ):

        def compared(path: str) -> str:
            data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "What?", [], 0.25, 8, 8]
            event = http.post("/gradio_api/call/compare", json={"data": data}).json()["event_id"]
            return http.get(f"/gradio_api/call/compare/{event}").text

        assert compared(str(secret)).startswith("event: error")
        with secret.open("rb") as file:
            (uploaded,) = http.post("/gradio_api/upload", files={"files": file}).json()
        assert "none: What?" in compared(uploaded)
