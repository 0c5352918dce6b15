"""What control makes of measured times and acceptance."""

from __future__ import annotations

import numpy as np
import pytest

from mm.core.drafting import NO_DRAFT, Draft
from mm.engine.control import Controller, PassTimes
from mm.engine.report import SpeculationStats


def times_of(costs: dict[int, float]) -> PassTimes:
    times = PassTimes()
    for rows, seconds in costs.items():
        times.observe(rows, seconds)
    return times


FLAT = {1: 1.0, 2: 1.1, 4: 1.2, 8: 1.4, 16: 2.0, 32: 3.6, 64: 7.0}


def run(controller: Controller, draft: Draft, said: tuple[int, ...], batch: int = 1) -> list[int]:
    """Tokens kept in each of 120 rounds where every draft of every answer meets `said`."""
    tracked = [controller.track() for _ in range(batch)]
    kept = []
    for _ in range(120):
        asked = [one for one in tracked if controller.is_asked(one)]
        chosen = controller.choose([draft] * len(asked), asked, batch, 512) if asked else []
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
    assert run(Controller(times_of(steep)), DRAFT, (*DRAFT.token_ids, 9), batch=16)[-1] == 0


def test_a_text_that_becomes_easy_is_noticed_without_verifying():
    controller = Controller(times_of({1: 1.0, 2: 2.5, 4: 2.6, 8: 2.8}))
    tracked = controller.track()
    for said, expected in (((9,), 0), ((1, 2, 3, 4, 5, 6, 7, 8, 9), 8)):
        for _ in range(80):
            controller.is_asked(tracked)
            (verified,) = controller.choose([DRAFT], [tracked], 1, 512)
            controller.learn(tracked, verified, said[: verified.num_tokens + 1])
        assert verified.num_tokens == expected


def test_drafting_that_costs_and_does_not_pay_is_asked_less_and_less():
    controller = Controller(times_of(FLAT))
    for _ in range(100):
        controller.spent(0.5, 1)
    tracked, asked = controller.track(), 0
    for _ in range(400):
        if controller.is_asked(tracked):
            asked += 1
            controller.choose([DRAFT], [tracked], 1, 512)
            controller.learn(tracked, NO_DRAFT, (9,))
    assert 3 < asked < 30


def test_what_is_kept_of_a_tree_is_a_tree():
    draft = Draft(token_ids=(1, 2, 3, 4, 5), parents=(0, 0, 1, 1, 2), path_scores=(0.6, 0.3, 0.5, 0.05, 0.2))
    controller = Controller(times_of({1: 1.0, 2: 1.1, 3: 1.15, 4: 1.2, 8: 3.0}))
    tracked = controller.track()
    controller.is_asked(tracked)
    (kept,) = controller.choose([draft], [tracked], 1, 512)
    assert kept.token_ids == (1, 2, 3)
    assert kept.parents == (0, 0, 1)
    controller.is_asked(tracked)
    (less,) = controller.choose([draft], [tracked], 1, 2)
    assert less.token_ids == (1, 3), "the pass had room for two"


def test_times_between_what_was_measured():
    times = times_of({1: 1.0, 4: 4.0, 8: 3.0})
    assert times.seconds(np.array([1, 2, 4, 8, 12])).tolist() == pytest.approx([1.0, 2.0, 4.0, 4.0, 4.0])
    for _ in range(9):
        times.observe(4, 2.0)
    times.observe(7, 100.0)
    assert times.seconds(np.array([4])).tolist() == pytest.approx([2.0])


def test_the_names_of_the_figures():
    stats = SpeculationStats(
        num_drafts=4, num_draft_tokens=12, num_accepted_tokens=6, num_target_steps=5, num_emitted_tokens=11
    )
    assert stats.mean_acceptance_length == 2.5
    assert stats.tokens_per_target_step == 2.2
    assert stats.acceptance_rate == 0.5
