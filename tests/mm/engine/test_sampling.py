"""Sampling: the law is the model's, the noise is a function of (seed, choice, position) and of nothing else."""

import math

import pytest
import torch

from mm.engine.sampling import Sampler, new_seed

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])


def draws(sampler: Sampler, count: int) -> torch.Tensor:
    return torch.bincount(torch.tensor([sampler.choose(LOGITS, i) for i in range(count)]), minlength=5)


def chi_square(counts: torch.Tensor, law: torch.Tensor) -> float:
    expected = law * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    law = torch.softmax(LOGITS / temperature, -1)
    # 18.47 is the 0.999 quantile of chi-square with 4 degrees of freedom.
    assert chi_square(draws(Sampler(temperature=temperature, seed=3), 4000), law) < 18.47


def test_top_p_draws_from_the_smallest_set_that_reaches_the_mass():
    law = torch.softmax(LOGITS, -1)
    kept = torch.tensor([0, 1, 4])
    assert law[0] + law[1] < 0.85 < law[kept].sum()
    counts = draws(Sampler(temperature=1.0, top_p=0.85, seed=5), 4000)
    assert counts[2] == counts[3] == 0
    # 13.82 is the 0.999 quantile with 2 degrees of freedom.
    assert chi_square(counts[kept], law[kept] / law[kept].sum()) < 13.82


def test_a_tiny_top_p_is_greedy():
    sampler = Sampler(temperature=1.0, top_p=1e-6, seed=1)
    assert {sampler.choose(LOGITS, i) for i in range(50)} == {0}


def test_zero_temperature_is_argmax_with_the_lowest_index_on_ties():
    assert Sampler().choose(torch.tensor([1.0, 3.0, 3.0]), 0) == 1


def test_noise_depends_on_seed_choice_and_position_only():
    def answer(**key):
        sampler = Sampler(temperature=1.0, **key)
        return [sampler.choose(torch.zeros(1000), i) for i in range(8)]

    assert answer(seed=1, choice=0) == answer(seed=1, choice=0)
    assert len(set(answer(seed=1, choice=0))) > 1
    assert answer(seed=1, choice=0) != answer(seed=2, choice=0)
    assert answer(seed=1, choice=0) != answer(seed=1, choice=1)


def test_low_precision_logits_keep_small_probabilities():
    counts = torch.tensor(
        [Sampler(temperature=1.0, seed=9).choose(torch.zeros(2048, dtype=torch.bfloat16), i) for i in range(500)]
    )
    assert len(counts.unique()) > 400


def test_new_seeds_differ():
    assert new_seed() != new_seed()
    assert 0 <= new_seed() < math.pow(2, 63)
