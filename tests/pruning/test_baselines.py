"""Uniform (case U1), random and no reduction."""

from __future__ import annotations

import itertools

import pytest
import torch

from mm.data.tokens import VisualTokens
from mm.errors import InvalidOption
from mm.plugins.apply import reduce_tokens
from mm.plugins.registry import create
from pruning.pre_llm.random import index_hash

MASK = (1 << 64) - 1


def line(num_tokens: int) -> VisualTokens:
    return VisualTokens.full(torch.randn(num_tokens, 4), (1, 1, num_tokens), "image")


def kept(spec: str, num_tokens: int, **options) -> list[int]:
    return reduce_tokens(create("reducer", spec, **options), line(num_tokens)).indices.tolist()


def test_u1_uniform():
    assert kept("uniform", 10, keep_ratio=0.4) == [1, 3, 6, 8]
    assert kept("uniform", 576, keep_ratio=64 / 576)[:3] == [4, 13, 22]


def splitmix64(index: int, seed: int) -> int:
    """The published generator in Python integers: its (index + 1)-th output from the state `seed`."""
    value = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@pytest.mark.parametrize("seed", [0, 1, 12345, (1 << 63) - 1])
def test_the_hash_is_splitmix64(seed):
    # splitmix64(0, 0) is the first output published for state 0.
    assert splitmix64(0, 0) == 0xE220A8397B1DCDAF
    start = splitmix64(0, seed)
    hashes = [value & MASK for value in index_hash(200, seed, torch.device("cpu")).tolist()]
    assert hashes == [splitmix64(index, start) for index in range(200)]


def test_random_is_the_same_for_a_seed_and_another_for_another():
    assert kept("random", 256, seed=1) == kept("random", 256, seed=1)
    draws = [frozenset(kept("random", 256, seed=seed)) for seed in range(20)]
    assert len(set(draws)) == 20
    # Two unrelated draws of 64 of 256 share 16 on average, with a standard deviation of about 3.
    shared = [len(a & b) for a, b in itertools.pairwise(draws)]
    assert 12 < sum(shared) / len(shared) < 20


def test_random_reaches_every_token():
    assert set().union(*(kept("random", 32, seed=seed) for seed in range(60))) == set(range(32))


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1.5, "3", True, None])
def test_bad_seeds_are_refused(seed):
    with pytest.raises(InvalidOption, match="seed"):
        create("reducer", "random", seed=seed)


@pytest.mark.parametrize("keep_ratio", [0, -0.5, 1.01, float("nan"), float("inf"), True, "0.5", None, [0.5]])
@pytest.mark.parametrize("name", ["uniform", "random", "divprune"])
def test_bad_ratios_are_refused(name, keep_ratio):
    with pytest.raises(InvalidOption, match="above 0 and at most 1, got"):
        create("reducer", name, keep_ratio=keep_ratio)


def test_none_keeps_everything():
    tokens = line(7)
    assert torch.equal(reduce_tokens(create("reducer", "none"), tokens).embeddings, tokens.embeddings)
