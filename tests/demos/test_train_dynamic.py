"""Dynamic-LLaVA's training: dropped tokens vanish, kept ones change nothing, the budget is met, a run goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from demos.train import train_dynamic
from demos.train.frozen import FrozenBatches, FrozenFeatures, load_base
from demos.train.reducer_training import run
from demos.train.sparse import (
    Decide,
    MaskedSoftmax,
    answer_places,
    by_answer,
    gumbel_keep,
    run_sparse,
    top_keep,
)
from demos.train.train_lm import run_decoder, splice, visual_tokens
from mm.plugins.weights import checkpoint_fingerprint
from pruning.learned.predictors import Predictors, PredictorShape

FOLDER = Path(__file__).parents[2] / "mm" / "models" / "weights" / "tiny"
SEED = 100_000


@pytest.fixture(scope="module")
def base():
    return load_base(FOLDER, "cpu")


@pytest.fixture(scope="module")
def made(base):
    """Two scenes with questions: batch, embeddings (B, T, D)."""
    features = FrozenFeatures.of_seeds(base, 2, 0, SEED)
    features.scenes = features.scenes.float()
    batches = FrozenBatches(AutoTokenizer.from_pretrained(FOLDER), features.info, questions=4)
    batch = batches.draw("scenes", [0, 1], np.random.default_rng(0))
    with torch.no_grad():
        embeds = splice(base, batch.packed, visual_tokens(base, features, batch, "cpu"), torch.float32)
    return batch, embeds


@pytest.fixture
def predictors():
    torch.manual_seed(0)
    return Predictors(PredictorShape(width=256, channels=32, keep_first=0))


@torch.no_grad()
def test_everything_kept_is_the_plain_model(base, made, predictors):
    batch, embeds = made
    decide = Decide(image_ratio=1.0, threshold=-1e9)
    found, decisions = run_sparse(base, predictors, embeds, batch.packed, decide)
    plain, *_ = run_decoder(base, embeds, batch.packed, clip=False)
    assert all(kept.all() for kept in decisions.image)
    assert decisions.output.all()
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_dropped_image_token_has_no_influence_and_a_kept_one_has(base, made, predictors):
    batch, embeds = made
    decide = Decide(image_ratio=0.25, text=False)
    before, decisions = run_sparse(base, predictors, embeds, batch.packed, decide)
    kept = torch.stack(decisions.image)
    assert kept.sum(1).tolist() == [64, 64]
    at = int(batch.packed.visual_at[0])
    for wanted, same in ((0.0, True), (1.0, False)):
        changed = embeds.clone()
        places = at + (kept[0] == wanted).nonzero().flatten()
        changed[0, places] += torch.randn(len(places), 256, generator=torch.Generator().manual_seed(1))
        after, _ = run_sparse(base, predictors, changed, batch.packed, Decide(fixed=kept, text=False))
        assert torch.equal(before, after) == same


@torch.no_grad()
def test_a_dropped_answer_token_is_seen_below_its_layer_and_by_itself_only(base, made, predictors):
    """With the text layer at the bottom and all answer tokens dropped, a logit depends on its own token alone."""
    batch, embeds = made
    lowest = Predictors(PredictorShape(width=256, channels=32, text_layer=0, keep_first=0))
    row, place, question = answer_places(batch.packed)
    long = question == question.bincount().argmax()
    row, place = row[long], place[long]
    here = (batch.packed.target_question == question[long][0]) & (batch.packed.target_place > place[0])
    for layer, threshold, seen in ((0, 1e9, False), (0, -1e9, True), (1, 1e9, True)):
        chosen = lowest if layer == 0 else predictors
        decide, changed = Decide(images=False, threshold=threshold), embeds.clone()
        changed[row[0], place[0]] += 1.0
        before, _ = run_sparse(base, chosen, embeds, batch.packed, decide)
        after, _ = run_sparse(base, chosen, changed, batch.packed, decide)
        assert torch.equal(before[here], after[here]) != seen
        assert not torch.equal(before[~here], after[~here])  # what the token itself predicts


@torch.no_grad()
def test_the_first_tokens_of_every_answer_are_kept(base, made):
    batch, embeds = made
    shape = PredictorShape(width=256, channels=32, keep_first=2)
    _, decisions = run_sparse(base, Predictors(shape), embeds, batch.packed, Decide(images=False, threshold=1e9))
    count, share = by_answer(batch.packed, decisions.output)
    assert count.max() > 10
    torch.testing.assert_close(share, count.clamp(max=2) / count)
    assert by_answer(batch.packed, decisions.output, 2)[1].sum() == 0


def test_the_gradient_of_a_decision_is_that_of_the_masked_softmax():
    """Of kept keys as autograd has it; of a dropped one, the same made smaller by the weight it would take."""
    rng, eye = torch.Generator().manual_seed(0), torch.eye(5, dtype=torch.bool)
    logits = torch.randn(1, 1, 5, 5, generator=rng) * 3
    allowed, policy = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril(), torch.tensor([[1.0, 0, 1, 0, 1]])
    goal = torch.randn(1, 1, 5, 5, generator=rng)
    one, two = logits.clone().requires_grad_(), policy.clone().requires_grad_()
    weights = one.exp() * allowed * torch.where(eye, 1.0, two[:, None, None])
    ((weights / weights.sum(-1, keepdim=True))[..., 4, :] * goal[..., 4, :]).sum().backward()
    mine, own = logits.clone().requires_grad_(), policy.clone().requires_grad_()
    found = MaskedSoftmax.apply(mine, allowed, own)
    (found[..., 4, :] * goal[..., 4, :]).sum().backward()
    torch.testing.assert_close(found, weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(mine.grad, one.grad, atol=1e-5, rtol=1e-4)
    share = logits[0, 0, 4].exp() / (logits[0, 0, 4].exp() * policy[0]).sum()
    shrunk = torch.where(policy[0] > 0, 1.0, 1 / (1 + share))
    torch.testing.assert_close(own.grad[0, :4], (two.grad[0] * shrunk)[:4], atol=1e-5, rtol=1e-4)
    assert (found[..., 1] * ~eye[:, 1]).sum() == 0


def test_top_keep_is_the_published_case_and_the_lower_index_wins():
    logits = torch.tensor([[2.0, 0], [1, 3], [0, 0], [3, 1], [-1, 2], [4, 4], [1, 0]])
    assert top_keep(logits, 0.5).nonzero().flatten().tolist() == [0, 3, 6]
    logits[5] = torch.tensor([1.0, 2])
    assert top_keep(logits, 0.6).nonzero().flatten().tolist() == [0, 2, 3, 6]
    assert top_keep(torch.zeros(4, 2), 0.5).tolist() == [1, 1, 0, 0]


def test_gumbel_draws_follow_the_probabilities_and_pass_gradients():
    logits = torch.tensor([1.0, 0.0]).expand(4000, 2).clone().requires_grad_()
    drawn = gumbel_keep(logits, 0.5, torch.Generator().manual_seed(0))
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    assert abs(drawn.mean().item() - 0.731) < 0.03
    drawn.sum().backward()
    assert (logits.grad[:, 0] > 0).all()


@pytest.fixture
def ready(base, tmp_path, monkeypatch):
    """A run folder with the features of four scenes."""
    features = FrozenFeatures.of_seeds(base, 4, 0, SEED)
    (tmp_path / "scenes.bin").write_bytes(features.scenes.view(torch.uint16).numpy().tobytes())
    (tmp_path / "clips.bin").write_bytes(b"")
    info = {**features.info, "tokens": 256, "width": 256, "base": checkpoint_fingerprint(FOLDER)}
    (tmp_path / "features.json").write_text(json.dumps(info))
    monkeypatch.setattr(train_dynamic, "SCENES", 1)
    return tmp_path


def start(folder, *more):
    options = ["--base", str(FOLDER), "--run", str(folder), "--steps", "4", "--scenes", "1", "--clips", "0", *more]
    run(train_dynamic.DynamicTraining, train_dynamic.arguments().parse_args(options))


def test_three_steps_and_on(ready):
    start(ready, "--stop-at", "3", "--adapt", "attention")
    config = json.loads((ready / "dynamic" / "config.json").read_text())
    assert config["base"] == checkpoint_fingerprint(FOLDER)
    assert config["trained"]["steps"] == 3
    weights, decoder = (load_file(ready / "dynamic" / f"{n}.safetensors") for n in ("model", "decoder"))
    assert sum(t.numel() for n, t in weights.items() if n.startswith("image")) == config["parameters"]["image"]
    assert all("self_attn" in name for name in decoder)
    start(ready, "--resume", "--adapt", "attention")
    assert json.loads((ready / "dynamic" / "config.json").read_text())["trained"]["steps"] == 4
    again = load_file(ready / "dynamic" / "decoder.safetensors")
    assert any(not torch.equal(again[name], decoder[name]) for name in decoder)


def test_interrupted_and_whole_runs_end_with_the_same_weights(ready):
    start(ready, "--adapt", "none", "--name", "whole")
    start(ready, "--adapt", "none", "--name", "parts", "--stop-at", "2")
    start(ready, "--adapt", "none", "--name", "parts", "--resume")
    whole, parts = (load_file(ready / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_step_in_which_nothing_is_decided_changes_nothing(base, ready, monkeypatch):
    """A clip, in a row of several turns, while the decoder is frozen."""
    clips = FrozenFeatures.of_seeds(base, 0, 1, SEED).clips
    (ready / "clips.bin").write_bytes(clips.view(torch.uint16).numpy().tobytes())
    info = json.loads((ready / "features.json").read_text())
    (ready / "features.json").write_text(json.dumps({**info, "clips": 1}))
    for name, value in (("CLIP_SHARE", 1.0), ("OTHER_ROWS", 1.0), ("CLIPS", 1)):
        monkeypatch.setattr(train_dynamic, name, value)
    start(ready, "--stop-at", "1", "--adapt", "none", "--name", "one")
    start(ready, "--stop-at", "2", "--adapt", "none", "--name", "two")
    one, two = (load_file(ready / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_features_of_another_checkpoint_are_refused(ready):
    info = json.loads((ready / "features.json").read_text())
    (ready / "features.json").write_text(json.dumps({**info, "base": "0" * 64}))
    with pytest.raises(SystemExit, match="another checkpoint"):
        start(ready)
