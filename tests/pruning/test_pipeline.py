"""A pipeline equals its stages one after the other, whatever they do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from mm.data.tokens import VisualTokens
from mm.errors import InvalidOption, ReducerFault
from mm.plugins.apply import reduce_tokens
from mm.plugins.reducer import ReduceContext, Reduction, Stage
from mm.plugins.registry import create
from mm.plugins.spec import build_reducer, reducer_spec
from pruning.base import ScoreReducer
from pruning.in_llm.fastv import FastV
from pruning.pipeline import Pipeline
from pruning.pre_llm.divprune import DivPrune
from pruning.pre_llm.uniform import Uniform


@dataclass(frozen=True, kw_only=True)
class PairMeans:
    """Merges neighbours two by two; its sizes add up. `sparse` says how it writes the weights."""

    acts_at: ClassVar[tuple[Stage, ...]] = (Stage.PRE_LLM,)
    needs: ClassVar[frozenset[str]] = frozenset()
    query_aware: ClassVar[bool] = True
    count: ClassVar[str] = "bounded"
    sparse: bool = False

    def plan(self, num_tokens: int, grid=None, kind="image") -> int:
        return num_tokens

    def after_encode(self, tokens: VisualTokens, context: ReduceContext) -> Reduction:
        n = tokens.num_tokens
        keep = torch.arange(0, n, 2)
        weights = torch.zeros(len(keep), n)
        weights[torch.arange(n) // 2, torch.arange(n)] = 1.0
        sizes = weights @ tokens.sizes
        merge = weights * tokens.sizes / sizes[:, None]
        return Reduction(keep=keep, merge=merge.to_sparse() if self.sparse else merge, sizes=sizes)


@dataclass(frozen=True, kw_only=True)
class ByFeature(ScoreReducer):
    """Keeps what the named feature likes best."""

    needs: ClassVar[frozenset[str]] = frozenset({"cls_attention"})

    def score(self, tokens: VisualTokens, context: ReduceContext) -> torch.Tensor:
        return context.aux_features["cls_attention"].mean(dim=0)


def some_tokens(num_tokens: int = 24) -> VisualTokens:
    rng = torch.Generator().manual_seed(num_tokens)
    tokens = VisualTokens.full(torch.randn(num_tokens, 8, generator=rng), (1, 1, num_tokens), "image")
    aux_features = {"cls_attention": torch.rand(3, num_tokens, generator=rng), "global": torch.rand(5, generator=rng)}
    return replace(tokens, aux_features=aux_features)


CHAINS = [
    (Uniform(keep_ratio=0.5), DivPrune(keep_ratio=0.5)),
    (DivPrune(keep_ratio=0.5), PairMeans()),
    (PairMeans(sparse=True), DivPrune(keep_ratio=0.5)),
    (PairMeans(), PairMeans(sparse=True)),
    (Uniform(keep_ratio=0.75), PairMeans(sparse=True), DivPrune(keep_ratio=0.6), PairMeans()),
]


@pytest.mark.parametrize("stages", CHAINS)
def test_equals_its_stages_one_after_the_other(stages):
    tokens = some_tokens()
    step_by_step = tokens
    for stage in stages:
        step_by_step = reduce_tokens(stage, step_by_step)
    at_once = reduce_tokens(Pipeline(stages=stages), tokens)
    assert torch.equal(at_once.positions, step_by_step.positions)
    assert torch.equal(at_once.sizes, step_by_step.sizes)
    assert torch.allclose(at_once.embeddings, step_by_step.embeddings, atol=1e-6)
    merges = any(isinstance(stage, PairMeans) for stage in stages)
    assert merges or torch.equal(at_once.embeddings, tokens.embeddings[at_once.indices])


def test_aux_features_follow_the_tokens():
    tokens = some_tokens()
    pipeline = Pipeline(stages=(Uniform(keep_ratio=0.5), ByFeature(keep_ratio=0.25)))
    first = Uniform(keep_ratio=0.5).after_encode(tokens, ReduceContext()).keep
    liked = tokens.aux_features["cls_attention"].mean(dim=0)[first]
    expected = first[liked.argsort(descending=True)[:3].sort().values]
    assert reduce_tokens(pipeline, tokens).indices.tolist() == expected.tolist()


def test_flags_follow_from_the_stages():
    pipeline = Pipeline(stages=(Uniform(), PairMeans(), ByFeature()))
    assert pipeline.needs == {"cls_attention"}
    assert pipeline.query_aware
    assert pipeline.count == "bounded"
    assert pipeline.acts_at == (Stage.PRE_LLM,)
    fixed = build_reducer("uniform:keep_ratio=0.5 + divprune:keep_ratio=0.5")
    assert (fixed.count, fixed.query_aware, fixed.needs) == ("fixed", False, frozenset())
    assert fixed.plan(256) == 64


def test_the_specification_names_an_equal_pipeline():
    spec = reducer_spec("uniform:keep_ratio=0.5 + divprune + none")
    pipeline = spec.plugin
    assert build_reducer(spec.canonical) == pipeline
    nested = Pipeline(stages=(Pipeline(stages=pipeline.stages[:2]), pipeline.stages[2]))
    assert nested == pipeline


def test_a_ratio_means_the_same_however_it_is_written():
    assert reducer_spec("uniform:keep_ratio=1").canonical == reducer_spec("uniform", 1.0).canonical


@pytest.mark.parametrize("stages", [(), None, 3, "uniform", ("uniform",), (Uniform(), object())])
def test_bad_stages_are_refused(stages):
    with pytest.raises(InvalidOption, match="stages"):
        create("reducer", "pipeline", stages=stages)


def test_an_order_in_which_tokens_do_not_meet_them_is_refused():
    inside = FastV(keep_ratio=0.5)
    assert Pipeline(stages=(Uniform(keep_ratio=0.5), inside)).acts_at == (Stage.PRE_LLM, Stage.IN_PREFILL)
    with pytest.raises(InvalidOption, match="put earlier stages first"):
        Pipeline(stages=(inside, Uniform(keep_ratio=0.5)))


def test_a_faulty_stage_is_named():
    @dataclass(frozen=True, kw_only=True)
    class Backwards(Uniform):
        def select(self, tokens, context, k):
            return super().select(tokens, context, k).flip(0)

    with pytest.raises(ReducerFault, match="Backwards: keep is not strictly ascending"):
        reduce_tokens(Pipeline(stages=(Uniform(keep_ratio=0.5), Backwards(keep_ratio=0.5))), some_tokens())
