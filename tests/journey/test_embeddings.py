"""Image embeddings over HTTP: an unmodified OpenAI client against the model we ship."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import pytest_asyncio

from mm.api import build_request
from mm.build import build_encode_parts
from mm.config import MediaLimits, ModelConfig, SourcePolicy
from mm.encode.pipeline import encode
from mm.encode.pooling import mean_embedding
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime

# Paths are allowed in the configuration: over HTTP they have to be refused all the same.
MODEL = ModelConfig(
    dtype="float32", num_threads=1, sources=SourcePolicy(allow_paths=True), limits=MediaLimits(max_images=2)
)
CONFIG = ServeConfig(model=MODEL)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    runtime = build_local_runtime(CONFIG)
    transport = httpx.ASGITransport(app=create_app(runtime, CONFIG))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client
    runtime.close()


@pytest.fixture
async def sdk(http) -> AsyncIterator[openai.AsyncOpenAI]:
    inner = httpx.AsyncClient(transport=http._transport, base_url="http://127.0.0.1")
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://127.0.0.1/v1", http_client=inner, max_retries=0
    ) as sdk:
        yield sdk


def messages(*urls: str, text: str = "") -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def expected(*files: bytes, **options: Any) -> np.ndarray:
    parts = build_encode_parts(MODEL)
    return mean_embedding(encode(build_request("", images=files, **options), parts)).numpy()


def file_in(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("encoding", [None, "float", "base64"])
async def test_the_openai_client_gets_the_mean_of_the_visual_tokens(sdk, image_url, encoding) -> None:
    """Without an encoding the client asks for base64 and decodes it itself."""
    options = {} if encoding is None else {"encoding_format": encoding}
    answer = await sdk.embeddings.create(
        model="tiny", input="", extra_body={"messages": messages(image_url)}, **options
    )
    (item,) = answer.data
    vector = np.frombuffer(base64.b64decode(item.embedding), "<f4") if encoding == "base64" else item.embedding
    assert np.array_equal(np.asarray(vector, np.float32), expected(file_in(image_url)))
    assert (answer.object, answer.model, item.index, item.object) == ("list", "tiny", 0, "embedding")
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == answer.model_extra["vision"]["visual_tokens_in"]


@pytest.mark.asyncio(loop_scope="module")
async def test_the_reducer_of_the_vision_object_acts(http, image_url) -> None:
    vision = {"reducer": "divprune", "keep_ratio": 0.25}
    body = {"model": "tiny", "messages": messages(image_url), "vision": vision, "user": "me"}
    response = await http.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    found = expected(file_in(image_url), **vision)
    assert np.array_equal(np.asarray(answer["data"][0]["embedding"], np.float32), found)
    assert answer["vision"]["visual_tokens_kept"] * 4 == answer["vision"]["visual_tokens_in"]
    assert answer["usage"]["prompt_tokens"] == answer["vision"]["visual_tokens_kept"]
    assert answer["vision"]["reducer"].startswith("divprune:")
    assert response.headers["x-mm-ignored-fields"] == "user"


@pytest.mark.asyncio(loop_scope="module")
async def test_several_items_share_one_vector_and_one_budget(http, image_url) -> None:
    body = {"model": "tiny", "messages": messages(image_url, image_url)}
    response = await http.post("/v1/embeddings", json=body)
    found = np.asarray(response.json()["data"][0]["embedding"], np.float32)
    assert np.array_equal(found, expected(file_in(image_url), file_in(image_url)))
    response = await http.post("/v1/embeddings", json={"model": "tiny", "messages": messages(*[image_url] * 3)})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "media_too_many_items")


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": None, "input": "a text"}, "messages"),
        ({"input": "a text"}, "input"),
        ({"messages": [{"role": "user", "content": "no media"}]}, "messages"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"temperature": 0.5}, "temperature"),
        ({"dimensions": 64}, "dimensions"),
        ({"model": "other"}, "model"),
        ({"vision": {"return_map": True}}, "vision.return_map"),
        ({"vision": {"keep_rato": 0.5}}, "vision.keep_rato"),
        ({"vision": {"reducer": "fastv"}}, "vision.reducer"),
        ({"vision": {"reducer": "divprune + fastv"}}, "vision.reducer"),
        ({"vision": {"reducer": "divprunne"}}, "vision.reducer"),
    ],
)
async def test_what_has_no_meaning_is_refused_by_name(http, image_url, fields, param) -> None:
    body = {"model": "tiny", "messages": messages(image_url)} | fields
    response = await http.post("/v1/embeddings", json=body)
    assert response.status_code in (400, 404), response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/chat/completions"])
@pytest.mark.parametrize("url", ["/etc/passwd", "demos/samples/scene.png", "file:///etc/passwd", "http://127.0.0.1/x"])
async def test_nobody_names_a_path_or_an_address_of_this_machine(http, path, url) -> None:
    response = await http.post(path, json={"model": "tiny", "messages": messages(url)})
    assert response.status_code == 400
    assert response.json()["error"]["code"] in ("media_bad_source", "media_remote_disabled")
    assert response.json()["error"]["param"] == "messages[0].content[0].image_url"


@pytest.mark.asyncio(loop_scope="module")
async def test_a_broken_picture_names_its_part(http) -> None:
    url = "data:image/png;base64," + base64.b64encode(b"broken").decode()
    response = await http.post("/v1/embeddings", json={"model": "tiny", "messages": messages(url)})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "media_undecodable")
    assert response.json()["error"]["param"] == "messages[0].content[0].image_url"


@pytest.mark.asyncio(loop_scope="module")
async def test_files_are_counted_once(http, image_url) -> None:
    def count(text: str) -> float:
        lines = [line for line in text.splitlines() if line.startswith("mm:media_bytes_total")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = count((await http.get("/metrics")).text)
    await http.post("/v1/embeddings", json={"model": "tiny", "messages": messages(image_url)})
    assert count((await http.get("/metrics")).text) - before == len(file_in(image_url))


@pytest.mark.asyncio(loop_scope="module")
async def test_the_schema_describes_the_body(http) -> None:
    schema = (await http.get("/openapi.json")).json()
    body = schema["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["model", "messages"]
    assert {"$ref": "#/components/schemas/EmbeddingVision"} in body["properties"]["vision"]["anyOf"]
    vision = schema["components"]["schemas"]["EmbeddingVision"]["properties"]
    assert sorted(vision) == ["fps", "keep_ratio", "num_frames", "reducer"]
