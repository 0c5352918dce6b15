"""What every registered reducer promises. A new one is tested as soon as it has its entry point."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.tokens import Grid, VisualTokens
from mm.errors import InvalidOption, ReducerFault
from mm.plugins.apply import reduce_tokens as reduce_by_context
from mm.plugins.cache_view import CacheView
from mm.plugins.capabilities import acts_before_decoder, capabilities_of, in_decode, in_prefill, parts_of, rewrites
from mm.plugins.declaration import declaration_problem
from mm.plugins.features import ATTENTION_RECEIVED, CLS_ATTENTION, TOWER_FEATURES, TOWER_KEYS
from mm.plugins.reducer import ReduceContext, Reducer, Stage
from mm.plugins.registry import create, get, names, options_of
from mm.plugins.spec import build_reducer, reducer_spec
from pruning.base import BudgetReducer, budget
from tests.helpers.learned import built

PIPELINES = [
    "holitom:keep_ratio=0.6 + visionzip:keep_ratio=0.5",
    "evs:keep_ratio=0.6 + divprune:keep_ratio=0.5",
    "pool2 + visionzip:keep_ratio=0.5 + divprune:keep_ratio=0.5",
    "cdpruner:keep_ratio=0.6 + scope:keep_ratio=0.4",
    "uniform:keep_ratio=0.5 + divprune:keep_ratio=0.5",
    "random:keep_ratio=0.7,seed=5 + uniform:keep_ratio=0.3 + none",
]
ALONE = [name for name in names("reducer") if name != "pipeline"]
IN_TOWER = [name for name in ALONE if Stage.IN_VIT in get("reducer", name).acts_at]
REWRITING = [name for name in ALONE if rewrites(build_reducer(name))]
"""Reducers that compute new tokens, for frames of the grid that they were trained on: they keep no row as it was."""

AFTER_TOWER = [name for name in ALONE if acts_before_decoder(build_reducer(name)) and name not in REWRITING]
IN_DECODER = [name for name in ALONE if {Stage.IN_PREFILL, Stage.IN_DECODE} & {*get("reducer", name).acts_at}]
BUDGETED = [name for name in AFTER_TOWER if "keep_ratio" in options_of(get("reducer", name))]
SPECS = AFTER_TOWER + PIPELINES
GRIDS: list[Grid] = [(1, 1, 1), (1, 1, 2), (1, 1, 7), (1, 16, 16), (3, 5, 7), (8, 8, 8), (1, 27, 27)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH = 32
AUX_FEATURES = {CLS_ATTENTION: 4, ATTENTION_RECEIVED: 4, TOWER_KEYS: 16, TOWER_FEATURES: 24}
"""What encoders of ours supply per token, and its height here."""

QUESTION = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))


LEAST_RATIO = {"router": 0.25}
"""Reducers whose budget has a lower bound."""


def build(text: str, keep_ratio: float | None = None) -> Any:
    """The reducer of a text. A learned one has weights as a training starts with."""
    return built(text, keep_ratio, width=WIDTH)


def make(grid: Grid, seed: int = 0, dtype: torch.dtype = torch.float32) -> VisualTokens:
    """Random tokens that carry every auxiliary feature that an encoder of ours supplies."""
    t, h, w = grid
    rng = torch.Generator().manual_seed(1000 * seed + t * h * w)
    embeddings = torch.randn(t * h * w, WIDTH, generator=rng).to(dtype)
    aux_features = {name: torch.rand(height, t * h * w, generator=rng) for name, height in AUX_FEATURES.items()}
    return VisualTokens.full(embeddings, grid, "image" if t == 1 else "video", aux_features)


def reduce_tokens(reducer: Any, tokens: VisualTokens) -> VisualTokens:
    return reduce_by_context(reducer, tokens, QUESTION)


def planned(reducer: Any, tokens: VisualTokens) -> int:
    return reducer.plan(tokens.num_tokens, tokens.grid, tokens.kind)


def same(a: VisualTokens, b: VisualTokens) -> bool:
    return all(torch.equal(getattr(a, plane), getattr(b, plane)) for plane in ("embeddings", "positions", "sizes"))


@pytest.fixture(params=SPECS)
def spec(request) -> str:
    return request.param


@pytest.fixture
def reducer(spec: str) -> Any:
    return build(spec)


@pytest.mark.parametrize("spec", [*ALONE, *PIPELINES, "uniform + mustdrop + fastv:layer=9"])
def test_what_every_reducer_declares(spec):
    resolved = reducer_spec(spec)
    reducer = resolved.plugin
    assert isinstance(reducer, Reducer)
    assert all(isinstance(stage, Stage) for stage in reducer.acts_at)
    assert isinstance(reducer.needs, frozenset)
    assert isinstance(reducer.query_aware, bool)
    assert reducer.count in ("fixed", "bounded")
    assert dataclasses.is_dataclass(reducer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        reducer.anything = 1
    assert build_reducer(resolved.canonical) == reducer
    assert reducer_spec(resolved.canonical).canonical == resolved.canonical
    assert resolved.capabilities == capabilities_of(reducer)
    assert not any(problem for part in parts_of(reducer) if (problem := declaration_problem(type(part))))
    part_of_spec = reducer_spec(resolved.before_decoder)
    assert not {Stage.IN_PREFILL, Stage.IN_DECODE} & {*part_of_spec.capabilities.stages} or "mustdrop" in spec


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


@pytest.mark.parametrize("name", REWRITING)
@pytest.mark.parametrize("num_frames", [1, 2, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_reducers_promise_that_compute_new_tokens(name, num_frames, dtype):
    """Counts, order, positions, dtype and sizes as of every other; the input is untouched; nothing is remembered."""
    reducer, tokens = build(name), dataclasses.replace(make((num_frames, 8, 8), dtype=dtype), kind="video")
    before = tokens.embeddings.clone()
    out = reduce_tokens(reducer, tokens)
    assert torch.equal(tokens.embeddings, before)
    assert 1 <= out.num_tokens <= planned(reducer, tokens)
    assert torch.equal(out.indices, out.indices.unique())
    assert (out.embeddings.dtype, out.sizes.dtype, out.grid) == (dtype, torch.float32, tokens.grid)
    assert torch.isfinite(out.embeddings).all()
    assert 0 < float(out.sizes.sum()) <= tokens.num_tokens + 1e-2
    assert out.placement is not None
    assert out.placement.offsets.tolist() == sorted(set(out.placement.offsets.tolist()))
    assert out.placement.advance > int(out.placement.offsets[-1])
    reduce_tokens(reducer, dataclasses.replace(make((3, 8, 8), seed=3), kind="video"))
    assert same(reduce_tokens(build(name), tokens), out)
    empty = reduce_tokens(reducer, dataclasses.replace(make((1, 0, 0)), kind="video"))
    assert empty.num_tokens == 0


def test_new_tokens_have_to_be_declared(monkeypatch):
    tokens = dataclasses.replace(make((3, 8, 8)), kind="video")
    monkeypatch.setattr(get("reducer", "cubes"), "rewrites", False)
    with pytest.raises(ReducerFault, match="declare rewrites"):
        reduce_tokens(build("cubes"), tokens)


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
    assert same(reduce_tokens(build(spec), tokens), alone)


@pytest.mark.parametrize("factor", [0.125, 1024.0])
def test_scaling_the_embeddings_scales_the_answer(reducer, factor):
    """Powers of two, so that not even the last bit of a cosine changes. Networks know the size of their inputs."""
    if capabilities_of(reducer).trained:
        pytest.skip("a network's answer depends on the size of its inputs")
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
    assert same(reduce_tokens(build(name, 1), tokens), tokens)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("keep_ratio", [0.01, 0.1, 0.25, 0.333, 0.5, 0.9])
def test_the_budget_is_exact(name, keep_ratio):
    reducer = build(name, max(keep_ratio, LEAST_RATIO.get(name, 0)))
    for grid in GRIDS:
        tokens = make(grid)
        num_kept = reduce_tokens(reducer, tokens).num_tokens
        assert num_kept <= planned(reducer, tokens)
        if isinstance(reducer, BudgetReducer) and reducer.acts_at == (Stage.PRE_LLM,):
            assert num_kept == budget(tokens.num_tokens, keep_ratio, reducer.rounding)


def test_composes_with_every_other(reducer):
    tokens = make((1, 9, 9))
    for other in SPECS:
        then = build(other)
        if {reducer.acts_at[0], then.acts_at[0]} != {Stage.PRE_LLM}:
            continue
        if any(getattr(stage, "needs_grid", False) for stage in parts_of(then)) and reducer != build("none"):
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
    """In embeddings and auxiliary features, of some tokens: the count holds, whole tokens stay whole, and none that is
    not finite is kept. Of all tokens: there is nothing to keep.
    """
    trained = capabilities_of(reducer).trained
    tokens = make((2, 9, 7), seed=6)
    hit = torch.rand(tokens.num_tokens, generator=torch.Generator().manual_seed(1)) < share
    spoiled = dataclasses.replace(
        tokens,
        embeddings=tokens.embeddings.masked_fill(hit[:, None], bad),
        aux_features={name: plane.masked_fill(hit, bad) for name, plane in tokens.aux_features.items()},
    )
    if share == 1 and planned(reducer, tokens) < tokens.num_tokens and not trained:
        with pytest.raises(ReducerFault, match="of which 0 are finite"):
            reduce_tokens(reducer, spoiled)
        return
    out = reduce_tokens(reducer, spoiled)
    assert out.num_tokens == planned(reducer, tokens) or reducer.count == "bounded"
    assert torch.isfinite(out.sizes).all()
    assert torch.isfinite(out.embeddings).all() or out.num_tokens == tokens.num_tokens or trained
    whole = (out.sizes == 1) & ~hit[out.indices]
    assert torch.equal(out.embeddings[whole], tokens.embeddings[out.indices[whole]])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    grid=st.tuples(st.integers(1, 5), st.integers(0, 13), st.integers(0, 13)),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    name=st.sampled_from(AFTER_TOWER),
    keep_ratio=st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.77, 1.0]),
    kind=st.sampled_from(["image", "video"]),
)
def test_any_shape_dtype_kind_and_budget(grid, seed, dtype, name, keep_ratio, kind):
    reducer = build(name, max(keep_ratio, LEAST_RATIO.get(name, 0)) if name in BUDGETED else None)
    tokens = dataclasses.replace(make(grid, seed, dtype), kind=kind)
    out = reduce_tokens(reducer, tokens)
    assert out.num_tokens <= planned(reducer, tokens) <= tokens.num_tokens
    assert (out.num_tokens > 0) == (tokens.num_tokens > 0)
    assert torch.equal(out.indices, out.indices.unique())
    assert torch.isfinite(out.embeddings).all()
    assert torch.isfinite(out.sizes).all()


def _gathered(reducer: Any, tokens: VisualTokens) -> dict[str, torch.Tensor]:
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
    reducer = build(name, keep_ratio)
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


# ── inside the decoder ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True)
class Prompted:
    """A prompt of a few text tokens, two items and a question, as a reducer sees it at the input of a layer."""

    layer: int
    num_layers: int
    item_sizes: tuple[int, ...]
    item_kinds: tuple[str, ...]
    visual: torch.Tensor
    origins: torch.Tensor
    items: torch.Tensor
    protected: torch.Tensor
    num_rows: int
    seed: int = 0

    @classmethod
    def whole(cls, layer: int, num_layers: int, item_sizes: tuple[int, ...], seed: int) -> Prompted:
        num_visual = sum(item_sizes)
        drawn = torch.rand(num_visual, generator=torch.Generator().manual_seed(seed))
        return cls(
            layer=layer,
            num_layers=num_layers,
            item_sizes=item_sizes,
            item_kinds=("image", "video", "image")[: len(item_sizes)],
            visual=torch.arange(3, 3 + num_visual),
            origins=torch.arange(num_visual),
            items=torch.repeat_interleave(torch.arange(len(item_sizes)), torch.tensor(item_sizes)),
            protected=drawn < 0.1,
            num_rows=num_visual + 8,
            seed=seed,
        )

    def after(self, keep: torch.Tensor, layer: int) -> Prompted:
        return dataclasses.replace(
            self,
            layer=layer,
            visual=torch.arange(3, 3 + len(keep)),
            origins=self.origins[keep],
            items=self.items[keep],
            protected=self.protected[keep],
            num_rows=self.num_rows - len(self.visual) + len(keep),
        )

    @property
    def hidden(self) -> torch.Tensor:
        return torch.randn(self.num_rows, WIDTH, generator=torch.Generator().manual_seed(self.seed))

    def attention_rows(self, rows: torch.Tensor, layer: int | None = None) -> torch.Tensor:
        assert layer is None or layer in (self.layer, self.layer - 1), "only these two layers can be asked for"
        drawn = torch.Generator().manual_seed(self.seed + self.layer)
        return torch.rand(4, len(rows), len(self.visual), generator=drawn) / self.num_rows

    def keys(self) -> torch.Tensor:
        return self.hidden.unflatten(1, (2, -1))


@pytest.mark.parametrize("name", IN_DECODER)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    num_layers=st.integers(10, 33),
    item_sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_inside_the_decoder(name, num_layers, item_sizes, seed):
    """What is kept is ascending, unique and never nothing; the same at every call; evictions keep valid entries."""
    reducer = build(name)
    view = first = Prompted.whole(1, num_layers, tuple(item_sizes), seed)
    cells = torch.cat([torch.arange(size) for size in item_sizes])
    rng = torch.Generator().manual_seed(seed)
    planes = {0: (view.visual, view.origins, view.num_rows)}
    for dropping in in_prefill(reducer):
        layers = dropping.layers(num_layers)
        assert list(layers) == sorted(set(layers))
        assert all(0 <= layer < num_layers for layer in layers)
        for layer in layers:
            view = dataclasses.replace(view, layer=layer)
            keep = dropping.in_prefill(layer, view)
            assert keep.dtype is torch.int64
            assert 0 < len(keep) <= len(view.visual)
            assert torch.equal(keep, keep.unique())
            assert keep[-1] < len(view.visual)
            assert torch.equal(dropping.in_prefill(layer, view), keep)
            view = view.after(keep, layer)
            planes[layer] = view.visual, view.origins, view.num_rows
    held = [planes[max(at for at in planes if at <= layer)] for layer in range(num_layers)]
    cache = CacheView(
        lengths=tuple(length for _, _, length in held),
        visual=tuple(visual for visual, _, _ in held),
        origins=tuple(origins for _, origins, _ in held),
        items=first.items,
        cells=torch.stack([cells // 4, cells % 4 // 2, cells % 2], dim=1),
        item_kinds=first.item_kinds,
        read=lambda layer: (torch.randn(held[layer][2], 2, 8, generator=rng), torch.ones(held[layer][2], 2, 8)),
    )
    for evicting in in_decode(reducer):
        for layer, stays in evicting.prefill_done(cache).items():
            assert stays.dtype is torch.int64
            assert torch.equal(stays, stays.unique())
            assert 0 < len(stays) <= cache.lengths[layer]
            assert stays[-1] < cache.lengths[layer]
            text = set(range(cache.lengths[layer])) - set(cache.visual[layer].tolist())
            assert text <= set(stays.tolist()), "text was evicted"


@pytest.mark.parametrize("name", [name for name in IN_DECODER if name not in AFTER_TOWER])
def test_what_acts_inside_the_decoder_alone_leaves_encoded_tokens_as_they_are(name):
    tokens = make((1, 9, 9))
    assert same(reduce_tokens(build(name), tokens), tokens)
    assert not hasattr(build(name), "after_encode"), "a method that does nothing"
