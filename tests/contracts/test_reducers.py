"""What every registered reducer promises. A new one is tested as soon as it has its entry point."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.tokens import Grid, VisualTokens
from mm.errors import InvalidOption
from mm.plugins.apply import reduce_tokens as reduce_by_context
from mm.plugins.capabilities import flat_stages
from mm.plugins.features import ATTENTION_RECEIVED, CLS_ATTENTION, TOWER_FEATURES, TOWER_KEYS
from mm.plugins.reducer import ReduceContext, Reducer, Stage
from mm.plugins.registry import create, get, names, options_of
from mm.plugins.spec import build_reducer, canonical_spec
from pruning.base import BudgetReducer, budget

PIPELINES = [
    "holitom:keep_ratio=0.6 + visionzip:keep_ratio=0.5",
    "evs:keep_ratio=0.6 + divprune:keep_ratio=0.5",
    "pool2 + visionzip:keep_ratio=0.5 + divprune:keep_ratio=0.5",
    "cdpruner:keep_ratio=0.6 + scope:keep_ratio=0.4",
    "uniform:keep_ratio=0.5 + divprune:keep_ratio=0.5",
    "random:keep_ratio=0.7,seed=5 + uniform:keep_ratio=0.3 + none",
]
IN_TOWER = [name for name in names("reducer") if getattr(get("reducer", name), "stage", None) is Stage.IN_VIT]
BEHIND = [name for name in names("reducer") if name not in ("pipeline", *IN_TOWER)]
BUDGETED = [name for name in BEHIND if "keep_ratio" in options_of(get("reducer", name))]
SPECS = BEHIND + PIPELINES
GRIDS: list[Grid] = [(1, 1, 1), (1, 1, 2), (1, 1, 7), (1, 16, 16), (3, 5, 7), (8, 8, 8), (1, 27, 27)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH = 32
AUX_FEATURES = {CLS_ATTENTION: 4, ATTENTION_RECEIVED: 4, TOWER_KEYS: 16, TOWER_FEATURES: 24}
"""What encoders of ours supply per token, and its height here."""

QUESTION = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))


def make(grid: Grid, seed: int = 0, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """Random tokens that carry every auxiliary feature that an encoder of ours supplies."""
    t, h, w = grid
    rng = torch.Generator().manual_seed(1000 * seed + t * h * w)
    embeddings = torch.randn(t * h * w, WIDTH, generator=rng).to(dtype)
    aux_features = {name: torch.rand(height, t * h * w, generator=rng) for name, height in AUX_FEATURES.items()}
    return VisualTokens.full(embeddings, grid, "image" if t == 1 else "video", aux_features)


def reduce_tokens(reducer: Reducer, tokens: VisualTokens) -> VisualTokens:
    return reduce_by_context(reducer, tokens, QUESTION)


def planned(reducer: Reducer, tokens: VisualTokens) -> int:
    return reducer.plan(tokens.num_tokens, tokens.grid, tokens.kind)


def same(a: VisualTokens, b: VisualTokens) -> bool:
    return all(torch.equal(getattr(a, plane), getattr(b, plane)) for plane in ("embeddings", "positions", "sizes"))


@pytest.fixture(params=SPECS)
def spec(request) -> str:
    return request.param


@pytest.fixture
def reducer(spec: str) -> Reducer:
    return build_reducer(spec)


def test_has_the_shape_of_a_reducer(reducer, spec):
    assert isinstance(reducer, Reducer)
    assert isinstance(reducer.stage, Stage)
    assert isinstance(reducer.needs, frozenset)
    assert isinstance(reducer.query_aware, bool)
    assert reducer.count in ("fixed", "bounded")
    assert dataclasses.is_dataclass(reducer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reducer.anything = 1
    assert build_reducer(canonical_spec(reducer)) == reducer


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_count_order_and_rows(reducer, grid, seed):
    tokens = make(grid, seed)
    out = reduce_tokens(reducer, tokens)
    most = planned(reducer, tokens)
    assert 1 <= out.num_tokens <= most <= tokens.num_tokens
    assert out.num_tokens == most or reducer.count == "bounded"
    indices = out.indices
    assert torch.equal(indices, indices.unique())
    assert (out.grid, out.kind, dict(out.aux_features)) == (tokens.grid, tokens.kind, {})
    assert torch.equal(out.positions, tokens.positions[indices])
    merged = out.sizes != 1
    assert torch.equal(out.embeddings[~merged], tokens.embeddings[indices[~merged]])
    assert out.sizes.sum() <= tokens.num_tokens + 1e-3


def test_nothing_stays_nothing(reducer):
    assert reducer.plan(0) == 0
    assert reduce_tokens(reducer, make((1, 0, 0))).num_tokens == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_the_input_is_untouched(reducer, grid):
    tokens = make(grid)
    before = {name: plane.clone() for name, plane in tokens.aux_features.items()}
    planes = (tokens.embeddings.clone(), tokens.positions.clone(), tokens.sizes.clone())
    reduce_tokens(reducer, tokens)
    assert all(
        torch.equal(a, b) for a, b in zip(planes, (tokens.embeddings, tokens.positions, tokens.sizes), strict=True)
    )
    assert all(torch.equal(before[name], plane) for name, plane in tokens.aux_features.items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_and_count_hold_in_half_precision(reducer, dtype):
    out = reduce_tokens(reducer, make((1, 16, 16), dtype=dtype))
    assert out.embeddings.dtype is dtype
    assert (out.positions.dtype, out.sizes.dtype) == (torch.int64, torch.float32)
    assert out.num_tokens == reduce_tokens(reducer, make((1, 16, 16))).num_tokens or reducer.count == "bounded"


def test_is_deterministic_and_keeps_no_state(reducer, spec):
    """Three runs, another item between two of them, and a second object: always the same answer."""
    tokens = make((1, 16, 16), seed=2)
    alone = reduce_tokens(reducer, tokens)
    reduce_tokens(reducer, make((3, 5, 7), seed=3))
    assert same(reduce_tokens(reducer, tokens), alone)
    assert same(reduce_tokens(build_reducer(spec), tokens), alone)


@pytest.mark.parametrize("factor", [0.125, 1024.0])
def test_scaling_the_embeddings_scales_the_answer(reducer, factor):
    """Powers of two, so that not even the last bit of a cosine changes."""
    tokens = make((1, 16, 16), seed=4)
    scaled = reduce_tokens(reducer, dataclasses.replace(tokens, embeddings=tokens.embeddings * factor))
    plain = reduce_tokens(reducer, tokens)
    assert torch.equal(scaled.indices, plain.indices)
    assert torch.equal(scaled.embeddings, plain.embeddings * factor)


def test_the_order_of_heads_does_not_matter(reducer):
    tokens = make((1, 16, 16), seed=5)
    flipped = {name: plane.flip(0) for name, plane in tokens.aux_features.items()}
    assert same(
        reduce_tokens(reducer, dataclasses.replace(tokens, aux_features=flipped)), reduce_tokens(reducer, tokens)
    )


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("grid", GRIDS)
def test_a_ratio_of_one_changes_nothing(name, grid):
    tokens = make(grid)
    assert same(reduce_tokens(build_reducer(name, 1), tokens), tokens)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("keep_ratio", [0.01, 0.1, 0.25, 0.333, 0.5, 0.9])
def test_the_budget_is_exact(name, keep_ratio):
    reducer = build_reducer(name, keep_ratio)
    for grid in GRIDS:
        tokens = make(grid)
        num_kept = reduce_tokens(reducer, tokens).num_tokens
        assert num_kept <= planned(reducer, tokens)
        if isinstance(reducer, BudgetReducer) and reducer.stage is Stage.PRE_LLM:
            assert num_kept == budget(tokens.num_tokens, keep_ratio, reducer.rounding)


def test_composes_with_every_other(reducer):
    tokens = make((1, 9, 9))
    for other in SPECS:
        then = build_reducer(other)
        if {reducer.stage, then.stage} != {Stage.PRE_LLM}:
            continue
        if any(getattr(stage, "needs_grid", False) for stage in flat_stages(then)) and reducer != build_reducer("none"):
            with pytest.raises(InvalidOption, match="every cell of the grid"):
                create("reducer", "pipeline", stages=(reducer, then))
            continue
        out = reduce_tokens(create("reducer", "pipeline", stages=(reducer, then)), tokens)
        apart = reduce_tokens(
            then, dataclasses.replace(reduce_tokens(reducer, tokens), aux_features=_gathered(reducer, tokens))
        )
        assert torch.equal(out.indices, apart.indices)
        assert torch.allclose(out.embeddings, apart.embeddings, atol=1e-5)


BROKEN = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("bad", BROKEN)
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_values_that_are_not_finite_spoil_no_other_token(reducer, bad, share):
    """In embeddings and auxiliary features, of some tokens or of all: the count holds, and whole tokens stay whole."""
    tokens = make((2, 9, 7), seed=6)
    hit = torch.rand(tokens.num_tokens, generator=torch.Generator().manual_seed(1)) < share
    spoiled = dataclasses.replace(
        tokens,
        embeddings=tokens.embeddings.masked_fill(hit[:, None], bad),
        aux_features={name: plane.masked_fill(hit, bad) for name, plane in tokens.aux_features.items()},
    )
    out = reduce_tokens(reducer, spoiled)
    assert out.num_tokens == planned(reducer, tokens) or reducer.count == "bounded"
    assert torch.isfinite(out.sizes).all()
    whole = (out.sizes == 1) & ~hit[out.indices]
    assert torch.equal(out.embeddings[whole], tokens.embeddings[out.indices[whole]])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(0, 13), st.integers(0, 13)),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(BEHIND),
    keep_ratio=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.77, 1.0]),
    kind=st.sampled_from(["image", "video"]),
)
def test_any_shape_dtype_kind_and_budget(grid, seed, dtype, name, keep_ratio, kind):
    reducer = build_reducer(name, keep_ratio if name in BUDGETED else None)
    tokens = dataclasses.replace(make(grid, seed, dtype), kind=kind)
    out = reduce_tokens(reducer, tokens)
    assert out.num_tokens <= planned(reducer, tokens) <= tokens.num_tokens
    assert (out.num_tokens > 0) == (tokens.num_tokens > 0)
    assert torch.equal(out.indices, out.indices.unique())
    assert torch.isfinite(out.embeddings).all()
    assert torch.isfinite(out.sizes).all()


def _gathered(reducer: Reducer, tokens: VisualTokens) -> dict[str, torch.Tensor]:
    indices = reduce_tokens(reducer, tokens).indices
    return {name: plane[..., indices] for name, plane in tokens.aux_features.items()}


@pytest.mark.parametrize("name", IN_TOWER)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    side=st.integers(0, 9),
    num_blocks=st.integers(1, 6),
    num_prefix=st.integers(0, 5),
    keep_ratio=st.sampled_from([0.02, 0.25, 0.5, 0.77, 1.0]),
    bad=st.sampled_from([None, float("nan"), float("inf")]),
)
def test_inside_a_tower(name, side, num_blocks, num_prefix, keep_ratio, bad):
    """Counts add up, each token that is left is one of its own, tokens in front stay there, and pictures do not mix."""
    reducer = build_reducer(name, keep_ratio)
    left = side * side
    try:
        counts = reducer.merges(left, num_blocks)
    except InvalidOption:
        assert reducer.plan(left, (1, side, side)) < left / 2**num_blocks + num_blocks
        return
    assert len(counts) == num_blocks
    assert left - sum(counts) == reducer.plan(left, (1, side, side))
    keys = torch.randn(2, num_prefix + left, 8, generator=torch.Generator().manual_seed(side))
    if bad is not None:
        keys[0, ::3] = bad
    for count in filter(None, counts):
        matched = reducer.match(keys, count, num_prefix)
        slots, anchors = matched.slots, matched.anchors
        assert slots.shape == keys.shape[:2]
        assert anchors.shape == (2, keys.shape[1] - count)
        everyone = torch.arange(anchors.shape[1]).expand(2, -1)
        assert torch.equal(slots.gather(1, anchors), everyone)
        assert (slots.amin(), slots.amax()) == (0, anchors.shape[1] - 1)
        assert torch.equal(anchors[:, :num_prefix], everyone[:, :num_prefix])
        assert not (slots[:, num_prefix:] < num_prefix).any()
        alone = reducer.match(keys[1:], count, num_prefix)
        assert torch.equal(alone.slots, slots[1:])
        keys = keys.gather(1, anchors.unsqueeze(-1).expand(-1, -1, 8))


def test_no_gradient_is_recorded(reducer):
    tokens = make((1, 6, 6))
    tokens.embeddings.requires_grad_(True)
    reduction = reducer.after_encode(tokens, ReduceContext(aux_features=tokens.aux_features, text_embeddings=QUESTION))
    assert not any(plane.requires_grad for plane in (reduction.merge, reduction.sizes) if plane is not None)
