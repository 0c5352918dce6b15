"""The benchmark of the reducers: budgets mean what they say, and the tables say what the file says."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from demos.bench.reducer_figures import Results, main_table, plot, put_into, report, task_table, verdicts
from demos.bench.reducers import Timed, done_before, methods_for, probes, ratios_of, spec_of
from mm.core.data import VisualTokens
from mm.core.plugins import ReduceContext, Stage, build_reducer
from serve.evaluation.items import read_test_set

ALL = sorted({*methods_for("image"), *methods_for("video")})


@pytest.mark.parametrize("method", ALL)
def test_every_method_has_a_specification_at_each_of_its_ratios(method: str) -> None:
    for ratio in ratios_of(method):
        reducer = build_reducer(spec_of(method, ratio, 0.01))
        if ratio == 1.0 and reducer.stage is Stage.PRE_LLM and not reducer.needs:
            tokens = VisualTokens.full(torch.randn(64, 8), (1, 8, 8), "image")
            assert len(reducer.after_encode(tokens, ReduceContext()).keep) == 64
        planned = reducer.plan(256, (1, 16, 16))
        outside = reducer.stage in (Stage.PRE_LLM, Stage.TEMPORAL, Stage.IN_VIT)
        if outside and reducer.count == "fixed" and method != "none":
            assert planned == pytest.approx(max(256 * ratio, 1), abs=1) or method in ("evs", "vidcom2")


def test_methods_act_on_their_kind() -> None:
    assert "evs" in methods_for("video")
    assert "evs" not in methods_for("image")
    assert methods_for("image")[0] == "none"
    assert "pipeline" not in ALL


def test_decisions_are_timed_and_nothing_else_is_changed() -> None:
    class Slow:
        needs = frozenset({"x"})

        def in_prefill(self, layer: int, view: object) -> str:
            until = time.process_time() + 0.02
            while time.process_time() < until:
                pass
            return f"{layer} {view}"

    timed = Timed(Slow())
    assert timed.needs == {"x"}
    assert not hasattr(timed, "prefill_done")
    assert timed.in_prefill(3, "v") == "3 v"
    assert 0.02 <= timed.select_s < 0.2


def test_probes_are_of_different_media_and_tasks() -> None:
    items = [item for item in read_test_set().items if item.kind == "image"]
    chosen = probes(items, 5)
    assert len({item.media_index for item in chosen}) == len(chosen) == 5
    assert len({item.task for item in chosen}) == 5


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`none` is right on all but each tenth item; "good" as `none`, "bad" and DivPrune on every fourth."""
    items = [item for item in read_test_set().items if item.task in ("color", "read")]
    asked = [item.id for item in items]
    cost = {
        "select": 0.001,
        "prefill_over_none": 0.5,
        "ttft_over_none": 0.7,
        "kv_bytes_over_none": 0.3,
        "layers_kept": 0.1,
    }
    right = {
        ("none", 1.0): [item for i, item in enumerate(asked) if i % 10],
        ("good", 0.1): [item for i, item in enumerate(asked) if i % 10],
        ("divprune", 0.1): asked[::4],
    }
    lines = [
        {
            "method": method,
            "keep_ratio": ratio,
            "kept": ratio,
            "asked": asked,
            "right": good,
            "texts": {asked[0]: "red"},
            "cost": cost | {"layers_kept": ratio},
        }
        for (method, ratio), good in right.items()
    ]
    lines.append(lines[1] | {"keep_ratio": 1.0, "asked": asked[:1], "texts": {asked[0]: "blue"}})
    settings = {"model": "tiny", "kind": "image", "limit": 3, "num_items": len(asked)}
    path = tmp_path_factory.mktemp("bench") / "reducers-x.jsonl"
    head = {"settings": settings, "machine": {"cpu": "some"}}
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *lines]))
    return path


def test_tables_and_verdicts_say_what_the_file_says(file: Path) -> None:
    results = Results(file, read_test_set().by_id())
    full = results.score(results.full)
    assert full == pytest.approx(np.mean([results.task_share(results.full, task)[0] for task in ("color", "read")]))
    assert 0.88 < full < 0.92
    good = next(line for line in main_table(results).splitlines() if "| good" in line)
    assert "100% (100%-100%)" in good
    assert verdicts(results) == [
        "1 methods keep 90% of the full accuracy at 10%: good.",
        "Above DivPrune with disjoint intervals: good on color, good on read.",
        "At keep_ratio 1 all but good gave the answers of `none` to 1 of 1 questions.",
    ]
    assert "**90%**" in task_table(results) or "**91%**" in task_table(results)


def test_a_plot_and_a_page(file: Path, tmp_path: Path) -> None:
    results = Results(file, read_test_set().by_id())
    plot(results, tmp_path / "plots" / "x.png")
    assert (tmp_path / "plots" / "x.png").stat().st_size > 10_000
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- reducers-x -->\noutdated\n<!-- end -->\nafter\n")
    put_into(page, "reducers-x", report(results))
    text = page.read_text()
    assert "outdated" not in text
    assert text.startswith("before\n<!-- reducers-x -->\ntiny, ")
    assert text.endswith("<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match="has no <!-- other -->"):
        put_into(page, "other", "")


def test_a_file_of_other_settings_is_not_continued(file: Path) -> None:
    settings = {"model": "tiny", "kind": "image", "limit": 3}
    assert done_before(file, settings) == {("none", 1.0), ("good", 0.1), ("divprune", 0.1), ("good", 1.0)}
    with pytest.raises(SystemExit, match="limit=3, this run has 4"):
        done_before(file, settings | {"limit": 4})
