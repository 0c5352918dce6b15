"""`POST /v1/responses` through OpenAI's own client, unchanged, and by hand."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

TEXT = "A red circle✓."


@pytest.fixture
async def sdk(client) -> AsyncIterator[openai.AsyncOpenAI]:
    http = httpx.AsyncClient(transport=client._transport, base_url="http://127.0.0.1")
    async with openai.AsyncOpenAI(
        api_key="none", base_url="http://127.0.0.1/v1", http_client=http, max_retries=0
    ) as sdk:
        yield sdk


async def test_a_text_is_answered(sdk, engine) -> None:
    answer = await sdk.responses.create(model="tiny", instructions="Be short.", input="Hello", max_output_tokens=9)
    assert (answer.output_text, answer.status, answer.model) == (TEXT, "completed", "tiny")
    assert (answer.usage.output_tokens, answer.usage.total_tokens) == (5, answer.usage.input_tokens + 5)
    request = engine.requests[-1]
    assert [(message.role, message.parts[0].text) for message in request.messages] == [
        ("system", "Be short."),
        ("user", "Hello"),
    ]
    assert request.sampling.max_new_tokens == 9


async def test_a_picture_and_earlier_turns_are_read(sdk, engine, image_url) -> None:
    first = await sdk.responses.create(model="tiny", input="Hello")
    parts = [{"type": "input_text", "text": "?"}, {"type": "input_image", "image_url": image_url, "detail": "auto"}]
    turns = [
        {"role": "user", "content": "Hello"},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"role": "user", "content": parts},
    ]
    vision = {"vision": {"reducer": "divprune:keep_ratio=0.25"}}
    answer = await sdk.responses.create(model="tiny", input=turns, extra_body=vision)
    assert answer.model_extra["vision"]["visual_tokens_kept"] == 2
    request = engine.requests[-1]
    assert [message.role for message in request.messages] == ["user", "assistant", "user"]
    assert request.messages[1].parts[0].text == TEXT
    assert request.vision.reducer == "divprune:keep_ratio=0.25"
    assert len(request.media) == 1


async def test_a_stream_has_the_events_of_the_api_in_their_order(sdk) -> None:
    events = [event async for event in await sdk.responses.create(model="tiny", input="Hello", stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    assert events[-1].response.output_text == TEXT
    assert events[-1].response.usage.output_tokens == 5


async def test_whole_and_streamed_are_the_same_response(sdk) -> None:
    whole = await sdk.responses.create(model="tiny", input="Hello", temperature=0.5)
    async with sdk.responses.stream(model="tiny", input="Hello", temperature=0.5) as stream:
        streamed = await stream.get_final_response()
    apart = {"id", "created_at", "output", "parallel_tool_calls"}
    assert streamed.model_dump(exclude=apart) == whole.model_dump(exclude=apart)
    assert streamed.output_text == whole.output_text


async def test_every_object_has_the_fields_that_the_client_declares(client) -> None:
    body = {"model": "tiny", "input": "Hello"}
    answer = (await client.post("/v1/responses", json=body)).json()
    TypeAdapter(Response).validate_python(answer)
    events = (await client.post("/v1/responses", json=body | {"stream": True})).text
    event_type = TypeAdapter(ResponseStreamEvent)
    for event in events.strip().split("\n\n"):
        name, data = event.split("\n", 1)
        assert event_type.validate_json(data.removeprefix("data: ")).type == name.removeprefix("event: ")


async def test_a_cut_answer_is_incomplete(client, engine) -> None:
    engine.finish_reason = "length"
    answer = (await client.post("/v1/responses", json={"model": "tiny", "input": "Hello"})).json()
    assert answer["status"] == answer["output"][0]["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_schema_becomes_a_response_format(sdk, engine) -> None:
    class Shape(BaseModel):
        color: str

    engine.words = ('{"color"', ': "red"}')
    answer = await sdk.responses.parse(model="tiny", input="Hello", text_format=Shape)
    assert answer.output_parsed == Shape(color="red")
    asked = engine.requests[-1].sampling.response_format
    assert json.loads(asked.schema)["properties"] == {"color": {"title": "Color", "type": "string"}}


async def test_an_error_in_the_middle_ends_the_stream_with_a_failed_response(sdk, engine) -> None:
    engine.error, engine.error_after = ValueError("x"), 2
    events = [event async for event in await sdk.responses.create(model="tiny", input="Hello", stream=True)]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.code == "server_error"


async def test_fields_without_an_effect_are_named_and_nothing_is_stored(client) -> None:
    body = {"model": "tiny", "input": "Hello", "store": True, "user": "me", "metadata": {"a": "b"}}
    response = await client.post("/v1/responses", json=body)
    assert response.headers["x-mm-ignored-fields"] == "metadata, store, user"
    assert (response.json()["store"], response.json()["metadata"]) == (False, {"a": "b"})


async def test_a_misspelt_field_is_answered_with_the_nearest(client) -> None:
    response = await client.post("/v1/responses", json={"model": "tiny", "input": "Hello", "max_output_token": 3})
    assert "did you mean 'max_output_tokens'" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": ["user"], "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": ["x"]}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]}, "input[0].content[0]"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"instructions": ["x"]}, "instructions"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"fromat": {"type": "text"}}}, "text.fromat"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"temprature": 1}, "temprature"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
async def test_what_is_not_served_is_refused_by_name(client, change, param) -> None:
    response = await client.post("/v1/responses", json={"model": "tiny", "input": "Hello"} | change)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
