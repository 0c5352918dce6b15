"""Several drafters in an order: each sequence takes the draft of the first one that proposes something.

So a sequence copies where it repeats something, and a model drafts for it elsewhere, as in SAM-Decoding with its
fallback (Hu et al. 2024). Every stage observes every sequence, since any of them may draft next.
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
    """Takes the draft of the first of `stages` that proposes something.

    Attributes:
        stages: Drafters in the order in which they are asked. In a specification: `copy + recycle`.
    """

    stages: tuple[Drafter, ...] = ()

    def __post_init__(self) -> None:
        if len(self.stages) < 2:
            raise InvalidOption("hybrid", "stages", "names fewer than two drafters; write them joined by ' + '")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(need for stage in self.stages for need in stage.needs)

    @property
    def trained(self) -> bool:
        return any(stage.trained for stage in self.stages)

    def load(self, target: DraftTarget) -> LoadedHybrid:
        return LoadedHybrid(self.stages, [stage.load(target) for stage in self.stages])


class LoadedHybrid:
    """The loaded stages. A session is a list with one session of each stage."""

    def __init__(self, drafters: Sequence[Drafter], stages: Sequence[LoadedDrafter[Any]]) -> None:
        self._stages = stages
        needs = [getattr(stage, "needs", drafter.needs) for drafter, stage in zip(drafters, stages, strict=True)]
        self.needs: frozenset[str] = frozenset().union(*needs)

    def open(self, prompt: Prompt, *, private: bool = False) -> list[object]:
        return [stage.open(prompt, private=private) for stage in self._stages]

    def propose(self, sessions: Sequence[list[object]], budgets: Sequence[DraftBudget]) -> list[Draft]:
        found = [NO_DRAFT] * len(sessions)
        for i, stage in enumerate(self._stages):
            without = [at for at, draft in enumerate(found) if not draft.num_tokens]
            if not without:
                break
            drafts = stage.propose([sessions[at][i] for at in without], [budgets[at] for at in without])
            for at, draft in zip(without, drafts, strict=True):
                found[at] = draft
        return found

    def observe(self, sessions: Sequence[list[object]], seen: Sequence[Observation]) -> None:
        for i, stage in enumerate(self._stages):
            stage.observe([session[i] for session in sessions], seen)

    def close(self, session: list[object]) -> None:
        for stage, own in zip(self._stages, session, strict=True):
            stage.close(own)
