"""From what an engine observes to the rows that a feature drafter reads, in serving as in training.

A row pairs a state of the target with the token that follows it; visual tokens are looked at apart, as
`mm.engine.spec_decode.drafters.eagle.vision_adapters` says. An item is a run of adjacent visual rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.eagle.vision_adapters import VisualContext


@dataclass(frozen=True, kw_only=True)
class FeatureRows:
    """Rows whose token is text.

    Attributes:
        states: (R, F).
        token_ids: (R,) int64, the token behind each state.
        positions: (R,) int64, one before the token's.
        items: (R,) int64, the item before the token, -1 before the first.
    """

    states: Tensor
    token_ids: Tensor
    positions: Tensor
    items: Tensor


def prompt_rows(prompt: Prompt, answer_ids: Tensor, rows: Tensor, states: Tensor) -> FeatureRows:
    """Rows of a prompt and the tokens behind it.

    Where a reducer dropped the row before a text token, the nearest row before it that is left stands in: its state
    carries what the target saw. Tokens whose row before is text without a state are left out.

    Args:
        answer_ids: (k,) int64; the state of the row before each is in `states`.
        rows: (r,) int64, ascending: which rows the states are of.
        states: (r, F).
    """
    device = states.device
    length, num_answer = prompt.length, len(answer_ids)
    is_visual = torch.cat([prompt.is_visual.to(device), torch.zeros(num_answer, dtype=torch.bool, device=device)])
    token_ids = torch.cat([prompt.token_ids.to(device), answer_ids.to(device)])
    behind = torch.arange(prompt.next_position, prompt.next_position + num_answer, device=device)
    positions = torch.cat([prompt.positions.amax(0).to(device), behind])
    text = (~is_visual).nonzero().squeeze(1)
    rows = rows.to(device)
    source = torch.searchsorted(rows, text - 1, right=True) - 1
    text, source = text[source >= 0], source[source >= 0]
    num_visual = is_visual.long().cumsum(0)
    is_near = num_visual[text - 1] - num_visual[rows[source]] == text - 1 - rows[source]
    text, source = text[is_near], source[is_near]
    assert not num_answer or int(text[-1]) == length + num_answer - 1
    return FeatureRows(
        states=states[source],
        token_ids=token_ids[text],
        positions=positions[text] - 1,
        items=item_of(is_visual)[text],
    )


def item_of(is_visual: Tensor) -> Tensor:
    """(n,) int64: of each row, which run of visual rows it is in or behind; -1 before the first."""
    starts = is_visual.clone()
    starts[1:] &= ~is_visual[:-1]
    return starts.long().cumsum(0) - 1


def answer_rows(prompt: Prompt, token_ids: Tensor, rows: Tensor, states: Tensor, item: int) -> FeatureRows:
    """Rows of tokens that a later pass gave.

    Args:
        token_ids, rows, states: (k,), (k,) and (k, F): token i follows row i.
        item: The last item of the prompt.
    """
    rows = rows.to(states.device)
    return FeatureRows(
        states=states,
        token_ids=token_ids.to(states.device),
        positions=prompt.next_position + rows - prompt.length,
        items=torch.full_like(rows, item),
    )


def sight_of(prompt: Prompt, rows: Tensor, last: Tensor | None) -> VisualContext:
    """A prompt's visual tokens, with the target's last hidden states where they are known.

    Args:
        rows: (r,) int64, which rows are known.
        last: (r, D) their states.
    """
    visual = prompt.is_visual.nonzero().squeeze(1)
    embeddings = prompt.embeddings[visual]
    features, question = None, embeddings[:0]
    if last is not None:
        rows = rows.to(last.device)
        features = last.new_full((prompt.length, last.shape[1]), torch.nan)
        features[rows] = last
        features = features[visual]
        question = last[rows > (int(visual[-1]) if len(visual) else -1)]
    return VisualContext(
        embeddings=embeddings,
        positions=prompt.positions.amax(0)[visual],
        items=item_of(prompt.is_visual)[visual],
        question=question,
        features=features,
    )
