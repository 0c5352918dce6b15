"""What tests of speculation share: the answers that drafters of `tests.drafters` are told, and times of passes."""

from __future__ import annotations

from collections.abc import Sequence

import mm
from mm.core.data import Request
from mm.engine.generate import encode
from mm.engine.pass_times import PassTimes
from tests.drafters import TRUTH


def learn_truths(model: mm.Model, asked: Sequence[Request], answers: Sequence[Sequence[Sequence[int]]]) -> None:
    """Note the tokens that a run without drafts answered, one entry per choice of each request."""
    for request, choices in zip(asked, answers, strict=True):
        encoded = encode(request, model.encode_parts)
        prompt = model.engine.family.splice(request.messages, [item.tokens for item in encoded])
        TRUTH[tuple(prompt.token_ids.tolist())] = [list(tokens) for tokens in choices]


def times_of(costs: dict[int, float], num_answers: int = 1) -> PassTimes:
    """Seconds of a pass by its rows, of which one is each answer's own."""
    times = PassTimes()
    times.observe(num_answers, 0, costs[num_answers])
    for rows, seconds in costs.items():
        if rows > num_answers:
            times.observe(num_answers, rows - num_answers, seconds)
    return times
