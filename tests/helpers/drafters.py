"""Drafters that nobody should use: they say what is false, what is true, both, or fail."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.base import OneByOne
from mm.plugins.drafter import Draft, DraftBudget, DraftTarget, Observation

TRUTH: dict[tuple[int, ...], list[list[int]]] = {}
"""Prompt to the answers that a run without drafts gave."""


@dataclass(frozen=True, kw_only=True)
class Wild:
    """Trees and chains of any shape, of truth and rubbish.

    Attributes:
        truth: Share of nodes on the true path that are right.
        shape: "chain", "tree" or "any".
        failing: Share of calls that raise or give what cannot be verified.
        states: States that it asks for, and checks.
    """

    trained: ClassVar[bool] = False
    truth: float = 0.5
    shape: str = "any"
    seed: int = 0
    failing: float = 0.0
    states: str = ""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(filter(None, self.states.split("|")))

    def load(self, target: DraftTarget) -> LoadedWild:
        return LoadedWild(self, target)


class LoadedWild(OneByOne):
    def __init__(self, options: Wild, target: DraftTarget) -> None:
        self.options, self.target = options, target
        self.random = random.Random(options.seed)
        self.num_open = 0
        self.seen: list[tuple[Prompt, Observation]] = []

    def open(self, prompt: Prompt, *, private: bool = False) -> WildSession:
        self.num_open += 1
        return WildSession(self, prompt)

    def close(self, session: WildSession) -> None:
        self.num_open -= 1


class WildSession:
    def __init__(self, shared: LoadedWild, prompt: Prompt) -> None:
        self._shared, self._prompt = shared, prompt
        self._answers = TRUTH.get(tuple(prompt.token_ids.tolist()), [])
        self.said: list[int] = []

    def observe(self, seen: Observation) -> None:
        if self._shared.random.random() < self._shared.options.failing / 4:
            raise RuntimeError("on purpose")
        self.said += seen.token_ids
        self._shared.seen.append((self._prompt, seen))

    def propose(self, budget: DraftBudget) -> Draft:
        options, rng = self._shared.options, self._shared.random
        if rng.random() < options.failing:
            if rng.random() < 0.5:
                raise RuntimeError("on purpose")
            return Draft(token_ids=(-5,), parents=(7,))
        vocab = self._shared.target.vocab_size
        count = rng.randint(0, budget.max_tokens)
        chain = options.shape == "chain" or (options.shape == "any" and rng.random() < 0.5)
        tokens, parents, true = [], [], {0: len(self.said)}
        fitting = [answer for answer in self._answers if answer[: len(self.said)] == self.said]
        depths = [0]
        for row in range(1, count + 1):
            parent = row - 1 if chain else rng.choice([r for r in range(row) if depths[r] < budget.max_depth] or [-1])
            if parent < 0 or depths[parent] >= budget.max_depth:
                break
            place = true.get(parent)
            correct = place is not None and fitting and place < len(fitting[0]) and rng.random() < options.truth
            token = fitting[0][place] if correct else rng.randrange(vocab)  # type: ignore[index]
            if any(p == parent and t == token for p, t in zip(parents, tokens, strict=True)):
                continue_with = next(
                    t for t in range(vocab) if (parent, t) not in set(zip(parents, tokens, strict=True))
                )
                token, correct = continue_with, False
            if correct:
                true[row] = place + 1  # type: ignore[operator]
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
        return Draft(token_ids=tuple(tokens), parents=tuple(parents), source="wild")
