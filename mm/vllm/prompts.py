"""From a spliced prompt to what vLLM takes: its text as token ids, its visual tokens as embeddings.

Two forms. Where positions are a line, vLLM gets the whole prompt, and for visual tokens the encoder's embeddings in
place of ids (`prompt_embeds` with `prompt_is_token_ids`). It numbers such a prompt 0, 1, 2, ... whatever it is: with
M-RoPE too, where a picture's tokens would silently lose their places. So families with M-RoPE that vLLM knows give each
item apart, with its grid (`multi_modal_data`), and vLLM computes positions from the grids itself. Both forms are
checked here against the positions that the family computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from mm.data.arrays import ints
from mm.data.tokens import Encoded, Prompt, VisualTokens
from mm.engine.interface import USE_NATIVE
from mm.errors import InvalidRequest

WHERE = "vision.positions"


class VllmPrompt(TypedDict, total=False):
    """The keys of vLLM's `TokensPrompt` and `EmbedsPrompt` that are used here."""

    prompt_token_ids: list[int]
    prompt_embeds: Tensor
    prompt_is_token_ids: list[bool]
    multi_modal_data: dict[str, Any]
    cache_salt: str


def in_line(prompt: Prompt, dtype: torch.dtype) -> VllmPrompt:
    """The whole prompt, its visual tokens as embeddings.

    Args:
        prompt: With positions 0, 1, 2, ...
        dtype: Of vLLM's model.

    Raises:
        InvalidRequest: Its positions are others, or it needs more than embeddings.
    """
    _check_plain(prompt)
    line = torch.arange(prompt.length).expand(len(prompt.positions), -1)
    if not torch.equal(prompt.positions.cpu(), line) or prompt.next_position != prompt.length:
        raise InvalidRequest(
            "the engine vllm numbers the tokens of a prompt 0, 1, 2, ..., and this prompt has other positions; send "
            f'vision.positions = "compact" or leave it out, or {USE_NATIVE}',
            WHERE,
        )
    found = VllmPrompt(prompt_token_ids=ints(prompt.token_ids))
    if prompt.is_visual.any():
        found["prompt_embeds"] = prompt.embeddings.to("cpu", dtype)
        found["prompt_is_token_ids"] = [not one for one in ints(prompt.is_visual)]
    return found


def with_grids(prompt: Prompt, media: Sequence[Encoded], merge: int, dtype: torch.dtype) -> VllmPrompt:
    """The prompt with one placeholder per item, and the items with their grids.

    Args:
        merge: Patches of the tower along each side of a visual token: grids count patches there.
        dtype: Of vLLM's model.

    Raises:
        InvalidRequest: An item was reduced, or vLLM would place a token elsewhere.
    """
    _check_plain(prompt)
    items = [item.tokens for item in media]
    for tokens in items:
        if ints(tokens.indices) != list(range(tokens.num_tokens_in)):
            raise InvalidRequest(
                "the engine vllm places this model's visual tokens by whole grids in time, height and width, and "
                f"{tokens.num_tokens} of {tokens.num_tokens_in} are left; name no reducer and no budget, or "
                f"{USE_NATIVE}",
                "vision.reducer",
            )
    if not torch.equal(prompt.positions.cpu(), positions_from_grids(prompt, items)):
        raise InvalidRequest(
            "the engine vllm would place visual tokens of this request elsewhere in time, or the text after them (a "
            "clip of Qwen2.5-VL, whose positions follow its seconds, or text_after_clip longer_side); "
            f"{USE_NATIVE}",
            "messages",
        )
    found = VllmPrompt(prompt_token_ids=[int(prompt.token_ids[i]) for i in _collapsed(prompt, items)])
    data: dict[str, Any] = {}
    for kind in ("image", "video"):
        of_kind = [tokens for tokens in items if tokens.kind == kind]
        if of_kind:
            grids = [(t, h * merge, w * merge) for t, h, w in (tokens.grid for tokens in of_kind)]
            data[kind] = {
                f"{kind}_embeds": torch.cat([tokens.embeddings.to("cpu", dtype) for tokens in of_kind]),
                f"{kind}_grid_thw": torch.tensor(grids),
            }
    if data:
        found["multi_modal_data"] = data
    return found


def positions_from_grids(prompt: Prompt, items: Sequence[VisualTokens]) -> Tensor:
    """(3, L): where vLLM places the tokens of a prompt by the items' grids, in steps of 1 along each axis.

    After text and after each item, positions go on behind the highest one so far.
    """
    runs, start, at = list[Tensor](), 0, 0
    grids = iter(items)
    visual = prompt.is_visual.cpu()
    while at < prompt.length:
        if visual[at]:
            axes = [torch.arange(n) for n in next(grids).grid]
            run = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
        else:
            rest = visual[at:].nonzero()
            run = torch.arange(int(rest[0]) if len(rest) else prompt.length - at).expand(3, -1)
        runs.append(run + start)
        start, at = int(runs[-1].max()) + 1, at + run.shape[1]
    return torch.cat(runs, dim=1)


def _collapsed(prompt: Prompt, items: Sequence[VisualTokens]) -> list[int]:
    """Indices of the prompt's tokens with only the first of each item's: vLLM repeats it itself."""
    visual = ints(prompt.is_visual.nonzero().flatten())
    firsts, at = set[int](), 0
    for tokens in items:
        firsts.add(visual[at])
        at += tokens.num_tokens
    dropped = set(visual) - firsts
    return [i for i in range(prompt.length) if i not in dropped]


def _check_plain(prompt: Prompt) -> None:
    if prompt.layer_planes is not None:
        raise InvalidRequest(
            f"the engine vllm takes no further planes of visual tokens, which this model's layers add; {USE_NATIVE}",
            "messages",
        )
    if prompt.mask is not None:
        raise InvalidRequest(
            "in this model, tokens of a prompt attend to later ones, which the engine vllm does not do with "
            f"embeddings; {USE_NATIVE}",
            "messages",
        )
