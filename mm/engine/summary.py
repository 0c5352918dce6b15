"""The last event of a request."""

from __future__ import annotations

from collections.abc import Sequence

from mm.data.outputs import KeptMap, Summary, Timings, Usage
from mm.engine.sequence import EngineRequest


def summary(job: EngineRequest, now: float) -> Summary:
    """Of a request whose last token came at `now`."""
    assert job.admitted is not None
    assert job.first_token is not None
    kept = _kept(job)
    timings = Timings(
        load_s=sum(item.timings.load_s for item in job.encoded),
        encode_s=sum(item.timings.encode_s for item in job.encoded),
        reduce_s=sum(item.timings.reduce_s for item in job.encoded),
        queue_s=job.admitted - job.arrived,
        prefill_s=job.first_token - job.admitted,
        decode_s=now - job.first_token,
    )
    shown = kept if job.request.vision.return_map else ()
    return Summary(
        usage=_usage(job, kept),
        timings=timings,
        kept=shown,
        reducer=job.reducer,
        reducer_faults=tuple(dict.fromkeys(job.faults)),
    )


def _usage(job: EngineRequest, kept: Sequence[KeptMap]) -> Usage:
    def count(kind: str, what: str) -> int:
        return sum(getattr(item.tokens, what) for item in job.encoded if item.tokens.kind == kind)

    return Usage(
        num_prompt_tokens=job.prompt.length,
        num_completion_tokens=job.num_completion_tokens,
        num_cached_tokens=job.num_cached_tokens,
        num_accepted_tokens=job.num_accepted_tokens,
        num_rejected_tokens=job.num_drafted_tokens - job.num_accepted_tokens,
        num_drafts=job.num_drafts,
        num_image_tokens_in=count("image", "num_tokens_in"),
        num_image_tokens_prompt=count("image", "num_tokens"),
        num_image_tokens_kept=sum(len(item.kept) for item in kept if item.kind == "image"),
        num_video_tokens_in=count("video", "num_tokens_in"),
        num_video_tokens_prompt=count("video", "num_tokens"),
        num_video_tokens_kept=sum(len(item.kept) for item in kept if item.kind == "video"),
    )


def _kept(job: EngineRequest) -> tuple[KeptMap, ...]:
    """What is left of each item behind the last layer at which tokens were dropped."""
    maps = []
    left = None if job.drops is None else job.drops.origins.cpu()
    first = 0
    for item in job.encoded:
        tokens, indices = item.tokens, item.tokens.indices.cpu()
        if left is not None:
            indices = indices[left[(left >= first) & (left < first + tokens.num_tokens)] - first]
        first += tokens.num_tokens
        maps.append(KeptMap(kind=tokens.kind, grid=tokens.grid, kept=tuple(indices.tolist())))
    return tuple(maps)
