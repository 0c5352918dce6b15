"""Carrying out a reduction: every plane follows, and nothing wrong passes."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import pytest
import torch

from mm.data.tokens import VisualTokens
from mm.errors import ReducerFault
from mm.plugins.apply import apply, reduce_tokens
from mm.plugins.reducer import Reduction
from pruning.pre_llm.uniform import Uniform


def tokens_of(num_tokens: int = 6, dtype: torch.dtype = torch.float32) -> VisualTokens:
    embeddings = torch.arange(num_tokens * 2, dtype=torch.float32).reshape(num_tokens, 2).to(dtype)
    tokens = VisualTokens.full(
        embeddings, (1, 2, num_tokens // 2), "image", {"cls_attention": torch.rand(2, num_tokens)}
    )
    return replace(tokens, sizes=torch.arange(1.0, num_tokens + 1))


def test_a_selection_gathers_every_plane():
    tokens = tokens_of()
    out = apply(Reduction(keep=torch.tensor([1, 4])), tokens)
    assert torch.equal(out.embeddings, tokens.embeddings[[1, 4]])
    assert out.positions.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert out.sizes.tolist() == [2.0, 5.0]
    assert out.indices.tolist() == [1, 4]
    assert (out.grid, out.kind, out.num_tokens_in, dict(out.aux_features)) == ((1, 2, 3), "image", 6, {})


@pytest.mark.parametrize("sparse", [False, True])
def test_a_merge_is_computed_in_float32_and_cast_back(sparse):
    embeddings = torch.tensor([[256.0], [1.0], [1.0], [0.0]], dtype=torch.bfloat16)
    tokens = VisualTokens.full(embeddings, (1, 2, 2), "image")
    weights = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1]])
    merge = weights.to_sparse() if sparse else weights
    out = apply(Reduction(keep=torch.tensor([0, 3]), merge=merge, sizes=torch.tensor([3.0, 1.0])), tokens)
    assert out.embeddings.dtype is torch.bfloat16
    # 258 / 3: sums in bfloat16 would lose both ones, since its step at 256 is 2.
    assert out.embeddings.tolist() == [[86.0], [0.0]]
    assert out.sizes.tolist() == [3.0, 1.0]


def merging(**changes) -> Reduction:
    weights = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.5]])
    return replace(Reduction(keep=torch.tensor([0, 4]), merge=weights, sizes=torch.tensor([3.0, 11.0])), **changes)


FAULTS = {
    "none of 6": Reduction(keep=torch.tensor([], dtype=torch.int64)),
    "int64 vector, not torch.int32": Reduction(keep=torch.tensor([0, 1], dtype=torch.int32)),
    r"of shape \(1, 2\)": Reduction(keep=torch.tensor([[0, 1]])),
    "outside 0..5": Reduction(keep=torch.tensor([0, 6])),
    "outside 0..5 ": Reduction(keep=torch.tensor([-1, 3])),
    "strictly ascending": Reduction(keep=torch.tensor([3, 1])),
    "strictly ascending ": Reduction(keep=torch.tensor([1, 1])),
    r"merge has to be of shape \(2, 6\)": merging(merge=torch.ones(2, 5) / 5),
    r"sizes has to be of shape \(2,\)": merging(sizes=torch.ones(3)),
    "sum to 1": merging(merge=torch.ones(2, 6)),
    "negative or not finite": merging(merge=torch.tensor([[2.0, -1, 0, 0, 0, 0], [0, 0, 0, 0, 0.5, 0.5]])),
    "negative or not finite ": merging(merge=torch.full((2, 6), float("nan"))),
    "sizes are not positive": merging(sizes=torch.tensor([0.0, 1.0])),
    "sizes are not positive ": merging(sizes=torch.tensor([float("inf"), 1.0])),
}


@pytest.mark.parametrize(("message", "reduction"), FAULTS.items())
def test_faults_are_named(message, reduction):
    with pytest.raises(ReducerFault, match=f"Some: .*{message.strip()}") as caught:
        apply(reduction, tokens_of(), "Some")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_example_for_faults_is_right_without_its_faults():
    assert apply(merging(), tokens_of()).embeddings.tolist() == [[1.0, 2.0], [9.0, 10.0]]


def test_an_item_without_tokens_stays_without():
    empty = VisualTokens.full(torch.empty(0, 4), (1, 0, 0), "image")
    assert apply(Reduction(keep=torch.empty(0, dtype=torch.int64)), empty).num_tokens == 0


def test_another_count_than_planned_is_a_fault():
    @dataclass(frozen=True, kw_only=True)
    class OneLess(Uniform):
        def select(self, tokens, context, k):
            return super().select(tokens, context, k - 1)

    with pytest.raises(ReducerFault, match="kept 2 of 6 tokens, but its plan says 3"):
        reduce_tokens(OneLess(keep_ratio=0.5), tokens_of())
