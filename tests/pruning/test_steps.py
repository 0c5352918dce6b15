"""A budget over crops and frames (case Q0), and decisions within each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm.data.quota import quota
from mm.data.tokens import VisualTokens
from mm.plugins.apply import reduce_tokens
from mm.plugins.reducer import Reduction
from pruning.base import merge_means
from pruning.helpers.steps import Step, StepReducer, runs
from pruning.pre_llm.uniform import Uniform


def test_q0_quota():
    assert quota(200, [576, 1152, 288]) == [57, 114, 29]


def test_each_part_keeps_one_while_there_are_enough():
    assert quota(5, [1, 1000, 1]) == [1, 3, 1]
    assert quota(2, [10, 10, 10]) == [1, 1, 0]
    assert quota(3, [0, 5, 0]) == [0, 3, 0]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.floats(0, 1))
def test_a_quota_is_exact_and_within_its_part(counts, share):
    total = round(sum(counts) * share)
    shares = quota(total, counts)
    assert sum(shares) == total
    assert all(0 <= kept <= count for kept, count in zip(shares, counts, strict=True))
    filled = sum(1 for count in counts if count)
    assert total < filled or all(kept for kept, count in zip(shares, counts, strict=True) if count)


def clip(steps: int = 3, side: int = 4) -> VisualTokens:
    embeddings = torch.randn(steps * side * side, 5, generator=torch.Generator().manual_seed(0))
    aux_features = {"mark": torch.arange(steps * side * side).float().unsqueeze(0)}
    return VisualTokens.full(embeddings, (steps, side, side), "video", aux_features)


def test_runs_follow_the_tokens_that_are_left():
    tokens = clip()
    assert runs(tokens) == [slice(0, 16), slice(16, 32), slice(32, 48)]
    left = replace(tokens, positions=tokens.positions[[0, 5, 33, 40, 47]], embeddings=tokens.embeddings[:5])
    assert runs(left) == [slice(0, 2), slice(2, 5)]


@dataclass(frozen=True, kw_only=True)
class Last(StepReducer):
    """Keeps each step's last tokens, by an auxiliary feature."""

    needs = frozenset({"mark"})

    def pick(self, step: Step, k: int) -> torch.Tensor:
        return step.aux_features["mark"][0].argsort(descending=True)[:k]


@dataclass(frozen=True, kw_only=True)
class Halves(StepReducer):
    """Merges each step's tokens into its first k, going round."""

    def decide(self, step: Step, k: int) -> Reduction:
        columns = torch.arange(step.embeddings.shape[0])
        return merge_means(torch.arange(k), columns % k, columns, step.sizes)


def test_each_step_decides_for_itself():
    assert reduce_tokens(Last(keep_ratio=7 / 48), clip()).indices.tolist() == [13, 14, 15, 30, 31, 46, 47]
    assert reduce_tokens(Last(keep_ratio=7 / 48, joint=True), clip()).indices.tolist() == list(range(41, 48))


@pytest.mark.parametrize("keep_ratio", [0.06, 0.25, 0.5])
def test_merges_stay_within_their_step(keep_ratio):
    tokens = clip()
    out = reduce_tokens(Halves(keep_ratio=keep_ratio), tokens)
    shares = quota(out.num_tokens, [16, 16, 16])
    assert torch.bincount(out.positions[:, 0], minlength=3).tolist() == shares
    for step, (frame, k) in enumerate(zip(tokens.embeddings.reshape(3, 16, 5), shares, strict=True)):
        expected = [frame[i::k].mean(dim=0) for i in range(k)]
        assert torch.allclose(out.embeddings[out.positions[:, 0] == step], torch.stack(expected), atol=1e-6)


def test_sizes_of_merged_tokens_weigh_in():
    tokens = clip(steps=1, side=2)
    weighted = replace(tokens, sizes=torch.tensor([1.0, 2, 3, 4]))
    out = reduce_tokens(Halves(keep_ratio=0.5), weighted)
    assert out.sizes.tolist() == [4, 6]
    expected = (tokens.embeddings[0] + 3 * tokens.embeddings[2]) / 4
    assert torch.allclose(out.embeddings[0], expected, atol=1e-6)


def test_a_clip_that_was_thinned_is_decided_frame_by_frame():
    thinned = reduce_tokens(Uniform(keep_ratio=0.5), clip())
    out = reduce_tokens(Halves(keep_ratio=0.25), thinned)
    assert torch.bincount(out.positions[:, 0]).tolist() == [2, 2, 2]
