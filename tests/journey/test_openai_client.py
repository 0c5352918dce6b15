"""OpenAI's own client, unchanged, against the application."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import openai
import pytest


@pytest.fixture
async def sdk(client) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(transport=client._transport, base_url="http://127.0.0.1")
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://127.0.0.1/v1", http_client=http, max_retries=0
    ) as sdk:
        yield sdk


MESSAGES = [{"role": "user", "content": "Hello"}]


async def test_answer(sdk) -> None:
    answer = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, n=2, max_completion_tokens=8)
    assert [choice.message.content for choice in answer.choices] == ["A red circle✓."] * 2
    assert answer.usage.total_tokens == 17


async def test_vision_object_travels_as_an_extra_field(sdk, engine, image_url) -> None:
    content = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": image_url}}]
    answer = await sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        extra_body={"vision": {"reducer": "divprune:keep_ratio=0.25", "return_map": True}},
    )
    assert answer.model_extra["vision"]["visual_tokens_kept"] == 2
    assert engine.requests[0].vision.reducer == "divprune:keep_ratio=0.25"


async def test_stream(sdk) -> None:
    stream = await sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "A red circle✓."
    assert chunks[-1].usage.completion_tokens == 5


async def test_stream_helper(sdk) -> None:
    async with sdk.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "A red circle✓."


async def test_models(sdk) -> None:
    assert [model.id async for model in await sdk.models.list()] == ["tiny", "alias/tiny"]
    assert (await sdk.models.retrieve("tiny")).id == "tiny"


async def test_error_classes(sdk, engine, make_client) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        await sdk.chat.completions.create(model="gpt", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES, temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.code == "invalid_value"
    engine.error = ValueError("x")
    with pytest.raises(openai.InternalServerError):
        await sdk.chat.completions.create(model="tiny", messages=MESSAGES)


async def test_error_in_mid_stream_reaches_the_caller(sdk, engine) -> None:
    engine.error, engine.error_after = ValueError("x"), 2
    stream = await sdk.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError, match="could not answer"):
        async for _ in stream:
            pass
