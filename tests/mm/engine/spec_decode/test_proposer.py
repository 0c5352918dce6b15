"""What speculation notes of each round."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from mm.engine.spec_decode.metrics import SpecDecodeStats
from mm.engine.spec_decode.proposer import SpecDecoder
from mm.engine.spec_decode.spec_state import StepResult
from mm.engine.spec_decode.verifier import TreeVerification
from mm.plugins.drafter import Draft
from tests.helpers.speculating import times_of


def test_figures_of_a_few_rounds():
    stats = SpecDecodeStats(num_accepted_per_position=[0, 0, 0])
    job = SimpleNamespace(num_drafts=0, num_drafted_tokens=0, num_accepted_tokens=0)
    for drafted, accepted in ((3, 3), (3, 1), (3, 0), (3, 2), (0, 0)):
        walk = TreeVerification(Draft.chain(tuple(range(drafted))), path=list(range(accepted + 1)))
        said = list(range(accepted + 1))
        one = StepResult(answer=SimpleNamespace(job=job), root=9, first=0, walk=walk, said=said)  # type: ignore[arg-type]
        SpecDecoder.count(SimpleNamespace(stats=stats), one)  # type: ignore[arg-type]
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (4, 12, 6)
    assert stats.num_accepted_per_position == [3, 2, 1]
    assert (stats.num_target_steps, stats.num_emitted_tokens) == (5, 11)
    assert stats.mean_acceptance_length == 2.5
    assert stats.tokens_per_target_step == 2.2
    assert stats.acceptance_rate == 0.5
    assert (job.num_drafts, job.num_drafted_tokens, job.num_accepted_tokens) == (4, 12, 6)


def test_what_a_pass_took_longer_is_charged_to_those_whose_rows_it_had():
    charged: dict[str, float] = {}

    def drafter(name: str, estimated_s: float) -> SimpleNamespace:
        took = lambda seconds: charged.__setitem__(name, seconds)  # noqa: E731
        return SimpleNamespace(controller=SimpleNamespace(estimated_s=estimated_s, took=took))

    speaking = [drafter("a", 1.0), drafter("b", 3.0), drafter("silent", 0.0)]
    engine_side = SimpleNamespace(times=times_of({1: 2.0}), _speaking=speaking)
    SpecDecoder.took(engine_side, 1, 4, 10.0)  # type: ignore[arg-type]
    assert charged == {"a": 2.0, "b": 6.0}
    assert engine_side.times.seconds(1, np.array([4]))[0] == 10.0
