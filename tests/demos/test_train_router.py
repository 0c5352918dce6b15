"""The router: what goes on where, labels that add up to the loss's rise, and a run that goes on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from demos.train import train_router
from demos.train.frozen import FrozenBatches, FrozenFeatures, load_base
from demos.train.reducer_training import run
from demos.train.train_router import group_index, num_open, rise_by_group, route
from mm.plugins.weights import checkpoint_fingerprint

FOLDER = Path(__file__).parents[2] / "mm" / "models" / "weights" / "tiny"
SEED = 100_000


@pytest.fixture(scope="module")
def base():
    return load_base(FOLDER, "cpu")


@pytest.fixture(scope="module")
def features(base):
    return FrozenFeatures.of_seeds(base, 3, 0, SEED)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(train_router, "BATCH", 2)
    monkeypatch.setattr(train_router, "UPDATES", 3)


def test_open_groups_go_on_whole_and_others_as_their_mean():
    tokens, score = torch.arange(16.0)[:, None].expand(16, 3), torch.tensor([0.0, 1.0, 0.5, -1.0])
    kept, places = route(tokens, score, 1)
    assert places == [0, 2, 3, 6, 7, 8, 10]
    assert kept[:, 0].tolist() == [2.5, 2, 3, 6, 7, 10.5, 12.5]
    assert route(tokens, score, 4)[1] == list(range(16))
    assert torch.equal(route(tokens, score, 4)[0], tokens)


def test_a_budget_gives_the_number_of_open_groups():
    assert num_open(64, 0.25) == 0
    assert num_open(64, 1.0) == 64
    for keep_ratio in (0.3, 0.4, 0.5, 0.77):
        opened = num_open(64, keep_ratio)
        assert 4 * opened + 64 - opened <= keep_ratio * 256 < 4 * (opened + 1) + 63 - opened
    assert group_index(16).flatten().sort().values.tolist() == list(range(256))


def test_shares_of_groups_add_up_to_the_rise_of_the_loss(base, features, monkeypatch):
    monkeypatch.setattr(train_router, "STEPS_OF_PATH", 16)
    batches = FrozenBatches(AutoTokenizer.from_pretrained(FOLDER), features.info, questions=6)
    groups, shares, rise, whole = rise_by_group(base, batches, features, 1)
    assert groups.shape == (2, 64, 4, 256)
    assert (rise > 0).all()
    assert (whole > 0).all()
    torch.testing.assert_close(shares.sum(1), rise, rtol=0.25, atol=0.05)


@pytest.fixture
def ready(features, tmp_path):
    (tmp_path / "scenes.bin").write_bytes(features.scenes.view(torch.uint16).numpy().tobytes())
    info = {**features.info, "tokens": 256, "width": 256, "base": checkpoint_fingerprint(FOLDER)}
    (tmp_path / "features.json").write_text(json.dumps(info))
    return tmp_path


def test_two_steps_and_on(ready):
    def start(*more):
        options = ["--base", str(FOLDER), "--run", str(ready), "--steps", "3", "--scenes", "1", *more]
        run(train_router.RouterTraining, train_router.arguments().parse_args(options))

    start("--stop-at", "2")
    before = load_file(ready / "router" / "model.safetensors")
    start("--resume")
    config = json.loads((ready / "router" / "config.json").read_text())
    assert config["trained"]["steps"] == 3
    assert config["base"] == checkpoint_fingerprint(FOLDER)
    assert config["parameters"] == sum(t.numel() for t in before.values())
    after = load_file(ready / "router" / "model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    steps = [json.loads(line)["step"] for line in (ready / "router" / "training.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2, 3]
