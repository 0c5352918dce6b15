"""From a sequence's hidden states to the inputs of a feature drafter, in serving as in training.

An input pairs a state of the target with the token after it. Visual tokens go through a vision adapter instead, see
`mm.engine.spec_decode.drafters.eagle.vision_adapters`. An item is a run of adjacent visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.eagle.vision_adapters import VisualContext


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """States of the target with the text tokens after them.

    Attributes:
        states: (T, F).
        token_ids: (T,) int64, the token after each state.
        positions: (T,) int64, one before the token's.
        items: (T,) int64, the item before the token, and -1 before the first item.
    """

    states: Tensor
    token_ids: Tensor
    positions: Tensor
    items: Tensor


def prompt_features(prompt: Prompt, generated_ids: Tensor, tokens: Tensor, states: Tensor) -> TextFeatures:
    """Features of a prompt's text, and of tokens that were generated after it.

    Where a reducer dropped the token before a text token, the nearest earlier token that was kept takes its place: its
    state carries what the target saw. Text tokens are left out where the token before is text without a state.

    Args:
        generated_ids: (k,) int64. The state of the token before each is in `states`.
        tokens: (r,) int64, ascending indices of the tokens that the states are of.
        states: (r, F).
    """
    device = states.device
    length, num_generated = prompt.length, len(generated_ids)
    is_visual = torch.cat([prompt.is_visual.to(device), torch.zeros(num_generated, dtype=torch.bool, device=device)])
    token_ids = torch.cat([prompt.token_ids.to(device), generated_ids.to(device)])
    following = torch.arange(prompt.next_position, prompt.next_position + num_generated, device=device)
    positions = torch.cat([prompt.positions.amax(0).to(device), following])
    text = (~is_visual).nonzero().squeeze(1)
    tokens = tokens.to(device)
    source = torch.searchsorted(tokens, text - 1, right=True) - 1
    text, source = text[source >= 0], source[source >= 0]
    num_visual = is_visual.long().cumsum(0)
    is_near = num_visual[text - 1] - num_visual[tokens[source]] == text - 1 - tokens[source]
    text, source = text[is_near], source[is_near]
    assert not num_generated or int(text[-1]) == length + num_generated - 1
    return TextFeatures(
        states=states[source],
        token_ids=token_ids[text],
        positions=positions[text] - 1,
        items=item_of(is_visual)[text],
    )


def item_of(is_visual: Tensor) -> Tensor:
    """(n,) int64: for each token the run of visual tokens that it is in or after, and -1 before the first."""
    starts = is_visual.clone()
    starts[1:] &= ~is_visual[:-1]
    return starts.long().cumsum(0) - 1


def generated_features(prompt: Prompt, token_ids: Tensor, tokens: Tensor, states: Tensor, item: int) -> TextFeatures:
    """Features of tokens that a later step generated.

    Args:
        token_ids, tokens, states: (k,), (k,) and (k, F): token i follows the token with index `tokens[i]`.
        item: The last item of the prompt.
    """
    tokens = tokens.to(states.device)
    return TextFeatures(
        states=states,
        token_ids=token_ids.to(states.device),
        positions=prompt.next_position + tokens - prompt.length,
        items=torch.full_like(tokens, item),
    )


def visual_context(prompt: Prompt, tokens: Tensor, last: Tensor | None) -> VisualContext:
    """A prompt's visual tokens, with the target's last hidden states where they are known.

    Args:
        tokens: (r,) int64, indices of the tokens with known states.
        last: (r, D), their last hidden states.
    """
    visual = prompt.is_visual.nonzero().squeeze(1)
    embeddings = prompt.embeddings[visual]
    features, question = None, embeddings[:0]
    if last is not None:
        tokens = tokens.to(last.device)
        features = last.new_full((prompt.length, last.shape[1]), torch.nan)
        features[tokens] = last
        features = features[visual]
        question = last[tokens > (int(visual[-1]) if len(visual) else -1)]
    return VisualContext(
        embeddings=embeddings,
        positions=prompt.positions.amax(0)[visual],
        items=item_of(prompt.is_visual)[visual],
        question=question,
        features=features,
    )
