"""Copying: when the newest tokens occurred before, propose the tokens that followed them then.

Paper     prompt lookup decoding (Saxena 2023), CopySpec (arXiv:2502.08923), SAM-Decoding (arXiv:2411.10666).
Reads     Token ids only: the prompt's text, the generated tokens, and those of other sequences where that is allowed.
Method    Find the longest end of the text, of `min_match` to `max_match` tokens, that occurred before. The tokens after
          that occurrence are the draft, at most `factor` times as many as matched. Prompt lookup: max_match=3,
          earliest. CopySpec: min_match=max_match=3, earliest.
Cost      0.3 us per token until something repeats, 3 us per token after that; 5 us per draft.
Differs   A match never contains a picture or clip. A copy from the latest occurrence may continue with its own tokens,
          so that a period is repeated. Each draft carries the measured acceptance of matches of its length: see `Odds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np

from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafters.base import OneByOne
from mm.engine.spec_decode.drafters.suffix_automaton import SuffixAutomaton
from mm.errors import InvalidOption
from mm.plugins.drafter import NO_DRAFT, Draft, DraftBudget, DraftTarget, Observation


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Copies the tokens that followed an earlier occurrence of the newest tokens.

    Attributes:
        min_match: How many tokens have to repeat before anything is copied.
        max_match: Longest match that is searched for; 0 allows any length.
        occurrence: Which earlier occurrence is copied from.
        factor: Tokens copied per token that matched; 0 copies as many as the budget allows.
        shared_tokens: Size in tokens of the store of finished sequences that all sequences copy from; 0 has no store.
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


class LoadedCopy(OneByOne["CopySession"]):
    """What all sequences share: how often copies were right, and the store of finished sequences."""

    def __init__(self, options: Copy) -> None:
        self.options = options
        self.odds = Odds()
        self.store = Store(options.shared_tokens)

    def open(self, prompt: Prompt, *, private: bool = False) -> CopySession:
        return CopySession(self, prompt, private or not self.options.shared_tokens)

    def close(self, session: CopySession) -> None:
        if not session.private:
            self.store.add(session.generated)


class CopySession:
    """The text of one sequence.

    The automaton is built once `min_match` tokens repeat, and updated when a draft is asked for. Most short sequences
    repeat nothing and never need it.
    """

    def __init__(self, shared: LoadedCopy, prompt: Prompt, private: bool) -> None:
        self._shared, self.private = shared, private
        self._tokens = text_of(prompt)
        self._num_prompt_tokens = len(self._tokens)
        self._ends = set(zip(*(self._tokens[i:] for i in range(shared.options.min_match)), strict=False))
        self._repeats = False
        self._text = SuffixAutomaton()
        self._in_store = StoreMatch(shared.store)
        self._proposed: tuple[int, tuple[int, ...]] = (0, ())

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
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
                self._in_store.follow(token)

    def propose(self, budget: DraftBudget) -> Draft:
        most = min(budget.max_tokens, budget.max_depth)
        matched, token_ids = self._copied(most)
        if not token_ids:
            return NO_DRAFT
        self._proposed = matched, token_ids
        scores = self._shared.odds.path_scores(matched, len(token_ids))
        return Draft.chain(token_ids, path_scores=scores, source="copy")

    def _copied(self, most: int) -> tuple[int, tuple[int, ...]]:
        """How many tokens matched, and the tokens that followed them."""
        options, text = self._shared.options, self._text
        if self._repeats:
            for token in self._tokens[len(text.tokens) :]:
                text.append(token)
        elif self._in_store.matched < options.min_match:
            return 0, ()
        matched = 0 if not self._repeats else min(text.matched, options.max_match or text.matched)
        source, end = text.tokens, -1
        if matched >= options.min_match:
            end = text.earlier_end(options.max_match or None, latest=options.occurrence == "latest")
        if not self.private and self._in_store.matched > max(matched, options.min_match - 1):
            matched, source, end = self._in_store.matched, self._in_store.tokens, self._in_store.end
        if end < 0:
            return 0, ()
        most = min(most, int(options.factor * matched)) if options.factor else most
        return matched, _continuation(
            source, end + 1, most, wraps=options.occurrence == "latest" and source is text.tokens
        )


def _continuation(source: Sequence[int], start: int, most: int, *, wraps: bool) -> tuple[int, ...]:
    """At most `most` tokens from `start` on, up to the first picture or clip.

    Args:
        wraps: Where the text ends, go on with the tokens copied so far.
    """
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
    """A prompt's token ids. Each run of visual tokens is one negative number that occurs nowhere else."""
    visual = prompt.is_visual.cpu().numpy()
    starts = visual.copy()
    starts[1:] &= ~visual[:-1]
    text = np.where(visual, -1 - np.arange(len(visual)), prompt.token_ids.cpu().numpy())
    return cast("list[int]", text[~visual | starts].tolist())


BOUNDS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
"""Match lengths at which the next rate of `Odds` begins."""


class Odds:
    """How often the next copied token was right, by the number of tokens that matched before it.

    Each right token makes the match one token longer, so one table serves all depths. It learns from the emitted
    tokens, whether or not the target verified the draft.

    Args:
        weight: Of the newest outcome in the moving average.
    """

    def __init__(self, weight: float = 0.05) -> None:
        self._weight = weight
        self._rates = [0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9]

    def learn(self, matched: int, proposed: Sequence[int], emitted: Sequence[int]) -> None:
        """Compare a copy, made after a match of `matched` tokens, with the tokens that the target emitted."""
        for i, (guess, token) in enumerate(zip(proposed, emitted, strict=False)):
            at = _bound(matched + i)
            self._rates[at] += self._weight * ((guess == token) - self._rates[at])
            if guess != token:
                return

    def path_scores(self, matched: int, count: int) -> tuple[float, ...]:
        """For each of `count` copied tokens, the probability that it and all before it are right."""
        scores: list[float] = []
        score = 1.0
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
    """The generated tokens of recent sequences in one automaton. When it is full, the older half is dropped.

    Args:
        max_tokens: Size of the store; 0 stores nothing.

    Attributes:
        generation: Goes up by one whenever the older half is dropped. Positions in `text` change then.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self.text = SuffixAutomaton()
        self.generation = 0

    def add(self, token_ids: Sequence[int]) -> None:
        """Add a finished sequence. One that is longer than the store is ignored."""
        if not token_ids or len(token_ids) > self._max_tokens:
            return
        if len(self.text.tokens) + len(token_ids) + 1 > self._max_tokens:
            self.text = SuffixAutomaton(self.text.tokens[-(self._max_tokens - len(token_ids)) // 2 :])
            self.generation += 1
        for token in token_ids:
            self.text.append(token)
        self.text.append(-1 - len(self.text.tokens))


class StoreMatch:
    """The longest end of one sequence's generated tokens that is also in the store."""

    def __init__(self, store: Store) -> None:
        self._store, self._generation = store, store.generation
        self._state = self.matched = 0

    def follow(self, token: int) -> None:
        """Extend the match by a token, or shorten it to what is still in the store."""
        if self._generation != self._store.generation:
            self._generation, self._state, self.matched = self._store.generation, 0, 0
        self._state, self.matched = self._store.text.follow(self._state, self.matched, token)

    @property
    def tokens(self) -> list[int]:
        """The text of the store."""
        return self._store.text.tokens

    @property
    def end(self) -> int:
        """Index of the last matched token in `tokens`; -1 when the store has changed."""
        return self._store.text.last_end(self._state) if self._generation == self._store.generation else -1
