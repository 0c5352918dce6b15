"""No drafts: what every drafter is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mm.core.data import Prompt
from mm.core.drafting import NO_DRAFT, Draft, DraftBudget, DraftTarget, Observation
from mm.engine.drafters.base import OneByOne


@dataclass(frozen=True, kw_only=True)
class NoDrafts:
    """Proposes nothing: one token per pass."""

    needs: ClassVar[frozenset[str]] = frozenset()
    trained: ClassVar[bool] = False

    def load(self, target: DraftTarget) -> LoadedNoDrafts:
        return LoadedNoDrafts()


class LoadedNoDrafts(OneByOne):
    def open(self, prompt: Prompt, *, private: bool = False) -> NoSession:
        return NoSession()


class NoSession:
    def propose(self, budget: DraftBudget) -> Draft:
        return NO_DRAFT

    def observe(self, seen: Observation) -> None:
        """Nothing is learned."""
