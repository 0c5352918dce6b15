"""From a request to its samplers: the model's defaults, its vocabulary, and which prompt tokens count."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mm.data.outputs import TokenLogprob
from mm.data.sampling_params import SamplingParams
from mm.data.tokens import Prompt
from mm.engine.sampling.sampler_factory import SamplerFactory
from mm.errors import InvalidRequest
from tests.helpers.checkpoints import tokenizer


@dataclass
class Family:
    default_sampling: dict[str, float] = field(default_factory=lambda: {"temperature": 0.0, "top_p": 0.9, "top_k": 20})
    eos_token_ids: frozenset[int] = frozenset({2})
    text_tokenizer: Any = field(default_factory=lambda: tokenizer().backend_tokenizer)
    language: Any = field(default_factory=lambda: SimpleNamespace(vocab_size=400))


def prompt(ids: list[int], visual: list[int]) -> Prompt:
    length = len(ids)
    return Prompt(
        token_ids=torch.tensor(ids),
        embeddings=torch.zeros(length, 4),
        positions=torch.arange(length).unsqueeze(0),
        next_position=length,
        is_visual=torch.tensor([i in visual for i in range(length)]),
    )


@pytest.fixture(scope="module")
def factory() -> SamplerFactory:
    return SamplerFactory(Family())


def test_the_models_defaults_hold_where_the_request_is_silent(factory):
    rule = factory.rule(SamplingParams(seed=1))
    assert (rule.temperature, rule.top_p, rule.top_k, rule.min_p, rule.repetition_penalty) == (0.0, 0.9, 20, 0.0, 1.0)
    given = factory.rule(SamplingParams(seed=1, temperature=0.5, top_p=1, top_k=-1, repetition_penalty=1.2))
    assert (given.temperature, given.top_p, given.top_k, given.repetition_penalty) == (0.5, 1, 0, 1.2)


def test_endings_are_the_models_and_the_requests(factory):
    assert factory.rule(SamplingParams(stop_token_ids=[7])).ending_token_ids == {2, 7}
    assert factory.rule(SamplingParams(stop_token_ids=[7], ignore_eos=True)).ending_token_ids == {7}


def test_answers_share_a_seed_and_differ_by_choice(factory):
    first, second = factory.make(SamplingParams(n=2), prompt([5], []))
    assert first.rule.seed == second.rule.seed
    assert (first.choice, second.choice) == (0, 1)
    assert factory.rule(SamplingParams()).seed != factory.rule(SamplingParams()).seed


def test_visual_rows_are_no_repetition(factory):
    (sampler,) = factory.make(SamplingParams(repetition_penalty=2), prompt([5, 3, 3, 9], visual=[1, 2]))
    logits = torch.full((400,), 1.0)
    law = sampler.law(logits, 0)
    assert law.argmax() not in (5, 9)
    (greedy,) = factory.make(
        SamplingParams(repetition_penalty=2, logit_bias={3: 1.0}), prompt([5, 3, 3, 9], visual=[1, 2])
    )
    assert greedy.law(logits, 0).argmax() == 3
    assert greedy.penalty is not None
    assert greedy.penalty.token_ids.tolist() == [5, 9]


@pytest.mark.parametrize("fields", [{"logit_bias": {400: 1}}, {"stop_token_ids": [400]}])
def test_ids_outside_the_vocabulary_are_refused(factory, fields):
    with pytest.raises(InvalidRequest, match="400") as caught:
        factory.make(SamplingParams(**fields), prompt([5], []))
    assert caught.value.param == next(iter(fields))


def test_tokens_tell_their_bytes(factory):
    vocabulary = factory.vocabulary
    first, *_, last = vocabulary.tokenizer.encode("\U0001f600", add_special_tokens=False).ids
    text = vocabulary.logprob(first, -1.5, ((last, -2.0), (2, -3.0), (399, -4.0)))
    assert text.token == "\\xf0"
    assert text.utf8 == b"\xf0"
    assert [t.utf8 for t in text.top] == [b"\x80", None, None]
    assert text.top[1].token == vocabulary.tokenizer.id_to_token(2)
    assert vocabulary.logprob(vocabulary.tokenizer.token_to_id("a"), 0.0).token == "a"
    assert pickle.loads(pickle.dumps(text)) == text
    assert isinstance(text, TokenLogprob)
