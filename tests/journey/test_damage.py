"""A real server process, real HTTP, and files damaged in every way: clear refusals, no 5xx, nothing dies.

The model has random weights; what it answers does not matter here, that it answers does.
"""

from __future__ import annotations

import base64
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.helpers.checkpoints import random_llava
from tests.helpers.clips import clip_bytes
from tests.helpers.damage import mutated, pictures

NUM_IMAGES, NUM_CLIPS, CONTROL_EVERY = 500, 200, 50
LEAK = re.compile(r"0x[0-9a-f]{6,}|Traceback|site-packages|\.py\b")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[subprocess.Popen, httpx.Client]]:
    folder = random_llava(tmp_path_factory.mktemp("server") / "llava", video=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serve.cli.app", "serve", str(folder), "--in-process", "--port", str(port)]
    log = (tmp_path_factory.mktemp("log") / "server.log").open("w")
    process = subprocess.Popen(
        [*command, "--frames", "2", "--threads", "1", "--served-model-name", "random"], stdout=log, stderr=log
    )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
        try:
            await_health(process, client)
            yield process, client
        finally:
            process.terminate()
            process.wait(30)
            log.close()


def await_health(process: subprocess.Popen, client: httpx.Client) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended while starting"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.2)
    pytest.fail("the server did not become healthy")


def ask(client: httpx.Client, kind: str, mime: str, data: bytes) -> httpx.Response:
    url = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    content = [{"type": "text", "text": "What?"}, {"type": f"{kind}_url", f"{kind}_url": {"url": url}}]
    body = {"model": "random", "messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0}
    return client.post("/v1/chat/completions", json=body)


def check(response: httpx.Response) -> str:
    """The answer's sort: an ordinary one, or the code of a well-formed refusal."""
    body = json.loads(response.content)
    if response.status_code == 200:
        assert isinstance(body["choices"][0]["message"]["content"], str)
        return "answered"
    assert response.status_code == 400, response.text
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["param"].startswith("messages[0].content[1]")
    assert not LEAK.search(response.text), response.text
    return body["error"]["code"]


@pytest.mark.parametrize(
    ("kind", "mime", "count"),
    [("image", "image/png", NUM_IMAGES), ("video", "video/mp4", NUM_CLIPS)],
    ids=["images", "clips"],
)
def test_damaged_media_are_refused_and_the_server_lives(server, kind, mime, count):
    process, client = server
    rng = random.Random(2026)
    originals = pictures() if kind == "image" else clips()
    control = ask(client, kind, mime, originals[0])
    assert check(control) == "answered"
    seen: Counter[str] = Counter()
    for index in range(count):
        seen[check(ask(client, kind, mime, mutated(originals[index % len(originals)], rng)))] += 1
        if index % CONTROL_EVERY == CONTROL_EVERY - 1:
            again = ask(client, kind, mime, originals[0])
            assert again.json()["choices"] == control.json()["choices"]
    assert process.poll() is None
    assert seen.total() == count
    # Damage that hits nobody's bytes is answered, damage that matters is refused: both have to occur.
    assert seen["answered"] > count / 50
    assert seen["media_undecodable"] > count / 10


def clips() -> list[bytes]:
    kinds = (("f.mp4", "libx264"), ("f.webm", "libvpx-vp9"), ("f.avi", "mpeg4"), ("f.mkv", "libx264"))
    return [clip_bytes(name=name, codec=codec, num_frames=12) for name, codec in kinds]
