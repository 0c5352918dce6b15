"""What a drafter observes of a sequence: new tokens, and the hidden states of tokens that it has not observed yet."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from mm.engine.sequence import Sequence
from mm.engine.spec_decode.spec_state import SpecState
from mm.engine.step_result import StepResult
from mm.plugins.drafter import Observation


def observe_prompt(seq: Sequence, spec: SpecState) -> Observation:
    """The prompt and the first token of a sequence that has gone on since, without being observed."""
    rows, hidden = spec.take(stop=seq.num_prompt_tokens)
    spec.num_observed = 1
    return Observation(token_ids=tuple(seq.output.token_ids[:1]), token_indices=rows, hidden=hidden, is_prompt=True)


def observe_step(result: StepResult, spec: SpecState, logits: Tensor) -> Observation:
    """The tokens since the last observation, and what was captured meanwhile.

    Args:
        logits: (n, vocab) of the newest step.
    """
    token_ids = result.seq.output.token_ids
    rows, hidden = spec.take()
    seen = Observation(
        token_ids=tuple(token_ids[spec.num_observed :]),
        token_indices=rows,
        hidden=hidden,
        num_drafted=result.verification.draft.num_tokens,
        num_accepted=result.verification.num_accepted,
        is_prompt=not spec.num_observed,
    )
    spec.num_observed = len(token_ids)
    num_top_ids = spec.drafter.num_top_ids
    return _with_top_ids(seen, result, logits, num_top_ids) if num_top_ids else seen


def _with_top_ids(seen: Observation, result: StepResult, logits: Tensor, num_top_ids: int) -> Observation:
    """Add the largest logits of every verified token, those on the accepted path last."""
    draft, path = result.verification.draft, result.verification.path
    order = [row for row in range(draft.num_tokens + 1) if row not in path] + path
    tokens = (result.root_token_id, *draft.token_ids)
    rows = logits[[result.first_row + row for row in order]]
    return replace(
        seen,
        step_token_ids=tuple(tokens[row] for row in order),
        step_top_ids=rows.topk(min(num_top_ids, rows.shape[1])).indices,
    )
