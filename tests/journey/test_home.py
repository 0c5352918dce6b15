"""The page at `/`: what a person sees who opens the printed address."""

from __future__ import annotations

import re
import shlex
from html import unescape

import pytest

from mm.config import ModelConfig
from serve.api.home import render_home
from serve.config import ServeConfig

KEYED = ServeConfig(api_keys=("hidden-key",))


def test_its_command_is_what_a_shell_can_run():
    page = render_home(ServeConfig(), "http://127.0.0.1:8000")
    words = shlex.split(unescape(re.findall(r"<pre>(.*?)</pre>", page, flags=re.DOTALL)[0]))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/chat/completions"]
    assert '"model": "tiny"' in words[-1]


def test_it_says_what_a_shipped_model_cannot_do():
    assert "photographs" in render_home(ServeConfig(), "http://here")
    assert "photographs" not in render_home(ServeConfig(model=ModelConfig(model="owner/name")), "http://here")


def test_it_shows_where_a_key_goes_and_not_the_key():
    page = render_home(KEYED, "http://here")
    assert "Bearer YOUR_KEY" in page
    assert "hidden-key" not in page


@pytest.mark.parametrize("hostile", ["<script>x</script>", "a'b\"c"])
def test_texts_from_outside_are_escaped(hostile):
    page = render_home(ServeConfig(served_model_names=(hostile,)), f"http://{hostile}")
    assert hostile not in page


async def test_it_is_served_without_scripts(client):
    response = await client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    links = re.findall(r'href="([^"]+)"', response.text)
    assert links
    for link in links:
        assert (await client.get(link)).status_code == 200
