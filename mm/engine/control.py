"""How much of what was drafted is worth verifying: expected tokens over expected time.

A pass of R rows takes T(R) seconds, which is measured: once when the engine is made, then at every pass that only
decodes. A drafted node is right with a probability that its drafter estimates, or that its depth has shown so far, both
corrected by what this answer's drafts turned out to be worth. Of the nodes of all answers those are kept that make

    (answers + sum of the kept nodes' probabilities) / (T(answers + kept nodes) + time to draft)

largest; a node is never likelier than its parent, so what is kept of a tree is a tree. With a large batch or hard text
nothing is kept. An answer whose drafts were worth nothing is asked less and less often, so that drafters that cost
something cost little where they do not pay; and what was drafted is compared with what was said even where it was not
verified, so that a text that becomes easy is noticed.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mm.core.drafting import NO_DRAFT, Draft, ProposalKind

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of a pass whose times are told apart."""
NEAREST = [0] + [min(ROWS, key=lambda rows: abs(rows - num)) for num in range(1, 2 * ROWS[-1])]
NEAREST = [at if abs(at - num) * 8 <= at else 0 for num, at in enumerate(NEAREST)]
"""Number of rows to that of `ROWS` under which its time is kept; 0 where it would blur two of them."""
NUM_SAMPLES = 9
WEIGHT = 0.1
"""Of the newest round in what is remembered of acceptance."""
MAX_WAIT = 64
"""Passes after which an answer is asked again at the latest."""
FREE_SHARE = 0.02
"""Drafting that takes less than this share of a pass is done always."""
LEAST_GAIN = 1.03
"""Expected speed-up from which drafts are verified: estimates err, and not drafting is never wrong."""
PROBE_EVERY = 256
"""Decisions of which one is taken the other way, so that no measured time grows old."""


class PassTimes:
    """Seconds that a pass of so many rows takes: the median of the last few, straight lines between."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._known = np.zeros(0), np.zeros(0)
        self._is_new = False

    def observe(self, num_rows: int, seconds: float) -> None:
        at = NEAREST[num_rows] if num_rows < len(NEAREST) else 0
        if at:
            self._samples.setdefault(at, deque(maxlen=NUM_SAMPLES)).append(seconds)
            self._is_new = True

    def seconds(self, num_rows: np.ndarray) -> np.ndarray:
        """Of passes with so many rows. Beyond what is known it goes on as between the last two."""
        if self._is_new:
            medians = [(rows, statistics.median(s)) for rows, s in sorted(self._samples.items())]
            rows, times = np.array(medians).T
            self._known, self._is_new = (rows, np.maximum.accumulate(times)), False  # more rows never take less
        rows, times = self._known
        if not len(rows):
            return np.ones(len(num_rows))
        found = np.interp(num_rows, rows, times)
        if len(rows) > 1:
            slope = (times[-1] - times[-2]) / (rows[-1] - rows[-2])
            found = found + slope * np.maximum(num_rows - rows[-1], 0)
        return found

    def calibrate(self, run: Callable[[int], float], most: int) -> None:
        """Measure passes of up to `most` rows; `run` gives the seconds of one."""
        for rows in ROWS:
            if rows <= most:
                run(rows)
                for _ in range(3):
                    self.observe(rows, run(rows))


@dataclass
class Acceptance:
    """What drafts turned out to be worth.

    Attributes:
        rates: How often a draft was right at each depth when it was right above.
        expected, found: Fading sums of the tokens that were expected to be right, and that were.
    """

    rates: list[float] = field(default_factory=list)
    expected: float = 2.0
    found: float = 2.0

    def learn(self, depth_hits: Sequence[bool], expected: float, found: float) -> None:
        for depth, hit in enumerate(depth_hits):
            if depth == len(self.rates):
                self.rates.append(self.rate(depth))
            self.rates[depth] += WEIGHT * (hit - self.rates[depth])
        self.expected += expected - WEIGHT * self.expected
        self.found += found - WEIGHT * self.found

    def rate(self, depth: int) -> float:
        return self.rates[min(depth, len(self.rates) - 1)] if self.rates else 0.6

    @property
    def correction(self) -> float:
        return min(2.0, (self.found + 0.2) / (self.expected + 0.2))

    def inherit(self) -> Acceptance:
        """What a new answer begins with."""
        return Acceptance(rates=list(self.rates))


@dataclass
class Tracked:
    """What control knows of one answer.

    Attributes:
        wait: Passes until it is asked for a draft again.
        patience: How many it would be the next time.
        draft: What was proposed last, for comparison with what is said; verified or not.
        scores: (n,) probabilities that its nodes are right.
    """

    acceptance: Acceptance
    wait: int = 0
    patience: int = 1
    draft: Draft = NO_DRAFT
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))


class Controller:
    """Decides about the drafts of one drafter."""

    def __init__(self, times: PassTimes) -> None:
        self._times = times
        self._acceptance = Acceptance()
        self._draft_s = 0.0
        self._num_choices = 0

    def track(self) -> Tracked:
        return Tracked(self._acceptance.inherit())

    def is_asked(self, tracked: Tracked) -> bool:
        """Whether an answer may draft for the next pass."""
        tracked.draft = NO_DRAFT
        tracked.wait -= 1
        return tracked.wait < 0

    def spent(self, seconds: float, num_drafts: int) -> None:
        """How long drafting for so many answers took."""
        if num_drafts:
            self._draft_s += WEIGHT * (seconds / num_drafts - self._draft_s)

    def choose(self, drafts: Sequence[Draft], tracked: Sequence[Tracked], num_answers: int, room: int) -> list[Draft]:
        """What of the drafts is to be verified.

        Args:
            num_answers: Answers that decode in the next pass, those without a draft too.
            room: Rows that the pass may have beyond one per answer.
        """
        for draft, one in zip(drafts, tracked, strict=True):
            one.draft, one.scores = draft, self._scores(draft, one)
        scores = np.concatenate([np.zeros(0), *(one.scores for one in tracked)])
        if not len(scores):
            self._be_patient(drafts, tracked, 1.0, float(self._times.seconds(np.array([num_answers]))[0]))
            return list(drafts)
        ordered = -np.sort(-scores)[:room]
        tokens = num_answers + np.concatenate([[0.0], np.cumsum(ordered)])
        seconds = self._times.seconds(num_answers + np.arange(len(tokens)))
        gains = tokens / seconds * seconds[0] / num_answers
        best = int(gains.argmax())
        worth = gains[best] * seconds[best] / (seconds[best] + self._draft_s * len(drafts))
        best = self._probed(gains, best if gains[best] >= LEAST_GAIN else 0)
        least = ordered[best - 1] if best else np.inf
        kept = [_kept(draft, one.scores >= least) for draft, one in zip(drafts, tracked, strict=True)]
        self._be_patient(kept, tracked, worth, float(seconds[0]))
        return kept

    def _probed(self, gains: np.ndarray, best: int) -> int:
        self._num_choices += 1
        if self._num_choices % PROBE_EVERY or len(gains) < 2:
            return best
        return 0 if best else int(gains[1:].argmax()) + 1

    def _scores(self, draft: Draft, tracked: Tracked) -> np.ndarray:
        """(n,) probability that each node is reached and right; falls from parent to child."""
        if not draft.num_tokens:
            return np.zeros(0)
        acceptance = tracked.acceptance
        # Of a draft that was drawn from a law no decision may depend on what was drawn.
        if draft.path_scores is not None and draft.kind is ProposalKind.POINT:
            return np.minimum(np.asarray(draft.path_scores) * acceptance.correction, 0.99)
        by_depth = np.cumprod([acceptance.rate(depth) for depth in range(max(draft.depths))])
        return by_depth[np.array(draft.depths[1:]) - 1]

    def _be_patient(self, kept: Sequence[Draft], tracked: Sequence[Tracked], worth: float, pass_s: float) -> None:
        is_free = self._draft_s < FREE_SHARE * pass_s
        for draft, one in zip(kept, tracked, strict=True):
            if is_free or (draft.num_tokens and worth >= LEAST_GAIN):
                one.patience = 1
            else:
                one.patience = min(2 * one.patience, MAX_WAIT)
                one.wait = one.patience

    def learn(self, tracked: Tracked, verified: Draft, said: Sequence[int]) -> None:
        """Compare what was proposed with what was said, down to the depth that was verified, and one level at least.

        Args:
            verified: What of the draft was verified; may be nothing.
            said: The tokens that came.
        """
        draft, row, hits = tracked.draft, 0, []
        if not draft.num_tokens:
            return
        deepest = max(1, max(verified.depths))
        for token in said[:deepest]:
            if not draft.children[row]:
                break
            row = next((child for child in draft.children[row] if draft.token_ids[child - 1] == token), 0)
            hits.append(row > 0)
            if not row:
                break
        expected = float(tracked.scores[np.array(draft.depths[1:]) <= deepest].sum())
        for acceptance in (tracked.acceptance, self._acceptance):
            acceptance.learn(hits, expected, sum(hits))


def _kept(draft: Draft, keep: np.ndarray) -> Draft:
    """The nodes that `keep` names; whoever is kept has a parent that is."""
    if keep.all():
        return draft
    if not keep.any():
        return NO_DRAFT
    nodes = np.flatnonzero(keep)
    row_of = np.zeros(draft.num_tokens + 1, dtype=np.int64)
    row_of[nodes + 1] = np.arange(1, len(nodes) + 1)
    return Draft(
        token_ids=tuple(draft.token_ids[i] for i in nodes),
        parents=tuple(int(row_of[draft.parents[i]]) for i in nodes),
        kind=draft.kind,
        draft_probs=None if draft.draft_probs is None else draft.draft_probs[[0, *(nodes + 1)]],
        path_scores=None if draft.path_scores is None else tuple(draft.path_scores[i] for i in nodes),
        source=draft.source,
    )
