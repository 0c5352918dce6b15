"""What speculative decoding counts of each step."""

from __future__ import annotations

from mm.engine.spec_decode.metrics import SpecDecodeStats


def test_figures_of_a_few_steps():
    stats = SpecDecodeStats(num_accepted_per_position=[0, 0, 0])
    for num_drafted, num_accepted in ((3, 3), (3, 1), (3, 0), (3, 2), (0, 0)):
        stats.record(num_accepted + 1, num_drafted, num_accepted)
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (4, 12, 6)
    assert stats.num_accepted_per_position == [3, 2, 1]
    assert (stats.num_target_steps, stats.num_emitted_tokens) == (5, 11)
    assert stats.mean_acceptance_length == 2.5
    assert stats.tokens_per_target_step == 2.2
    assert stats.acceptance_rate == 0.5
