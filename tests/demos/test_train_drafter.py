"""The drafters' training runs on any target, goes on where it stopped, and measures what it says."""

import json

import pytest
import torch

from demos.train import draft_data, train_drafter
from demos.train.drafting import STATIC_TREE, accepted, accepted_length
from mm.engine.spec_decode.drafters.eagle.head import read_draft_config
from tests.helpers.checkpoints import random_llava


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("target"), num_layers=4)


@pytest.fixture(autouse=True)
def _short_answers(monkeypatch):
    monkeypatch.setattr(draft_data, "MAX_NEW_TOKENS", 6)


def run(target, out, *more):
    options = ["--target", str(target), "--out", str(out), "--batch", "3", "--pool", "8", "--pictures", "1"]
    args = train_drafter.arguments().parse_args([*options, "--held-out-batches", "1", "--dtype", "float32", *more])
    torch.manual_seed(0)
    train_drafter.run(args)


def records(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("more", [[], ["--eagle3", "--draft-vocab", "40"]])
def test_three_steps_and_on(target, tmp_path, more):
    ways, plain = "none,msd,vispec,specvlm,flash", "eagle3" if more else "eagle"
    run(target, tmp_path, "--seeing", ways, "--steps", "5", "--stop-at", "3", *more)
    for way in ways.split(","):
        name = {"none": "eagle3" if more else "eagle"}.get(way, way + "-eagle3" * bool(more))
        config = read_draft_config(tmp_path / name)
        assert config.vision_adapter == way
        assert config.trained["steps"] == 3
        assert config.draft_vocab_size == (40 if more else None)
        assert len(config.feature_layers) == (3 if more else 0)
        found = records(tmp_path / name)
        assert found[0]["step"] == 0
        assert found[0]["loss"] > 0
        assert found[-1]["accepted"]["all"]["chain 3"] >= 1
    before = (tmp_path / plain / "model.safetensors").read_bytes()
    run(target, tmp_path, "--seeing", ways, "--steps", "5", "--resume", *more)
    assert read_draft_config(tmp_path / plain).trained["steps"] == 5
    assert (tmp_path / plain / "model.safetensors").read_bytes() != before


def test_a_trained_way_learns_what_one_pool_says(target, tmp_path):
    run(target, tmp_path, "--seeing", "none", "--steps", "40", "--pool", "6", "--eval-every", "40")
    found = [record for record in records(tmp_path / "eagle") if "loss" in record]
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.parametrize(
    ("path", "tree", "length"),
    [
        ([0, 0, 0, 0], 3, 3),
        ([0, 1, 0], 3, 1),
        ([2], 3, 0),
        ([], 3, 0),
        ([0, 2, 0, 0], STATIC_TREE, 3),
        ([0, 0, 0, 0, 0], STATIC_TREE, 5),
        ([3, 0, 0], STATIC_TREE, 2),
        ([4], STATIC_TREE, 0),
        ([0, 0, 2, 0], STATIC_TREE, 3),
    ],
)
def test_accepted_tokens_of_a_round(path, tree, length):
    assert accepted(path, tree) == length


def test_rounds_go_on_behind_what_was_accepted():
    """Ten tokens, a drafter that is right at every second place: rounds of 2, 2, 2, 2 and a rest of 1."""
    ranks = torch.zeros(1, 10, 3, dtype=torch.int64)
    ranks[0, :, 1:] = 5
    assert accepted_length(ranks, [10], 3) == (9, 5)
    ranks[0, :, 0] = 5
    assert accepted_length(ranks, [10], 3) == (9, 9)
    assert accepted_length(torch.zeros(1, 10, 3, dtype=torch.int64), [10], 3) == (9, 3)
    assert sum(STATIC_TREE.values()) == 25
