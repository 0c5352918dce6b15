"""The shipped model behind the whole application: tools, completions, tokens, budgets and the OpenAPI document."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from dataclasses import replace

import openai
import pytest
from PIL import Image, ImageDraw

from serve.api.routes import create_app
from serve.config import ServeConfig
from serve.runtime import ModelInfo
from serve.stages import build_local_runtime

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "report",
            "description": "Report a colour.",
            "parameters": {
                "type": "object",
                "properties": {"color": {"enum": ["red", "blue"]}},
                "required": ["color"],
                "additionalProperties": False,
            },
        },
    }
]
NAMED = {"type": "function", "function": {"name": "report"}}


def picture() -> str:
    image = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(image).ellipse((60, 60, 160, 160), fill="red")
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


@pytest.fixture(scope="module")
def http():
    from fastapi.testclient import TestClient

    config = ServeConfig()
    runtime = build_local_runtime(config)
    with TestClient(create_app(runtime, config), base_url="http://127.0.0.1") as client:
        yield client
    runtime.close()


@pytest.fixture
def client(http):
    return openai.OpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=http)


def ask(text="What color is the circle?", **image):
    return [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": picture(), **image}},
                {"type": "text", "text": text},
            ],
        }
    ]


@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_call_is_enforced_whole_and_streamed(client, choice):
    options = {"model": "tiny", "messages": ask(), "tools": TOOLS, "tool_choice": choice, "temperature": 0}
    whole = client.chat.completions.create(**options).choices[0]
    call = whole.message.tool_calls[0].function
    assert (call.name, whole.message.content) == ("report", None)
    assert json.loads(call.arguments)["color"] in ("red", "blue")
    assert whole.finish_reason == ("stop" if choice == NAMED else "tool_calls")
    deltas = [
        chunk.choices[0].delta for chunk in client.chat.completions.create(**options, stream=True) if chunk.choices
    ]
    parts = [part for delta in deltas for part in delta.tool_calls or ()]
    assert parts[0].function.name == "report"
    assert "".join(part.function.arguments for part in parts) == call.arguments
    assert len(parts) > 2


def test_tools_that_are_not_called_change_nothing_that_is_not_asked_for(client):
    answer = client.chat.completions.create(
        model="tiny", messages=ask(), tools=TOOLS, tool_choice="none", temperature=0
    )
    assert answer.choices[0].message.tool_calls is None
    again = client.chat.completions.create(model="tiny", messages=ask(), tools=TOOLS, temperature=0)
    assert again.choices[0].message.content


@pytest.mark.parametrize("field", ["detail", "max_visual_tokens"])
def test_an_answer_names_what_its_budget_did(http, field):
    body = {"model": "tiny", "messages": ask(**{field: {"detail": "low", "max_visual_tokens": 32}[field]})}
    vision = http.post("/v1/chat/completions", json=body).json()["vision"]
    assert vision["visual_tokens_kept"] in (32, 64)
    assert vision["reducer"] == f"divprune:keep_ratio={vision['visual_tokens_kept'] / 256:g}"
    plain = http.post("/v1/chat/completions", json={"model": "tiny", "messages": ask()}).json()["vision"]
    assert (plain["reducer"], plain["visual_tokens_kept"]) == ("none", 256)


def test_the_size_of_the_cache_is_reported_and_falls_with_the_tokens(http):
    def kv_bytes(**vision):
        body = {"model": "tiny", "messages": ask(), "max_tokens": 2, "vision": {"return_timings": True, **vision}}
        return http.post("/v1/chat/completions", json=body).json()["vision"]["kv_bytes"]

    assert 0 < 2 * kv_bytes(reducer="divprune", keep_ratio=0.25) < kv_bytes(reducer="none")


def test_a_completion_goes_on_after_the_prompt_that_a_template_would_write(http, client):
    """A chat answer and the completion of the same tokens are the same text."""
    messages = [{"role": "user", "content": "What can you do?"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=12)
    ids = http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert len(ids) == chat.usage.prompt_tokens
    text = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    for prompt in (ids, text):
        made = client.completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=12)
        assert made.choices[0].text == chat.choices[0].message.content
        assert made.usage.prompt_tokens == len(ids)
    stream = client.completions.create(model="tiny", prompt=text, temperature=0, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == chat.choices[0].message.content


def test_completions_take_many_prompts_and_tell_probabilities(client):
    made = client.completions.create(model="tiny", prompt=["red", "blue"], max_tokens=3, logprobs=2, temperature=0)
    assert [choice.index for choice in made.choices] == [0, 1]
    for choice in made.choices:
        assert "".join(choice.logprobs.tokens).removesuffix("</s>") == choice.text
        assert all(len(top) in (2, 3) for top in choice.logprobs.top_logprobs)
        assert choice.logprobs.text_offset[0] == 0
    assert made.usage.completion_tokens == sum(len(choice.logprobs.tokens) for choice in made.choices)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ""}, "prompt"),
        ("/v1/completions", {"prompt": [99999999]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "messages": []}, "messages"),
        ("/v1/completions", {"prompt": ["a", "b"], "stream": True}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"messages": "image"}, "messages"),
        ("/detokenize", {"tokens": [99999999]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
    ],
)
def test_what_these_routes_refuse_is_named(http, path, body, param):
    body = {"model": "tiny", **body} | ({"messages": ask()} if body.get("messages") == "image" else {})
    answer = http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_prompt_cannot_hold_a_token_that_stands_for_media(http):
    asked = http.post("/tokenize", json={"prompt": "<image>"})
    made = http.post("/v1/completions", json={"model": "tiny", "prompt": "<image>"})
    for answer in (asked, made):
        assert answer.status_code == 400
        assert "stands for media" in answer.json()["error"]["message"]


def test_fields_of_other_servers_are_carried_out_or_said_to_be_ignored(http):
    schema = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"], "additionalProperties": False}
    for fields in ({"guided_json": schema}, {"structured_outputs": {"json": json.dumps(schema)}}):
        made = http.post("/v1/chat/completions", json={"model": "tiny", "messages": ask(), **fields}).json()
        assert json.loads(made["choices"][0]["message"]["content"]) == {"a": "x"}
    body = {"model": "tiny", "messages": ask(), "reasoning_effort": "low", "service_tier": "auto"}
    answer = http.post("/v1/chat/completions", json=body | {"chat_template_kwargs": {"enable_thinking": False}})
    assert answer.status_code == 200
    assert answer.headers["x-mm-ignored-fields"] == "reasoning_effort, service_tier"


def test_the_document_has_every_status_and_content_type(http):
    document = http.get("/openapi.json").json()
    assert document["paths"]["/v1/chat/completions"]["post"]["responses"].keys() >= {"200", "400", "404", "413", "429"}
    for path, methods in document["paths"].items():
        for operation in methods.values():
            assert all("content" in answer for answer in operation["responses"].values()), path
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["model"]["enum"] == ["tiny"]
    assert body["additionalProperties"] is False


def test_with_keys_the_document_has_a_security_scheme():
    from fastapi.testclient import TestClient

    class Nothing:
        async def info(self):
            return ModelInfo(kinds=(), max_context_tokens=9, num_token_ids=9, default_reducer="none")

    app = create_app(Nothing(), ServeConfig(api_keys=("secret",)))  # type: ignore[arg-type]
    key = {"authorization": "Bearer secret"}
    document = TestClient(app, base_url="http://127.0.0.1").get("/openapi.json", headers=key).json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"]["/health"]["get"]["security"] == []
    assert "401" in document["paths"]["/v1/models"]["get"]["responses"]


def test_both_sides_of_the_page_are_cold_however_often_a_question_is_asked(http):
    pytest.importorskip("gradio")
    from serve.page.asking import ask_all
    from serve.page.cards import Shown
    from serve.page.client import Client
    from serve.page.form import FULL
    from serve.page.launch import serving
    from serve.page.request import Question, Upload

    upload = Upload(name="p.png", mime="image/png", data=base64.b64decode(picture().partition(",")[2]))
    warm = Question(text="What color is the circle?", upload=upload, max_tokens=4)
    questions = [replace(warm, reducer=reducer) for reducer in ("none", "fastv", "none", "fastv")]

    async def all_shown(asked):
        shown = [Shown(side=FULL)] * len(questions)
        return [step async for step in ask_all(asked, "tiny", questions, shown, asyncio.Event())][-1]

    with serving(http.app) as url:
        asked = Client(url)
        for shown in asyncio.run(all_shown(asked)):
            assert shown.reply.num_cached_tokens == 0
            assert shown.reply.timings_s["encode"] > 0
        asked.ask(warm)
        assert asked.ask(warm).num_cached_tokens > 0, "without the salt the second question is not cold"
        asked.close()
