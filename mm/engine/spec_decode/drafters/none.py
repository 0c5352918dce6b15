"""No drafts: what every drafter is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.base import OneByOne
from mm.plugins.drafter import NO_DRAFT, Draft, DraftBudget, DraftTarget, Observation


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
