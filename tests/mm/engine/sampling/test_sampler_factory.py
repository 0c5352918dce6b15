"""From a request to its samplers: the model's defaults, its vocabulary, and which prompt tokens count."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mm.data.checks import Range
from mm.data.outputs import TokenLogprob
from mm.data.sampling_params import SamplingParams, option
from mm.data.tokens import Prompt
from mm.engine.sampling.sampler_factory import SamplerFactory
from mm.errors import InvalidRequest
from tests.helpers.checkpoints import tokenizer
from tests.helpers.sampling import sampling_logprobs


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


def test_the_models_defaults_fill_what_the_request_leaves_open(factory):
    params = factory.resolve(SamplingParams(seed=1))
    assert (params.temperature, params.top_p, params.top_k) == (0.0, 0.9, 20)
    assert (params.floors, params.repetition_penalty) == ((), 1.0)
    given = factory.resolve(SamplingParams(seed=1, temperature=0.5, top_p=1, top_k=-1, repetition_penalty=1.2))
    assert (given.temperature, given.top_p, given.top_k, given.repetition_penalty) == (0.5, 1, 0, 1.2)


def test_endings_are_the_models_and_the_requests(factory):
    assert factory.resolve(SamplingParams(stop_token_ids=[7])).ending_token_ids == {2, 7}
    assert factory.resolve(SamplingParams(stop_token_ids=[7], ignore_eos=True)).ending_token_ids == {7}


def test_sequences_share_a_seed_and_differ_by_choice(factory):
    first, second = factory.make(SamplingParams(n=2), prompt([5], []))
    assert first.params.seed == second.params.seed
    assert (first.choice, second.choice) == (0, 1)
    assert factory.resolve(SamplingParams()).seed != factory.resolve(SamplingParams()).seed


def test_visual_tokens_are_no_repetition(factory):
    (sampler,) = factory.make(SamplingParams(repetition_penalty=2), prompt([5, 3, 3, 9], visual=[1, 2]))
    logits = torch.full((400,), 1.0)
    logprobs = sampling_logprobs(logits, sampler, 0)
    assert logprobs.argmax() not in (5, 9)
    (greedy,) = factory.make(
        SamplingParams(repetition_penalty=2, logit_bias={3: 1.0}), prompt([5, 3, 3, 9], visual=[1, 2])
    )
    assert sampling_logprobs(logits, greedy, 0).argmax() == 3
    assert greedy.penalty is not None
    assert greedy.penalty.token_ids.tolist() == [5, 9]


@pytest.mark.parametrize("fields", [{"logit_bias": {400: 1}}, {"stop_token_ids": [400]}])
def test_ids_outside_the_vocabulary_are_refused(factory, fields):
    with pytest.raises(InvalidRequest, match="400") as caught:
        factory.make(SamplingParams(**fields), prompt([5], []))
    assert caught.value.param == next(iter(fields))


def test_logprobs_come_with_text_and_bytes(factory):
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


def top_n_sigma_floor(logprobs: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Tokens more than n standard deviations below the largest go (arXiv:2411.07641)."""
    return logprobs.amax(-1, keepdim=True) - n * logprobs.std(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class WithTopNSigma(SamplingParams):
    """An option as it would be added: one declaration, and nothing anywhere else."""

    top_n_sigma: float | None = option(
        None, range=Range(low=0, high=100), off=0.0, floor=top_n_sigma_floor, help="Keeps tokens within n deviations."
    )


def test_an_option_is_added_by_one_declaration():
    """Its range is checked, the model's default is read, and it truncates: alone and beside the other options."""
    with pytest.raises(InvalidRequest, match="top_n_sigma was -1; it has to be from 0 to 100"):
        WithTopNSigma(top_n_sigma=-1)
    logits = torch.randn(400, generator=torch.Generator().manual_seed(0))
    limit = logits.max() - 1.5 * logits.std()
    own, other = SamplerFactory(Family(default_sampling={"top_n_sigma": 1.5})), SamplerFactory(Family())
    for factory, sampling in ((other, WithTopNSigma(top_n_sigma=1.5, top_p=1)), (own, WithTopNSigma())):
        (sampler,) = factory.make(replace(sampling, temperature=0.7, top_k=-1), prompt([5], []))
        kept = sampling_logprobs(logits, sampler, 0) > -torch.inf
        assert torch.equal(kept, logits >= limit)
        assert 1 < int(kept.sum()) < 400
    (both,) = other.make(WithTopNSigma(temperature=0.7, top_n_sigma=1.5, top_k=3, top_p=1), prompt([5], []))
    assert int((sampling_logprobs(logits, both, 0) > -torch.inf).sum()) == 3
    (off,) = other.make(WithTopNSigma(temperature=0.7, top_p=1, top_k=-1), prompt([5], []))
    assert not off.params.truncates
