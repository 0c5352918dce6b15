"""What tests of speculation share: telling the drafters of `tests.drafters` what the answers will be."""

from __future__ import annotations

from collections.abc import Sequence

import mm
from mm.core.data import Request
from mm.engine.generate import encode
from tests.drafters import TRUTH


def learn_truths(model: mm.Model, asked: Sequence[Request], answers: Sequence[Sequence[Sequence[int]]]) -> None:
    """Note the tokens that a run without drafts answered, one entry per choice of each request."""
    for request, choices in zip(asked, answers, strict=True):
        encoded = encode(request, model.encode_parts)
        prompt = model.engine.family.splice(request.messages, [item.tokens for item in encoded])
        TRUTH[tuple(prompt.token_ids.tolist())] = [list(tokens) for tokens in choices]
