"""No drafts: the baseline that every drafter is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.base import OneByOne
from mm.plugins.drafter import NO_DRAFT, Draft, DraftBudget, DraftTarget, Observation


@dataclass(frozen=True, kw_only=True)
class NoDrafts:
    """Proposes nothing: each step gives one token."""

    needs: ClassVar[frozenset[str]] = frozenset()
    trained: ClassVar[bool] = False

    def load(self, target: DraftTarget) -> LoadedNoDrafts:
        return LoadedNoDrafts()


class NoSession:
    """A session without state."""

    def propose(self, budget: DraftBudget) -> Draft:
        return NO_DRAFT

    def observe(self, seen: Observation) -> None:
        """Do nothing."""


class LoadedNoDrafts(OneByOne[NoSession]):
    """Opens sessions without state."""

    def open(self, prompt: Prompt, *, private: bool = False) -> NoSession:
        return NoSession()
