"""Helpers of the tests of speculative decoding: true continuations for test drafters, and step times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

import mm
from mm.data.request import Request
from mm.encode.pipeline import encode
from mm.engine.spec_decode.controller import CAPTURE_AHEAD, Controller
from mm.engine.spec_decode.cost_model import CostModel
from mm.engine.spec_decode.gain_budget import GainBudget
from mm.engine.spec_decode.verifier import TreeVerification
from tests.helpers.drafters import TRUTH


def learn_truths(model: mm.Model, requests: Sequence[Request], outputs: Sequence[Sequence[Sequence[int]]]) -> None:
    """Give the drafters of `tests.helpers.drafters` the true continuations.

    Args:
        outputs: For each request, the tokens of each choice, from a run without drafts.
    """
    for request, choices in zip(requests, outputs, strict=True):
        encoded = encode(request, model.encode_parts).items
        prompt = model.engine.family.splice(request.messages, [item.tokens for item in encoded])
        TRUTH[tuple(prompt.token_ids.tolist())] = [list(tokens) for tokens in choices]


def cost_model_of(step_s: dict[int, float], num_seqs: int = 1) -> CostModel:
    """A cost model that has seen steps of `num_seqs` sequences.

    Args:
        step_s: Number of tokens of a step to its seconds. All tokens but one per sequence are draft tokens.
    """
    costs = CostModel()
    costs.record(num_seqs, 0, step_s[num_seqs])
    for num_tokens, seconds in step_s.items():
        if num_tokens > num_seqs:
            costs.record(num_seqs, num_tokens - num_seqs, seconds)
    return costs


def draft_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft for sequences at random steps. Some intervals are so long that no hidden states are captured."""
    rng = np.random.default_rng(0)

    def should_propose(self, state):
        if rng.random() < 0.5:
            state.steps_to_draft = int(rng.choice([0, 1, 2, CAPTURE_AHEAD + 2]))
        else:
            state.steps_to_draft -= 1
        return state.steps_to_draft < 0

    monkeypatch.setattr(Controller, "should_propose", should_propose)
    monkeypatch.setattr(Controller, "select", lambda self, drafts, states, max_tokens: list(drafts))
    monkeypatch.setattr(GainBudget, "add", lambda self, steps: None)


def verify(verifications: Sequence[TreeVerification], sample: Callable[[list[int]], list[int | None]]) -> None:
    """Follow all drafts to their ends, one token at a time, as the output processor does.

    Args:
        sample: Given indices of verifications, the token at the node of each; None where the sequence is finished.
    """
    active = [i for i, verification in enumerate(verifications) if not verification.is_over]
    while active:
        tokens = sample(active)
        followed = zip(active, tokens, strict=True)
        active = [i for i, token in followed if token is not None and verifications[i].follow(token)]
