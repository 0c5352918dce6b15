"""`POST /v1/completions`: text that goes on after a prompt, in OpenAI's older form, whole or streamed.

The prompt is the whole prompt: no chat template is applied, and control tokens in it are such. The form becomes that of
a chat request, so that every option means the same there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from mm.data.outputs import Delta, Event, Summary, TokenLogprob, Usage
from mm.data.request import Message, TextPart
from mm.errors import InvalidRequest, shown
from serve.api.errors import ErrorResponse
from serve.api.parse import ChatCall, whole_numbers
from serve.api.render import LEAST_LOGPROB, JsonObject, ResponseMeta, summary_of, usage_fields
from serve.api.stream import DONE, frame

DEFAULT_MAX_TOKENS = 16
"""As in OpenAI's API."""
MAX_LOGPROBS = 20
NOT_TAKEN = frozenset(
    {"messages", "tools", "tool_choice", "chat_template_kwargs", "mm_processor_kwargs", "top_logprobs", "vision"}
)
"""Fields of a chat request that a completion has not."""

Prompt = str | tuple[int, ...]


def prompts_of(body: Any) -> list[Prompt]:
    """The prompts of a request's body: one text, one list of token ids, or a list of either.

    Raises:
        InvalidRequest: It is none of these.
    """
    prompt: object = whole_numbers(body.get("prompt")) if isinstance(body, dict) else None
    if prompt is None:
        raise InvalidRequest("prompt is missing; send a text or a list of token ids", "prompt", "missing_parameter")
    given = cast("list[object]", prompt) if isinstance(prompt, list) else [prompt]
    if given and all(_is_token(item) for item in given):
        return [tuple(cast("list[int]", given))]
    found: list[Prompt] = []
    for item in given:
        ids = cast("list[object]", item) if isinstance(item, list) else []
        if isinstance(item, str) and item:
            found.append(item)
        elif ids and all(_is_token(token) for token in ids):
            found.append(tuple(cast("list[int]", ids)))
        else:
            raise InvalidRequest(f"prompt holds {shown(item)}; it has to be a text or a list of token ids", "prompt")
    if not found:
        raise InvalidRequest("prompt is empty; send a text or a list of token ids", "prompt")
    return found


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def chat_body(body: Any) -> JsonObject:
    """The body of the chat request with the same options; its message stands for any prompt.

    Raises:
        InvalidRequest: A field is not one of a completion, or has another form.
    """
    fields = {name: value for name, value in cast(JsonObject, body).items() if value is not None}
    fields.pop("prompt", None)
    if wrong := next((name for name in fields if name in NOT_TAKEN), None):
        message = f"{wrong} belongs to /v1/chat/completions; a completion has a text or token ids only"
        raise InvalidRequest(message, wrong, "unsupported_parameter")
    for name in ("suffix",):
        if fields.pop(name, None):
            raise InvalidRequest(f"{name} is not supported by this server; leave it out", name, "unsupported_parameter")
    if "logprobs" in fields:
        wanted = whole_numbers(fields.pop("logprobs"))
        if not _is_token(wanted) or wanted > MAX_LOGPROBS:
            what = f"logprobs was {shown(wanted)}; it has to be a whole number of 0 to {MAX_LOGPROBS}"
            raise InvalidRequest(what, "logprobs")
        fields |= {"logprobs": True, "top_logprobs": wanted}
    fields.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
    return fields | {"messages": [{"role": "user", "content": "-"}]}


def with_prompt(call: ChatCall, prompt: Prompt, index: int) -> ChatCall:
    """The call with a whole prompt in place of its messages.

    Args:
        index: Of the prompt in its request; requests of one client have different ids in the engine.
    """
    request_id = f"{call.request.request_id}-{index}" if index else call.request.request_id
    if isinstance(prompt, str):
        message = Message(role="user", parts=(TextPart(text=prompt),), is_prompt=True)
    else:
        message = Message(role="user", parts=(), is_prompt=True, token_ids=prompt)
    return replace(call, request=replace(call.request, request_id=request_id, messages=(message,)))


def whole(meta: ResponseMeta, answers: Sequence[Sequence[Event]]) -> JsonObject:
    """The `text_completion` object.

    Args:
        answers: The events of each prompt.
    """
    choices: list[JsonObject] = []
    for events in answers:
        deltas = [event for event in events if isinstance(event, Delta)]
        for choice in sorted({delta.choice for delta in deltas}):
            own = [delta for delta in deltas if delta.choice == choice]
            logprobs = [token for delta in own for token in delta.logprobs]
            reason = next((delta.finish_reason for delta in reversed(own) if delta.finish_reason), None)
            text = "".join(delta.text for delta in own)
            choices.append(_choice(len(choices), text, reason, logprobs, 0))
    usages = [usage_fields(summary_of(events).usage) for events in answers]
    usage = usages[0] if len(usages) == 1 else _sum(usages)
    return _fields(meta) | {"choices": choices, "usage": usage}


def _sum(usages: Sequence[JsonObject]) -> JsonObject:
    """The usage of several prompts together."""
    first = usages[0]
    return {
        name: _sum([usage[name] for usage in usages]) if isinstance(first[name], dict) else sum(u[name] for u in usages)
        for name in first
    }


def _fields(meta: ResponseMeta) -> JsonObject:
    return meta.fields("text_completion") | {"id": f"cmpl-{meta.request_id}"}


def _choice(index: int, text: str, reason: str | None, logprobs: Sequence[TokenLogprob], offset: int) -> JsonObject:
    shown_logprobs = _logprobs(logprobs, offset) if logprobs else None
    return {"index": index, "text": text, "logprobs": shown_logprobs, "finish_reason": reason}


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> JsonObject:
    """The `logprobs` object in the older form: parallel lists.

    Args:
        offset: Characters of the text before the first token.
    """
    lengths = [len(token.token) if token.utf8 is not None else 0 for token in tokens]
    top = [{one.token: max(one.logprob, LEAST_LOGPROB) for one in (token, *token.top)} for token in tokens]
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
        "top_logprobs": top,
        "text_offset": [offset + before for before in itertools.accumulate([0, *lengths[:-1]])],
    }


@dataclass(kw_only=True)
class CompletionWriter:
    """Writes the events of one request as the frames of a streamed completion."""

    meta: ResponseMeta
    call: ChatCall
    offsets: dict[int, int] = field(default_factory=dict[int, int], init=False)

    def start(self) -> Iterator[bytes]:
        """Nothing: the older form has no first frame."""
        return iter(())

    def frames(self, events: Sequence[Event]) -> Iterator[bytes]:
        for event in events:
            if isinstance(event, Summary):
                if self.call.include_usage:
                    yield self._frame([], event.usage)
            elif event.text or event.logprobs or event.finish_reason:
                offset = self.offsets.get(event.choice, 0)
                self.offsets[event.choice] = offset + len(event.text)
                yield self._frame([_choice(event.choice, event.text, event.finish_reason, event.logprobs, offset)])

    def error(self, error: ErrorResponse) -> bytes:
        return frame(error.body)

    def end(self) -> bytes:
        return DONE

    def _frame(self, choices: list[JsonObject], usage: Usage | None = None) -> bytes:
        body = _fields(self.meta) | {"choices": choices}
        if self.call.include_usage:
            body["usage"] = None if usage is None else usage_fields(usage)
        return frame(body)
