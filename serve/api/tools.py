"""OpenAI's function tools: what a request may call, the form that its answer then has, and calls in the answer's text.

A named tool, or a call that is required, is enforced token by token by a JSON schema. With "auto" the model decides:
a call is text between `<tool_call>` and `</tool_call>`, as in `mm.models.tool_text`.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from mm.errors import InvalidRequest, nearest, shown
from mm.models.tool_text import CLOSE, OPEN
from serve.api.render import JsonObject

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ANY_OBJECT: JsonObject = {"type": "object"}
NAMED_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')

Mode = Literal["auto", "required", "named"]


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What a request may call.

    Attributes:
        declared: The tools as they were sent, for the chat template.
        mode: "named" calls the one tool `name`; "required" calls one of them; "auto" leaves it to the model.
    """

    declared: tuple[JsonObject, ...]
    mode: Mode = "auto"
    name: str = ""

    @property
    def names(self) -> list[str]:
        return [tool["function"]["name"] for tool in self.declared]

    @property
    def response_format(self) -> JsonObject | None:
        """The form of the answer, as the field `response_format` has it; None where the model decides."""
        if self.mode == "auto":
            return None
        if self.mode == "named":
            schema = next(_parameters(tool) for tool in self.declared if tool["function"]["name"] == self.name)
        else:
            schema = {"anyOf": [_call_schema(tool, i) for i, tool in enumerate(self.declared)]}
        return {"type": "json_schema", "json_schema": {"name": "call", "schema": schema}}


def _parameters(tool: JsonObject) -> JsonObject:
    return tool["function"].get("parameters") or ANY_OBJECT


def _call_schema(tool: JsonObject, index: int) -> JsonObject:
    """The schema of a call to one of several tools."""
    moved = _moved(_parameters(tool), f"#/anyOf/{index}/properties/arguments")
    properties = {"name": {"const": tool["function"]["name"]}, "arguments": moved}
    required = ["name", "arguments"]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references within itself hold although it now stands at `place`."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    found = {name: _moved(value, place) for name, value in cast(JsonObject, schema).items()}
    reference = found.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        found["$ref"] = f"{place}{reference[1:]}"
    return found


def parse_tools(tools: object, choice: object) -> tuple[Tools | None, tuple[JsonObject, ...]]:
    """What the fields `tools` and `tool_choice` ask for: what may be called, and what the template shows.

    Raises:
        InvalidRequest: Names the field that cannot be used.
    """
    declared = _declared(tools)
    if not declared:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest(f"tool_choice was {shown(choice)}, but there are no tools", "tool_choice")
        return None, ()
    if choice == "none":
        return None, declared
    if choice in (None, "auto"):
        return Tools(declared=declared), declared
    if choice == "required":
        return Tools(declared=declared, mode="required"), declared
    name = _chosen(choice)
    known = [tool["function"]["name"] for tool in declared]
    if name not in known:
        what = f"tool_choice names {shown(name)}, which is none of the tools{nearest(name, known)}"
        raise InvalidRequest(what, "tool_choice")
    return Tools(declared=declared, mode="named", name=name), declared


def _chosen(choice: object) -> str:
    given = cast(Mapping[str, Any], choice) if isinstance(choice, dict) else {}
    function = given.get("function")
    name = cast(Mapping[str, Any], function).get("name") if isinstance(function, dict) else None
    if given.get("type") != "function" or not isinstance(name, str):
        allowed = 'none, auto, required, or {"type": "function", "function": {"name": NAME}}'
        raise InvalidRequest(f"tool_choice was {shown(choice)}; allowed: {allowed}", "tool_choice")
    return name


def _declared(tools: object) -> tuple[JsonObject, ...]:
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise InvalidRequest(f"tools was {shown(tools)}; it has to be a list", "tools")
    given = cast("list[object]", tools)
    if len(given) > MAX_TOOLS:
        raise InvalidRequest(f"there are {len(given)} tools; the limit is {MAX_TOOLS}", "tools")
    found = tuple(_tool(tool, f"tools[{i}]") for i, tool in enumerate(given))
    names = [tool["function"]["name"] for tool in found]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"two tools are called {repeated!r}", "tools")
    return found


def _tool(tool: object, param: str) -> JsonObject:
    given = cast(JsonObject, tool) if isinstance(tool, dict) else {}
    function = given.get("function")
    if given.get("type") != "function" or not isinstance(function, dict):
        raise InvalidRequest("a tool has to be an object of the type function, with a function", param)
    fields = cast(JsonObject, function)
    name, parameters = fields.get("name"), fields.get("parameters")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        what = f"name was {shown(name)}; it has to be 1 to 64 letters, digits, _ or -"
        raise InvalidRequest(what, f"{param}.function.name")
    if not isinstance(parameters, dict | None):
        raise InvalidRequest("parameters has to be a JSON schema object", f"{param}.function.parameters")
    if not isinstance(fields.get("description"), str | None):
        raise InvalidRequest("description has to be a text", f"{param}.function.description")
    kept = {key: value for key, value in fields.items() if value is not None and key != "strict"}
    return {"type": "function", "function": kept}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of an answer: of its text, or of the call with that index. The first part of a call names its tool."""

    text: str
    call: int | None = None
    name: str = ""
    call_id: str = ""


@dataclass(kw_only=True)
class CallReader:
    """Reads the text of one choice as it comes, and tells text from calls."""

    tools: Tools
    held: str = field(default="", init=False)
    num_calls: int = field(default=0, init=False)
    has_begun: bool = field(default=False, init=False)

    def feed(self, text: str) -> list[Piece]:
        """What new text makes certain."""
        self.held += text
        if self.tools.mode == "named":
            return self._arguments(self._opened(self.tools.name) if not self.num_calls else [])
        if self.tools.mode == "required":
            return self._required()
        return self._marked(is_end=False)

    def finish(self) -> list[Piece]:
        """What is left at the end of the text."""
        if self.tools.mode == "auto":
            return self._marked(is_end=True)
        if self.tools.mode == "required" and not self.num_calls and self.held:
            held, self.held = self.held, ""
            return [Piece(text=held)]
        return []

    def _opened(self, name: str) -> list[Piece]:
        self.num_calls += 1
        return [Piece(text="", call=self.num_calls - 1, name=name, call_id=f"call_{uuid.uuid4().hex[:24]}")]

    def _arguments(self, before: list[Piece], keep: str = "") -> list[Piece]:
        """The arguments so far, but for what `keep` matches at their end."""
        self.held = self.held if self.has_begun else self.held.lstrip()
        kept = re.search(keep, self.held) if keep else None
        end = kept.start() if kept else len(self.held)
        text, self.held = self.held[:end], self.held[end:]
        self.has_begun = self.has_begun or bool(text)
        return [*before, *([Piece(text=text, call=self.num_calls - 1)] if text else [])]

    def _required(self) -> list[Piece]:
        opened: list[Piece] = []
        if not self.num_calls:
            found = NAMED_CALL.match(self.held)
            if found is None:
                return []
            self.held = self.held[found.end() :]
            opened = self._opened(json.loads(found[1]))
        return self._arguments(opened, r"\s*\}?\s*$")

    def _marked(self, *, is_end: bool) -> list[Piece]:
        """Text, and the calls in it that are complete."""
        found: list[Piece] = []
        while OPEN in self.held:
            before, _, rest = self.held.partition(OPEN)
            call, closed, after = rest.partition(CLOSE)
            if not closed and not is_end:
                return [*found, *self._text(before, OPEN + rest)]
            pieces = self._call(call) or [Piece(text=OPEN + call + closed)]
            found += [*self._text(before, after), *pieces]
        kept = 0 if is_end else _overlap(self.held, OPEN)
        cut = len(self.held) - kept
        return [*found, *self._text(self.held[:cut], self.held[cut:])]

    def _text(self, text: str, held: str) -> list[Piece]:
        self.held = held
        is_blank = self.num_calls and not text.strip()
        return [Piece(text=text)] if text and not is_blank else []

    def _call(self, text: str) -> list[Piece]:
        """A call to a known tool, or nothing."""
        try:
            call = json.loads(text)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
        except (ValueError, TypeError, KeyError, AttributeError):
            return []
        if name not in self.tools.names:
            return []
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        return [*self._opened(name), Piece(text=arguments, call=self.num_calls - 1)]


def _overlap(text: str, mark: str) -> int:
    """Characters at the end of a text with which a mark may begin."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


def finish_reason(reason: str | None, tools: Tools, num_calls: int) -> str | None:
    """Why a choice with tools ended, as OpenAI has it: a call that the request did not name is a reason of its own."""
    return "tool_calls" if reason == "stop" and num_calls and tools.mode != "named" else reason


def call_fields(pieces: Sequence[Piece]) -> list[JsonObject]:
    """Pieces of calls as the entries of a chunk's `tool_calls`."""
    return [
        {
            "index": piece.call,
            "id": piece.call_id,
            "type": "function",
            "function": {"name": piece.name, "arguments": ""},
        }
        if piece.name
        else {"index": piece.call, "function": {"arguments": piece.text}}
        for piece in pieces
        if piece.call is not None
    ]


def message_of(pieces: Sequence[Piece]) -> JsonObject:
    """The message of a whole answer: its text and its calls."""
    text = "".join(piece.text for piece in pieces if piece.call is None)
    calls: dict[int, JsonObject] = {}
    for piece in pieces:
        if piece.call is None:
            continue
        if piece.name:
            calls[piece.call] = {
                "id": piece.call_id,
                "type": "function",
                "function": {"name": piece.name, "arguments": ""},
            }
        calls[piece.call]["function"]["arguments"] += piece.text
    message: JsonObject = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    return message | ({"tool_calls": list(calls.values())} if calls else {})


def called(tools: Tools, text: str, reason: str | None) -> tuple[JsonObject, str | None]:
    """The message of a whole answer of a request with tools, and why it ended."""
    reader = CallReader(tools=tools)
    pieces = [*reader.feed(text), *reader.finish()]
    return message_of(pieces), finish_reason(reason, tools, reader.num_calls)
