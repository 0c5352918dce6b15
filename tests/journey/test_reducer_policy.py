"""What an operator decides about reducers, as clients see it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from mm.config import ModelConfig, ReducerPolicy
from mm.plugins.spec import reducer_spec
from pruning.in_llm.fastv import FastV
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime

PATH = "/v1/chat/completions"


@pytest.fixture
def failing(monkeypatch):
    """FastV fails at its layer."""

    def fail(self: FastV, layer: int, view: Any) -> None:
        raise RuntimeError("a secret of the plugin")

    monkeypatch.setattr(FastV, "in_prefill", fail)


def serving(**policy: Any) -> tuple[Any, httpx.AsyncClient]:
    config = ServeConfig(model=ModelConfig(dtype="float32", num_threads=1, reducers=ReducerPolicy(**policy)))
    runtime = build_local_runtime(config)
    return runtime, httpx.AsyncClient(
        transport=httpx.ASGITransport(app=create_app(runtime, config)), base_url="http://127.0.0.1"
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("on_error", ["fail", "keep_all"])
async def test_a_fault_is_an_error_or_a_counted_flag(failing, ask, image_url, on_error, stream) -> None:
    runtime, client = serving(on_error=on_error)
    content = [{"type": "image_url", "image_url": {"url": image_url}}]
    try:
        body = ask(content, vision={"reducer": "fastv"}, max_tokens=2, stream=stream)
        response = await client.post(PATH, json=body)
        metrics = (await client.get("/metrics")).text
    finally:
        await client.aclose()
        runtime.close()
    assert "secret" not in response.text
    if on_error == "fail":
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (500, "reducer_fault")
        assert error["message"] == "fastv: failed at layer 2: RuntimeError"
        return
    assert response.status_code == 200
    answer = json.loads(response.text.split("\n\n")[-3].removeprefix("data: ") if stream else response.text)
    assert answer["vision"]["reducer_faults"] == ["fastv: failed at layer 2: RuntimeError"]
    assert answer["vision"]["visual_tokens_kept"] == answer["vision"]["visual_tokens_in"]
    assert 'mm:reducer_faults_total{model_name="tiny",reducer="fastv"} 1.0' in metrics


async def test_limits_and_positions_of_a_request(ask, image_url) -> None:
    runtime, client = serving(allowed=("uniform",), min_keep_ratio=0.2)
    content = [{"type": "image_url", "image_url": {"url": image_url}}]

    async def error_of(**vision: Any) -> tuple[int, str, str]:
        response = await client.post(PATH, json=ask(content, vision=vision, max_tokens=1))
        error = response.json().get("error", {})
        return response.status_code, error.get("code", ""), error.get("param", "")

    try:
        assert await error_of(reducer="fastv") == (400, "reducer_not_allowed", "vision.reducer")
        assert await error_of(reducer="uniform", keep_ratio=0.1) == (400, "reducer_not_allowed", "vision.reducer")
        assert await error_of(positions="dense") == (400, "invalid_value", "vision.positions")
        assert await error_of(reducer="uniform", positions="compact") == (200, "", "")
    finally:
        await client.aclose()
        runtime.close()


@pytest.mark.parametrize("path", [PATH, "/v1/embeddings"])
async def test_a_ratio_without_a_reducer_reduces(ask, image_url, path) -> None:
    runtime, client = serving()
    body = ask([{"type": "image_url", "image_url": {"url": image_url}}], vision={"keep_ratio": 0.25})
    try:
        response = await client.post(path, json=body | ({"max_tokens": 1} if path == PATH else {}))
    finally:
        await client.aclose()
        runtime.close()
    vision = response.json()["vision"]
    assert vision["reducer"] == reducer_spec("divprune:keep_ratio=0.25").canonical
    assert 4 * vision["visual_tokens_kept"] == vision["visual_tokens_in"]
