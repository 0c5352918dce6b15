"""The benchmark of `mm tune`: equal FLOPs, disjoint pictures, and a table that says what was measured."""

from __future__ import annotations

import pytest

from demos.bench.tuning import ratio_for, report_tuning, rivals, split
from mm.plugins.spec import build_reducer
from serve.evaluation.items import read_test_set
from serve.tuning.schedule import Shape

SHAPE = Shape(num_layers=4, width=64, inner_width=160, query_width=64, key_width=32, num_visual=500, num_text=40)


@pytest.mark.parametrize("way", rivals(4))
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_rivals_use_the_same_flops_up(way: str, share: float) -> None:
    schedule, spec = rivals(4)[way]
    ratio = ratio_for(SHAPE, schedule, share)
    if ratio is None:
        assert (way, share) == ("fastv, layer 2", 0.4)
        return
    assert SHAPE.flop_share(schedule(ratio)) == pytest.approx(share, abs=1e-3)
    reducer = build_reducer(spec % ratio)
    layers = reducer.layers(4)
    kept = {"pyramiddrop": lambda at: reducer.ratio(1 + at)}.get(way, lambda at: reducer.keep_ratio)
    places = [sum(layer <= index for layer in layers) for index in range(4)]
    assert [kept(place - 1) if place else 1.0 for place in places] == pytest.approx(schedule(ratio), abs=1e-4)


def test_a_search_and_its_comparison_share_no_picture() -> None:
    items = [item for item in read_test_set().items if item.kind == "image"]
    tuned, rest = split(items, 2, 5)
    assert tuned
    assert rest
    assert not {item.media_index for item in tuned} & {item.media_index for item in rest}


def test_the_table_says_what_was_measured() -> None:
    row = {"search": "greedy", "way": "mm tune", "reducer": "scheduled", "flop_share": 0.5, "score": 0.8}
    rows = [row | {"tuned_over": [0, 0, 0]}, row | {"way": "fastv, layer 1", "tuned_over": [0.05, 0.01, 0.09]}]
    record = {"num_tuned": 3, "num_items": 4, "trials": 2, "tolerance": 0.02, "rows": rows}
    assert "| fastv, layer 1 | `scheduled` | 50%                  | 80.0% | +5 (+1 to +9)" in report_tuning(record)
