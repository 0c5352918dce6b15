"""The search for schedules: what it promises on models of known taste, and `mm tune` from end to end."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mm.errors import InvalidOption
from mm.plugins.spec import build_reducer
from serve.cli.app import app
from serve.cli.options import read_reducer
from serve.evaluation.items import EvaluationError
from serve.tuning import command
from serve.tuning.greedy import RATIOS, greedy, most_trials
from serve.tuning.schedule import Shape, spec_of
from serve.tuning.sigmoid import curve, fitted, largest_last, search, unsearched
from serve.tuning.trials import Journal, Trial

SHAPE = Shape(
    num_layers=8, width=64, inner_width=160, query_width=64, key_width=32, num_visual=500, num_text=40
)  # fmt: skip


def test_flops_equal_those_counted_by_hand():
    shape = Shape(num_layers=2, width=4, inner_width=6, query_width=4, key_width=2, num_visual=8, num_text=2)
    # 10 rows: q and out 2 * 160, k and v 2 * 80, scores and sums 2 * 400, MLP 3 * 240 multiply-adds.
    assert shape.layer_flops(1.0) == 2 * (320 + 160 + 800 + 720)
    assert shape.layer_flops(0.5) == 2 * (192 + 96 + 288 + 432)
    assert shape.flop_share((1.0, 0.5)) == pytest.approx((4000 + 2016) / 8000)


def test_a_schedule_names_the_layers_in_which_tokens_go():
    assert spec_of((1.0, 1.0, 0.5, 0.5, 0.25)) == "scheduled:at_layers=[2,4],keep_ratios=[0.5,0.25]"
    assert spec_of((1.0, 1.0)) == "none"
    build_reducer(spec_of((1.0, 0.3333, 0.0001)))


@pytest.mark.parametrize("needed", [(1.0, 0.5, 0.5, 0.1), (1.0, 1.0, 1.0, 1.0), (1.0, 0.01, 0.01, 0.01)])
def test_greedy_finds_the_least_each_layer_needs(needed):
    asked = []

    def is_good(schedule):
        asked.append(schedule)
        return all(given >= need for given, need in zip(schedule, needed, strict=True))

    assert greedy(4, is_good) == needed
    assert len(asked) <= most_trials(4)
    assert all(list(one) == sorted(one, reverse=True) and set(one) <= set(RATIOS) for one in asked)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("steepness", [2.0, 20.0, 200.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_fitted_curve_uses_the_budget_up_and_falls(budget, steepness, share):
    last = share * largest_last(SHAPE, budget)
    schedule = fitted(SHAPE, budget, steepness, last)
    assert schedule[0] == 1.0
    assert list(schedule) == sorted(schedule, reverse=True)
    assert SHAPE.flop_share(schedule) <= budget
    assert budget - SHAPE.flop_share(schedule) < 2e-3


def test_a_steep_curve_is_a_step_at_its_middle():
    assert curve(SHAPE, 200.0, 0.1, 0.5 + 1 / 16) == (1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1)


def test_a_budget_that_cannot_be_met_is_refused_with_what_can():
    with pytest.raises(InvalidOption, match="can be from 0\\.1"):
        largest_last(SHAPE, 0.05)
    with pytest.raises(InvalidOption, match="budget"):
        largest_last(SHAPE, 1.0)


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
def test_schedules_that_need_no_search_use_the_budget_up(budget):
    *steps, steady = unsearched(SHAPE, budget)
    for layer, step in enumerate(steps, start=1):
        assert step[:layer] == (1.0,) * layer
        assert len(set(step[layer:])) == 1
    assert len(steps) == (1 if budget == 0.2 else 2), "two whole layers take more than a fifth"
    assert steady == pytest.approx([steady[1] ** layer for layer in range(SHAPE.num_layers)], abs=1e-3)
    for schedule in (*steps, steady):
        assert budget - 0.01 < SHAPE.flop_share(schedule) <= budget


def test_the_search_comes_near_to_the_best_curve_and_repeats_itself():
    def taste(schedule):  # best: all is kept for long, and then nearly nothing
        return -abs(sum(schedule[1:4]) - 3) - schedule[-1]

    asked = []

    def score(schedule):
        asked.append(schedule)
        return taste(schedule)

    found = search(SHAPE, 0.5, 16, score)
    assert len(asked) == len(set(asked)) == 16
    assert taste(found) == max(map(taste, asked))
    assert taste(found) > max(map(taste, asked[:5]))
    assert SHAPE.flop_share(found) <= 0.5
    assert asked[:3] == unsearched(SHAPE, 0.5), "what needs no search is what a search has to beat"
    first = list(asked)
    asked.clear()
    assert search(SHAPE, 0.5, 16, score) == found
    assert asked == first


def test_a_journal_remembers_and_survives_a_cut(tmp_path):
    path, trial = tmp_path / "a.jsonl", Trial(reducer="none", num_right=3, num_visual=8.0, num_text=2.5)
    Journal(path, {"items": 4}).put(trial)
    with path.open("a") as file:
        file.write('{"reducer": "fastv", "num_ri')
    assert Journal(path, {"items": 4}).get("none") == trial
    assert Journal(path, {"items": 4}).get("fastv") is None
    with pytest.raises(EvaluationError, match="another search"):
        Journal(path, {"items": 5})


def run(*args):
    return CliRunner().invoke(app, ["tune", "tiny", "--limit", "1", "--task", "color", "--quiet", *map(str, args)])


def test_mm_tune_writes_a_reducer_and_resumes(tmp_path):
    out = tmp_path / "found.json"
    first = run("--budget", 0.7, "--trials", 3, "--out", out, "--max-tokens", 8)
    assert first.exit_code == 0, first.output
    found = json.loads(out.read_text())
    assert build_reducer(read_reducer(str(out))) == build_reducer(found["reducer"])
    assert found["flop_share"] <= 0.7
    journal = out.with_suffix(".trials.jsonl")
    lines = journal.read_text().splitlines()
    assert len(lines) == 1 + 1 + 3
    journal.write_text("\n".join(lines[:3]) + "\n")
    again = run("--budget", 0.7, "--trials", 3, "--out", out, "--max-tokens", 8)
    assert again.output == first.output
    assert json.loads(out.read_text()) == found
    assert journal.read_text().splitlines() == lines


def test_trials_of_other_weights_are_not_taken_for_these(tmp_path, monkeypatch):
    """A model that was trained on in place keeps its name."""
    options = ("--budget", 0.7, "--trials", 1, "--out", tmp_path / "found.json", "--max-tokens", 2)
    assert run(*options).exit_code == 0
    monkeypatch.setattr(command, "weights_hash", lambda folder: "others")
    assert "another search" in str(run(*options).exception)


def test_options_that_do_not_go_together_are_refused(tmp_path):
    for args, reported in ((("--search", "greedy", "--budget", 0.5), "budget"), ((), "budget")):
        result = run(*args, "--out", tmp_path / "x.json")
        assert result.exit_code != 0
        assert isinstance(result.exception, InvalidOption)
        assert reported in str(result.exception)


def test_what_the_search_needs_is_asked_for_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    result = run("--budget", 0.5, "--out", tmp_path / "x.json")
    assert isinstance(result.exception, InvalidOption)
    assert "mm-serving[tune]" in str(result.exception)


@pytest.mark.parametrize("text", ["{", "[]", '{"reducer": 3}'])
def test_a_file_that_is_no_reducer_is_refused(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(InvalidOption, match="does not name a reducer"):
        read_reducer(str(path))
    with pytest.raises(InvalidOption, match="cannot be read"):
        read_reducer(str(tmp_path / "missing.json"))
    assert read_reducer("fastv:layer=1") == "fastv:layer=1"
