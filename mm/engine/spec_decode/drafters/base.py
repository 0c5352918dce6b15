"""A base class for drafters whose sessions work one by one, without gaining anything from a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from mm.plugins.drafter import Draft, DraftBudget, Observation


class DraftSession(Protocol):
    """A session that drafts and observes by itself."""

    def propose(self, budget: DraftBudget) -> Draft: ...

    def observe(self, seen: Observation) -> None: ...


DraftSessionT = TypeVar("DraftSessionT", bound=DraftSession)


class OneByOne(Generic[DraftSessionT]):
    """A loaded drafter that calls its sessions one after another."""

    def propose(self, sessions: Sequence[DraftSessionT], budgets: Sequence[DraftBudget]) -> list[Draft]:
        return [session.propose(budget) for session, budget in zip(sessions, budgets, strict=True)]

    def observe(self, sessions: Sequence[DraftSessionT], seen: Sequence[Observation]) -> None:
        for session, observation in zip(sessions, seen, strict=True):
            session.observe(observation)

    def close(self, session: DraftSessionT) -> None:
        """Do nothing: all state is in the session."""
