"""What control makes of measured times and acceptance."""

from __future__ import annotations

import pytest

from mm.engine.spec_decode.controller import ALLOWANCE, CREDIT, EAGER, LEAST, SURCHARGE, TRIAL, Controller, ControlState
from mm.engine.spec_decode.cost_model import CostModel
from mm.engine.spec_decode.metrics import SpecDecodeStats
from mm.plugins.drafter import Draft
from tests.helpers.speculating import times_of

FLAT = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4, 16: 2.0, 32: 3.6, 64: 7.0}


def begun(controller: Controller, batch: int = 1) -> list[ControlState]:
    tracked = [controller.begin(batch) for _ in range(batch)]
    assert all(one is not None for one in tracked)
    return [one for one in tracked if one is not None]


def run(
    controller: Controller, draft: Draft, said: tuple[int, ...], batch: int = 1, ask_s: float = 0.0, count: int = 120
) -> list[int]:
    """Tokens kept in each of some rounds where every draft of every answer meets `said`."""
    tracked = begun(controller, batch)
    kept = []
    for _ in range(count):
        controller.pass_begins(batch)
        asked = [one for one in tracked if controller.is_asked(one)]
        chosen = controller.choose([draft] * len(asked), asked, 512) if asked else []
        if asked:
            controller.spent(ask_s * len(asked), num_asked=len(asked))
        kept.append(sum(one.num_tokens for one in chosen))
        for one, verified in zip(asked, chosen, strict=True):
            right = next((i for i, (a, b) in enumerate(zip(verified.token_ids, said, strict=False)) if a != b), None)
            right = verified.num_tokens if right is None else right
            controller.learn(one, verified, said[: right + 1])
    return kept


DRAFT = Draft.chain((1, 2, 3, 4, 5, 6, 7, 8))


def test_good_drafts_are_kept_whole_and_bad_ones_not_at_all():
    assert run(Controller(times_of(FLAT)), DRAFT, (1, 2, 3, 4, 5, 6, 7, 8, 9))[-1] == 8
    bad = run(Controller(times_of(FLAT)), DRAFT, (9,))
    assert bad[0] > 0, "nothing is known at first: it is tried"
    assert sum(bad[-60:]) <= 8, "but for a probe, nothing is verified any more"


def test_half_good_drafts_are_cut_where_they_stop_paying():
    kept = run(Controller(times_of(FLAT)), DRAFT, (1, 2, 3, 9, 9, 9, 9, 9, 9))[-1]
    assert 3 <= kept <= 4


def test_a_large_batch_verifies_nothing():
    steep = {rows: float(rows) for rows in (1, 2, 4, 8, 16, 32, 64, 128)}
    assert run(Controller(times_of(steep, 16)), DRAFT, (*DRAFT.token_ids, 9), batch=16)[-1] == 0


def test_where_the_batch_grows_drafts_stop_and_where_it_shrinks_they_come_back():
    times = CostModel()
    for batch, added in ((1, 0.01), (16, 0.2)):
        times.observe(batch, 0, 1.0)
        for rows in (1, 2, 4, 8, 16, 32, 64, 128):
            times.observe(batch, rows, 1.0 + added * rows)
    controller = Controller(times)
    mostly = (1, 2, 3, 9)
    for _ in range(2):
        assert run(controller, DRAFT, mostly, batch=1)[-1] > 0
        assert sum(run(controller, DRAFT, mostly, batch=16)[-40:]) <= 16, "but for a probe"


def test_a_text_that_becomes_easy_is_noticed_without_verifying():
    controller = Controller(times_of({1: 1.0, 2: 2.5, 4: 2.6, 9: 2.8}))
    (tracked,) = begun(controller)
    for said, expected in (((9,), 0), ((1, 2, 3, 4, 5, 6, 7, 8, 9), 8)):
        for _ in range(80):
            controller.is_asked(tracked)
            (verified,) = controller.choose([DRAFT], [tracked], 512)
            controller.learn(tracked, verified, said[: verified.num_tokens + 1])
        assert verified.num_tokens == expected


def asked_rounds(controller: Controller, batch: int, count: int, said: tuple[int, ...], price_s: float) -> list[int]:
    """In which of some passes of 1 s an answer is asked, whose drafting costs so much each time."""
    tracked, rounds = begun(controller)[0], []
    for number in range(count):
        controller.pass_begins(batch)
        if controller.is_asked(tracked):
            rounds.append(number)
            (verified,) = controller.choose([DRAFT], [tracked], 512)
            controller.spent(price_s, num_asked=1)
            controller.learn(tracked, verified, said[: verified.num_tokens + 1])
    return rounds


def test_hard_text_is_asked_rarely_and_the_dearer_the_rarer():
    dear = asked_rounds(Controller(times_of(FLAT)), 1, 800, (9,), 0.3)
    cheap = asked_rounds(Controller(times_of(FLAT)), 1, 800, (9,), 0.02)
    assert 5 < len(dear) < 32
    assert 2 * len(dear) < len(cheap) < 400
    free = asked_rounds(Controller(times_of(FLAT)), 1, 800, (9,), 0.001)
    assert len(free) == 800, "what costs nothing is asked always"


def test_easy_text_is_asked_always():
    assert len(asked_rounds(Controller(times_of(FLAT)), 1, 200, (*DRAFT.token_ids, 9), 0.3)) == 200


@pytest.mark.parametrize("cost", ["asking", "observing", "verifying"])
def test_every_cost_counts_and_the_loss_is_bounded(cost):
    """Answers of ten tokens, none of which was drafted rightly: all but about `ALLOWANCE` of the time is kept."""
    controller = Controller(times_of(FLAT))
    lost, num_passes, num_begun = 0.0, 0, 0
    for _ in range(2000):
        tracked = controller.begin(1)
        num_begun += tracked is not None
        for _ in range(10):
            num_passes += 1
            controller.pass_begins(1)
            if tracked is None:
                continue
            seconds = 0.4
            if cost == "verifying":
                draft = Draft.chain((1, 2), path_scores=(0.9, 0.9))
                tracked.acceptance = type(tracked.acceptance)()  # it believes in itself for ever
                tracked.wait = 0
                if controller.is_asked(tracked):
                    (kept,) = controller.choose([draft], [tracked], 512)
                    lost += 0.15 if kept.num_tokens else 0.0
                    controller.learn(tracked, kept, (9,))
                continue
            controller.spent(seconds, **{"num_asked" if cost == "asking" else "num_observed": 1})
            lost += seconds
        if tracked is not None:
            controller.end()
    assert num_begun > 5, "it is tried again and again"
    assert lost < 0.02 * num_passes + CREDIT - LEAST


def test_an_engine_in_debt_lets_one_answer_try_and_many_when_that_pays():
    controller = Controller(times_of(FLAT))
    controller.pass_begins(1)
    controller.spent(1000.0)
    assert controller.begin(1) is None
    for _ in range(int(-LEAST / ALLOWANCE) + 10):
        controller.pass_begins(1)
    assert controller.begin(1) is not None
    assert controller.begin(1) is None, "one tries for all"
    controller.learn(ControlState(draft=DRAFT, scores=[0.9] * 8), DRAFT, (*DRAFT.token_ids, 9))
    assert controller.begin(1) is not None


def test_debt_at_one_batch_size_keeps_nobody_from_drafting_at_another():
    controller = Controller(times_of(FLAT))
    controller.pass_begins(16)
    controller.spent(1000.0)
    assert controller.begin(16) is None
    assert controller.begin(1) is not None


def test_costs_are_booked_where_it_is_decided_who_begins():
    """Answers come in one by one: while the first ones decode, what the prompts of the others cost counts for all."""
    controller = Controller(times_of(FLAT))
    controller.pass_begins(1, 16)
    controller.spent(1000.0)
    assert controller.begin(16) is None
    assert controller.begin(1) is not None
    watched = Controller(times_of(FLAT))
    for _ in range(1000):
        watched.pass_begins(0, 4)
        watched.watched()
    assert watched.begin(4) is None, "handing out states that nobody reads is a cost too"


def test_an_answer_that_comes_to_a_batch_size_in_debt_is_left_alone():
    """The first of many begins while it is alone: what it does among the others is paid from their account."""
    controller = Controller(times_of(FLAT))
    controller.pass_begins(1, 16)
    controller.spent(1000.0)
    controller.pass_begins(1)
    (alone,) = begun(controller)
    controller.pass_begins(16)
    assert not controller.is_asked(alone)
    assert not alone.is_near, "nor is anything kept for it"
    controller.pass_begins(1)
    assert not controller.is_asked(alone)
    assert alone.is_near, "alone again, it is asked soon"


def test_an_answer_that_began_is_asked_though_its_beginning_took_the_last_of_the_money():
    controller = Controller(times_of(FLAT))
    controller.account(1).book(-CREDIT)
    (tracked,) = begun(controller)
    controller.spent(1000.0)
    assert not controller.account(1).is_open
    assert controller.is_asked(tracked), "else nobody would ever know what it is worth"


def test_a_pass_is_paid_for_by_what_it_took():
    controller = Controller(times_of(FLAT))
    (tracked,) = begun(controller)
    controller.pass_begins(1)
    assert controller.is_asked(tracked)
    (kept,) = controller.choose([DRAFT], [tracked], 512)
    assert kept.num_tokens
    before = controller.account(1).balance
    controller.took(controller.estimated_s)
    assert controller.account(1).balance == before
    controller.took(controller.estimated_s + 2.0)
    assert controller.account(1).balance == pytest.approx(before - 2.0 * SURCHARGE)
    controller.pass_begins(1)
    assert not controller.estimated_s, "the next pass is another one"


def test_a_trial_goes_on_until_it_can_tell_and_then_none_begins_before_all_is_paid_back():
    controller = Controller(times_of(FLAT))
    account = controller.account(1)
    account.book(-CREDIT)
    controller.pass_begins(1)
    (tracked,) = begun(controller)
    controller.spent(TRIAL / 2)
    tracked.worth = 0.9
    assert controller.is_asked(tracked), "in debt, but not by what a trial may cost"
    controller.spent(TRIAL / 2)
    assert not controller.is_asked(tracked)
    controller.end()
    num_passes = 0
    while controller.begin(1) is None:
        controller.pass_begins(1)
        num_passes += 1
    assert num_passes * ALLOWANCE >= TRIAL
    assert account.balance >= 0


def test_a_pass_over_the_prompt_is_for_drafters_that_have_gained():
    """A draft before the first token of its own is a risk: it is taken where a drafter has shown that it pays."""
    controller = Controller(times_of(FLAT))
    controller.pass_begins(1)

    def first_asked(reads_states: bool) -> int:
        tracked = controller.begin(1, reads_states=reads_states)
        assert tracked is not None
        controller.end()
        return next(number for number in range(9) if controller.is_asked(tracked))

    assert first_asked(reads_states=False) == 0, "what reads no prompt risks nothing"
    assert first_asked(reads_states=True) == 1
    controller.learn(ControlState(draft=DRAFT, scores=[0.9] * 8), DRAFT, (*DRAFT.token_ids, 9))
    assert controller.account(1).balance > EAGER
    assert first_asked(reads_states=True) == 0


def test_what_is_kept_of_a_tree_is_a_tree():
    draft = Draft(token_ids=(1, 2, 3, 4, 5), parents=(0, 0, 1, 1, 2), path_scores=(0.6, 0.3, 0.5, 0.05, 0.2))
    controller = Controller(times_of({1: 1.0, 2: 1.1, 3: 1.15, 4: 1.2, 8: 3.0}))
    (tracked,) = begun(controller)
    controller.is_asked(tracked)
    (kept,) = controller.choose([draft], [tracked], 512)
    assert kept.token_ids == (1, 2, 3)
    assert kept.parents == (0, 0, 1)
    controller.is_asked(tracked)
    (less,) = controller.choose([draft], [tracked], 2)
    assert less.token_ids == (1, 3), "the pass had room for two"


def test_the_names_of_the_figures():
    stats = SpecDecodeStats(
        num_drafts=4, num_draft_tokens=12, num_accepted_tokens=6, num_target_steps=5, num_emitted_tokens=11
    )
    assert stats.mean_acceptance_length == 2.5
    assert stats.tokens_per_target_step == 2.2
    assert stats.acceptance_rate == 0.5


def test_a_token_is_worth_what_it_will_take_when_all_that_are_served_decode():
    """While prompts of others go in, few decode: what they gain now would have been gained in larger passes."""
    times = times_of({1: 1.0, 9: 1.3})
    times.observe(16, 0, 4.0)
    gained = []
    for num_served in (1, 16):
        controller = Controller(times)
        controller.pass_begins(1, num_served)
        before = controller.account(num_served).balance
        controller.learn(ControlState(draft=DRAFT, scores=[0.9] * 8), DRAFT, (1, 2, 9))
        gained.append(controller.account(num_served).balance - before)
    assert gained == pytest.approx([2.0, 2.0 * 4.0 / 16])


def test_what_pays_alone_is_not_verified_where_others_will_decode_beside_it():
    times = times_of({1: 1.0, 9: 2.0})
    times.observe(16, 0, 1.6)
    verified = []
    for num_served in (1, 16):
        controller = Controller(times)
        (tracked,) = begun(controller)
        controller.pass_begins(1, num_served)
        (kept,) = controller.choose([DRAFT], [tracked], 512)
        verified.append(kept.num_tokens)
    assert verified[0] > 0
    assert verified[1] == 0
