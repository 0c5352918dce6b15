"""What drafters share: requests one by one where nothing is gained by taking them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mm.plugins.drafter import Draft, DraftBudget, Observation


class DraftSession(Protocol):
    """One answer's drafting."""

    def propose(self, budget: DraftBudget) -> Draft: ...

    def observe(self, seen: Observation) -> None: ...


class OneByOne:
    """A loaded drafter whose sessions do everything themselves. Batched ones are tested against this loop."""

    def propose(self, sessions: Sequence[DraftSession], budgets: Sequence[DraftBudget]) -> list[Draft]:
        return [session.propose(budget) for session, budget in zip(sessions, budgets, strict=True)]

    def observe(self, sessions: Sequence[DraftSession], seen: Sequence[Observation]) -> None:
        for session, observation in zip(sessions, seen, strict=True):
            session.observe(observation)

    def close(self, session: Any) -> None:
        """Nothing is kept outside of the session."""
