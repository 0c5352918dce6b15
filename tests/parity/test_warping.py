"""Our logits processors against Hugging Face's processors and warpers, on random logits."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mm.data.sampling_params import min_p_floor
from mm.engine.sampling.resolved_params import ResolvedSamplingParams
from mm.engine.sampling.sampler import Sampler
from tests.helpers.sampling import sampling_logprobs

PROMPT = [1, 5, 9, 9, 20]
ANSWER = [3, 5, 7]


def reference(params: ResolvedSamplingParams, logits: torch.Tensor) -> torch.Tensor:
    """(vocab,) log-probabilities as `generate` would have them, in its own order."""
    steps = LogitsProcessorList()
    if params.logit_bias:
        steps.append(SequenceBiasLogitsProcessor([[[token_id], value] for token_id, value in params.logit_bias]))
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.ending_token_ids:
        endings = sorted(params.ending_token_ids)
        steps.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), params.min_tokens, endings))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    for _, value in params.floors:
        steps.append(MinPLogitsWarper(value))
    return steps(torch.tensor([PROMPT + ANSWER]), logits.unsqueeze(0)).log_softmax(-1)[0]


ONE_BY_ONE = {
    "temperature": ResolvedSamplingParams(temperature=0.7),
    "top_k": ResolvedSamplingParams(temperature=1.0, top_k=7),
    "top_k beyond what is sorted first": ResolvedSamplingParams(temperature=1.0, top_k=300),
    "top_k beyond the vocabulary": ResolvedSamplingParams(temperature=1.0, top_k=10_000),
    "narrow top_p": ResolvedSamplingParams(temperature=1.0, top_p=0.3),
    "wide top_p": ResolvedSamplingParams(temperature=1.9, top_p=0.98),
    "min_p": ResolvedSamplingParams(temperature=1.0, floors=((min_p_floor, 0.05),)),
    "repetition": ResolvedSamplingParams(temperature=1.0, repetition_penalty=1.3),
    "repetition encouraged": ResolvedSamplingParams(temperature=1.0, repetition_penalty=0.8),
    "bias": ResolvedSamplingParams(temperature=1.0, logit_bias=((2, 5.0), (5, -3.0))),
    "min_tokens": ResolvedSamplingParams(temperature=1.0, min_tokens=9, ending_token_ids=frozenset({2, 4})),
    "min_tokens reached": ResolvedSamplingParams(temperature=1.0, min_tokens=3, ending_token_ids=frozenset({2, 4})),
}


def assert_same_logprobs(params: ResolvedSamplingParams, logits: torch.Tensor) -> None:
    sampler = Sampler(params, prompt_token_ids=PROMPT)
    for token_id in ANSWER:
        sampler.observe(token_id)
    ours, theirs = sampling_logprobs(logits, sampler, len(ANSWER)), reference(params, logits)
    assert torch.equal(ours == -torch.inf, theirs == -torch.inf)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("params", ONE_BY_ONE.values(), ids=ONE_BY_ONE.keys())
@pytest.mark.parametrize("vocab", [40, 1000])
def test_each_step(params, vocab):
    for seed in range(5):
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 2
        assert_same_logprobs(params, logits)


@pytest.mark.parametrize("seed", range(40))
def test_all_steps_together(seed):
    rng = random.Random(seed)
    params = ResolvedSamplingParams(
        temperature=rng.uniform(0.2, 2),
        top_k=rng.choice([0, 5, 50, 500]),
        top_p=rng.choice([1.0, 0.4, 0.9, 0.99]),
        floors=rng.choice([(), ((min_p_floor, 0.01),), ((min_p_floor, 0.1),)]),
        repetition_penalty=rng.choice([1.0, 0.7, 1.5]),
        logit_bias=((rng.randrange(40), 3.0),),
        min_tokens=rng.choice([0, 9]),
        ending_token_ids=frozenset({4}),
    )
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * rng.choice([1, 4])
    assert_same_logprobs(params, logits)
