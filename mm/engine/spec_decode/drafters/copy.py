"""Copying: what followed the last time is proposed again.

Paper     prompt lookup decoding (Saxena 2023), CopySpec (arXiv:2502.08923), SAM-Decoding (arXiv:2411.10666).
Reads     token ids alone: the prompt's text, the answer, and what other answers said where that is allowed.
Rule      the longest end of the text, of `min_match` to `max_match` tokens, that occurred before; what stood behind it
          is the draft, at most `factor` times as long as what matched. prompt lookup: max_match=3, earliest.
          CopySpec: min_match=max_match=3, earliest.
Cost      0.3 us per token until something repeats, 3 us from then on; 5 us per proposal.
Differs   Never matches across a picture or clip. Behind the latest occurrence the copy may run into itself, so that a
          period is repeated. Speaks up only where matches of that length have been right often enough: see `Odds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.base import OneByOne
from mm.engine.spec_decode.drafters.suffix_automaton import SuffixAutomaton
from mm.errors import InvalidOption
from mm.plugins.drafter import NO_DRAFT, Draft, DraftBudget, DraftTarget, Observation


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Copies what followed an earlier occurrence of the text's end.

    Attributes:
        min_match: Tokens that have to repeat before anything is copied.
        max_match: Longest end that is looked for; 0 is any length.
        occurrence: Which earlier one is copied from.
        factor: Tokens copied per token that matched; 0 copies as many as are allowed.
        shared_tokens: Size of the store of recent answers that all answers copy from; 0 keeps them apart.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    trained: ClassVar[bool] = False
    min_match: int = 2
    max_match: int = 0
    occurrence: Literal["latest", "earliest"] = "latest"
    factor: float = 0.0
    shared_tokens: int = 0

    def __post_init__(self) -> None:
        if self.min_match < 1:
            raise InvalidOption("copy", "min_match", f"was {self.min_match}; it has to be at least 1")
        if self.max_match and self.max_match < self.min_match:
            raise InvalidOption("copy", "max_match", f"was {self.max_match}, less than min_match {self.min_match}")
        if self.occurrence not in ("latest", "earliest"):
            raise InvalidOption("copy", "occurrence", f"was {self.occurrence!r}; it has to be latest or earliest")
        if self.factor < 0 or self.shared_tokens < 0:
            name = "factor" if self.factor < 0 else "shared_tokens"
            raise InvalidOption("copy", name, "has to be at least 0")

    def load(self, target: DraftTarget) -> LoadedCopy:
        return LoadedCopy(self)


class LoadedCopy(OneByOne):
    """What all answers share: how often copies were right, and the store of recent answers."""

    def __init__(self, options: Copy) -> None:
        self.options = options
        self.odds = Odds()
        self.store = Store(options.shared_tokens)

    def open(self, prompt: Prompt, *, private: bool = False) -> CopySession:
        return CopySession(self, prompt, private or not self.options.shared_tokens)

    def close(self, session: CopySession) -> None:
        if not session.private:
            self.store.add(session.answer)


class CopySession:
    """One answer's text.

    The automaton is built when `min_match` tokens repeat for the first time, and brought up to date when it is asked:
    most short answers repeat nothing.
    """

    def __init__(self, shared: LoadedCopy, prompt: Prompt, private: bool) -> None:
        self._shared, self.private = shared, private
        self._tokens = text_of(prompt)
        self._num_prompt_tokens = len(self._tokens)
        self._ends = set(zip(*(self._tokens[i:] for i in range(shared.options.min_match)), strict=False))
        self._repeats = False
        self._text = SuffixAutomaton()
        self._place = Place(shared.store)
        self._proposed: tuple[int, tuple[int, ...]] = (0, ())

    @property
    def answer(self) -> list[int]:
        return self._tokens[self._num_prompt_tokens :]

    def observe(self, seen: Observation) -> None:
        matched, proposed = self._proposed
        if proposed and seen.token_ids:
            self._shared.odds.learn(matched, proposed, seen.token_ids)
        self._proposed = 0, ()
        count = self._shared.options.min_match
        for token in seen.token_ids:
            self._tokens.append(token)
            end = tuple(self._tokens[-count:])
            self._repeats = end in self._ends
            self._ends.add(end)
            if not self.private:
                self._place.follow(token)

    def propose(self, budget: DraftBudget) -> Draft:
        most = min(budget.max_tokens, budget.max_depth)
        matched, token_ids = self._copied(most)
        if not token_ids:
            return NO_DRAFT
        self._proposed = matched, token_ids
        scores = self._shared.odds.path_scores(matched, len(token_ids))
        return Draft.chain(token_ids, path_scores=scores, source="copy")

    def _copied(self, most: int) -> tuple[int, tuple[int, ...]]:
        """How much matched, and what stood behind it."""
        options, text = self._shared.options, self._text
        if self._repeats:
            for token in self._tokens[len(text.tokens) :]:
                text.append(token)
        elif self._place.matched < options.min_match:
            return 0, ()
        matched = 0 if not self._repeats else min(text.matched, options.max_match or text.matched)
        source, end = text.tokens, -1
        if matched >= options.min_match:
            end = text.earlier_end(options.max_match or None, latest=options.occurrence == "latest")
        if not self.private and self._place.matched > max(matched, options.min_match - 1):
            matched, source, end = self._place.matched, self._place.tokens, self._place.end
        if end < 0:
            return 0, ()
        most = min(most, int(options.factor * matched)) if options.factor else most
        return matched, _behind(source, end + 1, most, wraps=options.occurrence == "latest" and source is text.tokens)


def _behind(source: Sequence[int], start: int, most: int, *, wraps: bool) -> tuple[int, ...]:
    """The tokens from `start` on, up to where a medium stands; where the text ends, it goes on with its own copy."""
    found = list(source[start : start + most])
    if wraps and start < len(source):
        period = len(source) - start
        while len(found) < most:
            found.append(found[len(found) - period])
    for i, token in enumerate(found):
        if token < 0:
            return tuple(found[:i])
    return tuple(found)


def text_of(prompt: Prompt) -> list[int]:
    """A prompt's token ids, each run of visual rows as one number that occurs nowhere else."""
    visual = prompt.is_visual.cpu().numpy()
    starts = visual.copy()
    starts[1:] &= ~visual[:-1]
    text = np.where(visual, -1 - np.arange(len(visual)), prompt.token_ids.cpu().numpy())
    return text[~visual | starts].tolist()


BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Lengths of a match from which another rate holds."""


class Odds:
    """How often the next copied token was right, by the length of what matched before it.

    Every token that is copied rightly makes the match one longer, so one table serves all depths. It learns from what
    was said, whether or not the target verified the draft.
    """

    def __init__(self, weight: float = 0.05) -> None:
        self._weight = weight
        self._rates = [0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9]

    def learn(self, matched: int, proposed: Sequence[int], said: Sequence[int]) -> None:
        for i, (guess, token) in enumerate(zip(proposed, said, strict=False)):
            at = _bound(matched + i)
            self._rates[at] += self._weight * ((guess == token) - self._rates[at])
            if guess != token:
                return

    def path_scores(self, matched: int, count: int) -> tuple[float, ...]:
        """Probability that each of `count` copied tokens is reached and right."""
        scores, score = [], 1.0
        for i in range(count):
            score *= self._rates[_bound(matched + i)]
            scores.append(score)
        return tuple(scores)


def _bound(matched: int) -> int:
    at = len(BOUNDS) - 1
    while at and BOUNDS[at] > matched:
        at -= 1
    return at


class Store:
    """Recent answers of all requests in one automaton; when it is full, the older half goes.

    Args:
        max_tokens: Its size; 0 stores nothing.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.text = SuffixAutomaton()
        self.generation = 0

    def add(self, answer: Sequence[int]) -> None:
        if not answer or len(answer) > self._max_tokens:
            return
        if len(self.text.tokens) + len(answer) + 1 > self._max_tokens:
            self.text = SuffixAutomaton(self.text.tokens[-(self._max_tokens - len(answer)) // 2 :])
            self.generation += 1
        for token in answer:
            self.text.append(token)
        self.text.append(-1 - len(self.text.tokens))


class Place:
    """Where one answer's text stands in the store."""

    def __init__(self, store: Store) -> None:
        self._store, self._generation = store, store.generation
        self._state = self.matched = 0

    def follow(self, token: int) -> None:
        if self._generation != self._store.generation:
            self._generation, self._state, self.matched = self._store.generation, 0, 0
        self._state, self.matched = self._store.text.follow(self._state, self.matched, token)

    @property
    def tokens(self) -> list[int]:
        return self._store.text.tokens

    @property
    def end(self) -> int:
        return self._store.text.last_end(self._state) if self._generation == self._store.generation else -1
