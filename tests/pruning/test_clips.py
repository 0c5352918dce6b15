"""EVS (case E1), VidCom2 (VC1), HoliTom (H1), FlashVID (FL1, FL2), clustering (K1): the specification's cases, and
properties.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mm.data.tokens import VisualTokens
from mm.errors import InvalidOption
from mm.plugins.apply import reduce_tokens
from mm.plugins.features import ATTENTION_RECEIVED
from mm.plugins.registry import create
from mm.plugins.spec import build_reducer
from pruning.base import unit_rows
from pruning.helpers.clips import beginnings, num_segments
from pruning.helpers.clusters import distances_between, dpc_knn
from pruning.temporal import flashvid
from pruning.temporal.evs import changes
from pruning.temporal.holitom import segments
from pruning.temporal.vidcom2 import frame_shares, likeness, steady_channels

VIDEO = ["evs", "vidcom2", "holitom", "flashvid"]


def clip(rows: list, num_frames: int) -> VisualTokens:
    embeddings = torch.tensor(rows).float()
    grid = (num_frames, 1, len(rows) // num_frames)
    return VisualTokens.full(embeddings, grid, "video", {ATTENTION_RECEIVED: torch.rand(2, len(rows))})


E1 = [[1, 0], [0, 1], [1, 1], [2, 1], [1, 0], [1, 1], [1, 1], [1, 2], [0, 1], [1, 1], [1, 2], [1, 2]]


def test_e1_evs():
    changed = changes(torch.tensor(E1).float().unflatten(0, (3, 4)))
    expected = torch.tensor([[255, 255, 255, 255], [0, 0.2929, 0, 0.2], [1, 0, 0.0513, 0]])
    assert torch.allclose(changed, expected, atol=5e-4)
    out = reduce_tokens(create("reducer", "evs", keep_ratio=0.5), clip(E1, 3))
    assert out.indices.tolist() == [0, 1, 2, 3, 5, 8]


@pytest.mark.parametrize(
    ("frames", "per_frame", "keep_ratio", "kept"),
    [(3, 4, 0.25, 4), (8, 100, 0.3, 240), (10, 7, 0.67, 46), (10, 100, 0.1, 100)],
)
def test_e1_counts(frames, per_frame, keep_ratio, kept):
    reducer = create("reducer", "evs", keep_ratio=keep_ratio)
    assert reducer.plan(frames * per_frame, (frames, 1, per_frame), "video") == kept


def test_evs_keeps_what_moves():
    """A still clip in which one cell changes in one frame."""
    frames = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0)).repeat(4, 1, 1)
    frames[2:, 5] = torch.randn(6, generator=torch.Generator().manual_seed(1))
    tokens = VisualTokens.full(frames.flatten(0, 1), (4, 3, 3), "video")
    out = reduce_tokens(create("reducer", "evs", keep_ratio=10 / 36), tokens)
    assert out.indices.tolist() == [*range(9), 2 * 9 + 5]


VC1 = [
    *([12, 3, 4, 5], [12, 4, 1, -1], [9, 4, 4, -2], [12, 1, 4, -4]),
    *([3, 4, 3, -8], [6, 2, 3, 3], [6, 1, 2, 8], [12, 2, 2, 8]),
    *([3, 3, 2, -2], [9, 2, 2, 6], [12, 4, 3, 4], [12, 2, 4, -4]),
]


def test_vc1_vidcom2():
    values = torch.tensor(VC1).float()
    assert torch.allclose(values.var(dim=0, correction=0), torch.tensor([12, 1.2222, 0.9722, 25.41]), atol=5e-3)
    assert sorted(steady_channels(values).tolist()) == [1, 2]
    to_clip, resemblance = likeness(values.unflatten(0, (3, 4)))
    expected = torch.tensor(
        [[9.8007, 6.6622, 9.9245, 7.2788], [9.3526, 9.7352, 9.0992, 9.9070], [9.3253, 9.9725, 9.6074, 8.7624]]
    )
    assert torch.allclose(resemblance, expected, atol=5e-4)
    assert torch.allclose(-to_clip.mean(dim=1), torch.tensor([-4.2098, -4.7522, -4.6964]), atol=5e-4)
    assert frame_shares(to_clip, 0.5).tolist() == [3, 1, 1]
    assert reduce_tokens(create("reducer", "vidcom2", keep_ratio=0.5), clip(VC1, 3)).indices.tolist() == [
        0,
        1,
        3,
        6,
        8,
        11,
    ]


def test_vidcom2_gives_back_what_is_too_much():
    """r = 0.42: the frames ask for 3 + 1 + 1 tokens where 5 are to stay, at 0.34 for 2 + 1 + 1 of 4."""
    frames = torch.tensor(VC1).float().unflatten(0, (3, 4))
    to_clip, resemblance = likeness(frames)
    for keep_ratio in (0.26, 0.34, 0.42, 0.59, 0.76, 0.92):
        shares = frame_shares(to_clip, keep_ratio).long().tolist()
        own = [t * 4 + i for t, k in enumerate(shares) for i in resemblance[t].argsort()[:k].tolist()]
        flat = resemblance.flatten()
        others = [i for i in flat.argsort().tolist() if i not in own]
        ranked = sorted(own, key=lambda i: flat[i].item()) + others
        k = max(3, int(round(12 * keep_ratio * 1000) // 1000))
        out = reduce_tokens(create("reducer", "vidcom2", keep_ratio=keep_ratio), clip(VC1, 3))
        assert out.indices.tolist() == sorted(ranked[:k])


H1 = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()


def saved(still: torch.Tensor, found: list[tuple[int, int]]) -> int:
    return sum((last - first) * int(still[first:last].all(dim=0).sum()) for first, last in found if last > first)


def test_h1_segments():
    assert segments(H1) == [(0, 2), (3, 5)]
    assert [saved(H1[:end], segments(H1[:end])) for end in range(6)] == [0, 3, 4, 4, 7, 8]
    assert segments(torch.ones(3, 2).bool()) == [(0, 3)]
    assert saved(torch.ones(3, 2).bool(), [(0, 3)]) == 6


@pytest.mark.parametrize("seed", range(5))
def test_segments_save_as_much_as_any(seed):
    rng = torch.Generator().manual_seed(seed)
    still = torch.rand(6, 5, generator=rng) > 0.35

    def best(end: int) -> int:
        return max([0, *(best(start - 1) + saved(still, [(start, end)]) for start in range(end + 1))]) if end > 0 else 0

    found = segments(still)
    assert [frame for first, last in found for frame in range(first, last + 1)] == list(range(7))
    assert saved(still, found) == best(6)


def test_k1_clusters():
    points = torch.tensor([0.0, 1, 3, 10, 11, 14]).unsqueeze(1)
    centres, labels = dpc_knn(points, 2, 2)
    assert centres.sort().values.tolist() == [0, 3]
    groups = [[i for i in range(6) if labels[i] == c] for c in centres.argsort().tolist()]
    assert groups == [[0, 1, 2], [3, 4, 5]]
    assert [round(points[g].mean().item(), 4) for g in groups] == [1.3333, 11.6667]
    centres, labels = dpc_knn(points, 3, 2)
    assert centres.tolist() == [0, 3, 1]
    assert [[i for i in range(6) if labels[i] == c] for c in range(3)] == [[0], [3, 4, 5], [1, 2]]


@pytest.mark.parametrize("seed", range(4))
def test_clusters_of_real_differences(seed):
    """As with distances from differences of rows; some of which are equal, and one no number."""
    rows = 5 + torch.randn(40, 96, generator=torch.Generator().manual_seed(seed))
    rows[7], rows[21], rows[30] = rows[3], rows[3], torch.nan
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") / 96**0.5
    torch.testing.assert_close(distances_between(rows), distances, equal_nan=True)
    assert (distances_between(rows)[[3, 7, 21]][:, [3, 7, 21]] == 0).all()


def test_clusters_of_copies_are_all_there():
    centres, labels = dpc_knn(torch.ones(6, 3), 4, 4)
    assert centres.tolist() == [0, 1, 2, 3]
    assert sorted(set(labels.tolist())) == [0, 1, 2, 3]


def test_holitom_averages_what_stands_still():
    """Two cells that never move, two that always do: the still ones become one token each, in the first frame."""
    rng = torch.Generator().manual_seed(0)
    frames = torch.randn(3, 4, 8, generator=rng)
    frames[:, 1] = torch.randn(8, generator=rng) + 0.01 * torch.randn(3, 8, generator=rng)
    frames[:, 3] = torch.randn(8, generator=rng)
    attention = torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 0]]).reshape(1, 12)
    tokens = VisualTokens.full(frames.flatten(0, 1), (3, 2, 2), "video", {ATTENTION_RECEIVED: attention})
    # 8 tokens are left of 12: two still ones and two in each frame.
    out = reduce_tokens(create("reducer", "holitom", keep_ratio=0.9), tokens)
    assert out.indices.tolist() == [0, 1, 2, 3, 4, 6, 8, 10]
    assert out.sizes.tolist() == [1, 3, 1, 3, 1, 1, 1, 1]
    assert torch.allclose(out.embeddings[1], frames[:, 1].mean(dim=0), atol=1e-6)
    # 4 of them: a cluster of the still ones, and the one that is looked at in each frame.
    out = reduce_tokens(create("reducer", "holitom", keep_ratio=1 / 3), tokens)
    assert out.indices.tolist() == [1, 2, 4, 10]
    assert out.sizes.tolist() == [6, 1, 1, 1]
    expected = 0.6 * frames[:, 1].mean(dim=0) + 0.4 * frames[:, 3].mean(dim=0)
    assert torch.allclose(out.embeddings[0], expected, atol=1e-6)


FL1 = [[4, 1, 0], [3, 2, 0], [0, 1, 3], [1, 4, 1], [0, 0, 5], [2, 2, 1]]
FL2 = [[[4, 0], [0, 4], [3, 3]], [[5, 1], [1, 5], [4, -4]], [[1, 6], [6, 1], [2, 2]]]


def test_fl1_flashvid_choice():
    unit = unit_rows(torch.tensor([FL1, FL1]).float())
    weights = torch.tensor([[3.0, 1, 2, 6, 1, 5], [1, 1, 1, 1, 1, 1]])
    order = flashvid.pick_order(unit, weights, 3)
    assert order[0].tolist() == [3, 0, 2]
    alone = flashvid.pick_order(unit[1:], weights[1:], 6)[0].tolist()
    assert order[1].tolist() == alone[:3]
    assert sorted(alone) == list(range(6))


def test_fl2_flashvid_trees():
    frames = torch.tensor(FL2).float()
    begins = torch.tensor([True, False, False])
    roots = flashvid.tree_roots(unit_rows(frames), torch.zeros(3, 3).bool(), begins, 0.95)
    assert roots.tolist() == [0, 1, 2, 0, 1, 5, 1, 0, 8]
    flat = frames.flatten(0, 1)
    assert torch.allclose(flat[roots == 0].mean(dim=0), torch.tensor([5, 2 / 3]))
    assert torch.allclose(flat[roots == 1].mean(dim=0), torch.tensor([2 / 3, 5]))
    # A chosen token has no tree, and none grows over the border of a segment.
    chosen = torch.zeros(3, 3).bool()
    chosen[1, 0] = True
    assert flashvid.tree_roots(unit_rows(frames), chosen, begins, 0.95).tolist() == [0, 1, 2, 3, 1, 5, 1, 7, 8]
    apart = flashvid.tree_roots(unit_rows(frames), torch.zeros(3, 3).bool(), torch.tensor([True, False, True]), 0.95)
    assert apart.tolist() == [0, 1, 2, 0, 1, 5, 6, 7, 8]


def test_flashvid_raises_the_threshold_until_the_budget_is_left():
    """A still clip: every token of frames 2 to 4 would join the one before, and 4 trees would be left for 8 tokens."""
    rng = torch.Generator().manual_seed(0)
    frames = torch.randn(1, 4, 8, generator=rng) + 0.05 * torch.randn(4, 4, 8, generator=rng)
    begins, none = torch.tensor([True, False, False, False]), torch.zeros(4, 4).bool()
    unit = unit_rows(frames)
    assert flashvid.tree_roots(unit, none, begins, 0.8).unique().tolist() == [0, 1, 2, 3]
    likeness = (unit[1:] * unit[:-1]).sum(dim=-1).flatten()
    # Of the 12 that may join, the 8th by likeness is the new threshold: 7 join, and 9 of 16 trees are left.
    bar = likeness.sort(descending=True).values[7]
    joining = (likeness > bar).nonzero().squeeze(1) + 4
    roots = flashvid.tree_roots(unit, none, begins, 0.8, least=2)
    assert (roots != torch.arange(16)).nonzero().squeeze(1).tolist() == joining.tolist()
    attention = {ATTENTION_RECEIVED: torch.rand(2, 16, generator=rng)}
    tokens = VisualTokens.full(frames.flatten(0, 1), (4, 2, 2), "video", attention)
    for share in (0.0, 0.5, 1.0):
        reducer = create("reducer", "flashvid", keep_ratio=0.5, diverse_share=share, min_segments=1)
        assert reduce_tokens(reducer, tokens).num_tokens == 8


def test_flashvid_weighs_by_the_event():
    """e = x . mean of the segment: (2, 1, 0) for rows of frame 1 with the mean (1, 0), negative ones count as 0."""
    frames = torch.tensor([[[2.0, 0], [1, 0], [0, 0]], [[-3, 0], [1, 1], [2, -1]]])
    apart = flashvid.event_relevance(frames, torch.tensor([True, True]))
    assert apart[0].tolist() == [2, 1, 0]
    assert apart[1].tolist() == [0, 0, 0]  # its mean is (0, 0)
    joint = flashvid.event_relevance(frames, torch.tensor([True, False]))
    assert joint.tolist() == [[1, 0.5, 0], [0, 0.5, 1]]


@pytest.mark.parametrize(("num_frames", "least"), [(1, 1), (7, 1), (8, 2), (31, 7), (32, 8), (64, 8)])
def test_flashvid_segments_of_short_clips(num_frames, least):
    assert num_segments(num_frames) == least
    still = torch.ones(num_frames, 2, 4)
    assert int(beginnings(still, 0.9, least).sum()) == least


@pytest.mark.parametrize(("per_frame", "keep_ratio", "whole", "chosen"), [(196, 0.125, 25, 18), (196, 0.3125, 62, 44)])
def test_fl2_budgets(per_frame, keep_ratio, whole, chosen):
    """Of an r of .1 and .25 with an expansion of 1.25. Chosen tokens stand alone, the others are merged."""
    frames = torch.randn(2, per_frame, 8, generator=torch.Generator().manual_seed(0))
    tokens = VisualTokens.full(
        frames.flatten(0, 1), (2, 1, per_frame), "video", {ATTENTION_RECEIVED: torch.rand(2, 2 * per_frame)}
    )
    reducer = create("reducer", "flashvid", keep_ratio=keep_ratio, event=False)
    assert reducer.plan(2 * per_frame, tokens.grid, "video") == 2 * whole
    out = reduce_tokens(reducer, tokens)
    assert out.num_tokens == 2 * whole
    assert out.sizes.sum() == 2 * per_frame
    unit, attention = unit_rows(frames), tokens.aux_features[ATTENTION_RECEIVED].sum(dim=0).view(2, -1)
    order = flashvid.pick_order(unit, attention, chosen) + torch.tensor([[0], [per_frame]])
    alone = torch.isin(out.indices, order)
    assert int(alone.sum()) == 2 * chosen
    assert (out.sizes[alone] == 1).all()


def test_flashvid_segments_begin_where_frames_differ():
    """Three pictures, two frames of each: two true borders, and the least alike of the others where more are wanted."""
    rng = torch.Generator().manual_seed(0)
    scenes = torch.randn(3, 5, 16, generator=rng).repeat_interleave(2, dim=0)
    frames = scenes + torch.tensor([0.0, 0.001, 0, 0.02, 0, 0.005]).view(6, 1, 1) * torch.randn(6, 5, 16, generator=rng)
    assert beginnings(frames, 0.9, 1).nonzero().flatten().tolist() == [0, 2, 4]
    assert beginnings(frames, 0.9, 4).nonzero().flatten().tolist() == [0, 2, 3, 4]
    assert beginnings(frames, 0.9, 99).all()


def test_flashvid_merges_what_stands_still():
    """One cell moves and is looked at; the others stand still and are one token each over a segment of time."""
    rng = torch.Generator().manual_seed(0)
    frames = torch.randn(4, 4, 8, generator=rng)
    frames[:, 1:] = torch.randn(3, 8, generator=rng)
    attention = torch.tensor([1.0, 0, 0, 0]).repeat(4).view(1, 16)
    tokens = VisualTokens.full(frames.flatten(0, 1), (4, 2, 2), "video", {ATTENTION_RECEIVED: attention})
    unit = unit_rows(frames)
    chosen = torch.tensor([True, False, False, False]).repeat(4, 1)
    roots = flashvid.tree_roots(unit, chosen, torch.tensor([True, False, False, False]), 0.8)
    assert roots.unique().tolist() == [0, 1, 2, 3, 4, 8, 12]
    # One token of each frame is chosen, and one more is left of each: 8 of 16, four of which are means.
    reducer = create("reducer", "flashvid", keep_ratio=0.5, diverse_share=0.5, segment_threshold=-1, min_segments=1)
    out = reduce_tokens(reducer, tokens)
    assert out.num_tokens == 8
    assert out.sizes.sum() == 16


@pytest.mark.parametrize("name", VIDEO)
@pytest.mark.parametrize("grid", [(1, 3, 5), (2, 1, 1), (9, 2, 3), (5, 7, 7)])
@pytest.mark.parametrize("keep_ratio", [0.05, 0.25, 0.6])
def test_images_stay_and_clips_lose(name, grid, keep_ratio):
    reducer = create("reducer", name, keep_ratio=keep_ratio)
    t, h, w = grid
    embeddings = torch.randn(t * h * w, 12, generator=torch.Generator().manual_seed(t))
    aux_features = {ATTENTION_RECEIVED: torch.rand(2, t * h * w)}
    image = VisualTokens.full(embeddings, grid, "image", aux_features)
    assert torch.equal(reduce_tokens(reducer, image).embeddings, embeddings)
    out = reduce_tokens(reducer, replace(image, kind="video"))
    assert out.num_tokens <= reducer.plan(t * h * w, grid, "video")
    least = {"evs": h * w, "vidcom2": t, "holitom": 1, "flashvid": t * math.ceil(h * w * keep_ratio)}[name]
    assert out.num_tokens <= max(least, round(keep_ratio * t * h * w))


@pytest.mark.parametrize("name", VIDEO)
def test_a_clip_of_one_picture_loses_nothing_that_moves(name):
    """All frames equal: what is left shows every cell once before it shows any twice."""
    frame = torch.randn(12, 16, generator=torch.Generator().manual_seed(5))
    tokens = VisualTokens.full(frame.repeat(6, 1), (6, 3, 4), "video", {ATTENTION_RECEIVED: torch.rand(2, 72)})
    out = reduce_tokens(create("reducer", name, keep_ratio=0.5), tokens)
    cells = out.indices % 12
    if name == "holitom":
        assert out.indices.tolist() == list(range(12))
        assert torch.allclose(out.embeddings, frame, atol=1e-5)
    elif name == "evs":
        assert set(cells.tolist()) == set(range(12))
    assert out.num_tokens == (12 if name == "holitom" else 36)


@pytest.mark.parametrize("spec", ["uniform + evs", "evs + vidcom2", "divprune + holitom", "pool2 + evs"])
def test_behind_one_that_removes_cells_they_are_refused(spec):
    with pytest.raises(InvalidOption, match=r"every cell of the grid|tokens do not meet them"):
        build_reducer(spec)


def test_chains_of_a_clip():
    reducer = build_reducer("evs:keep_ratio=0.5 + divprune:keep_ratio=0.5")
    tokens = clip(E1 * 4, 12)
    out = reduce_tokens(reducer, tokens)
    assert out.num_tokens == 12 == reducer.plan(48, tokens.grid, "video")
    image = reduce_tokens(reducer, replace(tokens, kind="image"))
    assert image.num_tokens == 24 == reducer.plan(48, tokens.grid, "image")


@pytest.mark.parametrize("threshold", [1.5, "x", True])
def test_bad_thresholds_are_refused(threshold):
    with pytest.raises(InvalidOption, match="threshold"):
        create("reducer", "holitom", threshold=threshold)
