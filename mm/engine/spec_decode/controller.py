"""Whether drafting pays, and how much of what was drafted is worth verifying.

One pass of the decoder gives B answers a token each and takes T(B) seconds, so a token is worth T(B) / B, where B are
the answers that will decode together: those, too, whose prompts still go in. A drafter is credited with that for every
token that a pass gave beyond one per answer, and charged with everything it caused: opening a session, observing,
proposing, deciding, and the time by which drafted rows made a pass longer. Credits less charges are its account, one
for each range of batch sizes, in passes.

- An answer begins to draft while the account is open. `TRIAL` passes in debt it closes: nothing is kept, observed or
  asked, nor for an answer that began at another batch size, and each pass pays back `ALLOWANCE`. Out of the red it
  opens, and an answer tries again, long enough to tell. So a drafter that does not pay costs about that share of the
  time and no more, whatever its costs are made of, and one that begins to pay is noticed.
- An answer whose drafts are not worth their costs is asked less and less often, down to `IDLE_SHARE` of its time.
- Of what was drafted those nodes are verified that make

      (tokens of a pass + sum of the kept nodes' probabilities) / (T(answers, kept nodes) + time to draft)

  largest; a pass counts as the tokens that its time is worth. A node is never likelier than its parent, so what is
  kept of a tree is a tree. A node is right with a probability that its drafter estimates, or that its depth has shown
  so far, both corrected by what this answer's drafts turned out to be worth. What was drafted is compared with what
  was said even where it was not verified.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from mm.engine.spec_decode.cost_model import ROWS, CostModel, Median
from mm.plugins.drafter import NO_DRAFT, Draft

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
TRIAL = 2.0
"""Passes of debt at which an account closes: what a trial may cost."""
MOST, LEAST = 32.0, -16.0
"""Passes between which an account moves, so that neither a good past nor a bad one decides for long."""
EAGER = 12.0
"""Passes that an account has to hold before drafters that read states begin with an answer's first pass: their first
draft is a pass over the whole prompt, for which an answer that ends sooner does not pay."""
WATCH_SHARE = 0.03
"""Of a pass, that handing out states takes on a small model on a CPU; on others less."""
STAKE = 2.0
"""Passes that an account has to hold before an answer begins beside another one: with less, one tries for all."""
NEAR = 8
"""Passes ahead of a question from which on what an answer's passes show is kept for it."""
LEAST_GAIN = 1.03
"""Expected speed-up from which drafts are verified: estimates err, and not drafting is never wrong."""
PROBE_EVERY = 64
"""Decisions of which one is taken the other way, so that no measured time grows old."""


@dataclass
class Account:
    """What drafting brought at about one batch size, in passes: what was gained or may be lost.

    Attributes:
        is_open: Whether there is something to spend.
        worth: Speed-up that the last drafts of all answers promised; a new answer begins with it.
        ask_s: Seconds per answer that proposing and deciding take.
        observe_s: Seconds per answer that observing takes.
    """

    balance: float = CREDIT
    is_open: bool = True
    worth: float = 1.1
    ask_s: Median = field(default_factory=Median)
    observe_s: Median = field(default_factory=Median)

    def book(self, passes: float) -> None:
        self.balance = max(LEAST, min(MOST, self.balance + passes))
        self.is_open = self.balance >= (-TRIAL if self.is_open else 0.0)

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
class ControlState:
    """What control knows of one answer.

    Attributes:
        wait: Passes until it is asked for a draft again.
        patience: How many it would be the next time.
        account: Of the batch size at which it was asked or waited last.
        worth: Speed-up that its last drafts promised there, their costs included.
        draft: What was proposed last, for comparison with what is said; verified or not.
        scores: Of its nodes, the probabilities that they are right.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    wait: int = 0
    patience: int = 1
    account: Account | None = None
    worth: float = 1.1
    draft: Draft = NO_DRAFT
    scores: Sequence[float] = ()

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
        estimated_s: By which drafted rows are expected to make the next pass longer; it is charged with that.
    """

    def __init__(self, times: CostModel) -> None:
        self._times = times
        self._acceptance = Acceptance()
        self._accounts: dict[int, Account] = {}
        self._num_choices = 0
        self._num_answers = self._num_served = 1
        self._tokens_per_pass = 1.0
        self.num_begun = 0
        self.estimated_s = 0.0

    @property
    def _current(self) -> Account:
        return self.account(self._num_served)

    def account(self, num_answers: int) -> Account:
        """Of the batch sizes from one power of two to the next."""
        return self._accounts.setdefault(num_answers.bit_length(), Account())

    def begin(self, num_answers: int, *, reads_states: bool = False) -> ControlState | None:
        """Let an answer draft; None where there is nothing to pay for that.

        Args:
            num_answers: Answers that are being served, this one too.
            reads_states: Whether its first draft is a pass over the prompt.
        """
        if not self.may_begin(num_answers):
            return None
        account = self.account(num_answers)
        self.num_begun += 1
        wait = int(reads_states and account.balance < EAGER)
        return ControlState(self._acceptance.inherit(), wait=wait, account=account, worth=account.worth)

    def may_begin(self, num_answers: int) -> bool:
        """Whether there is something to pay for an answer that begins to draft."""
        account = self.account(num_answers)
        return account.is_open and (not self.num_begun or account.balance >= STAKE)

    def end(self) -> None:
        """An answer that drafted is over."""
        self.num_begun -= 1

    def pass_begins(self, num_answers: int, num_served: int | None = None) -> None:
        """A pass is near in which so many answers decode.

        Args:
            num_served: Answers under way, those whose prompt goes in and those in line too: by these accounts are kept,
                since they tell how many will decode together. As many as decode by default.
        """
        self._num_answers, self._num_served = max(1, num_answers), num_served or max(1, num_answers)
        pass_s, later_s = self._times.plain(self._num_answers), self._times.plain(self._num_served)
        self._tokens_per_pass = max(float(self._num_answers), self._num_served * pass_s / later_s)
        self.estimated_s = 0.0
        self._current.book(ALLOWANCE)

    def is_asked(self, tracked: ControlState) -> bool:
        """Whether an answer drafts for this pass. Asked once per pass."""
        tracked.draft = NO_DRAFT
        account = self._current
        if tracked.account is not account:
            # What drafts were worth at another batch size says little. Where the account is closed, none comes in.
            tracked.account, tracked.worth, tracked.patience = account, account.worth, 1
            tracked.wait = min(tracked.wait, NEAR) if account.is_open else MAX_WAIT
        tracked.wait -= 1
        if tracked.wait >= 0:
            return False
        if not tracked.is_worth and not account.is_open:
            tracked.wait = tracked.patience = min(2 * tracked.patience, MAX_WAIT)
            return False
        return True

    def watched(self) -> None:
        """A pass hands out states for this drafter."""
        self._current.book(-WATCH_SHARE)

    def spent(self, seconds: float, *, num_asked: int = 0, num_observed: int = 0) -> None:
        """How long drafting took, and for how many answers it did what."""
        account = self._current
        account.book(-SURCHARGE * seconds / self._times.plain(self._num_answers))
        if num_asked:
            account.ask_s.observe(seconds / num_asked)
        if num_observed:
            account.observe_s.observe(seconds / num_observed)

    def took(self, seconds: float) -> None:
        """By how much drafted rows did make a pass longer; the estimate that was charged is put right."""
        self._current.book(-SURCHARGE * (seconds - self.estimated_s) / self._times.plain(self._num_answers))

    def choose(self, drafts: Sequence[Draft], tracked: Sequence[ControlState], room: int) -> list[Draft]:
        """What of the drafts is to be verified.

        Args:
            room: Rows that the pass may have beyond one per answer.
        """
        for draft, one in zip(drafts, tracked, strict=True):
            one.draft, one.scores = draft, self._scores(draft, one)
        num_answers, account = self._num_answers, self._current
        ordered = sorted((score for one in tracked for score in one.scores), reverse=True)[: min(room, ROWS[-1] - 1)]
        best, added, token_s = 0, 0.0, self._times.plain(num_answers) / self._tokens_per_pass
        if ordered and self._times.is_known(num_answers):
            seconds = self._times.table(num_answers)
            best = self._best(ordered, seconds, account.price_s * len(drafts))
            added = self.estimated_s = seconds[best] - seconds[0]
            account.book(-SURCHARGE * added / seconds[0])
        least = ordered[best - 1] if best else math.inf
        chosen = []
        for draft, one in zip(drafts, tracked, strict=True):
            mine = [i for i, score in enumerate(one.scores) if score >= least]
            price = account.price_s / token_s + added / token_s * len(mine) / max(1, best)
            gained = sum(one.scores[i] for i in mine)
            self._be_patient(one, (1 + gained) / (1 + SURCHARGE * price), len(tracked))
            chosen.append(_kept(draft, mine))
        return chosen

    def _best(self, ordered: Sequence[float], seconds: Sequence[float], asked_s: float) -> int:
        """How many of the likeliest nodes make the most tokens per second.

        Args:
            ordered: Their probabilities, falling.
            seconds: Of passes with 0, 1, ... drafted rows.
            asked_s: That drafting took.
        """
        tokens = self._tokens_per_pass
        plain = tokens / (seconds[0] + asked_s)
        best, rate = 0, 0.0
        for count, score in enumerate(ordered, start=1):
            tokens += score
            if tokens / (seconds[count] + asked_s) > rate:
                best, rate = count, tokens / (seconds[count] + asked_s)
        pays = rate >= LEAST_GAIN * plain
        self._num_choices += 1
        return best if pays != (self._num_choices % PROBE_EVERY == 0) else 0

    def _scores(self, draft: Draft, tracked: ControlState) -> Sequence[float]:
        """The probability that each node is reached and right; falls from parent to child."""
        if not draft.num_tokens:
            return ()
        acceptance = tracked.acceptance
        if draft.path_scores is not None:
            correction = acceptance.correction
            return [min(score * correction, 0.99) for score in draft.path_scores]
        by_depth = list(itertools.accumulate(map(acceptance.rate, range(max(draft.depths))), operator.mul))
        return [by_depth[depth - 1] for depth in draft.depths[1:]]

    def _be_patient(self, one: ControlState, worth: float, num_asked: int) -> None:
        """Ask the sooner, the more an answer's drafts promise for what they cost."""
        account = self._current
        one.worth += WORTH_WEIGHT * (worth - one.worth)
        account.worth += WORTH_WEIGHT / 4 / num_asked * (worth - account.worth)
        one.patience = 1 if one.is_worth else min(2 * one.patience, self._longest_wait())
        one.wait = one.patience - 1

    def _longest_wait(self) -> int:
        """Passes between two questions to an answer that has nothing to say."""
        num_answers = self._num_answers
        share = self._current.price_s * num_answers / self._times.plain(num_answers)
        return max(1, min(MAX_WAIT, math.ceil(share / IDLE_SHARE)))

    def learn(self, tracked: ControlState, verified: Draft, said: Sequence[int]) -> None:
        """Compare what was proposed with what was said, down to the depth that was verified, and one level at least.

        Args:
            verified: What of the draft was verified; may be nothing.
            said: The tokens that came.
        """
        draft, row, hits = tracked.draft, 0, []
        if not draft.num_tokens:
            return
        if verified.num_tokens:
            self._current.book((len(said) - 1) / self._tokens_per_pass)
        deepest = max(1, max(verified.depths))
        for token in said[:deepest]:
            if not draft.children[row]:
                break
            row = next((child for child in draft.children[row] if draft.token_ids[child - 1] == token), 0)
            hits.append(row > 0)
            if not row:
                break
        expected = sum(score for score, depth in zip(tracked.scores, draft.depths[1:], strict=True) if depth <= deepest)
        for acceptance in (tracked.acceptance, self._acceptance):
            acceptance.learn(hits, expected, sum(hits))


def _kept(draft: Draft, nodes: Sequence[int]) -> Draft:
    """The nodes of these indices, ascending; whoever is kept has a parent that is."""
    if len(nodes) == draft.num_tokens:
        return draft
    if not nodes:
        return NO_DRAFT
    if nodes[-1] == len(nodes) - 1:
        return draft.cut(len(nodes))
    row_of = {0: 0} | {node + 1: row for row, node in enumerate(nodes, start=1)}
    return Draft(
        token_ids=tuple(draft.token_ids[i] for i in nodes),
        parents=tuple(row_of[draft.parents[i]] for i in nodes),
        path_scores=None if draft.path_scores is None else tuple(draft.path_scores[i] for i in nodes),
        source=draft.source,
    )
