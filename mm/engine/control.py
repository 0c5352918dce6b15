"""Whether drafting pays, and how much of what was drafted is worth verifying.

One pass of the decoder gives B answers a token each and takes T(B) seconds, so a token is worth T(B) / B. A drafter is
credited with that for every token that a pass gave beyond one per answer, and charged with everything it caused:
opening a session, observing, proposing, deciding, and the time by which drafted rows made a pass longer. Credits less
charges are its account, one for each range of batch sizes, in passes.

- An answer begins to draft while the account is not in debt. In debt, nothing is kept, observed or asked: each pass
  pays back `ALLOWANCE`, and out of the red an answer tries again. So a drafter that does not pay costs about that share
  of the time and no more, whatever its costs are made of, and one that begins to pay is noticed.
- An answer whose drafts are not worth their costs is asked less and less often, down to `IDLE_SHARE` of its time.
- Of what was drafted those nodes are verified that make

      (answers + sum of the kept nodes' probabilities) / (T(answers, kept nodes) + time to draft)

  largest; a node is never likelier than its parent, so what is kept of a tree is a tree. A node is right with a
  probability that its drafter estimates, or that its depth has shown so far, both corrected by what this answer's
  drafts turned out to be worth. What was drafted is compared with what was said even where it was not verified.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mm.core.drafting import NO_DRAFT, Draft, ProposalKind

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Rows of a pass whose times are told apart."""
NEAREST = [0] + [min(ROWS, key=lambda rows: abs(rows - num)) for num in range(1, 2 * ROWS[-1])]
"""Number of rows to that of `ROWS` under which its time is kept."""
ROW_SHARE = 0.001
"""Of a pass, that another row takes at the least: no row is free, however times err."""
NUM_SAMPLES = 9
REFRESH = 8
"""Passes after which what they take is summed up anew."""
WEIGHT = 0.1
"""Of the newest round in what is remembered of acceptance."""
WORTH_WEIGHT = 0.2
"""Of the newest draft in what an answer's drafts are worth: one that was not is no reason to ask less."""
ALLOWANCE = 0.01
"""Share of the time that may be lost in trying whether drafting pays."""
IDLE_SHARE = 0.005
"""Share of its time for which an answer whose drafts do not pay is asked."""
MAX_WAIT = 64
"""Passes after which an answer is asked again at the latest."""
SURCHARGE = 1.15
"""On every cost: what a drafter pushes out of the processor's caches slows passes that nobody charges it with."""
CREDIT = 8.0
"""Passes that an account begins with."""
MOST, LEAST = 32.0, -16.0
"""Passes between which an account moves, so that neither a good past nor a bad one decides for long."""
STAKE = 2.0
"""Passes that an account has to hold before an answer begins beside another one: out of debt, one tries for all."""
NEAR = 8
"""Passes ahead of a question from which on what an answer's passes show is kept for it."""
LEAST_GAIN = 1.03
"""Expected speed-up from which drafts are verified: estimates err, and not drafting is never wrong."""
PROBE_EVERY = 64
"""Decisions of which one is taken the other way, so that no measured time grows old."""
NOTHING = np.zeros(1)


class Median:
    """Of the last few values."""

    def __init__(self, value: float | None = None) -> None:
        self._values: deque[float] = deque([] if value is None else [value], maxlen=NUM_SAMPLES)
        self.value = value or 0.0

    def observe(self, value: float) -> None:
        self._values.append(value)
        self.value = statistics.median(self._values)


class PassTimes:
    """Seconds that a pass takes, by how many answers it serves and how many drafted rows it verifies.

    What a drafted row adds is learned at each batch size; before that it is what a row adds to one long chunk.
    """

    def __init__(self) -> None:
        self._chunk = np.array([0.0, 1.0]), np.array([0.0, 1.0])
        self._plain: dict[int, Median] = {}
        self._added: dict[int, dict[int, Median]] = {}
        self._tables: dict[int, np.ndarray] = {}
        self._age = 0

    def observe(self, num_answers: int, num_drafted: int, seconds: float) -> None:
        """Note a pass in which nothing but decoding was done."""
        self._age += 1
        if num_answers >= len(NEAREST) or num_drafted >= len(NEAREST):
            return
        if not num_drafted:
            self._plain.setdefault(num_answers, Median()).observe(seconds)
        elif num_answers in self._plain:
            added = self._added.setdefault(NEAREST[num_answers], {}).setdefault(NEAREST[num_drafted], Median())
            added.observe(seconds - self._plain[num_answers].value)

    def plain(self, num_answers: int) -> float:
        """Seconds of a pass in which so many answers decode without drafts."""
        if known := self._plain.get(num_answers):
            return known.value
        if not self._plain:
            return float(self._chunk_seconds(np.array([num_answers]))[0])
        counts = sorted(self._plain)
        near = min(max(num_answers, counts[0]), counts[-1])
        found = float(np.interp(near, counts, [self._plain[count].value for count in counts]))
        here, there = self._chunk_seconds(np.array([num_answers, near]))
        return found * float(here / there)

    def is_known(self, num_answers: int) -> bool:
        """Whether passes of so many answers have been seen without drafts."""
        return num_answers in self._plain or num_answers >= len(NEAREST)

    def seconds(self, num_answers: int, num_drafted: np.ndarray) -> np.ndarray:
        """Of passes in which so many answers decode and so many drafted rows are verified."""
        rows, plain = np.array([0, *ROWS], dtype=float), self.plain(num_answers)
        added = self._chunk_seconds(num_answers + rows) - self._chunk_seconds(np.array([float(num_answers)]))
        known = sorted(self._added.get(NEAREST[min(num_answers, len(NEAREST) - 1)], {}).items())
        if known:  # what rows of a chunk take, and by how much that was wrong for about as many rows
            wrong = [median.value - added[1 + ROWS.index(count)] for count, median in known]
            added = added + np.interp(rows, [0, *(count for count, _ in known)], [0.0, *wrong])
        added = np.maximum.accumulate(np.maximum(added, ROW_SHARE * plain * rows))
        return plain + _interpolated(num_drafted, rows, added)

    def table(self, num_answers: int) -> np.ndarray:
        """(256,) seconds of passes with 0, 1, ... drafted rows; may be some passes old."""
        if self._age >= REFRESH or num_answers not in self._tables:
            if self._age >= REFRESH:
                self._tables, self._age = {}, 0
            self._tables[num_answers] = self.seconds(num_answers, np.arange(ROWS[-1]))
        return self._tables[num_answers]

    def _chunk_seconds(self, rows: np.ndarray) -> np.ndarray:
        return _interpolated(rows, *self._chunk)

    def calibrate(self, run: Callable[[int], float], most: int) -> None:
        """Measure passes of one chunk of up to `most` rows; `run` gives the seconds of one."""
        rows = [count for count in ROWS if count <= most]
        found = []
        for count in rows:
            run(count)
            found.append(statistics.median(run(count) for _ in range(3)))
        self._chunk = np.array(rows, dtype=float), np.maximum.accumulate(found)  # more rows never take less


def _interpolated(at: np.ndarray, known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Straight lines between what is known; beyond it goes on as between the last two."""
    found = np.interp(at, known, values)
    if len(known) > 1:
        found = found + (values[-1] - values[-2]) / (known[-1] - known[-2]) * np.maximum(at - known[-1], 0)
    return found


@dataclass
class Account:
    """What drafting brought at about one batch size, in passes: what was gained or may be lost.

    Attributes:
        worth: Speed-up that the last drafts of all answers promised; a new answer begins with it.
        ask_s: Seconds per answer that proposing and deciding take.
        observe_s: Seconds per answer that observing takes.
    """

    balance: float = CREDIT
    worth: float = 1.1
    ask_s: Median = field(default_factory=Median)
    observe_s: Median = field(default_factory=Median)

    def book(self, passes: float) -> None:
        self.balance = max(LEAST, min(MOST, self.balance + passes))

    @property
    def price_s(self) -> float:
        """Seconds to ask an answer once, without what its first draft takes."""
        return self.ask_s.value + self.observe_s.value


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
        account: Of the batch size at which it was asked or waited last.
        worth: Speed-up that its last drafts promised there, their costs included.
        draft: What was proposed last, for comparison with what is said; verified or not.
        scores: (n,) probabilities that its nodes are right.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    wait: int = 0
    patience: int = 1
    account: Account | None = None
    worth: float = 1.1
    draft: Draft = NO_DRAFT
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def is_worth(self) -> bool:
        """Whether it is better drafted for than not."""
        return self.worth >= 1

    @property
    def is_due(self) -> bool:
        """Whether it is to be asked for the next pass."""
        return self.wait <= 0

    @property
    def is_near(self) -> bool:
        """Whether it is to be asked so soon that what its passes show is of use."""
        return self.wait <= NEAR


class Controller:
    """Decides about the drafts of one drafter.

    Attributes:
        num_begun: Answers that draft.
    """

    def __init__(self, times: PassTimes) -> None:
        self._times = times
        self._acceptance = Acceptance()
        self._accounts: dict[int, Account] = {}
        self._num_choices = 0
        self._num_answers = 1
        self.num_begun = 0

    def account(self, num_answers: int) -> Account:
        """Of the batch sizes from one power of two to the next."""
        return self._accounts.setdefault(num_answers.bit_length(), Account())

    def begin(self, num_answers: int, wait: int = 0) -> Tracked | None:
        """Let an answer draft, from `wait` passes on; None where there is nothing to pay for that.

        Args:
            num_answers: Answers that are being served, this one too.
        """
        if self.account(num_answers).balance < STAKE * min(self.num_begun, 1):
            return None
        self.num_begun += 1
        return Tracked(self._acceptance.inherit(), wait=wait)

    def end(self) -> None:
        """An answer that drafted is over."""
        self.num_begun -= 1

    def pass_begins(self, num_answers: int) -> None:
        """A pass is near in which so many answers decode."""
        self._num_answers = num_answers
        self.account(num_answers).book(ALLOWANCE)

    def is_asked(self, tracked: Tracked) -> bool:
        """Whether an answer drafts for this pass. Asked once per pass."""
        tracked.draft = NO_DRAFT
        account = self.account(self._num_answers)
        if tracked.account is not account:  # what drafts were worth at another batch size says little
            tracked.account, tracked.worth, tracked.patience = account, account.worth, 1
            tracked.wait = min(tracked.wait, NEAR)
        tracked.wait -= 1
        if tracked.wait >= 0:
            return False
        if not tracked.is_worth and account.balance < 0:
            tracked.wait = tracked.patience = min(2 * tracked.patience, MAX_WAIT)
            return False
        return True

    def spent(self, seconds: float, *, num_asked: int = 0, num_observed: int = 0) -> None:
        """How long drafting took, and for how many answers it did what."""
        account = self.account(self._num_answers)
        account.book(-SURCHARGE * seconds / self._times.plain(self._num_answers))
        if num_asked:
            account.ask_s.observe(seconds / num_asked)
        if num_observed:
            account.observe_s.observe(seconds / num_observed)

    def choose(self, drafts: Sequence[Draft], tracked: Sequence[Tracked], room: int) -> list[Draft]:
        """What of the drafts is to be verified.

        Args:
            room: Rows that the pass may have beyond one per answer.
        """
        for draft, one in zip(drafts, tracked, strict=True):
            one.draft, one.scores = draft, self._scores(draft, one)
        num_answers, account = self._num_answers, self.account(self._num_answers)
        ordered = np.sort(np.concatenate([one.scores for one in tracked]))[::-1][: min(room, ROWS[-1] - 1)]
        best, added, token_s = 0, 0.0, self._times.plain(num_answers) / num_answers
        if len(ordered) and self._times.is_known(num_answers):
            tokens = num_answers + np.concatenate([NOTHING, np.cumsum(ordered)])
            seconds = self._times.table(num_answers)[: len(tokens)]
            rates = tokens / (seconds + account.price_s * len(drafts))
            best = int(rates.argmax())
            best = self._probed(rates, best if rates[best] >= LEAST_GAIN * rates[0] else 0)
            added = float(seconds[best] - seconds[0])
            account.book(-SURCHARGE * added / float(seconds[0]))
        least = ordered[best - 1] if best else np.inf
        keep = [one.scores >= least for one in tracked]
        for one, mine in zip(tracked, keep, strict=True):
            gained, num_rows = float(one.scores[mine].sum()), int(mine.sum())
            price = account.price_s / token_s + added / token_s * num_rows / max(1, best)
            self._be_patient(one, (1 + gained) / (1 + SURCHARGE * price), len(tracked))
        return [_kept(draft, mine) for draft, mine in zip(drafts, keep, strict=True)]

    def _probed(self, rates: np.ndarray, best: int) -> int:
        self._num_choices += 1
        if self._num_choices % PROBE_EVERY or len(rates) < 2:
            return best
        return 0 if best else int(rates[1:].argmax()) + 1

    def _scores(self, draft: Draft, tracked: Tracked) -> np.ndarray:
        """(n,) probability that each node is reached and right; falls from parent to child."""
        if not draft.num_tokens:
            return NOTHING[:0]
        acceptance = tracked.acceptance
        # Of a draft that was drawn from a law no decision may depend on what was drawn.
        if draft.path_scores is not None and draft.kind is ProposalKind.POINT:
            return np.minimum(np.asarray(draft.path_scores) * acceptance.correction, 0.99)
        by_depth = np.cumprod([acceptance.rate(depth) for depth in range(max(draft.depths))])
        return by_depth[np.array(draft.depths[1:]) - 1]

    def _be_patient(self, one: Tracked, worth: float, num_asked: int) -> None:
        """Ask the sooner, the more an answer's drafts promise for what they cost."""
        account = self.account(self._num_answers)
        one.worth += WORTH_WEIGHT * (worth - one.worth)
        account.worth += WORTH_WEIGHT / 4 / num_asked * (worth - account.worth)
        one.patience = 1 if one.is_worth else min(2 * one.patience, self._longest_wait())
        one.wait = one.patience - 1

    def _longest_wait(self) -> int:
        """Passes between two questions to an answer that has nothing to say."""
        num_answers = self._num_answers
        share = self.account(num_answers).price_s * num_answers / self._times.plain(num_answers)
        return max(1, min(MAX_WAIT, math.ceil(share / IDLE_SHARE)))

    def learn(self, tracked: Tracked, verified: Draft, said: Sequence[int]) -> None:
        """Compare what was proposed with what was said, down to the depth that was verified, and one level at least.

        Args:
            verified: What of the draft was verified; may be nothing.
            said: The tokens that came.
        """
        draft, row, hits = tracked.draft, 0, []
        if not draft.num_tokens:
            return
        if verified.num_tokens:
            self.account(self._num_answers).book((len(said) - 1) / self._num_answers)
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
