"""Budgets in visual tokens: how many of each item may enter the decoder, known before the tower runs.

`max_visual_tokens` and `detail` count what the encoder's half hands over. A reducer comes first. Where it leaves more
than the budget, the operator's reducer (`ReducerPolicy.budget_by`) keeps exactly as many as may stay. Those that the
request's reducer protects come first. With "native", `mm.encode.lowered` makes fewer tokens before that.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mm.config import ReducerPolicy
from mm.data.media import Kind
from mm.data.quota import quota
from mm.data.request import MediaPart, Request
from mm.data.tokens import Encoded, Grid, VisualTokens
from mm.errors import InvalidOption, InvalidRequest, ReducerNotAllowed
from mm.plugins.apply import apply, reduce_tokens
from mm.plugins.capabilities import ProvidesFeatures, capabilities_of, check_compatible, plans_tokens
from mm.plugins.reducer import Reducer, Reduction, Stage
from mm.plugins.spec import RATIO_REDUCER, build_reducer

NATIVE = "native"
LOW_SHARE = 4
"""An item with detail "low" has at most one token for so many of detail "high"."""


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """What a request asks of its visual tokens.

    Attributes:
        parts: Per item, where it stands in the messages.
        max_visual_tokens: Of all items.
        settled: Per item how many it may have, once that is known.
    """

    parts: tuple[MediaPart, ...] = ()
    max_visual_tokens: int | None = None
    settled: tuple[int, ...] = ()

    @classmethod
    def of(cls, request: Request) -> TokenBudget:
        parts = [part for message in request.messages for part in message.parts if isinstance(part, MediaPart)]
        return cls(
            parts=tuple(sorted(parts, key=lambda part: part.index)), max_visual_tokens=request.vision.max_visual_tokens
        )

    @property
    def is_limited(self) -> bool:
        """Whether it limits anything."""
        return self.max_visual_tokens is not None or any(
            part.detail == "low" or part.max_visual_tokens is not None for part in self.parts
        )

    def limits(self, counts: Sequence[int], policy: ReducerPolicy) -> list[int]:
        """How many tokens of each item may enter the decoder, of `counts` that its reducer leaves.

        Raises:
            InvalidRequest: There are more items than tokens allowed.
        """
        if self.settled:
            return [min(pair) for pair in zip(self.settled, counts, strict=True)]
        allowed = [self._limit(i, count, policy) for i, count in enumerate(counts)]
        most = self.max_visual_tokens
        if most is None or sum(allowed) <= most:
            return allowed
        num_items = sum(count > 0 for count in allowed)
        if most < num_items:
            what = f"max_visual_tokens was {most} for {num_items} images and clips; each needs at least one"
            raise InvalidRequest(what, "vision.max_visual_tokens")
        return quota(most, allowed)

    def _limit(self, item: int, count: int, policy: ReducerPolicy) -> int:
        part = self.parts[item] if item < len(self.parts) else None
        if part is None or not count:
            return count
        if part.max_visual_tokens is not None:
            count = min(count, part.max_visual_tokens)
        return min(count, policy.detail_low_tokens, max(1, count // LOW_SHARE)) if part.detail == "low" else count


def planned_tokens(reducer: Reducer, grid: Grid, kind: Kind) -> int:
    """Tokens that a reducer leaves of an item, or the most that it may."""
    num_tokens = math.prod(grid)
    for part in plans_tokens(reducer):
        num_tokens = part.plan(num_tokens, grid, kind)
    return num_tokens


def fitted(
    items: Sequence[Encoded], budget: TokenBudget, policy: ReducerPolicy, reducer: Reducer
) -> tuple[Encoded, ...]:
    """The items with as many tokens as the budget allows. Shares follow from what was planned, not from what is left.

    Raises:
        InvalidRequest: As `TokenBudget.limits`.
        ReducerNotAllowed: The operator wants a larger share to be kept.
    """
    if not budget.is_limited:
        return tuple(items)
    planned = [planned_tokens(reducer, item.tokens.grid, item.tokens.kind) for item in items]
    limits = budget.limits(planned, policy)
    return tuple(_fitted(item, limit, policy) for item, limit in zip(items, limits, strict=True))


def _fitted(item: Encoded, limit: int, policy: ReducerPolicy) -> Encoded:
    tokens = item.tokens
    if tokens.num_tokens <= limit:
        return item
    check_share(limit, tokens.num_tokens_in, policy)
    name = RATIO_REDUCER if policy.budget_by == NATIVE else policy.budget_by
    left = _cut(tokens, limit, name)
    key = hashlib.sha256(f"{item.key}\n{name} {limit}".encode()).hexdigest() if item.key else ""
    before = {} if item.num_before_budget else {"num_before_budget": tokens.num_tokens, "budget_by": name}
    return replace(item, tokens=left, key=key, **before)


def check_budget_by(policy: ReducerPolicy, encoder: ProvidesFeatures, host: str) -> None:
    """Refuse a way to reach budgets that this model does not have.

    Args:
        host: Names the encoder in the error.

    Raises:
        IncompatiblePlugin: It needs what the encoder does not supply.
        InvalidOption: It is no reducer that keeps a share of the tokens, knowing nothing but them.
    """
    name = policy.budget_by
    reducer = build_reducer(name, 0.5)
    check_compatible(reducer, encoder, host)
    if name == NATIVE:
        return
    capabilities = capabilities_of(reducer)
    if capabilities.needs or capabilities.count != "fixed" or capabilities.stages != (Stage.PRE_LLM,):
        raise InvalidOption(
            "mm",
            "budget_by",
            f"was {name}; give native, or a reducer that acts after the projector, keeps an exact share and needs "
            f"nothing else, such as {RATIO_REDUCER} or uniform",
        )


def _cut(tokens: VisualTokens, limit: int, name: str) -> VisualTokens:
    """`limit` tokens by a reducer: of the protected ones first, of the others what is left of the budget."""
    if tokens.protected is None or not tokens.protected.any():
        return _reduced(tokens, limit, name)
    first, others = (_only(tokens, flags) for flags in (tokens.protected, ~tokens.protected))
    share = min(limit, first.num_tokens)
    parts = [_reduced(first, share, name)] + ([_reduced(others, limit - share, name)] if limit > share else [])
    return _only(tokens, torch.isin(tokens.indices, torch.cat([part.indices for part in parts])))


def _reduced(tokens: VisualTokens, limit: int, name: str) -> VisualTokens:
    return reduce_tokens(build_reducer(name, limit / tokens.num_tokens), tokens)


def _only(tokens: VisualTokens, flags: Tensor) -> VisualTokens:
    return apply(Reduction(keep=flags.nonzero().squeeze(1)), tokens, RATIO_REDUCER)


def check_share(num_tokens: int, num_tokens_in: int, policy: ReducerPolicy) -> None:
    """Refuse a budget that leaves a smaller share of an item than the operator allows.

    Raises:
        ReducerNotAllowed: Says how much it leaves.
    """
    if policy.min_keep_ratio is not None and num_tokens < policy.min_keep_ratio * num_tokens_in:
        raise ReducerNotAllowed(
            f"this budget leaves {num_tokens} of {num_tokens_in} visual tokens of an item; requests to this server may "
            f"not go below {policy.min_keep_ratio:g}"
        )
