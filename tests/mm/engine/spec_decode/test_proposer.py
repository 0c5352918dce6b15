"""Which drafters are charged for a step with drafts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from mm.engine.spec_decode.proposer import SpecDecoder
from tests.helpers.speculating import cost_model_of


def test_the_time_that_drafts_add_is_charged_to_the_drafters_that_made_them():
    charged: dict[str, float] = {}

    def drafter(name: str, estimated_s: float) -> SimpleNamespace:
        def record_step_cost(seconds: float) -> None:
            charged[name] = seconds

        return SimpleNamespace(controller=SimpleNamespace(estimated_s=estimated_s, record_step_cost=record_step_cost))

    active = [drafter("a", 1.0), drafter("b", 3.0), drafter("silent", 0.0)]
    spec_decoder = SimpleNamespace(costs=cost_model_of({1: 2.0}), _active=active)
    SpecDecoder.record_step(spec_decoder, 1, 4, 10.0)  # type: ignore[arg-type]
    assert charged == {"a": 2.0, "b": 6.0}
    assert spec_decoder.costs.step_s(1, np.array([4]))[0] == 10.0
