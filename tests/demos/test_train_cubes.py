"""Cubes: borders and momentum of the published case, any number of frames, untrained = pooled, and a run goes on."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from demos.train import train_cubes
from demos.train.cube_data import CubeBatches, build_prompt, changed_frames, frame_tokens
from demos.train.cubing import (
    CubeNetwork,
    Cubes,
    CubeShape,
    gumbel_share,
    num_borders,
    onsets,
    pick_borders,
    token_places,
    uniform_borders,
)
from demos.train.data.clips import sample_clip
from demos.train.frozen import FrozenFeatures, load_base
from demos.train.reducer_training import run
from mm.plugins.weights import checkpoint_fingerprint
from pruning.learned.cubing import grid_means, momentum

FOLDER = Path(__file__).parents[2] / "mm" / "models" / "weights" / "tiny"
SEED = 100_000


@pytest.fixture(scope="module")
def base():
    return load_base(FOLDER, "cpu")


@pytest.fixture(scope="module")
def features(base):
    return FrozenFeatures.of_seeds(base, 0, 3, SEED)


def network(side=4, seed=0):
    torch.manual_seed(seed)
    return CubeNetwork(CubeShape(32, query_side=side))


def test_momentum_borders_and_cubes_are_the_published_case():
    frames = torch.tensor([0.0, 1, 1, 4, 4, 4, 9, 9, 10, 10])[:, None]
    change = momentum(frames)[:, 0]
    expected = [1, 0.2, 2.44, 0.488, 0.0976, 4.0195, 0.8039, 0.9608, 0.1922]
    torch.testing.assert_close(change, torch.tensor(expected), atol=1e-4, rtol=0)
    assert pick_borders(change.abs(), num_borders(10, 5)) == [0, 6]
    assert pick_borders(change.abs(), num_borders(10, 3)) == [0, 3, 6]
    assert [num_borders(n, 5) for n in (2, 7, 8, 12, 13, 420)] == [1, 1, 1, 1, 2, 83]


@pytest.mark.parametrize("num_frames", [1, 2, 3, 16])
@pytest.mark.parametrize("side", [2, 4, 8])
def test_every_length_gives_its_number_of_tokens(num_frames, side):
    frames = torch.randn(num_frames, 64, 32, generator=torch.Generator().manual_seed(0))
    made = network(side)(frames, 5)
    cubes = num_borders(num_frames, 5) + 1
    assert made.borders[0] == 0
    assert made.borders == sorted(set(made.borders))
    assert made.tokens.shape == (cubes, side**2, 32)
    assert made.thumbnail.shape == (4, 32)
    assert len(made.logits) == num_frames - 1
    assert torch.isfinite(made.tokens).all()
    assert cubes == {1: 1, 2: 2, 3: 2, 16: 3}[num_frames]


def test_an_untrained_network_pools_each_cube():
    frames = torch.randn(8, 64, 32, generator=torch.Generator().manual_seed(0))
    made = network()(frames, 3, borders=[0, 2, 7])
    for own, (a, b) in zip(made.tokens, ((0, 2), (2, 7), (7, 8)), strict=True):
        torch.testing.assert_close(own, grid_means(frames[a:b].mean(0), 8, 4))
    shown = frames[[0, 2, 7]].mean(0)
    torch.testing.assert_close(made.thumbnail, grid_means(shown, 8, 2))
    assert grid_means(torch.arange(16.0)[:, None], 4, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_a_cube_depends_on_its_own_frames_and_on_their_order():
    model, rng = network(), torch.Generator().manual_seed(0)
    torch.nn.init.normal_(model.resampler.out.weight, generator=rng)
    frames = torch.randn(6, 64, 32, generator=rng)
    before, changed = model(frames, 3, borders=[0, 3]).tokens, frames.clone()
    changed[4] += 1
    after = model(changed, 3, borders=[0, 3]).tokens
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    turned = model(frames[[2, 1, 0, 3, 4, 5]], 3, borders=[0, 3]).tokens
    assert not torch.allclose(before[0], turned[0], atol=1e-4)


def test_the_loss_reaches_the_cubing_by_the_thumbnail_alone():
    model = network()
    frames = torch.randn(6, 64, 32, generator=torch.Generator().manual_seed(0))
    model(frames, 3).tokens.sum().backward()
    assert model.cubing.aggregate.weight.grad is None
    (model(frames, 3).thumbnail ** 2).sum().backward()
    assert model.cubing.aggregate.weight.grad.abs().sum() > 0


def test_noise_is_drawn_in_float32_and_none_is_drawn_without():
    logits = torch.zeros(20_000, 2, dtype=torch.bfloat16)
    share = gumbel_share(logits, 1.0, torch.Generator().manual_seed(0))
    assert share.dtype == torch.float32
    assert torch.isfinite(share).all()
    assert abs(share.mean().item() - 0.5) < 0.01
    assert share.unique().numel() > 10_000
    assert gumbel_share(logits, 0.0, None).unique().tolist() == [0.5]


def test_tokens_of_a_cube_stand_as_far_apart_as_those_of_frames():
    places = token_places(CubeShape(32), 3)
    assert (places[1] - places[0] == 64).all()
    assert places[0].tolist()[:5] == [9, 11, 13, 15, 25]
    assert token_places(CubeShape(32, query_side=8), 1)[0].tolist() == list(range(64))


def test_digits_of_the_first_frame_stand_before_each_cube():
    shape = CubeShape(32)
    cubes = Cubes(torch.ones(2, 16, 32), torch.ones(4, 32), [0, 12], torch.zeros(15, 2))
    prompt = build_prompt(shape, cubes)
    assert prompt.places == sorted(set(prompt.places))
    assert prompt.digit == [-1] * 4 + [0] + [-1] * 16 + [1, 2] + [-1] * 16
    assert prompt.length == 4 + 2 * 64
    embed = torch.nn.Embedding(20, 32)
    found = prompt.embeddings(embed, list(range(5, 15)))
    torch.testing.assert_close(found[21:23], embed.weight[[6, 7]])
    assert (found[23:] == 1).all()


def test_borders_stand_where_changes_begin():
    """A slow event in frames 2 to 5 and a short one in frame 8: their first frames, then what is left over."""
    share = torch.zeros(9)
    share[[1, 2, 3, 4, 7]] = 1.0
    assert pick_borders(onsets(share), 2) == [0, 2, 8]
    assert pick_borders(onsets(share), 3) == [0, 2, 3, 8]
    assert pick_borders(onsets(torch.zeros(1)), 1) == [0, 1]


def test_labels_mark_every_frame_of_an_event():
    for seed in range(30):
        clip = sample_clip(seed)
        states = clip.states()
        differs = [0] + [int(a != b) for a, b in pairwise(states)]
        assert changed_frames(clip, clip.num_frames).tolist() == differs


def test_a_packed_row_of_cubes_is_the_prompt_alone(base, features):
    """Two clips in one batch give what each gives by itself."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    batches, shape = CubeBatches(tokenizer, features.info), CubeShape(256)
    torch.manual_seed(0)
    model = CubeNetwork(shape)
    rng = np.random.default_rng(0)
    asked = [batches.ask(item, rng) for item in (0, 1)]
    for one in asked:
        del one.questions[3:]
    with torch.no_grad():
        prompts = [build_prompt(shape, model(frame_tokens(base, features, i, "cpu"), 5)) for i in (0, 1)]
        found = []
        for parts in ([0, 1], [0], [1]):
            packed = batches.pack([asked[i] for i in parts], [prompts[i] for i in parts]).packed
            visual = [prompts[i].embeddings(base.model.language_model.embed_tokens, batches.digits) for i in parts]
            embeds = train_cubes.splice(base, packed, visual, torch.float32)
            found.append(train_cubes.run_decoder(base, embeds, packed, clip=False)[0])
    torch.testing.assert_close(found[0], torch.cat(found[1:]), atol=1e-4, rtol=1e-4)


@pytest.fixture
def ready(features, tmp_path):
    (tmp_path / "clips.bin").write_bytes(features.clips.view(torch.uint16).numpy().tobytes())
    (tmp_path / "scenes.bin").write_bytes(bytes(2 * 256 * 256))
    info = {**features.info, "tokens": 256, "width": 256, "base": checkpoint_fingerprint(FOLDER)}
    (tmp_path / "features.json").write_text(json.dumps(info))
    return tmp_path


def start(folder, *more):
    options = ["--base", str(FOLDER), "--run", str(folder), "--steps", "4", "--clips", "2", "--batch", "2", *more]
    run(train_cubes.CubesTraining, train_cubes.arguments().parse_args(options))


def test_interrupted_and_whole_runs_end_with_the_same_weights(ready):
    start(ready, "--name", "whole")
    start(ready, "--name", "parts", "--stop-at", "2")
    assert json.loads((ready / "parts" / "config.json").read_text())["trained"]["steps"] == 2
    start(ready, "--name", "parts", "--resume")
    for file in ("model", "decoder"):
        whole, parts = (load_file(ready / name / f"{file}.safetensors") for name in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
    config = json.loads((ready / "whole" / "config.json").read_text())
    assert config["base"] == checkpoint_fingerprint(FOLDER)
    assert config["parameters"]["decoder"] > 2_000_000


def test_uniform_cubes_are_of_about_one_length():
    for num_frames in range(1, 40):
        borders = uniform_borders(num_frames, num_borders(num_frames, 3))
        lengths = np.diff([*borders, num_frames])
        assert lengths.max() - lengths.min() <= 1
        assert lengths.min() >= 1
