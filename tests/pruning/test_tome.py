"""ToMe: case T1 of the reduction specification, its schedules, and what is carried out inside a tower."""

from __future__ import annotations

import pytest
import torch

from encoders.helpers.merging import _merge, run_blocks
from mm.errors import InvalidOption, ReducerFault
from mm.plugins.reducer import Matched
from mm.plugins.registry import create
from mm.plugins.spec import build_reducer
from pruning.in_vit.tome import ToMe, match, schedule

KEYS = torch.tensor([[5.0, 0], [4, 1], [0, 3], [1, 4], [3, -2], [5, 1], [1, 1], [-1, 2]]).unsqueeze(0)
VALUES = torch.arange(1.0, 9).reshape(1, 8, 1)


def merged(sizes: torch.Tensor, num_prefix: int) -> tuple[Matched, list[float], list[float]]:
    matched = match(KEYS, 2, num_prefix)
    values, left = _merge(matched.slots, VALUES, sizes, 6)
    return matched, values.flatten().tolist(), left.flatten().tolist()


def test_t1_without_cls():
    matched, values, sizes = merged(torch.ones(1, 8), 0)
    assert values == [7, 5, 2, 3.5, 3.5, 8]
    assert sizes == [1, 1, 1, 2, 2, 1]
    assert matched.anchors.tolist() == [[6, 4, 1, 3, 5, 7]]
    assert matched.slots[0, 0] == matched.slots[0, 5]
    assert matched.slots[0, 2] == matched.slots[0, 3]


def test_t1_with_cls():
    matched, values, sizes = merged(torch.ones(1, 8), 1)
    assert values == [1, 5, 4.5, 3.5, 6, 8]
    assert sizes == [1, 1, 2, 2, 1, 1]
    assert matched.anchors.tolist() == [[0, 4, 1, 3, 5, 7]]


def test_t1_weighted():
    matched, values, sizes = merged(torch.tensor([[3.0, 1, 1, 1, 1, 1, 1, 1]]), 0)
    slot = matched.anchors[0].tolist().index(5)
    assert (values[slot], sizes[slot]) == (2.25, 4)


def test_schedules():
    assert schedule(12, 8, -1) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert schedule(4, 7, -0.5) == [10, 8, 6, 4]
    assert schedule(5, 3, 0) == [3] * 5
    assert schedule(1, 4, 1) == [0]


@pytest.mark.parametrize("slope", [-1, -0.3, 0, 0.5, 1])
@pytest.mark.parametrize(
    ("patches", "blocks", "keep_ratio"), [(576, 23, 0.25), (256, 6, 0.1), (49, 12, 0.9), (9, 3, 0.3)]
)
def test_exactly_as_many_are_left_as_asked_for(slope, patches, blocks, keep_ratio):
    reducer = ToMe(keep_ratio=keep_ratio, slope=slope)
    counts = reducer.merges(patches, blocks)
    assert patches - sum(counts) == reducer.plan(patches)
    left = patches
    for count in counts:
        assert 0 <= count <= left // 2
        left -= count


def test_what_is_out_of_reach_is_refused():
    with pytest.raises(InvalidOption, match="out of reach: each of 2 blocks merges half"):
        ToMe(keep_ratio=0.1).merges(256, 2)


def plain(hidden: torch.Tensor, counts: tuple[int, ...], prefix: int) -> dict[int, tuple[list[int], torch.Tensor]]:
    """Merging on lists, one picture: every token is its members and its place; blocks that change nothing else."""
    rows = [([i], i) for i in range(len(hidden))]

    def value(members):
        return hidden[members].mean(dim=0)

    for count in counts:
        patches = list(range(prefix, len(rows)))
        a, b = [i for i in patches if i % 2 == 0], [i for i in patches if i % 2]
        if not count:
            continue
        unit = [torch.nn.functional.normalize(value(members), dim=0) for members, _ in rows]
        best = {i: max(b, key=lambda j, i=i: (unit[i] @ unit[j]).item()) for i in a}
        ranked = sorted(a, key=lambda i: -(unit[i] @ unit[best[i]]).item())
        for i in ranked[:count]:
            rows[best[i]] = (rows[best[i]][0] + rows[i][0], rows[best[i]][1])
        alone = sorted(ranked[count:]) if prefix else ranked[count:]
        rows = rows[:prefix] + [rows[i] for i in alone] + [rows[j] for j in b]
    return {place - prefix: (members, value(members)) for members, place in rows[prefix:]}


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_blocks_merge_as_the_plain_version(prefix):
    """Blocks without attention or MLP: what is left are the means of those that were merged, in reading order."""
    hidden = torch.randn(3, prefix + 25, 6, generator=torch.Generator().manual_seed(prefix))
    reducer = ToMe(keep_ratio=0.28)
    out = run_blocks([None] * 4, hidden, prefix, reducer, lambda _, x, bias: (x, x.unsqueeze(1)), lambda _, x: x)
    for i, picture in enumerate(hidden):
        expected = plain(picture, reducer.merges(25, 4), prefix)
        assert out.anchors[i].tolist() == sorted(expected)
        assert out.sizes[i].tolist() == [len(expected[place][0]) for place in sorted(expected)]
        values = torch.stack([expected[place][1] for place in sorted(expected)])
        assert torch.allclose(out.hidden[i], values, atol=1e-5)


def test_attention_counts_each_token_as_often_as_it_stands_for():
    """The bias is log size, so that k copies and one token of size k get the same share."""
    biases = []
    hidden = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))

    def attend(_, x, bias):
        biases.append(bias)
        return x, x.unsqueeze(1)

    out = run_blocks([0, 1, 2], hidden, 1, ToMe(keep_ratio=0.5), attend, lambda _, x: x)
    assert biases[0] is None
    assert torch.allclose(biases[2].exp().sum(), torch.tensor(9.0))
    assert out.sizes.sum() == 8


def faulty(**changes) -> type:
    class Faulty(ToMe):
        def match(self, keys, num_merged, num_prefix):
            matched = super().match(keys, num_merged, num_prefix)
            planes = {"slots": matched.slots.clone(), "anchors": matched.anchors.clone()} | {
                name: change(getattr(matched, name)) for name, change in changes.items()
            }
            return Matched(**planes)

    return Faulty


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": lambda plane: plane + 1},
        {"slots": lambda plane: plane.clamp_max(3)},
        {"anchors": lambda plane: plane - 1},
        {"anchors": lambda plane: plane.flip(1)},
        {"anchors": lambda plane: plane[:, :-1]},
    ],
)
def test_what_cannot_be_merged_is_a_fault(changes):
    hidden = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ReducerFault, match="Faulty"):
        run_blocks([0], hidden, 0, faulty(**changes)(keep_ratio=0.6), lambda _, x, b: (x, x[:, None]), lambda _, x: x)


@pytest.mark.parametrize("slope", [-2, "x", True, float("nan")])
def test_bad_slopes_are_refused(slope):
    with pytest.raises(InvalidOption, match="slope"):
        create("reducer", "tome", slope=slope)


def test_reducers_of_cells_do_not_follow_it():
    for spec in ("tome + evs", "tome + pool2"):
        with pytest.raises(InvalidOption, match="every cell of the grid"):
            build_reducer(spec)
    assert build_reducer("tome:keep_ratio=0.5 + divprune:keep_ratio=0.5").plan(256, (1, 16, 16)) == 64
