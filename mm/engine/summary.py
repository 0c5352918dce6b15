"""The summary of a request: its token counts, its timings, and which visual tokens were kept."""

from __future__ import annotations

from collections.abc import Sequence

from mm.data.arrays import ints
from mm.data.media import Kind
from mm.data.outputs import KeptMap, Summary, Timings, Usage
from mm.data.tokens import Encoded
from mm.engine.sequence import EngineRequest


def summarise(request: EngineRequest, now: float) -> Summary:
    """The last event of a request.

    Args:
        now: When its last token came, on the clock of `time.perf_counter`.
    """
    assert request.first_scheduled_time is not None
    assert request.first_token_time is not None
    kept = _kept_maps(request)
    timings = Timings(
        load_s=sum(item.timings.load_s for item in request.media),
        encode_s=sum(item.timings.encode_s for item in request.media),
        reduce_s=sum(item.timings.reduce_s for item in request.media),
        queue_s=request.first_scheduled_time - request.arrival_time,
        prefill_s=request.first_token_time - request.first_scheduled_time,
        decode_s=now - request.first_token_time,
    )
    return Summary(
        usage=_usage(request, kept),
        timings=timings,
        kept=kept if request.params.vision.return_map else (),
        reducer=reducer_text(request.reducer, request.media),
        reducer_faults=tuple(dict.fromkeys(request.reducer_faults)),
        kv_bytes=request.kv_bytes,
    )


def reducer_text(reducer: str, media: Sequence[Encoded]) -> str:
    """The reducer that an answer names: the request's, and what its budget in tokens left of the items."""
    names = dict.fromkeys(item.budget_by for item in media if item.num_before_budget)
    if not names:
        return reducer
    before = sum(item.num_before_budget or item.tokens.num_tokens for item in media)
    share = sum(item.tokens.num_tokens for item in media) / before
    budget = f"{' + '.join(names)}:keep_ratio={round(share, 4):g}"
    return budget if reducer == "none" else f"{reducer} + {budget}"


def _usage(request: EngineRequest, kept: Sequence[KeptMap]) -> Usage:
    tokens = [item.tokens for item in request.media]

    def num_in(kind: Kind) -> int:
        return sum(one.num_tokens_in for one in tokens if one.kind == kind)

    def num_in_prompt(kind: Kind) -> int:
        return sum(one.num_tokens for one in tokens if one.kind == kind)

    def num_kept(kind: Kind) -> int:
        return sum(len(item.kept) for item in kept if item.kind == kind)

    return Usage(
        num_prompt_tokens=request.prompt.length,
        num_completion_tokens=request.num_completion_tokens,
        num_cached_tokens=request.num_cached_tokens,
        num_accepted_tokens=request.num_accepted_tokens,
        num_rejected_tokens=request.num_draft_tokens - request.num_accepted_tokens,
        num_drafts=request.num_drafts,
        num_image_tokens_in=num_in("image"),
        num_image_tokens_prompt=num_in_prompt("image"),
        num_image_tokens_kept=num_kept("image"),
        num_video_tokens_in=num_in("video"),
        num_video_tokens_prompt=num_in_prompt("video"),
        num_video_tokens_kept=num_kept("video"),
    )


def _kept_maps(request: EngineRequest) -> tuple[KeptMap, ...]:
    """What is left of each item after the last layer at which tokens were dropped."""
    maps = list[KeptMap]()
    left = None if request.prune_state is None else request.prune_state.origins.cpu()
    first = 0
    for item in request.media:
        tokens, indices = item.tokens, item.tokens.indices.cpu()
        if left is not None:
            indices = indices[left[(left >= first) & (left < first + tokens.num_tokens)] - first]
        first += tokens.num_tokens
        maps.append(KeptMap(kind=tokens.kind, grid=tokens.grid, kept=tuple(ints(indices)), cubes=item.cubes))
    return tuple(maps)
