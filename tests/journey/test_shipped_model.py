"""The same application over the model we ship: the parts fit together."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shipped() -> AsyncIterator[httpx.AsyncClient]:
    runtime = build_local_runtime(ServeConfig())
    transport = httpx.ASGITransport(app=create_app(runtime, ServeConfig()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client
    runtime.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.asyncio(loop_scope="module")
async def test_reduced_image_is_answered_and_counted(shipped, ask, image_url, stream) -> None:
    content = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": image_url}}]
    vision = {"reducer": "divprune", "keep_ratio": 0.25, "return_map": True}
    body = ask(content, vision=vision, max_tokens=4, temperature=0, stream=stream)
    response = await shipped.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    if stream:
        assert response.text.endswith("data: [DONE]\n\n")
        return
    answer = response.json()
    (item,) = answer["vision"]["items"]
    num_in, num_kept = answer["vision"]["visual_tokens_in"], answer["vision"]["visual_tokens_kept"]
    assert num_in == item["grid"][0] * item["grid"][1] * item["grid"][2]
    assert num_kept == len(item["kept"]) == num_in // 4
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == num_kept
