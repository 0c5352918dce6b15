"""Sampling: the probs is the model's, the noise is a function of (seed, choice, position) and of nothing else."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch

from mm.data.sampling_params import min_p_floor
from mm.engine.sampling.noise import gumbel
from mm.engine.sampling.resolved_params import ResolvedSamplingParams, new_seed
from mm.engine.sampling.sample import sample
from mm.engine.sampling.sampler import SampledToken, Sampler
from mm.errors import EngineError
from tests.helpers.sampling import noise, sampling_logprobs

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def pick(sampler: Sampler, logits: torch.Tensor, position: int = 0) -> SampledToken:
    (sampled,) = sample(logits.unsqueeze(0), [sampler], [position])
    assert isinstance(sampled, SampledToken)
    return sampled


def draws(params: ResolvedSamplingParams, count: int, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    sampled = sample(logits.expand(count, -1), [Sampler(params)] * count, range(count))
    return torch.bincount(torch.tensor([c.token_id for c in sampled]), minlength=logits.shape[0])


def chi_square(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    probs = torch.softmax(LOGITS / temperature, -1)
    # 18.47 is the 0.999 quantile of chi-square with 4 degrees of freedom.
    assert chi_square(draws(ResolvedSamplingParams(temperature=temperature, seed=3), 4000), probs) < 18.47


def test_top_p_draws_from_the_smallest_set_that_reaches_the_mass():
    probs = torch.softmax(LOGITS, -1)
    kept = torch.tensor([0, 1, 4])
    assert probs[0] + probs[1] < 0.85 < probs[kept].sum()
    counts = draws(ResolvedSamplingParams(temperature=1.0, top_p=0.85, seed=5), 4000)
    assert counts[2] == counts[3] == 0
    # 13.82 is the 0.999 quantile with 2 degrees of freedom.
    assert chi_square(counts[kept], probs[kept] / probs[kept].sum()) < 13.82


def test_draws_follow_penalised_and_biased_logits():
    sampler = Sampler(
        ResolvedSamplingParams(temperature=1.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((3, 2.0),))
    )
    for token_id in (0, 0, 4):
        sampler.observe(token_id)
    probs = torch.softmax(torch.tensor([2.0 - 1.25, 1.0, 0.0, 1.0, 0.5 - 0.75]), -1)
    sampled = sample(LOGITS.expand(4000, -1), [sampler] * 4000, range(4000))
    counts = torch.bincount(torch.tensor([c.token_id for c in sampled]), minlength=5)
    assert chi_square(counts, probs) < 18.47


def test_the_prompt_counts_for_repetition_alone():
    penalties = {"repetition_penalty": 2.0, "frequency_penalty": 1.0, "presence_penalty": 0.5}
    params = ResolvedSamplingParams(temperature=1.0, **penalties)
    sampler = Sampler(params, prompt_token_ids=[0, 0, 3])
    for token_id in (4, 4, 3):
        sampler.observe(token_id)
    expected = torch.tensor([2.0 / 2, 1.0, 0.0, -1.0 * 2 - 1.5, 0.5 / 2 - 2.5]).log_softmax(-1)
    torch.testing.assert_close(sampling_logprobs(LOGITS, sampler, 3), expected)


def test_the_noise_is_splitmix64():
    # The first numbers of the reference implementation (prng.di.unimi.it/splitmix64.c) for the seed 1234567.
    numbers = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    expected = [-math.log(-math.log(((number >> 12) + 0.5) / 2**52)) for number in numbers]
    assert gumbel(torch.tensor([1234567]), torch.arange(3)).tolist() == pytest.approx(expected, rel=1e-12)


def test_noise_of_neighbouring_tokens_and_positions_is_independent():
    numbers = torch.stack([noise(Sampler(ResolvedSamplingParams(seed=1)), position, 1000) for position in range(200)])
    # Standard Gumbel: mean 0.5772, variance pi^2 / 6; standard errors of 200,000 numbers are 0.003 and 0.008.
    assert abs(float(numbers.mean()) - 0.5772) < 0.012
    assert abs(float(numbers.var()) - math.pi**2 / 6) < 0.035
    centred = numbers - numbers.mean()
    for neighbour in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(float(neighbour.mean())) < 0.015


def test_a_tiny_top_p_is_greedy():
    assert draws(ResolvedSamplingParams(temperature=1.0, top_p=1e-6, seed=1), 50, LOGITS.roll(2))[2] == 50


@pytest.mark.parametrize("vocab", [1, 5, 2000])  # of the largest only a part is summed at first
@pytest.mark.parametrize("temperature", [5e-324, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [5e-324, 1e-46, 1e-40, 1 - 2**-53, 1.0])
def test_a_token_is_drawn_at_the_ends_of_every_range(vocab: int, temperature: float, top_p: float):
    """5e-324 is the smallest number that JSON can carry; it is 0 in float32."""
    for logits in (torch.zeros(vocab), torch.arange(vocab) * 1e4, torch.full((vocab,), -3e38)):
        for min_p, top_k in itertools.product((0.0, 5e-324, 1.0), (0, 1, 2**31 - 1)):
            params = ResolvedSamplingParams(
                temperature=temperature, top_p=top_p, floors=((min_p_floor, min_p),), top_k=top_k, seed=1
            )
            drawn = pick(Sampler(params), logits.float()).token_id
            assert 0 <= drawn < vocab
            if top_p < 0.5:
                assert logits[drawn] == logits.max()


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
def test_the_coldest_temperatures_are_greedy(temperature):
    assert draws(ResolvedSamplingParams(temperature=temperature, seed=1), 50, LOGITS.roll(2))[2] == 50


def test_zero_temperature_is_argmax_with_the_lowest_index_on_ties():
    assert pick(Sampler(ResolvedSamplingParams()), torch.tensor([1.0, 3.0, 3.0])).token_id == 1
    assert pick(Sampler(ResolvedSamplingParams(num_logprobs=0)), torch.tensor([1.0, 3.0, 3.0])).token_id == 1


def test_noise_depends_on_seed_choice_and_position_only():
    def answer(seed: int, choice: int = 0):
        sampler = Sampler(ResolvedSamplingParams(temperature=1.0, seed=seed), choice)
        return [pick(sampler, torch.zeros(1000), i).token_id for i in range(8)]

    assert answer(1) == answer(1)
    assert len(set(answer(1))) > 1
    assert answer(1) != answer(2)
    assert answer(1) != answer(1, choice=1)


def test_low_precision_logits_keep_small_probabilities():
    counts = draws(ResolvedSamplingParams(temperature=1.0, seed=9), 500, torch.zeros(2048, dtype=torch.bfloat16))
    assert int((counts > 0).sum()) > 400


def test_new_seeds_differ():
    assert new_seed() != new_seed()
    assert 0 <= new_seed() < math.pow(2, 63)


def any_params(rng: random.Random, vocab: int) -> ResolvedSamplingParams:
    """Every field at its neutral value as often as not."""
    maybe = lambda value, neutral: value if rng.random() < 0.4 else neutral  # noqa: E731
    return ResolvedSamplingParams(
        temperature=maybe(rng.choice([0.3, 1.0, 1.7]), 0.0),
        top_k=maybe(rng.choice([1, 3, 40, 255, 256, 400, 5000]), 0),
        top_p=maybe(rng.choice([0.1, 0.5, 0.9, 0.999]), 1.0),
        floors=maybe(((min_p_floor, rng.choice([0.01, 0.2])),), ()),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.5, 2), 1.0),
        logit_bias=maybe(tuple((i, rng.uniform(-9, 9)) for i in rng.sample(range(vocab), 3)), ()),
        seed=rng.randrange(100),
        min_tokens=maybe(rng.randrange(6), 0),
        ending_token_ids=maybe(frozenset(rng.sample(range(vocab), 2)), frozenset()),
        num_logprobs=maybe(rng.choice([0, 1, 5, 20]), None),
    )


@pytest.mark.parametrize("vocab", [30, 600])
@pytest.mark.parametrize("seed", range(8))
def test_a_row_comes_out_alone_as_in_any_batch_in_any_order(vocab, seed):
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    # Halves make ties, and a small range wide nuclei.
    logits = (torch.randn(24, vocab, generator=generator) * rng.choice([2, 8])).round().div(2)
    logits[rng.randrange(24), 3] = torch.nan
    all_params = [any_params(rng, vocab) for _ in range(24)]
    prompts = [[rng.randrange(vocab) for _ in range(4)] for _ in all_params]
    histories = [[rng.randrange(vocab) for _ in range(rng.randrange(9))] for _ in all_params]
    samplers = []
    for i, params in enumerate(all_params):
        samplers.append(Sampler(params, i % 3, prompt_token_ids=prompts[i]))
        for token_id in histories[i]:
            samplers[-1].observe(token_id)
    positions = [len(history) for history in histories]
    alone = [result_of(sample(logits[i : i + 1], [samplers[i]], [positions[i]])[0]) for i in range(24)]
    assert sum(isinstance(sampled, str) for sampled in alone) == 1

    order = rng.sample(range(24), 24)
    for rows in (order, order[:7], order[7:]):
        batch = sample(logits[rows], [samplers[i] for i in rows], [positions[i] for i in rows])
        assert [result_of(sampled) for sampled in batch] == [alone[i] for i in rows]


@pytest.mark.parametrize("seed", range(10))
def test_a_new_sampler_that_observed_the_same_tokens_is_its_equal(seed):
    rng = random.Random(seed)
    params = replace(any_params(rng, 50), temperature=0.9, repetition_penalty=1.4, frequency_penalty=0.7)
    rows = torch.randn(40, 50, generator=torch.Generator().manual_seed(seed))
    first = Sampler(params, prompt_token_ids=[1, 2, 3])
    answer: list[int] = []
    for position, row in enumerate(rows):
        again = Sampler(params, prompt_token_ids=[3, 2, 1])
        for token_id in answer:
            again.observe(token_id)
        sampled = pick(first, row, position)
        assert pick(again, row, position) == sampled
        first.observe(sampled.token_id)
        answer.append(sampled.token_id)


def result_of(sampled: SampledToken | EngineError) -> SampledToken | str:
    return str(sampled) if isinstance(sampled, EngineError) else sampled


@pytest.mark.parametrize("seed", range(6))
def test_the_token_is_the_largest_of_logprobs_and_noise(seed):
    rng = random.Random(seed)
    for vocab in (30, 600):
        params = any_params(rng, vocab)
        sampler = Sampler(params, 1, prompt_token_ids=[4])
        for token_id in (1, 2, 2):
            sampler.observe(token_id)
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3
        before = logits.clone()
        logprobs = sampling_logprobs(logits, sampler, 3)
        assert torch.equal(logits, before)
        assert int((logprobs + noise(sampler, 3, vocab)).argmax()) == pick(sampler, logits, 3).token_id
        assert float(logprobs.exp().sum()) == pytest.approx(1, abs=1e-4)
        if params.temperature == 0:
            assert int((logprobs == 0).sum()) == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "params",
    [ResolvedSamplingParams(), ResolvedSamplingParams(temperature=1.0), ResolvedSamplingParams(num_logprobs=3)],
    ids=["greedy", "warm", "logprobs"],
)
def test_logits_that_are_no_numbers_cost_their_own_row(value, params):
    logits = LOGITS.repeat(3, 1)
    logits[1, 2] = value
    first, broken, last = sample(logits, [Sampler(params)] * 3, [0, 0, 0])
    assert isinstance(broken, EngineError)
    assert "not finite" in str(broken)
    assert first == last == pick(Sampler(params), LOGITS)


def test_a_row_of_minus_infinity_is_an_error():
    (broken,) = sample(torch.full((1, 4), -torch.inf), [Sampler(ResolvedSamplingParams())], [0])
    assert isinstance(broken, EngineError)


def test_logprobs_come_from_the_raw_logits():
    params = ResolvedSamplingParams(temperature=2.0, top_k=1, logit_bias=((3, 90.0),), num_logprobs=3)
    sampled = pick(Sampler(params), LOGITS)
    raw = LOGITS.log_softmax(-1)
    assert sampled.token_id == 3
    assert sampled.logprob == pytest.approx(float(raw[3]), abs=1e-6)
    assert [token_id for token_id, _ in sampled.top] == [0, 1, 4]
    assert [value for _, value in sampled.top] == pytest.approx(raw[[0, 1, 4]].tolist(), abs=1e-6)


def test_endings_are_held_off_until_there_are_enough_tokens():
    params = ResolvedSamplingParams(min_tokens=2, ending_token_ids=frozenset({0, 1}), logit_bias=((0, 100.0),))
    sampler = Sampler(params)
    assert [pick(sampler, LOGITS, position).token_id for position in range(3)] == [4, 4, 0]
    assert sampler.ends(0)
    assert not sampler.ends(4)


def test_no_token_left_is_an_error():
    params = ResolvedSamplingParams(min_tokens=1, ending_token_ids=frozenset(range(5)))
    (sampled,) = sample(LOGITS.unsqueeze(0), [Sampler(params)], [0])
    assert isinstance(sampled, EngineError)
