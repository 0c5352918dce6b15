"""Calls in an answer's text: what a reader makes of it, however the text is cut, and what a template sees."""

from __future__ import annotations

import json
import random

import pytest

from mm.data.messages import parse_messages
from mm.errors import InvalidRequest
from mm.models.tool_text import written_out
from serve.api.tools import CallReader, Tools, called, message_of, parse_tools

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time.", "strict": True}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CASES = [
    ("auto", "It is noon.", "It is noon.", []),
    ("auto", f"I look. {CALL}", "I look. ", [("weather", {"city": "Rome"})]),
    (
        "auto",
        f"{CALL}\n{CALL.replace('weather', 'clock')}",
        None,
        [("weather", {"city": "Rome"}), ("clock", {"city": "Rome"})],
    ),
    (
        "auto",
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        [],
    ),
    ("auto", "a < b and <tool", "a < b and <tool", []),
    ("auto", '<tool_call>{"name": "clock", "arguments": {}}', None, [("clock", {})]),
    ("named", '{"city": "Rome"}', None, [("weather", {"city": "Rome"})]),
    ("required", '{"name":"weather", "arguments" : {"a": {"b": "}"}}}', None, [("weather", {"a": {"b": "}"}})]),
    ("required", '{"name": "clock", "arguments": {}}', None, [("clock", {})]),
]


@pytest.mark.parametrize(("mode", "text", "content", "calls"), CASES)
@pytest.mark.parametrize("seed", range(4))
def test_a_text_is_read_the_same_however_it_is_cut(mode, text, content, calls, seed) -> None:
    tools = Tools(declared=(WEATHER, CLOCK), mode=mode, name="weather" if mode == "named" else "")
    reader, chance = CallReader(tools=tools), random.Random(seed)
    pieces, rest = [], text
    while rest:
        size = chance.randint(1, 6) if seed else len(rest)
        pieces += reader.feed(rest[:size])
        rest = rest[size:]
    message = message_of([*pieces, *reader.finish()])
    assert message["content"] == content
    made = [call["function"] for call in message.get("tool_calls", [])]
    assert [(call["name"], json.loads(call["arguments"])) for call in made] == calls
    assert called(tools, text, "stop")[1] == ("tool_calls" if calls and mode != "named" else "stop")


def test_a_required_call_has_the_schema_of_one_of_the_tools() -> None:
    import jsonschema

    parameters = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/place"}},
        "required": ["at"],
        "$defs": {"place": {"type": "string"}},
    }
    tool = {"type": "function", "function": {"name": "go", "parameters": parameters}}
    tools, declared = parse_tools([tool, CLOCK], "required")
    assert tools is not None
    assert declared[1]["function"] == {"name": "clock", "description": "The time."}
    schema = (tools.response_format or {})["json_schema"]["schema"]
    jsonschema.validate({"name": "go", "arguments": {"at": "x"}}, schema)
    jsonschema.validate({"name": "clock", "arguments": {}}, schema)
    for wrong in ({"name": "go", "arguments": {"at": 1}}, {"name": "other", "arguments": {}}, {"name": "go"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(
    ("tools", "choice", "param"),
    [
        ([WEATHER], "sometimes", "tool_choice"),
        ([WEATHER], {"type": "function", "function": {"name": "wether"}}, "tool_choice"),
        ([WEATHER, WEATHER], None, "tools"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "tools[0].function.name"),
        ({}, None, "tools"),
    ],
)
def test_tools_that_cannot_be_used_are_named(tools, choice, param) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_tools(tools, choice)
    assert caught.value.param == param


def test_a_template_without_tools_gets_them_as_text() -> None:
    turns = [
        {"role": "user", "content": "Rome?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"c": 1}'}}],
        },
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    messages, _ = parse_messages(turns)
    texts = ["".join(part.text for part in turn.parts) for turn in written_out(messages)]
    assert texts[1] == '<tool_call>\n{"name": "weather", "arguments": {"c": 1}}\n</tool_call>'
    assert texts[2] == "<tool_response>\nsunny\n</tool_response>"
    assert [turn.role for turn in written_out(messages)] == ["user", "assistant", "user"]
