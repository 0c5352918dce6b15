"""What reducers share: token budgets, ordered selection, checks of options, base classes, and `none`.

Nothing here knows a model. `mm.plugins.apply.apply` carries a decision out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mm.data.media import Kind
from mm.data.tokens import Grid, VisualTokens
from mm.errors import InvalidOption
from mm.plugins.reducer import Count, ReduceContext, Reduction, Stage
from mm.plugins.registry import name_of

Rounding = Literal["half_up", "half_even", "floor", "floor_complement", "ceil"]


def budget(
    num_tokens: int, keep_ratio: float | Fraction, rounding: Rounding = "half_up", *, compat: bool = False
) -> int:
    """Tokens to keep of `num_tokens`: at least 1 when there are any, at most all.

    The ratio is read as the decimal it was written as: 100 * (1 - 0.9) keeps 10 tokens, where binary floats give 9.

    Args:
        num_tokens: At least 0.
        keep_ratio: Tokens kept / tokens in, in (0, 1].
        rounding: "half_up" and "half_even" to the nearest, "floor", "ceil"; "floor_complement" is floor(N * (1 - q))
            with q = 1 - keep_ratio, which differs from "floor" only with `compat`.
        compat: Compute in binary floats, to reproduce counts of codes that do.

    Raises:
        ValueError: A negative count, or a ratio outside (0, 1].
    """
    if num_tokens < 0:
        raise ValueError(f"the number of tokens cannot be negative, got {num_tokens}")
    ratio = Fraction(str(keep_ratio))
    if not 0 < ratio <= 1:
        raise ValueError(f"keep_ratio has to be in (0, 1], got {keep_ratio}")
    exact = num_tokens * ratio
    if compat:
        kept = float(ratio) if rounding != "floor_complement" else 1 - float(1 - ratio)
        exact = num_tokens * kept
    return min(num_tokens, max(1, _round(exact, rounding)))


def _round(exact: float | Fraction, rounding: Rounding) -> int:
    match rounding:
        case "half_up":
            return math.floor(exact + Fraction(1, 2))
        case "half_even":
            return round(exact)
        case "floor" | "floor_complement":
            return math.floor(exact)
        case "ceil":
            return math.ceil(exact)


def top_k_ascending(scores: Tensor, k: int) -> Tensor:
    """(k,) int64: where the `k` largest of `scores` (N,) are, ascending. The lowest index wins a tie.

    A score that is not finite counts as minus infinity: it is kept only when nothing else is left.
    """
    ranked = torch.nan_to_num(scores.float(), nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    # A stable sort and not topk, which promises no order among equals.
    return torch.sort(ranked, descending=True, stable=True).indices[:k].sort().values


def unit_rows(rows: Tensor) -> Tensor:
    """`rows` (..., D) at length 1 in float32; zero where they are zero or not finite."""
    rows = rows.float()
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return (rows / norms.clamp_min(1e-12)).masked_fill_(~torch.isfinite(norms), 0.0)


def merge_means(keep: Tensor, rows: Tensor, columns: Tensor, sizes: Tensor) -> Reduction:
    """Each kept token becomes the mean of those that go into it, weighted by how many original tokens they stand for.

    Args:
        keep: (k,) int64, the anchors, ascending.
        rows, columns: (m,) int64: token `columns[i]` goes into `keep[rows[i]]`. Tokens not named are dropped.
        sizes: (N,) of the tokens.
    """
    weights = sizes.index_select(0, columns)
    totals = torch.zeros(keep.shape[0], device=sizes.device).index_add_(0, rows, weights)
    shares = weights / totals.index_select(0, rows)
    # Sparse, so that a row that is not finite spoils only the mean it is part of.
    shape = (keep.shape[0], sizes.shape[0])
    merge = torch.sparse_coo_tensor(torch.stack([rows, columns]), shares, shape, check_invariants=False)
    return Reduction(keep=keep, merge=merge, sizes=totals)


def keep_all(tokens: VisualTokens) -> Reduction:
    """The decision that changes nothing."""
    return Reduction(keep=torch.arange(tokens.num_tokens, device=tokens.embeddings.device))


def ratio_option(owner: str, option: str, value: object) -> float:
    """`value` as a ratio in (0, 1].

    Raises:
        InvalidOption: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InvalidOption(owner, option, f"has to be a number above 0 and at most 1, got {value!r}")
    return float(value)


def number_option(owner: str, option: str, value: object, low: float, high: float) -> float:
    """`value` as a number from `low` to `high`.

    Raises:
        InvalidOption: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidOption(owner, option, f"has to be a number from {low:g} to {high:g}, got {value!r}")
    return float(value)


def int_option(owner: str, option: str, value: object, low: int, high: int) -> int:
    """`value` as an integer from `low` to `high`.

    Raises:
        InvalidOption: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidOption(owner, option, f"has to be an integer from {low} to {high}, got {value!r}")
    return value


def bool_option(owner: str, option: str, value: object) -> bool:
    """`value` as true or false.

    Raises:
        InvalidOption: It is something else.
    """
    if not isinstance(value, bool):
        raise InvalidOption(owner, option, f"has to be true or false, got {value!r}")
    return value


def choice_option(owner: str, option: str, value: object, choices: Sequence[str]) -> str:
    """`value` as one of `choices`.

    Raises:
        InvalidOption: It is something else.
    """
    if not isinstance(value, str) or value not in choices:
        raise InvalidOption(owner, option, f"has to be one of {', '.join(choices)}, got {value!r}")
    return value


class BaseReducer:
    """What most reducers declare. A subclass declares `acts_at` and whatever differs."""

    needs: ClassVar[frozenset[str]] = frozenset()
    query_aware: ClassVar[bool] = False
    count: ClassVar[Count] = "fixed"


@dataclass(frozen=True, kw_only=True)
class BudgetReducer(BaseReducer):
    """A reducer that keeps a fixed share of the tokens. Subclasses write `select`.

    Attributes:
        keep_ratio: Tokens kept / tokens in, in (0, 1].
    """

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    rounding: ClassVar[Rounding] = "half_up"
    keep_ratio: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratio", ratio_option(name_of(self), "keep_ratio", self.keep_ratio))

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        return budget(num_tokens, self.keep_ratio, self.rounding)

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        k = self.plan(tokens.num_tokens)
        if k >= tokens.num_tokens:
            return keep_all(tokens)
        return Reduction(keep=self.select(tokens, context, k))

    def select(self, tokens: VisualTokens, context: ReduceContext, k: int) -> Tensor:
        """(k,) int64: the kept indices, ascending, with 0 < k < N."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ScoreReducer(BudgetReducer):
    """A reducer that keeps the tokens with the highest scores. Subclasses write `score`."""

    def select(self, tokens: VisualTokens, context: ReduceContext, k: int) -> Tensor:
        return top_k_ascending(self.score(tokens, context), k)

    def score(self, tokens: VisualTokens, context: ReduceContext) -> Tensor:
        """(N,): higher is kept."""
        raise NotImplementedError


class PrefillReducer(BaseReducer):
    """A reducer that drops tokens inside the decoder, at the input of some layers. Subclasses write `layers` and
    `in_prefill`, see `mm.plugins.reducer.InPrefill`.
    """

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.IN_PREFILL,)
    query_aware: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class NoReduction(BaseReducer):
    """Keep every token: the reference every reducer is measured against."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)

    def plan(self, num_tokens: int, grid: Grid | None = None, kind: Kind = "image") -> int:
        return num_tokens

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        return keep_all(tokens)
