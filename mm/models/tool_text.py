"""Tools as text, for checkpoints whose chat template knows none.

The form is the one that Hermes and Qwen models are trained on: tools in the system message, a call as JSON between
`<tool_call>` and `</tool_call>`, its result between `<tool_response>` and `</tool_response>`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mm.data.request import Message, TextPart

OPEN, CLOSE = "<tool_call>", "</tool_call>"
HEAD = (
    "You may call functions. These are their signatures, one in each line:\n{tools}\n\n"
    'To call one, answer with {{"name": NAME, "arguments": OBJECT}} between {open} and {close}.'
)


def written_out(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with their tools, calls and results as text. Others come back as they are."""
    if not any(message.fields or message.context or message.role == "tool" for message in messages):
        return messages
    context = json.loads(messages[0].context or "{}")
    turns = [_turn(message) for message in messages]
    if tools := context.get("tools"):
        lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        head = TextPart(text=HEAD.format(tools=lines, open=OPEN, close=CLOSE))
        if turns[0].role == "system":
            turns[0] = replace(turns[0], parts=(*turns[0].parts, TextPart(text="\n\n"), head))
        else:
            turns.insert(0, Message(role="system", parts=(head,)))
    options = context.get("options")
    turns[0] = replace(turns[0], context=json.dumps({"options": options}) if options else "")
    return turns


def _turn(message: Message) -> Message:
    if message.role == "tool":
        parts = (TextPart(text="<tool_response>\n"), *message.parts, TextPart(text="\n</tool_response>"))
        return Message(role="user", parts=parts)
    fields: dict[str, Any] = json.loads(message.fields or "{}")
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in fields.get("tool_calls") or ()]
    text = "\n".join(f"{OPEN}\n{call}\n{CLOSE}" for call in calls)
    return replace(message, parts=(*message.parts, *([TextPart(text=text)] if text else [])), fields="", context="")
