"""Decides whether drafting pays, and how many drafted tokens are worth verifying.

A decode step of B sequences takes T(B) seconds and gives each sequence one token. A token is therefore worth T(B) / B
seconds, where B is the number of sequences that will decode together, those included whose prompts are not computed
yet. A drafter gains this time for every token beyond one per sequence and step. It is charged for everything that it
causes: opening sessions, proposing, observing, the decisions here, and the time that draft tokens add to a step. Gains
less costs are its gain budget, see `gain_budget.py`. There is one budget for each range of batch sizes.

Three decisions follow from these figures.

- Which sequences draft. A sequence starts to draft only while the budget is open. A sequence that comes to a batch
  size whose budget is closed gets no drafts there, and its hidden states are not captured.
- How often a sequence drafts. Each draft promises a speed-up: the tokens that it is expected to give, over what they
  cost. While the running mean of a sequence is below 1, the number of steps between two of its drafts doubles each
  time, up to a limit that bounds the cost to `IDLE_SHARE` of the time.
- How many nodes are verified. The nodes of all drafts compete, and those are kept that maximise

      (tokens of a step + sum of the kept nodes' probabilities) / (T(sequences, kept nodes) + time to draft)

  A node is never more probable than its parent, so the kept nodes of a tree form a tree.

Every draft is compared with the tokens that were emitted, also where it was not verified. A sequence whose text becomes
easy is therefore noticed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from mm.engine.spec_decode.acceptance import Acceptance, matches_by_depth
from mm.engine.spec_decode.cost_model import TOKEN_COUNTS, CostModel
from mm.engine.spec_decode.gain_budget import EXPLORATION_SHARE, GainBudget
from mm.plugins.drafter import NO_DRAFT, Draft

SPEEDUP_WEIGHT = 0.2
"""Weight of the newest draft in a sequence's expected speed-up. One bad draft is no reason to draft less."""
IDLE_SHARE = 0.005
"""Share of its time that a sequence whose drafts do not pay still spends on drafts."""
MAX_INTERVAL = 64
"""Largest number of steps between two drafts for a sequence."""
COST_FACTOR = 1.15
"""Factor on every cost. A drafter evicts data from the processor's caches, and later steps are slower for it. Nobody
measures that part."""
PROMPT_DRAFT_THRESHOLD = 12.0
"""Balance in steps from which a drafter that reads hidden states drafts at a sequence's first decode step. Its first
draft is a forward over the whole prompt. A sequence that ends sooner does not pay for that."""
CAPTURE_COST = 0.03
"""Cost of capturing hidden states in a step, as a share of the step. Measured with a small model on a CPU; larger
models and GPUs lose less."""
CONCURRENT_START_THRESHOLD = 2.0
"""Balance in steps from which a sequence may start to draft while others draft. Below it one sequence tries for all."""
CAPTURE_AHEAD = 8
"""Hidden states are captured for a sequence when its next draft is at most this many steps away."""
MIN_SPEEDUP = 1.03
"""Expected speed-up of a step from which drafts are verified. Estimates err, and a plain step is never wrong."""
PROBE_INTERVAL = 64
"""One decision in so many is reversed, so that both kinds of step are measured again."""


@dataclass
class ControlState:
    """What the controller keeps of one sequence.

    Attributes:
        steps_to_draft: Steps until the sequence gets its next draft.
        interval: Steps between its drafts. It doubles while they do not pay.
        budget: The gain budget of the batch size at which the sequence decoded last.
        speedup: Running mean of the speed-up that its drafts promised at that batch size, costs included.
        draft: What was proposed last, verified or not. It is compared with the emitted tokens.
        probabilities: (n,) probability of each of its nodes that it is accepted.
    """

    acceptance: Acceptance = field(default_factory=Acceptance)
    steps_to_draft: int = 0
    interval: int = 1
    budget: GainBudget | None = None
    speedup: float = 1.1
    draft: Draft = NO_DRAFT
    probabilities: Sequence[float] = ()

    @property
    def pays(self) -> bool:
        """Whether drafting is expected to make the sequence faster."""
        return self.speedup >= 1

    @property
    def is_due(self) -> bool:
        """Whether the sequence gets a draft for the next step."""
        return self.steps_to_draft <= 0

    @property
    def is_due_soon(self) -> bool:
        """Whether its next draft is so near that hidden states have to be captured for it."""
        return self.steps_to_draft <= CAPTURE_AHEAD


class Controller:
    """Decides when one drafter drafts, and what of its drafts is verified.

    Call `start_step` before every step, `should_propose` for each sequence, and `select` with the drafts. After the
    step call `record_step_cost` and `record_acceptance`.

    Args:
        costs: Measured step times, shared by all drafters of an engine.

    Attributes:
        num_drafting: Sequences that have started to draft and have not stopped.
        estimated_s: Seconds that draft tokens are expected to add to the coming step. They are already charged.
    """

    def __init__(self, costs: CostModel) -> None:
        self._costs = costs
        self._acceptance = Acceptance()
        self._budgets: dict[int, GainBudget] = {}
        self._num_decisions = 0
        self._num_decoding = self._num_running = 1
        self._tokens_per_step = 1.0
        self.num_drafting = 0
        self.estimated_s = 0.0

    @property
    def _budget(self) -> GainBudget:
        return self.budget(self._num_running)

    def budget(self, num_seqs: int) -> GainBudget:
        """The gain budget of a batch size. Sizes from one power of two to the next share one."""
        return self._budgets.setdefault(num_seqs.bit_length(), GainBudget())

    # ── which sequences draft ─────────────────────────────────────────────────────────────────────────────────────────

    def may_start(self, num_seqs: int) -> bool:
        """Whether a sequence may start to draft at a batch size."""
        budget = self.budget(num_seqs)
        return budget.is_open and (not self.num_drafting or budget.balance >= CONCURRENT_START_THRESHOLD)

    def start(self, num_seqs: int, *, reads_states: bool = False) -> ControlState | None:
        """Start to draft for a sequence; None where the budget does not allow it.

        Args:
            num_seqs: Sequences under way, this one included.
            reads_states: Whether the drafter's first draft is a forward over the prompt's hidden states.
        """
        if not self.may_start(num_seqs):
            return None
        budget = self.budget(num_seqs)
        self.num_drafting += 1
        delay = int(reads_states and budget.balance < PROMPT_DRAFT_THRESHOLD)
        acceptance = self._acceptance.for_new_sequence()
        return ControlState(acceptance, steps_to_draft=delay, budget=budget, speedup=budget.speedup)

    def stop(self) -> None:
        """Count a sequence that drafted as finished."""
        self.num_drafting -= 1

    # ── how often they draft ──────────────────────────────────────────────────────────────────────────────────────────

    def start_step(self, num_decoding: int, num_running: int | None = None) -> None:
        """Prepare for a step, and add the step's exploration share to the budget.

        Args:
            num_decoding: Sequences that decode in the step.
            num_running: Sequences under way, those in prefill and in the waiting queue included. They will decode
                together, so their number chooses the budget. By default `num_decoding`.
        """
        self._num_decoding, self._num_running = max(1, num_decoding), num_running or max(1, num_decoding)
        now_s, later_s = self._costs.decode_s(self._num_decoding), self._costs.decode_s(self._num_running)
        self._tokens_per_step = max(float(self._num_decoding), self._num_running * now_s / later_s)
        self.estimated_s = 0.0
        self._budget.add(EXPLORATION_SHARE)

    def should_propose(self, state: ControlState) -> bool:
        """Whether a sequence gets a draft for this step. It counts the step: call it once per step and sequence."""
        state.draft = NO_DRAFT
        budget = self._budget
        if state.budget is not budget:
            # Speed-ups measured at another batch size say little here. With a closed budget there is no draft at all.
            state.budget, state.speedup, state.interval = budget, budget.speedup, 1
            state.steps_to_draft = min(state.steps_to_draft, CAPTURE_AHEAD) if budget.is_open else MAX_INTERVAL
        state.steps_to_draft -= 1
        if state.steps_to_draft >= 0:
            return False
        if not state.pays and not budget.is_open:
            state.steps_to_draft = state.interval = min(2 * state.interval, MAX_INTERVAL)
            return False
        return True

    def _schedule_next(self, state: ControlState, speedup: float, num_proposed: int) -> None:
        """Update a sequence's expected speed-up, and choose the step of its next draft."""
        budget = self._budget
        state.speedup += SPEEDUP_WEIGHT * (speedup - state.speedup)
        budget.speedup += SPEEDUP_WEIGHT / 4 / num_proposed * (speedup - budget.speedup)
        state.interval = 1 if state.pays else min(2 * state.interval, self._longest_interval())
        state.steps_to_draft = state.interval - 1

    def _longest_interval(self) -> int:
        """Steps between two drafts at which drafts that do not pay cost `IDLE_SHARE` of the time."""
        num_seqs = self._num_decoding
        share = self._budget.draft_s * num_seqs / self._costs.decode_s(num_seqs)
        return max(1, min(MAX_INTERVAL, math.ceil(share / IDLE_SHARE)))

    # ── what is verified ──────────────────────────────────────────────────────────────────────────────────────────────

    def select(self, drafts: Sequence[Draft], states: Sequence[ControlState], max_tokens: int) -> list[Draft]:
        """The part of each draft that is worth verifying; it may be empty.

        Args:
            drafts: One for each sequence for which `should_propose` was true.
            states: Of the same sequences.
            max_tokens: Draft tokens that the step can take in all.
        """
        for draft, state in zip(drafts, states, strict=True):
            state.draft, state.probabilities = draft, state.acceptance.path_probabilities(draft)
        num_seqs, budget = self._num_decoding, self._budget
        limit = min(max_tokens, TOKEN_COUNTS[-1] - 1)
        ordered = sorted((value for state in states for value in state.probabilities), reverse=True)[:limit]
        num_kept, added_s, token_s = 0, 0.0, self._costs.decode_s(num_seqs) / self._tokens_per_step
        if ordered and self._costs.is_measured(num_seqs):
            step_s = self._costs.step_table(num_seqs)
            num_kept = self._num_worth_verifying(ordered, step_s, budget.draft_s * len(drafts))
            added_s = self.estimated_s = step_s[num_kept] - step_s[0]
            budget.add(-COST_FACTOR * added_s / step_s[0])
        threshold = ordered[num_kept - 1] if num_kept else math.inf
        selected = list[Draft]()
        for draft, state in zip(drafts, states, strict=True):
            nodes = [i for i, value in enumerate(state.probabilities) if value >= threshold]
            cost = budget.draft_s / token_s + added_s / token_s * len(nodes) / max(1, num_kept)
            gain = sum(state.probabilities[i] for i in nodes)
            self._schedule_next(state, (1 + gain) / (1 + COST_FACTOR * cost), len(states))
            selected.append(_subtree(draft, nodes))
        return selected

    def _num_worth_verifying(self, ordered: Sequence[float], step_s: Sequence[float], draft_s: float) -> int:
        """How many of the most probable nodes give the most tokens per second.

        Args:
            ordered: Probabilities of the nodes, falling.
            step_s: Seconds of a step with 0, 1, ... draft tokens.
            draft_s: Seconds that drafting took.
        """
        tokens = self._tokens_per_step
        plain = tokens / (step_s[0] + draft_s)
        best, rate = 0, 0.0
        for count, probability in enumerate(ordered, start=1):
            tokens += probability
            if tokens / (step_s[count] + draft_s) > rate:
                best, rate = count, tokens / (step_s[count] + draft_s)
        pays = rate >= MIN_SPEEDUP * plain
        self._num_decisions += 1
        return best if pays != (self._num_decisions % PROBE_INTERVAL == 0) else 0

    # ── what it cost and gained ───────────────────────────────────────────────────────────────────────────────────────

    def record_capture(self) -> None:
        """Charge a step that captures hidden states for a sequence."""
        self._budget.add(-CAPTURE_COST)

    def record_cost(self, seconds: float, *, num_proposed: int = 0, num_observed: int = 0) -> None:
        """Charge the time that drafting took.

        Args:
            num_proposed: Sequences for which drafts were proposed in this time.
            num_observed: Sequences for which the drafter observed a step in this time.
        """
        budget = self._budget
        budget.add(-COST_FACTOR * seconds / self._costs.decode_s(self._num_decoding))
        if num_proposed:
            budget.propose_s.add(seconds / num_proposed)
        if num_observed:
            budget.observe_s.add(seconds / num_observed)

    def record_step_cost(self, seconds: float) -> None:
        """Charge the seconds that draft tokens added to the step. They replace the estimate that was charged."""
        self._budget.add(-COST_FACTOR * (seconds - self.estimated_s) / self._costs.decode_s(self._num_decoding))

    def record_acceptance(self, state: ControlState, verified: Draft, emitted: Sequence[int]) -> None:
        """Compare what was proposed for a sequence with its new tokens, and add what was gained to the budget.

        The comparison goes down to the depth that was verified, and to depth 1 at least.

        Args:
            verified: The part of the draft that was verified; it may be empty.
            emitted: The tokens that the step gave the sequence.
        """
        draft = state.draft
        if not draft.num_tokens:
            return
        if verified.num_tokens:
            self._budget.add((len(emitted) - 1) / self._tokens_per_step)
        max_depth = max(1, max(verified.depths))
        matches = matches_by_depth(draft, emitted, max_depth)
        compared = zip(state.probabilities, draft.depths[1:], strict=True)
        expected = sum(probability for probability, depth in compared if depth <= max_depth)
        for acceptance in (state.acceptance, self._acceptance):
            acceptance.record(matches, expected)


def _subtree(draft: Draft, nodes: Sequence[int]) -> Draft:
    """The draft with some of its tokens only.

    Args:
        nodes: Ascending indices of the tokens. The parent of each is among them, or is the root.
    """
    if len(nodes) == draft.num_tokens:
        return draft
    if not nodes:
        return NO_DRAFT
    if nodes[-1] == len(nodes) - 1:
        return draft.cut(len(nodes))
    new_index = {0: 0} | {node + 1: index for index, node in enumerate(nodes, start=1)}
    return Draft(
        token_ids=tuple(draft.token_ids[i] for i in nodes),
        parents=tuple(new_index[draft.parents[i]] for i in nodes),
        path_scores=None if draft.path_scores is None else tuple(draft.path_scores[i] for i in nodes),
        source=draft.source,
    )
