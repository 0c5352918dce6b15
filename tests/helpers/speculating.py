"""What tests of speculation share: scripted answers for the drafters of `tests.helpers.drafters`, and step times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

import mm
from mm.data.request import Request
from mm.encode.pipeline import encode
from mm.engine.spec_decode.controller import NEAR, Account, Controller
from mm.engine.spec_decode.cost_model import CostModel
from mm.engine.spec_decode.verifier import TreeVerification
from tests.helpers.drafters import TRUTH


def learn_truths(model: mm.Model, asked: Sequence[Request], answers: Sequence[Sequence[Sequence[int]]]) -> None:
    """Note the tokens that a run without drafts answered, one entry per choice of each request."""
    for request, choices in zip(asked, answers, strict=True):
        encoded = encode(request, model.encode_parts).items
        prompt = model.engine.family.splice(request.messages, [item.tokens for item in encoded])
        TRUTH[tuple(prompt.token_ids.tolist())] = [list(tokens) for tokens in choices]


def times_of(costs: dict[int, float], num_answers: int = 1) -> CostModel:
    """Seconds of a pass by its rows, of which one is each answer's own."""
    times = CostModel()
    times.observe(num_answers, 0, costs[num_answers])
    for rows, seconds in costs.items():
        if rows > num_answers:
            times.observe(num_answers, rows - num_answers, seconds)
    return times


def let_control_waver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask answers at random, before and after their first draft, and let some wait so long that nothing is kept."""
    rng = np.random.default_rng(0)

    def is_asked(self, tracked):
        tracked.wait = int(rng.choice([0, 1, 2, NEAR + 2])) if rng.random() < 0.5 else tracked.wait - 1
        return tracked.wait < 0

    monkeypatch.setattr(Controller, "is_asked", is_asked)
    monkeypatch.setattr(Controller, "choose", lambda self, drafts, tracked, room: list(drafts))
    monkeypatch.setattr(Account, "book", lambda self, passes: None)


def verify(walks: Sequence[TreeVerification], sample: Callable[[list[int]], list[int | None]]) -> None:
    """Go down all drafts to their ends, one token at a time, as the output processor does.

    Args:
        sample: Given indices of walks, the token at the row where each stands; None where the sequence is finished.
    """
    active = [i for i, walk in enumerate(walks) if not walk.is_over]
    while active:
        tokens = sample(active)
        active = [i for i, token in zip(active, tokens, strict=True) if token is not None and walks[i].follow(token)]
