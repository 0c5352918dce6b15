"""Several drafters, the first of which that has something to propose is heard.

So an answer copies where it repeats something and is drafted by a model where it does not, as SAM-Decoding does with
its fallback (Hu et al. 2024). All of them observe everything, since nobody knows who will be asked next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm.data.tokens import Prompt
from mm.errors import InvalidOption
from mm.plugins.drafter import NO_DRAFT, Draft, DraftBudget, Drafter, DraftTarget, LoadedDrafter, Observation


@dataclass(frozen=True, kw_only=True)
class Hybrid:
    """Copies when it can and drafts otherwise: the first of `stages` that proposes something.

    Attributes:
        stages: Drafters, the one that is asked first in front. In a specification: `copy + recycle`.
    """

    stages: tuple[Drafter, ...] = ()

    def __post_init__(self) -> None:
        if len(self.stages) < 2:
            raise InvalidOption("hybrid", "stages", "names fewer than two drafters; write them joined by ' + '")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(stage.needs for stage in self.stages))

    @property
    def trained(self) -> bool:
        return any(stage.trained for stage in self.stages)

    def load(self, target: DraftTarget) -> LoadedHybrid:
        return LoadedHybrid(self.stages, [stage.load(target) for stage in self.stages])


class LoadedHybrid:
    """Its sessions are lists: one session of each stage."""

    def __init__(self, drafters: Sequence[Drafter], stages: Sequence[LoadedDrafter]) -> None:
        self._stages = stages
        needs = [getattr(stage, "needs", drafter.needs) for drafter, stage in zip(drafters, stages, strict=True)]
        self.needs: frozenset[str] = frozenset().union(*needs)

    def open(self, prompt: Prompt, *, private: bool = False) -> list[Any]:
        return [stage.open(prompt, private=private) for stage in self._stages]

    def propose(self, sessions: Sequence[list[Any]], budgets: Sequence[DraftBudget]) -> list[Draft]:
        found = [NO_DRAFT] * len(sessions)
        for i, stage in enumerate(self._stages):
            asked = [at for at, draft in enumerate(found) if not draft.num_tokens]
            if not asked:
                break
            drafts = stage.propose([sessions[at][i] for at in asked], [budgets[at] for at in asked])
            for at, draft in zip(asked, drafts, strict=True):
                found[at] = draft
        return found

    def observe(self, sessions: Sequence[list[Any]], seen: Sequence[Observation]) -> None:
        for i, stage in enumerate(self._stages):
            stage.observe([session[i] for session in sessions], seen)

    def close(self, session: list[Any]) -> None:
        for stage, own in zip(self._stages, session, strict=True):
            stage.close(own)
