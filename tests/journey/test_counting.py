"""The endpoint that only counts, over a real model: what it tells is what the answer's usage says."""

from __future__ import annotations

import base64
import io

import httpx
import numpy as np
import PIL.Image

from mm.config import ModelConfig
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime


def url_of(height: int, width: int) -> str:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def body(*details: dict, **vision) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url_of(64 + i, 80), **one}} for i, one in enumerate(details)]
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 2,
        "temperature": 0,
        "vision": vision,
    }


async def test_what_is_told_is_what_is_used():
    config = ServeConfig(model=ModelConfig(model="tiny", dtype="float32", num_threads=1))
    runtime = build_local_runtime(config)
    try:
        transport = httpx.ASGITransport(create_app(runtime, config))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            seen = {}
            for name, request in {
                "plain": body({}),
                "two": body({}, {}, max_visual_tokens=33),
                "low": body({"detail": "low"}),
                "high": body({"detail": "high"}),
                "reduced": body({}, {"max_visual_tokens": 5}, reducer="divprune:keep_ratio=0.5"),
                "text": body(),
            }.items():
                told = (await client.post("/v1/chat/completions/count", json=request)).json()
                used = (await client.post("/v1/chat/completions", json=request)).json()
                assert told["usage"]["prompt_tokens"] == used["usage"]["prompt_tokens"], name
                details = used["usage"]["prompt_tokens_details"]
                assert told["usage"]["prompt_tokens_details"]["image_tokens"] == details["image_tokens"]
                assert told["vision"]["visual_tokens"] == used["vision"]["visual_tokens_kept"]
                assert told["vision"]["is_exact"]
                seen[name] = told["vision"]["visual_tokens"]
            assert seen["two"] == 33
            assert 4 * seen["low"] <= seen["high"] == seen["plain"]
            assert seen["reduced"] == seen["plain"] // 2 + 5
            assert seen["text"] == 0
            wrong = await client.post("/v1/chat/completions/count", json=body({}, {}, max_visual_tokens=1))
            assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "vision.max_visual_tokens")
    finally:
        runtime.close()
