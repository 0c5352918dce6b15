"""MustDrop's three stages on small cases worked out by hand, and in the decoder against a mask."""

from __future__ import annotations

import pytest
import torch

import mm
from mm.data.tokens import VisualTokens
from mm.errors import IncompatiblePlugin, InvalidOption
from mm.plugins.apply import apply, reduce_tokens
from mm.plugins.cache_view import CacheView
from mm.plugins.reducer import ReduceContext
from mm.plugins.spec import build_reducer
from pruning.in_llm.mustdrop import MustDrop, filtered, merge_windows, window_scores
from tests.helpers.checkpoints import random_qwen2_5_vl
from tests.parity.test_generate import picture, png

GRID = [
    [[1, 0], [1, 0], [0, 1], [1, 0]],
    [[1, 0], [2, 1], [1, 1], [0, 2]],
    [[0, 3], [1, 4], [2, 2], [3, 1]],
    [[0, 1], [0, 2], [1, 3], [3, 3]],
]


def tokens_of(grid, cls=None) -> VisualTokens:
    rows = torch.tensor(grid, dtype=torch.float32)
    height, width, channels = rows.shape
    aux_features = {} if cls is None else {"cls_attention": torch.tensor(cls)[None]}
    return VisualTokens.full(rows.reshape(-1, channels), (1, height, width), "image", aux_features)


def test_windows_merge_to_their_mean_where_they_begin():
    tokens = tokens_of(GRID)
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    scores = window_scores(tokens.embeddings[torch.tensor(windows)])
    assert scores.tolist() == pytest.approx([0.9472, 0.5202, 0.9851, 0.8630], abs=5e-5)
    reduced = apply(merge_windows(tokens, 2, 0.8), tokens)
    assert reduced.indices.tolist() == [0, 2, 3, 6, 7, 8, 10]
    assert reduced.sizes.tolist() == [4, 1, 1, 1, 1, 4, 4]
    expected = [[1.25, 0.25], [0, 1], [1, 0], [1, 1], [0, 2], [0.25, 2.5], [2.25, 2.25]]
    torch.testing.assert_close(reduced.embeddings, torch.tensor(expected), atol=1e-6, rtol=0)


def test_windows_that_lack_a_token_stay_as_they_are():
    alike = VisualTokens.full(torch.ones(25, 3), (1, 5, 5), "image")
    assert apply(merge_windows(alike, 2, 0.8), alike).sizes.tolist().count(4) == 4
    hole = apply(merge_windows(alike, 1, 0.8), alike)
    assert hole.num_tokens == 25
    without_first = reduce_tokens(build_reducer("uniform:keep_ratio=0.96"), alike)
    missing = set(range(25)) - set(without_first.indices.tolist())
    assert len(missing) == 1
    merged = apply(merge_windows(without_first, 2, 0.8), without_first)
    whole = {(0, 0), (0, 1), (1, 0), (1, 1)} - {(cell // 5 // 2, cell % 5 // 2) for cell in missing}
    assert merged.sizes.tolist().count(4) == len(whole)


def test_key_tokens_are_those_the_tower_attends_to():
    attention = [0.0] * 16
    attention[7], attention[10], attention[11] = 0.9, 0.8, 0.8
    tokens = tokens_of(GRID, attention)
    context = ReduceContext(aux_features=tokens.aux_features)
    reduction = MustDrop(window=2, key_ratio=0.25).after_encode(tokens, context)
    assert reduction.protected is not None
    # Seven are left: ceil(1.75) = 2, the single token 7 and the window 10, whose attention is 0.4 on average.
    assert reduction.keep[reduction.protected].tolist() == [7, 10]
    pipeline = build_reducer("uniform:keep_ratio=1.0 + mustdrop:window=2,key_ratio=0.25 + none")
    followed = reduce_tokens(pipeline, tokens)
    assert followed.protected is not None
    assert followed.indices[followed.protected].tolist() == [7, 10]


def test_the_filter_looks_at_the_sum_and_at_the_largest_row():
    rows = torch.tensor([[0.020, 0.001, 0.004, 0.030, 0.002, 0.001], [0.010, 0.002, 0.050, 0.010, 0.003, 0.002]])
    keep = filtered(rows.sum(0), rows.amax(0), 0.10, 0.005)
    assert keep.nonzero().squeeze(1).tolist() == [0, 2, 3]
    keys = torch.tensor([False, True, False, False, False, False])
    assert (keep | keys).nonzero().squeeze(1).tolist() == [0, 1, 2, 3]
    assert keys[keep | keys].nonzero().squeeze(1).tolist() == [1]
    assert filtered(rows.sum(0), rows.amax(0), 1.0, 1.0).nonzero().squeeze(1).tolist() == [2]


def test_the_cache_keeps_what_survived_all_filters():
    kept = [[0, 1, 3, 4, 6, 7, 8], [0, 1, 3, 4, 5, 6], [0, 2, 3, 4, 5]]
    origins = [torch.arange(9)]
    for keep in kept:
        origins.append(origins[-1][torch.tensor(keep)])
    # Rows 0, 6, 7 and 8 of these nine are text, which nobody drops; borders before layers 2, 3 and 4 of 6.
    text = torch.tensor([0, 6, 7, 8])
    planes = [origins[0], origins[0], *origins[1:], origins[-1]]
    is_visual = [~torch.isin(plane, text) for plane in planes]
    view = CacheView(
        lengths=tuple(len(plane) for plane in planes),
        visual=tuple(flags.nonzero().squeeze(1) for flags in is_visual),
        origins=tuple(plane[flags] for plane, flags in zip(planes, is_visual, strict=True)),
        items=torch.zeros(9, dtype=torch.int64),
        cells=torch.zeros(9, 3, dtype=torch.int64),
        item_kinds=("image",),
        read=lambda layer: pytest.fail("neither keys nor values are read"),
    )
    answer = MustDrop(at_layers=(2, 3, 4)).prefill_done(view)
    assert {layer: planes[layer][rows].tolist() for layer, rows in answer.items()} == {
        1: [0, 4, 6, 7, 8],
        2: [0, 4, 6, 7, 8],
        3: [0, 4, 6, 7, 8],
    }


def test_the_paper_s_layers_at_other_depths():
    assert MustDrop().layers(32) == (3, 7, 11, 15)
    assert MustDrop().layers(4) == (1, 2)
    assert MustDrop().layers(1) == ()
    assert MustDrop(at_layers=[2, 5]).layers(32) == (2, 5)


@pytest.mark.parametrize(
    ("option", "value"),
    [("window", 0), ("similarity", 2), ("key_ratio", -0.1), ("peak", "x"), ("at_layers", [3, 3]), ("at_layers", 3)],
)
def test_options_out_of_range_are_named(option, value):
    with pytest.raises(InvalidOption, match=option):
        MustDrop(**{option: value})


def test_a_tower_without_cls_is_refused_by_name(tmp_path):
    model = mm.load(random_qwen2_5_vl(tmp_path), dtype="float32")
    image = png(picture(0, (112, 112)))
    with pytest.raises(IncompatiblePlugin, match="cls_attention"):
        model.generate("What?", images=[image], reducer="mustdrop")
    answer = model.generate("What?", images=[image], reducer="mustdrop:key_ratio=0,peak=0.2", max_new_tokens=2)
    assert 0 < answer.usage.num_visual_tokens_kept <= answer.usage.num_visual_tokens_in
