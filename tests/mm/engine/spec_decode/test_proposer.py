"""Who is charged for a step with drafts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from mm.engine.spec_decode.proposer import SpecDecoder
from tests.helpers.speculating import times_of


def test_the_time_that_drafts_add_is_charged_to_the_drafters_that_made_them():
    charged: dict[str, float] = {}

    def drafter(name: str, estimated_s: float) -> SimpleNamespace:
        took = lambda seconds: charged.__setitem__(name, seconds)  # noqa: E731
        return SimpleNamespace(controller=SimpleNamespace(estimated_s=estimated_s, took=took))

    active = [drafter("a", 1.0), drafter("b", 3.0), drafter("silent", 0.0)]
    spec_decoder = SimpleNamespace(costs=times_of({1: 2.0}), _active=active)
    SpecDecoder.record_step(spec_decoder, 1, 4, 10.0)  # type: ignore[arg-type]
    assert charged == {"a": 2.0, "b": 6.0}
    assert spec_decoder.costs.seconds(1, np.array([4]))[0] == 10.0
