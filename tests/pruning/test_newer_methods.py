"""MMTok, HoloV, DART, FastVID, InfiniPot-V and PixelPrune, on small cases worked out by hand and by plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mm.data.tokens import VisualTokens
from mm.errors import InvalidOption
from mm.plugins.apply import reduce_tokens
from mm.plugins.features import ATTENTION_RECEIVED, TOWER_FEATURES
from mm.plugins.registry import create
from pruning.before_vit.pixelprune import PixelPrune
from pruning.helpers.coverage import most_covering
from pruning.in_llm.infinipot import InfiniPot, newest
from pruning.pre_llm.holov import allocate, crop_score, crops
from pruning.temporal.fastvid import spread


def line(rows, **aux_features) -> VisualTokens:
    embeddings = torch.as_tensor(rows).float()
    return VisualTokens.full(embeddings, (1, 1, len(embeddings)), "image", aux_features)


# ── MMTok ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_coverage_counts_what_is_new():
    """Columns cover (.5 .4 .0), (.4 .4 .0), (.0 .1 .3): first .9, then .3 against 0, then nothing new."""
    covers = torch.tensor([[0.5, 0.4, 0.0], [0.4, 0.4, 0.1], [0.0, 0.0, 0.3]])
    chosen, gains = most_covering(covers, torch.zeros(3), 3)
    assert chosen.tolist() == [0, 2, 1]
    assert torch.allclose(gains, torch.tensor([0.9, 0.3, 0.0]))
    assert most_covering(covers, torch.tensor([-math.inf, 0, 0]), 2)[0].tolist() == [1, 2]


def plain_mmtok(x, z, text, k, alpha=0.5) -> list[int]:
    def cosines(a, b):
        return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T

    def softmax(a):
        return np.exp(a) / np.exp(a).sum(axis=1, keepdims=True)

    rows = np.concatenate([softmax(cosines(text, x) / 0.02) / len(text), alpha * softmax(cosines(z, z) / 0.2) / len(z)])
    covered, chosen = np.zeros(len(rows)), []
    while len(chosen) < k:
        gains = [sum(max(0, c - v) for c, v in zip(column, covered, strict=True)) for column in rows.T]
        chosen.append(max((i for i in range(len(x)) if i not in chosen), key=lambda i: (gains[i], -i)))
        covered = np.maximum(covered, rows[:, chosen[-1]])
    return sorted(chosen)


@pytest.mark.parametrize("seed", range(4))
def test_mmtok_equals_the_plain_version(seed):
    rng = np.random.default_rng(seed)
    x, z, text = rng.standard_normal((40, 12)), rng.standard_normal((40, 8)), rng.standard_normal((5, 12))
    tokens = line(x, **{TOWER_FEATURES: torch.from_numpy(z.T).float()})
    out = reduce_tokens(create("reducer", "mmtok", keep_ratio=0.3), tokens, torch.from_numpy(text).float())
    assert out.indices.tolist() == plain_mmtok(x, z, text, 12)


def test_mmtok_covers_the_question_and_the_picture():
    """Without alpha each word's own token comes first; without a question the picture alone counts."""
    x = torch.eye(6)
    tokens = line(x, **{TOWER_FEATURES: torch.tensor([[1.0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])})
    asked = reduce_tokens(create("reducer", "mmtok", keep_ratio=1 / 3, alpha=0), tokens, x[[2, 5]])
    assert asked.indices.tolist() == [2, 5]
    silent = reduce_tokens(create("reducer", "mmtok", keep_ratio=1 / 3), tokens, torch.zeros(0, 6))
    assert silent.indices.tolist() == [0, 4]


# ── HoloV ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_holov_crops_and_shares():
    assert [(run.start, run.stop) for run in crops(10, 4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]
    assert [(run.start, run.stop) for run in crops(2, 4)] == [(0, 1), (1, 2)]
    # Shares .5, .3, .2 of 7 are 3.5, 2.1, 1.4: floors 3, 2, 1, and one more for the largest.
    assert allocate(7, torch.tensor([5.0, 3, 2]), [9, 9, 9]) == [4, 2, 1]
    assert allocate(7, torch.tensor([5.0, 3, 2]), [2, 9, 9]) == [2, 3, 2]  # what the first has no room for
    assert allocate(6, torch.tensor([0.0, 0, 0]), [2, 2, 2]) == [2, 2, 2]


def test_holov_score():
    """Cosines of (1 0), (1 0), (0 1): c = 1, 0 and 0 off the diagonal, the mean over others .5, .5, 0. Variances, over
    all three entries of a row, the diagonal as 0: (.25 + .25 + .25) / 2, the same, and 0.
    """
    attention = torch.tensor([0.2, 0.1, 0.3])
    variances = torch.tensor([0.375, 0.375, 0])
    scaled = 1000 * attention
    expected = (scaled + 0.09 * variances * scaled.mean() / (variances.mean() + 1e-6)).mean()
    found = crop_score(torch.tensor([[2.0, 0], [1, 0], [0, 3]]), attention, 0.09)
    assert torch.allclose(found, expected)


def test_holov_keeps_the_best_of_each_crop():
    attention = torch.tensor([[0.05, 0.2, 0.01, 0.04, 0.3, 0.1, 0.1, 0.2]])
    x = torch.ones(8, 3)  # all alike: variances differ in no crop, and shares are those of attention: .3 and .7
    out = reduce_tokens(
        create("reducer", "holov", keep_ratio=0.5, num_crops=2), line(x, **{ATTENTION_RECEIVED: attention})
    )
    # .3 of 4 is 1.2, .7 is 2.8: 1 and 2, and one more for the second.
    assert out.indices.tolist() == [1, 4, 5, 7]


# ── DART ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_dart_takes_what_duplicates_the_pivots_least():
    """Pivot 0 (norm 9) at 0 degrees takes token 3 at 180; the text pivot at 90 degrees takes token 4 at 270."""
    x = [[9, 0], [1, 0.1], [0.1, 1], [-1, 0], [0, -1], [1, 1]]
    text = torch.tensor([[0.0, 0.5], [0, 2.0]])
    reducer = create("reducer", "dart", keep_ratio=0.5, image_pivots=1, text_pivots=1)
    assert reduce_tokens(reducer, line(x), text).indices.tolist() == [0, 3, 4]
    # Without the question the picture's pivot takes both: 180 degrees, then 90 or 270, of which -0 is not less.
    alone = create("reducer", "dart", keep_ratio=0.5, image_pivots=1, text_pivots=0)
    assert reduce_tokens(alone, line(x), text).indices.tolist() == [0, 3, 4]
    few = create("reducer", "dart", keep_ratio=1 / 3)
    assert reduce_tokens(few, line(x), text).indices.tolist() == [0, 5]  # the two largest norms, no room for more


@pytest.mark.parametrize("option", ["image_pivots", "text_pivots"])
def test_dart_refuses_what_is_no_number_of_pivots(option):
    with pytest.raises(InvalidOption, match=option):
        create("reducer", "dart", **{option: -1})


# ── FastVID ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("total", "num_frames", "room", "expected"),
    [
        (8, 4, 9, [0, 0, 0, 8]),  # one anchor: the last
        (10, 5, 9, [5, 0, 0, 0, 5]),  # two: the last and the fourth before it
        (11, 5, 9, [5, 0, 0, 0, 6]),  # what does not divide goes to the later
        (12, 4, 5, [2, 2, 3, 5]),  # more than the anchor has tokens for
        (20, 4, 5, [5, 5, 5, 5]),
    ],
)
def test_fastvid_spreads_a_segments_budget(total, num_frames, room, expected):
    assert spread(total, num_frames, room, 4) == expected


def test_fastvid_merges_what_is_not_looked_at():
    """Two frames, one segment. Attention keeps cell 0 of each; of the others one context token is left, in frame 1.

    Left are (0 1), (0 1), (0 3) and (0 1): all join the densest of frame 1, (0 1) at the last cell, which becomes
    .6 (0 1) + .4 (0 1.5).
    """
    frames = torch.tensor([[[1.0, 0], [0, 1], [0, 1]], [[1, 0], [0, 3], [0, 1]]])
    attention = torch.tensor([[0.9, 0, 0, 0.9, 0, 0]])
    tokens = VisualTokens.full(frames.flatten(0, 1), (2, 1, 3), "video", {ATTENTION_RECEIVED: attention})
    reducer = create("reducer", "fastvid", keep_ratio=0.67, context_share=0.5, segment_threshold=-1, min_segments=1)
    out = reduce_tokens(reducer, tokens)
    # floor(3 * .67) = 2 per frame: 1 by attention and 1 context token each, both of them on frame 1.
    assert out.indices.tolist() == [0, 3, 4, 5]
    assert out.embeddings.tolist()[:2] == [[1, 0], [1, 0]]
    # With two context tokens, equal cosines join the first: 4 tokens, mean 1.5; the second has itself alone.
    by_place = dict(zip(out.indices.tolist(), out.embeddings.tolist(), strict=True))
    assert by_place[4] == pytest.approx([0, 0.6 * 3 + 0.4 * (1 + 1 + 3) / 3])
    assert by_place[5] == pytest.approx([0, 1])
    assert float(out.sizes.sum()) == pytest.approx(6)


# ── InfiniPot-V ───────────────────────────────────────────────────────────────────────────────────────────────────────


def cells_of(num_frames: int, num_cells: int) -> torch.Tensor:
    index = torch.arange(num_frames * num_cells)
    return torch.stack([index // num_cells, torch.zeros_like(index), index % num_cells], dim=1)


def test_infinipot_keeps_the_new_and_the_large():
    """4 frames of 2 cells. Cell 0 stands still, cell 1 turns in the last frame: its older keys are new against it."""
    still, turned = [1.0, 0], [0.0, 1]
    keys = torch.tensor([[still, still]] * 3 + [[still, turned]]).flatten(0, 1).unsqueeze(1)
    assert newest(keys, cells_of(4, 2), 4, 0.25).tolist() == [1, 3, 6, 7]
    values = torch.tensor([1.0, 1, 9, 1, 8, 1, 1, 1]).view(8, 1, 1)
    # Of 6, half by novelty: 3 of the newest, the last frame and the first of cell 1; the others by their values.
    assert InfiniPot(recent_share=0.25).choose(keys, values, cells_of(4, 2), 5).tolist() == [1, 2, 4, 6, 7]
    assert InfiniPot(redundancy_share=0).choose(keys, values, cells_of(4, 2), 2).tolist() == [2, 4]


def test_infinipot_without_room_for_a_frame():
    """Then the last frame still says what is new, and has no place of its own."""
    keys = torch.randn(12, 2, 4, generator=torch.Generator().manual_seed(0))
    chosen = newest(keys, cells_of(3, 4), 2, 0.25)
    unit = torch.nn.functional.normalize(keys, dim=-1).view(3, 4, 2, 4)
    likeness = (unit * unit[-1]).sum(-1).mean(-1).flatten()
    assert chosen.tolist() == likeness.argsort()[:2].sort().values.tolist()


# ── PixelPrune ────────────────────────────────────────────────────────────────────────────────────────────────────────


def shown(rows: list[str]) -> torch.Tensor:
    """(1, h, w, 1) of digits, in tenths."""
    return torch.tensor([[[float(digit) / 10] for digit in row] for row in rows]).unsqueeze(0)


def kept(pixels: torch.Tensor, tau: float = 0) -> list[str]:
    return [
        "".join("x" if cell else "." for cell in row) for row in PixelPrune(tau=tau).keep_cells(pixels).flatten(0, 1)
    ]


def test_pixelprune_keeps_corners_of_what_is_flat():
    """A flat picture keeps its first cell. A block keeps its corner, and where the ground begins again."""
    assert kept(shown(["111", "111"])) == ["x..", "..."]
    # Row 1: 2 against its left is new, then 1 after it. Row 2: c = a and not b at the edges: predicted from above.
    assert kept(shown(["1111", "1221", "1221"])) == ["x...", ".x.x", "...."]
    assert kept(shown(["12", "34"])) == ["xx", "xx"]


def test_pixelprune_compares_with_what_is_shown():
    """A ramp in steps of .1: with tau .1 each step is alike, but the second differs by .2 from what stands for it."""
    assert kept(shown(["12345"]), tau=0.11) == ["x.x.x"]
    assert kept(shown(["12345"])) == ["xxxxx"]


def test_pixelprune_of_a_clip_leaves_what_stands_still():
    still = torch.rand(1, 3, 3, 4, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1, 1)
    still[2, 1, 1] += 0.5
    assert PixelPrune().keep_cells(still).sum(dim=(1, 2)).tolist() == [9, 0, 1]
    assert PixelPrune(tau=0.6).keep_cells(still)[1:].sum() == 0


@pytest.mark.parametrize("tau", [0, 0.05, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_no_cell_is_further_than_tau_from_what_stands_for_it(seed, tau):
    rng = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(2, 6, 7, 3, generator=rng) * 4).round() / 4 + 0.02 * torch.rand(2, 6, 7, 3, generator=rng)
    keep = PixelPrune(tau=tau).keep_cells(pixels)
    values = pixels[keep]
    nearest = (pixels.flatten(0, 2).unsqueeze(1) - values).abs().amax(dim=-1).amin(dim=1)
    assert float(nearest.max()) <= tau + 1e-6
