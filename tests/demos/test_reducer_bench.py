"""The benchmark of the reducers: budgets mean what they say, and the tables say what the file says."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from demos.bench import reducer_page
from demos.bench.budgets import methods_for, ratios_of, spec_of
from demos.bench.reducer_bench import Timed
from demos.bench.reducer_figures import (
    main_table,
    paired_table,
    plot,
    put_into,
    report,
    task_table,
    verdicts,
)
from demos.bench.reducer_results import Results
from demos.bench.reducers import done_before, plan_of, probes
from mm.data.tokens import VisualTokens
from mm.models.checkpoint import find
from mm.plugins.capabilities import acts_outside_decoder
from mm.plugins.reducer import ReduceContext, Stage
from mm.plugins.spec import build_reducer
from serve.evaluation.items import read_test_set

TINY = find("tiny")
ALL = sorted({*methods_for("image", TINY), *methods_for("video", TINY)})


@pytest.mark.parametrize("method", ALL)
def test_every_method_has_a_specification_at_each_of_its_ratios(method: str) -> None:
    for ratio in ratios_of(method):
        reducer = build_reducer(spec_of(method, ratio, 0.01))
        if ratio == 1.0 and reducer.acts_at == (Stage.PRE_LLM,) and not reducer.needs:
            tokens = VisualTokens.full(torch.randn(64, 8), (1, 8, 8), "image")
            assert len(reducer.after_encode(tokens, ReduceContext()).keep) == 64
        if acts_outside_decoder(reducer) and reducer.count == "fixed" and method != "none":
            of_pictures = method in methods_for("image", TINY)
            grid, kind = ((1, 16, 16), "image") if of_pictures else ((4, 8, 8), "video")
            near = pytest.approx(max(256 * ratio, 1), abs=grid[0])  # some share a budget out between frames
            assert reducer.plan(256, grid, kind) == near or method in ("evs", "vidcom2")


def test_methods_act_on_their_kind() -> None:
    assert "evs" in methods_for("video")
    assert "evs" not in methods_for("image")
    assert methods_for("image")[0] == "none"
    assert {"router", "dynamic"} <= {*methods_for("image", TINY)}
    assert "cubes" in methods_for("video", TINY)
    assert not {"dynamic", "router"} & {*methods_for("video", TINY)}  # their weights keep clips whole
    assert not {"router", "dynamic", "cubes"} & {*methods_for("image"), *methods_for("video")}  # no weights there
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
    """`none` is right on all but each tenth item, "good" as well; DivPrune on each fourth, "bad" on most of these."""
    items = [item for item in read_test_set().items if item.task in ("color", "read")]
    asked = [item.id for item in items]
    cost = {
        "encode": 0.03,
        "select": 0.001,
        "prefill": 0.02,
        "ttft": 0.051,
        "prefill_over_none": 0.5,
        "ttft_over_none": 0.7,
        "kv_bytes_over_none": 0.3,
        "layers_kept": 0.1,
    }
    right = {
        ("none", 1.0): [item for i, item in enumerate(asked) if i % 10],
        ("good", 0.1): [item for i, item in enumerate(asked) if i % 10],
        ("divprune", 0.1): asked[::4],
        ("bad", 0.1): [item for i, item in enumerate(asked[::4]) if i % 9],
        ("uniform", 0.1): [item for i, item in enumerate(asked[::4]) if i % 9],
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
    settings = {"model": "tiny", "kind": "image", "limit": 3, "num_items": len(asked), "weights": "0123456789abcdef"}
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
    said = verdicts(results)
    assert said[0] == "At 10% of the tokens these keep 90% of the full score: `good` 100%."
    assert said[1] == "At 10%, better than DivPrune with disjoint intervals: `good` on color, `good` on read."
    assert said[2].startswith("Better than DivPrune question by question, in points over all tasks: `good` by +6")
    assert "by chance alone 0 of 6 comparisons would look better" in said[2]
    assert said[3] == "At 10%, not clearly better than evenly spread tokens (`uniform`): `bad`."
    assert said[-1] == "At keep_ratio 1 all but good gave the same answers as `none` to 1 of 1 questions."
    assert "**90%**" in task_table(results) or "**91%**" in task_table(results)


def test_methods_are_compared_question_by_question(file: Path) -> None:
    """`bad` is right where DivPrune is, but for each ninth question: two intervals alone do not show that."""
    results = Results(file, read_test_set().by_id())
    base, bad = results.find("divprune", 0.1), results.find("bad", 0.1)
    assert base is not None
    assert bad is not None
    value, low, high = results.over(bad, base)
    assert value == pytest.approx(results.score(bad) - results.score(base))
    assert low <= value <= high < 0
    shares = [results.task_share(line, "color") for line in (bad, base)]
    assert shares[0][2] > shares[1][1]
    assert results.over(bad, base, "color")[2] < 0
    row = next(line for line in paired_table(results).splitlines() if "| bad" in line)
    assert [cell.split()[0] for cell in row.split("|")[4:6]] == ["-", "color"]
    assert "_2" in task_table(results)


def test_a_plot_and_a_page(file: Path, tmp_path: Path) -> None:
    results = Results(file, read_test_set().by_id())
    plot(results, tmp_path / "plots" / "x.png")
    assert (tmp_path / "plots" / "x.png").stat().st_size > 10_000
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- reducers-x -->\noutdated\n<!-- end -->\nafter\n")
    put_into(page, "reducers-x", report(results))
    text = page.read_text()
    assert "outdated" not in text
    assert text.startswith("before\n<!-- reducers-x -->\n- At 10% ")
    assert text.endswith("<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match="has no <!-- other -->"):
        put_into(page, "other", "")


def test_a_file_of_other_settings_is_not_continued(file: Path) -> None:
    settings = {"model": "tiny", "kind": "image", "limit": 3}
    assert done_before(file, settings, {}) == {
        *[(method, 0.1) for method in ("good", "divprune", "bad", "uniform")],
        ("none", 1.0),
        ("good", 1.0),
    }
    with pytest.raises(SystemExit, match="limit=3, this run has 4"):
        done_before(file, settings | {"limit": 4}, {})


def test_lines_of_other_weights_are_measured_again(file: Path, tmp_path: Path) -> None:
    other, settings = tmp_path / "x.jsonl", {"model": "tiny"}
    head, *lines = file.read_text().splitlines()
    lines = [
        json.dumps(line | {"weights": "good@1"}) if line["method"] == "good" else json.dumps(line)
        for line in map(json.loads, lines)
    ]
    other.write_text("\n".join([head, *lines, ""]))
    assert ("good", 0.1) in done_before(other, settings, {"good": "good@1", "none": ""})
    assert "good@1" in other.read_text()
    left = done_before(other, settings, {"good": "good@2", "none": ""})
    assert {method for method, _ in left} == {"none", "divprune", "bad", "uniform"}
    assert "good@1" not in other.read_text()


def test_learned_methods_are_measured_last() -> None:
    methods = methods_for("image", TINY)
    plan = plan_of(methods, (0.1, 0.25, 1.0))
    learned = [method in ("dynamic", "router") for method, _ in plan]
    assert True in learned
    assert learned == sorted(learned)
    assert plan[0][1] == 0.1


def test_the_page_has_figures_only_where_a_script_writes_them() -> None:
    """Between markers, so that text and tables cannot disagree."""
    page = Path(__file__).parents[2] / "docs" / "reducers.md"
    by_hand = re.sub(r"<!-- [\w-]+ -->.*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
    assert not re.findall(r"\d+(?:\.\d+)? ?%|\d\.\d+x|\d+ ms", by_hand)
    names = {f"reducers-{model}-{kind}" for model in ("tiny", "tiny_plain") for kind in ("image", "video")}
    assert names <= set(re.findall(r"<!-- ([\w-]+) -->", page.read_text()))


def test_a_page_without_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file of results that the page is made of is there and is read."""
    page = tmp_path / "reducers.md"
    page.write_text((Path(__file__).parents[2] / "docs" / "reducers.md").read_text())
    monkeypatch.setattr(reducer_page, "plot", lambda *_: None)
    reducer_page.write_page(page)
    assert "FLOPs saved at most" in page.read_text()
    before = page.read_text()
    reducer_page.write_page(page)
    assert page.read_text() == before


def test_both_kinds_share_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    class Run:
        def __init__(self, command: list[str]) -> None:
            ran.append(command)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(reducer_page.subprocess, "Popen", Run)
    cases = [("tiny", False, 0.7), ("tiny_plain", False, 0.3), ("tiny_plain", True, 1.0)]
    for (model, only_plain, share), (jobs, parts) in itertools.product(cases, ((1, (10, 20)), (2, (20, 20)))):
        ran.clear()
        args = argparse.Namespace(minutes=20 / share, jobs=jobs, limit=(7, 5), only_plain=only_plain)
        reducer_page.measure(args, model)
        assert [run[run.index("--kind") + 1] for run in ran] == ["image", "video"]
        assert [run[run.index("--model") + 1] for run in ran] == [model, model]
        assert [Path(run[run.index("--out") + 1]).stem for run in ran] == [
            f"reducers-{model}-image",
            f"reducers-{model}-video",
        ]
        assert ["--methods" in run for run in ran] == [model == "tiny_plain"] * 2
        assert [run[run.index("--limit") + 1] for run in ran] == ["7", "5"]
        assert [float(run[run.index("--minutes") + 1]) for run in ran] == pytest.approx(parts, abs=0.1)
