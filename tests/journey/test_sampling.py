"""Sampling fields and forms of answers, over HTTP and from Python, with the model we ship."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from enum import Enum
from typing import Any

import httpx
import openai
import pydantic
import pytest
import pytest_asyncio

import mm
from mm.errors import InvalidRequest
from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.stages import build_local_runtime
from tests.mm.engine.sampling.test_openai_models import CASES as OPENAI_MODELS

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shipped() -> AsyncIterator[httpx.AsyncClient]:
    runtime = build_local_runtime(ServeConfig())
    transport = httpx.ASGITransport(app=create_app(runtime, ServeConfig()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        yield client
    runtime.close()


@pytest.fixture
def sdk(shipped: httpx.AsyncClient) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="none", base_url="http://127.0.0.1/v1", http_client=shipped, max_retries=0)


@pytest.fixture(scope="module")
def model() -> mm.Model:
    return mm.load("tiny")


MESSAGES: Any = [{"role": "user", "content": "What colour is the circle?"}]


async def post(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0} | fields
    return await client.post("/v1/chat/completions", json=body)


async def text_of(client: httpx.AsyncClient, **fields: Any) -> str:
    response = await post(client, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


async def test_logprobs_cover_the_answer(sdk) -> None:
    answer = await sdk.chat.completions.create(
        model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=3, temperature=0, max_tokens=12
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert bytes(b for token in content for b in token.bytes or ()).decode() == answer.choices[0].message.content
    for token in content:
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == token.logprob <= 0


async def test_streamed_logprobs_are_those_of_the_whole_answer(sdk) -> None:
    options = {"model": "tiny", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2, "seed": 4, "max_tokens": 12}
    whole = await sdk.chat.completions.create(**options, temperature=1, n=2, stop=["zzz"])
    stream = await sdk.chat.completions.create(**options, temperature=1, n=2, stop=["zzz"], stream=True)
    pieces: dict[int, list[Any]] = {0: [], 1: []}
    async for chunk in stream:
        for choice in chunk.choices:
            if choice.logprobs:
                pieces[choice.index] += choice.logprobs.content
    assert [pieces[choice.index] for choice in whole.choices] == [c.logprobs.content for c in whole.choices]


async def test_without_logprobs_there_are_none(shipped) -> None:
    assert (await post(shipped)).json()["choices"][0]["logprobs"] is None


async def test_bias_penalties_and_truncation_change_the_answer_as_they_say(shipped, model) -> None:
    plain = await text_of(shipped)
    first = model.generate("What colour is the circle?", max_new_tokens=1, temperature=0).token_ids[0][0]
    banned = (await post(shipped, logit_bias={str(first): -100}, logprobs=True)).json()["choices"][0]
    word = model.engine.inputs.vocabulary.text_of(first)
    assert all(token["token"] != word for token in banned["logprobs"]["content"])
    assert await text_of(shipped, temperature=2, top_k=1) == plain
    assert await text_of(shipped, temperature=2, min_p=1) == plain
    counts = []
    for penalty in (0, 2):
        answer = await post(shipped, ignore_eos=True, max_tokens=60, frequency_penalty=penalty, logprobs=True)
        tokens = [token["token"] for token in answer.json()["choices"][0]["logprobs"]["content"]]
        counts.append(max(tokens.count(token) for token in tokens))
    assert counts[1] < counts[0]


async def test_min_tokens_holds_off_the_end_and_stop_strings(shipped, model) -> None:
    (eos,) = model.engine.family.eos_token_ids
    for min_tokens in (0, 7):
        usage = (await post(shipped, logit_bias={str(eos): 100}, min_tokens=min_tokens)).json()["usage"]
        assert usage["completion_tokens"] == min_tokens + 1
    endless = {"logit_bias": {str(eos): -100}, "max_tokens": 20}
    text = await text_of(shipped, **endless)
    stopped = (await post(shipped, stop=[text[1:3]], **endless)).json()
    assert stopped["choices"][0]["message"]["content"] == text[: text.index(text[1:3])]
    assert stopped["usage"]["completion_tokens"] < 8
    held = (await post(shipped, stop=[text[1:3]], min_tokens=8, **endless)).json()
    assert held["usage"]["completion_tokens"] >= 8
    assert held["choices"][0]["message"]["content"].startswith(text[:3])


async def test_stop_token_ids_end_an_answer_without_their_text(shipped, model) -> None:
    free = model.generate(MESSAGES[0]["content"], max_new_tokens=12, temperature=0, ignore_eos=True).token_ids[0]
    last = next(i for i, token_id in enumerate(free) if i and token_id not in free[:i])
    answer = (await post(shipped, stop_token_ids=[free[last]], ignore_eos=True)).json()
    assert answer["usage"]["completion_tokens"] == last + 1
    assert answer["choices"][0]["finish_reason"] == "stop"
    before = await text_of(shipped, max_tokens=last, ignore_eos=True)
    assert answer["choices"][0]["message"]["content"] == before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("field", [{"logit_bias": {"99999": 1}}, {"stop_token_ids": [99999]}])
async def test_ids_outside_the_vocabulary_are_named(shipped, field, stream) -> None:
    response = await post(shipped, stream=stream, **field)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == next(iter(field))
    assert "99999" in error["message"]


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


BAD_SCHEMAS: dict[str, tuple[Any, str]] = {
    "no such type": ({"type": "objec"}, "objec"),
    "broken pattern": ({"type": "string", "pattern": "(a"}, "regex"),
    "unsatisfiable": ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    "missing reference": ({"$ref": "#/$defs/none"}, "/$defs/none"),
    "remote reference": ({"$ref": "http://127.0.0.1/schema"}, "127.0.0.1"),
}


@pytest.mark.parametrize(("schema", "reason"), BAD_SCHEMAS.values(), ids=BAD_SCHEMAS.keys())
async def test_schemas_that_cannot_be_used_are_refused_with_the_reason(shipped, schema, reason) -> None:
    response = await post(shipped, response_format=schema_format(schema))
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "response_format.json_schema.schema"
    assert reason in error["message"]
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 500


async def test_json_object_is_json(shipped) -> None:
    fields = {"response_format": {"type": "json_object"}, "temperature": 1, "max_tokens": 400}
    for seed in range(5):
        choice = (await post(shipped, seed=seed, **fields)).json()["choices"][0]
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
        else:
            assert choice["message"]["content"].startswith("{")


class Colour(Enum):
    red = "red"
    green = "green"


class Thing(pydantic.BaseModel):
    colour: Colour
    big: bool


class Scene(pydantic.BaseModel):
    things: list[Thing] = pydantic.Field(min_length=1, max_length=2)
    note: str = pydantic.Field(max_length=12)


async def test_the_client_parses_into_its_own_model(sdk) -> None:
    answer = await sdk.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Scene, temperature=1, seed=3, max_tokens=500
    )
    scene = answer.choices[0].message.parsed
    assert isinstance(scene, Scene)
    assert 1 <= len(scene.things) <= 2


@pytest.mark.parametrize("form", OPENAI_MODELS, ids=lambda form: form.__name__)
async def test_the_client_parses_every_model_that_its_documentation_shows(shipped, sdk, form) -> None:
    """Through the grammar of the real engine; quotes and brackets are likelier, so that texts and lists end soon."""
    biases = dict.fromkeys(await _ids(shipped, '"'), 8) | dict.fromkeys(await _ids(shipped, "]", "}"), 14)
    options = {"model": "tiny", "temperature": 1, "max_tokens": 200, "logit_bias": biases}
    chat = await sdk.chat.completions.parse(messages=MESSAGES, response_format=form, seed=1, **options)
    assert isinstance(chat.choices[0].message.parsed, form)
    async with sdk.chat.completions.stream(messages=MESSAGES, response_format=form, seed=1, **options) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.parsed == chat.choices[0].message.parsed
    answer = await sdk.responses.parse(
        model="tiny",
        input=MESSAGES,
        text_format=form,
        temperature=1,
        max_output_tokens=200,
        extra_body={"logit_bias": biases, "seed": 1},
    )
    assert answer.output_parsed == chat.choices[0].message.parsed


async def _ids(client: httpx.AsyncClient, *texts: str) -> list[str]:
    """Tokens of texts, as keys of a logit_bias."""
    every = [await client.post("/tokenize", json={"model": "tiny", "prompt": text}) for text in texts]
    return sorted({str(token) for one in every for token in one.json()["tokens"]})


async def test_a_form_cut_by_the_limit_says_length(shipped) -> None:
    choice = (await post(shipped, response_format=schema_format({"type": "array"}), max_tokens=1)).json()["choices"][0]
    assert choice["finish_reason"] == "length"


async def test_python_takes_the_same_options(model) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    answer = model.generate(
        "?", max_new_tokens=100, temperature=1, seed=1, n=2, response_format=schema_format(schema), logprobs=True
    )
    assert all(json.loads(text)["n"] in (1, 2) for text in answer.texts)
    assert [len(reported) for reported in answer.logprobs] == [len(ids) for ids in answer.token_ids]
    assert [[t.token_id for t in reported] for reported in answer.logprobs] == [list(ids) for ids in answer.token_ids]
    assert model.generate("?", max_new_tokens=2).logprobs == ()
    with pytest.raises(InvalidRequest, match=r"top_k was 1\.5"):
        model.generate("?", top_k=1.5)
    with pytest.raises(InvalidRequest, match="99999"):
        model.generate("?", logit_bias={99999: 1})
