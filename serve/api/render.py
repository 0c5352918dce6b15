"""Events to OpenAI's JSON: whole completions, chunks and usage. Pure functions: equal events give equal bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mm.data.outputs import Delta, Event, KeptMap, Summary, TokenLogprob, Usage

JsonObject = dict[str, Any]
"""A JSON object."""

LEAST_LOGPROB = -9999.0
"""What OpenAI sends for a probability of 0, whose logarithm JSON cannot hold."""


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8. A lone surrogate, which only an error message can quote, stays an escape."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        "utf-8", "backslashreplace"
    )


@dataclass(frozen=True, kw_only=True)
class ResponseMeta:
    """The fields that every chunk of one response repeats."""

    request_id: str
    model: str
    created: int

    def fields(self, object_: str) -> JsonObject:
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": object_,
            "created": self.created,
            "model": self.model,
        }


def usage_fields(usage: Usage) -> JsonObject:
    """The `usage` object. Prompt tokens are counted after reduction, as the decoder got them."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.num_cached_tokens,
            "image_tokens": usage.num_image_tokens_prompt,
            "video_tokens": usage.num_video_tokens_prompt,
        },
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.num_accepted_tokens,
            "rejected_prediction_tokens": usage.num_rejected_tokens,
        },
    }


def vision_fields(summary: Summary, *, return_map: bool, return_timings: bool) -> JsonObject:
    """The `vision` object of a response."""
    fields: JsonObject = {
        "reducer": summary.reducer,
        "visual_tokens_in": summary.usage.num_visual_tokens_in,
        "visual_tokens_kept": summary.usage.num_visual_tokens_kept,
    }
    if summary.reducer_faults:
        fields["reducer_faults"] = list(summary.reducer_faults)
    if return_map:
        fields["items"] = [_kept(item) for item in summary.kept]
    if return_timings:
        fields["timings"] = {name: round(seconds, 6) for name, seconds in asdict(summary.timings).items()}
        fields["kv_bytes"] = summary.kv_bytes
    return fields


def speculation_fields(usage: Usage) -> JsonObject:
    """The `speculation` object of a response: the steps with a draft, and the tokens of one on average."""
    length = usage.mean_acceptance_length
    return {"drafts": usage.num_drafts, "mean_acceptance_length": length and round(length, 4)}


def pieces(deltas: Sequence[Delta]) -> list[JsonObject]:
    """One choice's text in runs: of tokens that were drafted and accepted, and of tokens that were not.

    Text that was held back belongs to the token after which it could be sent.
    """
    runs: list[JsonObject] = []
    for delta in deltas:
        piece = accepted_fields(len(delta.token_ids), delta.num_drafted)
        if runs and bool(runs[-1]["accepted_tokens"]) == bool(delta.num_drafted):
            runs[-1] = {name: runs[-1][name] + value for name, value in {"text": delta.text, **piece}.items()}
        elif delta.text or delta.token_ids:
            runs.append({"text": delta.text, **piece})
    return runs


def accepted_fields(num_tokens: int, num_accepted: int) -> dict[str, int]:
    return {"tokens": num_tokens, "accepted_tokens": num_accepted}


def _kept(item: KeptMap) -> JsonObject:
    fields: JsonObject = {"kind": item.kind, "grid": list(item.grid), "kept": list(item.kept)}
    return fields | ({"cubes": [asdict(cube) for cube in item.cubes]} if item.cubes else {})


def logprobs_fields(logprobs: Sequence[TokenLogprob]) -> JsonObject:
    """The `logprobs` object of a choice or a chunk: an entry per generated token."""
    return {
        "content": [_logprob(token) | {"top_logprobs": [_logprob(other) for other in token.top]} for token in logprobs],
        "refusal": None,
    }


def _logprob(token: TokenLogprob) -> JsonObject:
    utf8 = None if token.utf8 is None else list(token.utf8)
    return {"token": token.token, "logprob": max(token.logprob, LEAST_LOGPROB), "bytes": utf8}


def completion(
    meta: ResponseMeta,
    events: Sequence[Event],
    *,
    return_map: bool,
    return_timings: bool,
    return_accepted: bool = False,
    message: Callable[[str, str | None], tuple[JsonObject, str | None]] = lambda text, reason: (
        {"role": "assistant", "content": text, "refusal": None},
        reason,
    ),
) -> JsonObject:
    """The `chat.completion` object, for a request that does not stream.

    Args:
        message: The message of a choice and why it ended, given its text and the engine's reason.
    """
    texts: dict[int, list[str]] = {}
    reasons: dict[int, str | None] = {}
    logprobs: dict[int, list[TokenLogprob]] = {}
    for event in events:
        if isinstance(event, Delta):
            texts.setdefault(event.choice, []).append(event.text)
            if event.logprobs:
                logprobs.setdefault(event.choice, []).extend(event.logprobs)
            reasons[event.choice] = event.finish_reason or reasons.get(event.choice)
    summary = summary_of(events)
    shown = {choice: message("".join(texts[choice]), reasons[choice]) for choice in sorted(texts)}
    body = meta.fields("chat.completion") | {
        "choices": [
            {
                "index": choice,
                "message": shown[choice][0],
                "logprobs": logprobs_fields(logprobs[choice]) if choice in logprobs else None,
                "finish_reason": shown[choice][1],
            }
            for choice in sorted(texts)
        ],
        "usage": usage_fields(summary.usage),
        "vision": vision_fields(summary, return_map=return_map, return_timings=return_timings),
    }
    if return_accepted:
        deltas = [event for event in events if isinstance(event, Delta)]
        runs = [pieces([delta for delta in deltas if delta.choice == choice]) for choice in sorted(texts)]
        body["speculation"] = speculation_fields(summary.usage) | {"pieces": runs}
    return body


def summary_of(events: Sequence[Event]) -> Summary:
    last = events[-1]
    assert isinstance(last, Summary), "events that end without an error end with their summary"
    return last


def chunk(
    meta: ResponseMeta,
    choice: int,
    delta: JsonObject,
    finish_reason: str | None = None,
    logprobs: Sequence[TokenLogprob] = (),
) -> JsonObject:
    """One `chat.completion.chunk`."""
    shown = logprobs_fields(logprobs) if logprobs else None
    return meta.fields("chat.completion.chunk") | {
        "choices": [{"index": choice, "delta": delta, "logprobs": shown, "finish_reason": finish_reason}]
    }
