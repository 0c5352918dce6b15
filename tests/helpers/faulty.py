"""Reducers that break their promise, one class per stage and one option for how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mm.plugins.reducer import Reduction, Stage
from pruning.base import BaseReducer, keep_all

HOWS = ("raises", "nan", "duplicates", "outside", "nothing", "empty")


def bad_rows(how: str, num_rows: int) -> Tensor | None:
    """Rows that nobody can keep."""
    match how:
        case "raises":
            raise RuntimeError("a secret of the plugin")
        case "nan":
            return torch.full((num_rows,), torch.nan)
        case "duplicates":
            return torch.zeros(2, dtype=torch.int64)
        case "outside":
            return torch.arange(num_rows + 1)
        case "empty":
            return torch.arange(0)
    return None


@dataclass(frozen=True, kw_only=True)
class Outer(BaseReducer):
    """At fault before the decoder."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    how: str = "raises"

    def plan(self, num_tokens: int, *_: object) -> int:
        return num_tokens

    def after_encode(self, tokens, context) -> Reduction:
        if self.how == "nan":
            merge = torch.full((tokens.num_tokens, tokens.num_tokens), torch.nan)
            return Reduction(keep=keep_all(tokens).keep, merge=merge)
        rows = bad_rows(self.how, tokens.num_tokens)
        return None if rows is None else Reduction(keep=rows)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Inner(BaseReducer):
    """At fault inside the decoder, after a layer at which it does well."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.IN_PREFILL,)
    how: str = "raises"

    def layers(self, num_layers: int) -> tuple[int, ...]:
        if self.how == "nothing":
            raise KeyError("layers")
        return (1, 2)

    def in_prefill(self, layer: int, view) -> Tensor | None:
        num_rows = len(view.visual)
        return torch.arange(num_rows) if layer == 1 else bad_rows(self.how, num_rows)


@dataclass(frozen=True, kw_only=True)
class Late(BaseReducer):
    """At fault when the prompt is in."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.IN_DECODE,)
    how: str = "raises"

    def prefill_done(self, view) -> Mapping[int, Tensor] | None:
        rows = bad_rows(self.how, view.lengths[1])
        return None if rows is None else {1: rows}


@dataclass(frozen=True, kw_only=True)
class Compact(BaseReducer):
    """Keeps every other token and wants its positions counted anew."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    positions: ClassVar[str] = "compact"

    def plan(self, num_tokens: int, *_: object) -> int:
        return (num_tokens + 1) // 2

    def after_encode(self, tokens, context) -> Reduction:
        return Reduction(keep=torch.arange(0, tokens.num_tokens, 2))


ENTRY_POINTS = {
    "outer": "tests.helpers.faulty:Outer",
    "inner": "tests.helpers.faulty:Inner",
    "late": "tests.helpers.faulty:Late",
    "compact": "tests.helpers.faulty:Compact",
}
