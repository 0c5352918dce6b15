"""Decisions of the controller for given step times and acceptance."""

from __future__ import annotations

import pytest

from mm.engine.spec_decode.controller import COST_FACTOR, PROMPT_DRAFT_THRESHOLD, Controller, ControlState
from mm.engine.spec_decode.cost_model import CostModel
from mm.engine.spec_decode.gain_budget import EXPLORATION_SHARE, INITIAL_BALANCE, MAX_DEFICIT, MIN_BALANCE
from mm.engine.spec_decode.metrics import SpecDecodeStats
from mm.plugins.drafter import Draft
from tests.helpers.speculating import cost_model_of

FLAT = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4, 16: 2.0, 32: 3.6, 64: 7.0}
"""Seconds of a step by its number of tokens: draft tokens are cheap."""
DRAFT = Draft.chain((1, 2, 3, 4, 5, 6, 7, 8))


def started(controller: Controller, num_seqs: int = 1) -> list[ControlState]:
    states = [controller.start(num_seqs) for _ in range(num_seqs)]
    assert all(state is not None for state in states)
    return [state for state in states if state is not None]


def accept_whole_draft(controller: Controller) -> None:
    """Record a step in which a sequence gained eight tokens."""
    state = ControlState(draft=DRAFT, probabilities=[0.9] * 8)
    controller.record_acceptance(state, DRAFT, (*DRAFT.token_ids, 9))


def run(
    controller: Controller, draft: Draft, text: tuple[int, ...], num_seqs: int = 1, propose_s: float = 0.0
) -> list[int]:
    """Number of verified tokens in each of 120 steps. Every sequence proposes `draft` and continues with `text`."""
    states = started(controller, num_seqs)
    num_verified = []
    for _ in range(120):
        controller.start_step(num_seqs)
        proposing = [state for state in states if controller.should_propose(state)]
        selected = controller.select([draft] * len(proposing), proposing, 512) if proposing else []
        if proposing:
            controller.record_cost(propose_s * len(proposing), num_proposed=len(proposing))
        num_verified.append(sum(verified.num_tokens for verified in selected))
        for state, verified in zip(proposing, selected, strict=True):
            pairs = enumerate(zip(verified.token_ids, text, strict=False))
            num_accepted = next((i for i, (drafted, token) in pairs if drafted != token), verified.num_tokens)
            controller.record_acceptance(state, verified, text[: num_accepted + 1])
    return num_verified


# ── what is verified ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_good_drafts_are_verified_whole_and_bad_ones_not_at_all():
    assert run(Controller(cost_model_of(FLAT)), DRAFT, (1, 2, 3, 4, 5, 6, 7, 8, 9))[-1] == 8
    bad = run(Controller(cost_model_of(FLAT)), DRAFT, (9,))
    assert bad[0] > 0, "nothing is known at first, so drafts are tried"
    assert sum(bad[-60:]) <= 8, "later nothing is verified, except for a probe"


def test_half_good_drafts_are_cut_where_more_tokens_do_not_pay():
    num_verified = run(Controller(cost_model_of(FLAT)), DRAFT, (1, 2, 3, 9, 9, 9, 9, 9, 9))[-1]
    assert 3 <= num_verified <= 4


def test_a_large_batch_verifies_nothing():
    steep = {count: float(count) for count in (1, 2, 4, 8, 16, 32, 64, 128)}
    assert run(Controller(cost_model_of(steep, 16)), DRAFT, (*DRAFT.token_ids, 9), num_seqs=16)[-1] == 0


def test_drafts_stop_when_the_batch_grows_and_return_when_it_shrinks():
    costs = CostModel()
    for num_seqs, added in ((1, 0.01), (16, 0.2)):
        costs.record(num_seqs, 0, 1.0)
        for count in (1, 2, 4, 8, 16, 32, 64, 128):
            costs.record(num_seqs, count, 1.0 + added * count)
    controller = Controller(costs)
    mostly_right = (1, 2, 3, 9)
    for _ in range(2):
        assert run(controller, DRAFT, mostly_right, num_seqs=1)[-1] > 0
        assert sum(run(controller, DRAFT, mostly_right, num_seqs=16)[-40:]) <= 16, "nothing, except for a probe"


def test_a_text_that_becomes_easy_is_noticed_without_verifying():
    controller = Controller(cost_model_of({1: 1.0, 2: 2.5, 4: 2.6, 9: 2.8}))
    (state,) = started(controller)
    for text, expected in (((9,), 0), ((1, 2, 3, 4, 5, 6, 7, 8, 9), 8)):
        for _ in range(80):
            controller.should_propose(state)
            (verified,) = controller.select([DRAFT], [state], 512)
            controller.record_acceptance(state, verified, text[: verified.num_tokens + 1])
        assert verified.num_tokens == expected


def test_the_selected_nodes_of_a_tree_form_a_tree():
    draft = Draft(token_ids=(1, 2, 3, 4, 5), parents=(0, 0, 1, 1, 2), path_scores=(0.6, 0.3, 0.5, 0.05, 0.2))
    controller = Controller(cost_model_of({1: 1.0, 2: 1.1, 3: 1.15, 4: 1.2, 8: 3.0}))
    (state,) = started(controller)
    controller.should_propose(state)
    (selected,) = controller.select([draft], [state], 512)
    assert selected.token_ids == (1, 2, 3)
    assert selected.parents == (0, 0, 1)
    controller.should_propose(state)
    (smaller,) = controller.select([draft], [state], 2)
    assert smaller.token_ids == (1, 3), "the step had room for two draft tokens"


def test_drafts_that_pay_alone_are_not_verified_where_others_will_decode_too():
    costs = cost_model_of({1: 1.0, 9: 2.0})
    costs.record(16, 0, 1.6)
    num_verified = []
    for num_running in (1, 16):
        controller = Controller(costs)
        (state,) = started(controller)
        controller.start_step(1, num_running)
        (selected,) = controller.select([DRAFT], [state], 512)
        num_verified.append(selected.num_tokens)
    assert num_verified[0] > 0
    assert num_verified[1] == 0


# ── how often a sequence drafts ───────────────────────────────────────────────────────────────────────────────────────


def proposing_steps(controller: Controller, num_steps: int, text: tuple[int, ...], propose_s: float) -> list[int]:
    """The steps, of 1 s each, in which one sequence gets a draft. Each draft costs `propose_s`."""
    (state,), proposing = started(controller), []
    for step in range(num_steps):
        controller.start_step(1)
        if controller.should_propose(state):
            proposing.append(step)
            (verified,) = controller.select([DRAFT], [state], 512)
            controller.record_cost(propose_s, num_proposed=1)
            controller.record_acceptance(state, verified, text[: verified.num_tokens + 1])
    return proposing


def test_a_hard_text_gets_few_drafts_and_fewer_if_they_are_expensive():
    expensive = proposing_steps(Controller(cost_model_of(FLAT)), 800, (9,), 0.3)
    cheap = proposing_steps(Controller(cost_model_of(FLAT)), 800, (9,), 0.02)
    assert 5 < len(expensive) < 32
    assert 2 * len(expensive) < len(cheap) < 400
    free = proposing_steps(Controller(cost_model_of(FLAT)), 800, (9,), 0.001)
    assert len(free) == 800, "drafts that cost nothing are proposed at every step"


def test_an_easy_text_gets_a_draft_at_every_step():
    assert len(proposing_steps(Controller(cost_model_of(FLAT)), 200, (*DRAFT.token_ids, 9), 0.3)) == 200


def test_a_draft_over_the_whole_prompt_waits_until_drafting_has_gained():
    """A draft at the first decode step is a risk for drafters that read hidden states. Later drafters may take it."""
    controller = Controller(cost_model_of(FLAT))
    controller.start_step(1)

    def first_draft(reads_states: bool) -> int:
        state = controller.start(1, reads_states=reads_states)
        assert state is not None
        controller.stop()
        return next(step for step in range(9) if controller.should_propose(state))

    assert first_draft(reads_states=False) == 0, "without a forward over the prompt there is no risk"
    assert first_draft(reads_states=True) == 1
    accept_whole_draft(controller)
    assert controller.budget(1).balance > PROMPT_DRAFT_THRESHOLD
    assert first_draft(reads_states=True) == 0


# ── the gain budget ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("cost", ["proposing", "observing", "verifying"])
def test_every_cost_is_charged_and_the_loss_is_bounded(cost):
    """Sequences of ten tokens whose drafts are always wrong lose about `EXPLORATION_SHARE` of the time."""
    controller = Controller(cost_model_of(FLAT))
    lost_s, num_steps, num_started = 0.0, 0, 0
    for _ in range(2000):
        state = controller.start(1)
        num_started += state is not None
        for _ in range(10):
            num_steps += 1
            controller.start_step(1)
            if state is None:
                continue
            if cost == "verifying":
                draft = Draft.chain((1, 2), path_scores=(0.9, 0.9))
                state.acceptance = type(state.acceptance)()  # it never learns that its estimates are wrong
                state.steps_to_draft = 0
                if controller.should_propose(state):
                    (selected,) = controller.select([draft], [state], 512)
                    lost_s += 0.15 if selected.num_tokens else 0.0
                    controller.record_acceptance(state, selected, (9,))
                continue
            controller.record_cost(0.4, **{"num_proposed" if cost == "proposing" else "num_observed": 1})
            lost_s += 0.4
        if state is not None:
            controller.stop()
    assert num_started > 5, "drafting is tried again and again"
    assert lost_s < 0.02 * num_steps + INITIAL_BALANCE - MIN_BALANCE


def test_after_a_loss_one_sequence_tries_and_more_follow_when_it_gains():
    controller = Controller(cost_model_of(FLAT))
    controller.start_step(1)
    controller.record_cost(1000.0)
    assert controller.start(1) is None
    for _ in range(int(-MIN_BALANCE / EXPLORATION_SHARE) + 10):
        controller.start_step(1)
    assert controller.start(1) is not None
    assert controller.start(1) is None, "only one tries"
    accept_whole_draft(controller)
    assert controller.start(1) is not None


def test_a_loss_at_one_batch_size_does_not_stop_drafting_at_another():
    controller = Controller(cost_model_of(FLAT))
    controller.start_step(16)
    controller.record_cost(1000.0)
    assert controller.start(16) is None
    assert controller.start(1) is not None


def test_costs_are_charged_to_the_batch_size_of_all_running_sequences():
    """Requests arrive one by one. While the first decode, the others' prompts already cost drafting time."""
    controller = Controller(cost_model_of(FLAT))
    controller.start_step(1, 16)
    controller.record_cost(1000.0)
    assert controller.start(16) is None
    assert controller.start(1) is not None
    capturing = Controller(cost_model_of(FLAT))
    for _ in range(1000):
        capturing.start_step(0, 4)
        capturing.record_capture()
    assert capturing.start(4) is None, "capturing hidden states that nobody reads is a cost too"


def test_a_sequence_that_comes_to_a_closed_budget_gets_no_drafts():
    """The first of many sequences starts while it is alone. Among the others it falls under their budget."""
    controller = Controller(cost_model_of(FLAT))
    controller.start_step(1, 16)
    controller.record_cost(1000.0)
    controller.start_step(1)
    (state,) = started(controller)
    controller.start_step(16)
    assert not controller.should_propose(state)
    assert not state.is_due_soon, "and no hidden states are captured for it"
    controller.start_step(1)
    assert not controller.should_propose(state)
    assert state.is_due_soon, "alone again, it soon gets a draft"


def test_a_sequence_that_has_started_gets_a_draft_although_its_start_closed_the_budget():
    controller = Controller(cost_model_of(FLAT))
    controller.budget(1).add(-INITIAL_BALANCE)
    (state,) = started(controller)
    controller.record_cost(1000.0)
    assert not controller.budget(1).is_open
    assert controller.should_propose(state), "otherwise its speed-up would never be known"


def test_a_step_is_charged_with_its_measured_time():
    controller = Controller(cost_model_of(FLAT))
    (state,) = started(controller)
    controller.start_step(1)
    assert controller.should_propose(state)
    (selected,) = controller.select([DRAFT], [state], 512)
    assert selected.num_tokens
    before = controller.budget(1).balance
    controller.record_step_cost(controller.estimated_s)
    assert controller.budget(1).balance == before
    controller.record_step_cost(controller.estimated_s + 2.0)
    assert controller.budget(1).balance == pytest.approx(before - 2.0 * COST_FACTOR)
    controller.start_step(1)
    assert not controller.estimated_s, "the estimate belongs to one step"


def test_a_trial_ends_at_the_largest_deficit_and_the_next_starts_when_it_is_paid_back():
    controller = Controller(cost_model_of(FLAT))
    budget = controller.budget(1)
    budget.add(-INITIAL_BALANCE)
    controller.start_step(1)
    (state,) = started(controller)
    controller.record_cost(MAX_DEFICIT / 2)
    state.speedup = 0.9
    assert controller.should_propose(state), "the deficit is smaller than a trial may cost"
    controller.record_cost(MAX_DEFICIT / 2)
    assert not controller.should_propose(state)
    controller.stop()
    num_steps = 0
    while controller.start(1) is None:
        controller.start_step(1)
        num_steps += 1
    assert num_steps * EXPLORATION_SHARE >= MAX_DEFICIT
    assert budget.balance >= 0


def test_a_token_is_worth_its_time_in_a_step_of_all_running_sequences():
    """While other prompts are computed, few sequences decode. Their tokens would otherwise come from larger steps."""
    costs = cost_model_of({1: 1.0, 9: 1.3})
    costs.record(16, 0, 4.0)
    gains = []
    for num_running in (1, 16):
        controller = Controller(costs)
        controller.start_step(1, num_running)
        before = controller.budget(num_running).balance
        controller.record_acceptance(ControlState(draft=DRAFT, probabilities=[0.9] * 8), DRAFT, (1, 2, 9))
        gains.append(controller.budget(num_running).balance - before)
    assert gains == pytest.approx([2.0, 2.0 * 4.0 / 16])


def test_the_figures_of_speculative_decoding():
    stats = SpecDecodeStats(
        num_drafts=4, num_draft_tokens=12, num_accepted_tokens=6, num_target_steps=5, num_emitted_tokens=11
    )
    assert stats.mean_acceptance_length == 2.5
    assert stats.tokens_per_target_step == 2.2
    assert stats.acceptance_rate == 0.5
