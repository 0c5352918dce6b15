"""How often drafted tokens turn out to be right, and how probable that is for the nodes of a new draft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mm.plugins.drafter import Draft

NEWEST_WEIGHT = 0.1
"""Weight of the newest draft in the running acceptance figures."""
INITIAL_RATE = 0.6
"""Acceptance rate that is assumed before any draft was compared with the text."""


@dataclass
class Acceptance:
    """Running acceptance figures, of one sequence or of a drafter.

    Attributes:
        rates: By depth, how often a node was right when its parent was right.
        expected: Decaying sum of the number of tokens that the estimated probabilities promised.
        found: Decaying sum of the number of tokens that were right.
    """

    rates: list[float] = field(default_factory=list[float])
    expected: float = 2.0
    found: float = 2.0

    def record(self, matches: Sequence[bool], expected: float) -> None:
        """Record how a draft compared with the text.

        Args:
            matches: By depth, whether the draft had the token of the text; see `matches_by_depth`.
            expected: Sum of the estimated probabilities of the nodes that were compared.
        """
        for depth, is_match in enumerate(matches):
            if depth == len(self.rates):
                self.rates.append(self.rate(depth))
            self.rates[depth] += NEWEST_WEIGHT * (is_match - self.rates[depth])
        self.expected += expected - NEWEST_WEIGHT * self.expected
        self.found += sum(matches) - NEWEST_WEIGHT * self.found

    def rate(self, depth: int) -> float:
        """Acceptance rate at a depth, counted from 0. Below all recorded depths it is that of the last one."""
        return self.rates[min(depth, len(self.rates) - 1)] if self.rates else INITIAL_RATE

    @property
    def correction(self) -> float:
        """Factor from the drafter's estimates to what was right, at most 2."""
        return min(2.0, (self.found + 0.2) / (self.expected + 0.2))

    def for_new_sequence(self) -> Acceptance:
        """The rates that a new sequence starts with. Its correction starts at 1."""
        return Acceptance(rates=list(self.rates))

    def path_probabilities(self, draft: Draft) -> Sequence[float]:
        """(n,) probability of each node that it is accepted with all its ancestors. It falls from parent to child.

        It comes from the drafter's own estimates, corrected, where the draft has them; otherwise from the rates.
        """
        if not draft.num_tokens:
            return ()
        if draft.path_scores is not None:
            correction = self.correction
            return [min(score * correction, 0.99) for score in draft.path_scores]
        by_depth, probability = list[float](), 1.0
        for depth in range(max(draft.depths)):
            probability *= self.rate(depth)
            by_depth.append(probability)
        return [by_depth[depth - 1] for depth in draft.depths[1:]]


def matches_by_depth(draft: Draft, emitted: Sequence[int], max_depth: int) -> list[bool]:
    """Compare a draft with the tokens that were emitted.

    Args:
        max_depth: The comparison ends at this depth.

    Returns:
        By depth, whether the draft had the emitted token. It ends after the first token that the draft did not have.
    """
    node, matches = 0, list[bool]()
    for token in emitted[:max_depth]:
        if not draft.children[node]:
            break
        node = next((child for child in draft.children[node] if draft.token_ids[child - 1] == token), 0)
        matches.append(node > 0)
        if not node:
            break
    return matches
