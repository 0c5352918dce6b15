"""Events to OpenAI's JSON: whole answers, chunks and usage. Pure functions; the same bytes wherever they run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mm.data.outputs import Delta, Event, KeptMap, Summary, TokenLogprob, Usage

LEAST_LOGPROB = -9999.0
"""What OpenAI sends for a probability of 0, whose logarithm JSON cannot hold."""


def to_json(value: Any) -> bytes:
    """Compact UTF-8. A lone surrogate, which only an error message could quote, stays an escape."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode(
        "utf-8", "backslashreplace"
    )


@dataclass(frozen=True, kw_only=True)
class Head:
    """What every piece of one answer repeats."""

    request_id: str
    model: str
    created: int

    def fields(self, object_: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.request_id}",
            "object": object_,
            "created": self.created,
            "model": self.model,
        }


def usage_fields(usage: Usage) -> dict[str, Any]:
    """Counts after reduction: what the decoder really saw."""
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


def vision_fields(summary: Summary, *, return_map: bool, return_timings: bool) -> dict[str, Any]:
    """The `vision` object of an answer."""
    fields: dict[str, Any] = {
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
    return fields


def speculation_fields(usage: Usage) -> dict[str, Any]:
    """The `speculation` object of an answer: passes with a draft, and how many tokens one gave, its own included."""
    length = usage.mean_acceptance_length
    return {"drafts": usage.num_drafts, "mean_acceptance_length": length and round(length, 4)}


def pieces(deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    """One choice's text in runs of tokens that were drafted and accepted, and of tokens that were not.

    Text that was held back stands where the token came that made it safe to send.
    """
    runs: list[dict[str, Any]] = []
    for delta in deltas:
        piece = accepted_fields(len(delta.token_ids), delta.num_drafted)
        if runs and bool(runs[-1]["accepted_tokens"]) == bool(delta.num_drafted):
            runs[-1] = {name: runs[-1][name] + value for name, value in {"text": delta.text, **piece}.items()}
        elif delta.text or delta.token_ids:
            runs.append({"text": delta.text, **piece})
    return runs


def accepted_fields(num_tokens: int, num_accepted: int) -> dict[str, int]:
    return {"tokens": num_tokens, "accepted_tokens": num_accepted}


def _kept(item: KeptMap) -> dict[str, Any]:
    return {"kind": item.kind, "grid": list(item.grid), "kept": list(item.kept)}


def logprobs_fields(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """The `logprobs` object of a choice or a chunk: an entry per generated token."""
    return {
        "content": [_logprob(token) | {"top_logprobs": [_logprob(other) for other in token.top]} for token in logprobs],
        "refusal": None,
    }


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    utf8 = None if token.utf8 is None else list(token.utf8)
    return {"token": token.token, "logprob": max(token.logprob, LEAST_LOGPROB), "bytes": utf8}


def completion(
    head: Head, events: Sequence[Event], *, return_map: bool, return_timings: bool, return_accepted: bool = False
) -> dict[str, Any]:
    """The answer to a request that does not stream."""
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
    answer = head.fields("chat.completion") | {
        "choices": [
            {
                "index": choice,
                "message": {"role": "assistant", "content": "".join(texts[choice]), "refusal": None},
                "logprobs": logprobs_fields(logprobs[choice]) if choice in logprobs else None,
                "finish_reason": reasons[choice],
            }
            for choice in sorted(texts)
        ],
        "usage": usage_fields(summary.usage),
        "vision": vision_fields(summary, return_map=return_map, return_timings=return_timings),
    }
    if return_accepted:
        deltas = [event for event in events if isinstance(event, Delta)]
        runs = [pieces([delta for delta in deltas if delta.choice == choice]) for choice in sorted(texts)]
        answer["speculation"] = speculation_fields(summary.usage) | {"pieces": runs}
    return answer


def summary_of(events: Sequence[Event]) -> Summary:
    last = events[-1]
    assert isinstance(last, Summary), "events that end without an error end with their summary"
    return last


def chunk(
    head: Head,
    choice: int,
    delta: dict[str, Any],
    finish_reason: str | None = None,
    logprobs: Sequence[TokenLogprob] = (),
) -> dict[str, Any]:
    """One `chat.completion.chunk`."""
    told = logprobs_fields(logprobs) if logprobs else None
    return head.fields("chat.completion.chunk") | {
        "choices": [{"index": choice, "delta": delta, "logprobs": told, "finish_reason": finish_reason}]
    }
