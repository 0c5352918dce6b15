"""Optimisers and checkpoints of the training: rates, what calming changes, and what a stopped run finds again."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from demos.train.train_lm import CALM_SCALE, CALM_SHARE, calm
from demos.train.training import Optimisers, save_checkpoint


class Projector(nn.Module):
    """The shipped projector's two layers, by the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.linear_1(x).relu())


@pytest.fixture
def projector():
    torch.manual_seed(0)
    return Projector()


@pytest.fixture
def decoder():
    return nn.Linear(5, 5)


def optimisers_of(projector: nn.Module, decoder: nn.Linear) -> Optimisers:
    calmed = list(projector.parameters())
    return Optimisers([decoder.weight], [decoder.bias], muon_lr=0.01, adam_lr=0.01, num_steps=100, calmed=calmed)


def train(projector: nn.Module, decoder: nn.Module, optimisers: Optimisers, steps: range) -> None:
    """Directions of the visual tokens are what counts, as for a decoder that normalises what it reads."""
    torch.manual_seed(1)
    inputs, targets = torch.randn(64, 4), torch.randn(64, 5)
    for step in steps:
        tokens = nn.functional.normalize(projector(inputs), dim=-1)
        (decoder(tokens) - targets).square().mean().backward()
        optimisers.step(step)


def moved(projector: nn.Module, decoder: nn.Module, optimisers: Optimisers, step: int) -> float:
    before = projector.linear_2.weight.detach().clone()
    train(projector, decoder, optimisers, range(step, step + 1))
    return (projector.linear_2.weight.detach() - before).norm().item() / before.norm().item()


def test_calming_shrinks_the_tokens_and_keeps_their_directions(projector, decoder):
    optimisers = optimisers_of(projector, decoder)
    train(projector, decoder, optimisers, range(60))
    inputs = torch.randn(8, 4)
    before = projector(inputs)
    calm(projector, optimisers)
    torch.testing.assert_close(projector(inputs), CALM_SCALE * before)


def test_a_calmed_projector_moves_slowly_from_the_first_step_on(projector, decoder):
    optimisers = optimisers_of(projector, decoder)
    train(projector, decoder, optimisers, range(60))
    fast = moved(projector, decoder, optimisers, 60)
    calm(projector, optimisers)
    slow = moved(projector, decoder, optimisers, 61)
    assert slow == pytest.approx(fast * CALM_SHARE / CALM_SCALE, rel=0.3)


def test_a_checkpoint_remembers_that_it_was_calmed_and_goes_on_alike(projector, decoder, tmp_path):
    optimisers = optimisers_of(projector, decoder)
    train(projector, decoder, optimisers, range(10))
    assert optimisers.calmed_share == 1
    calm(projector, optimisers)
    kept = {"projector": projector.state_dict(), "decoder": decoder.state_dict()}
    save_checkpoint(tmp_path / "lm.pt", **kept, optimisers=optimisers.state_dict())
    train(projector, decoder, optimisers, range(10, 15))

    state = torch.load(tmp_path / "lm.pt")
    other, other_decoder = Projector(), nn.Linear(5, 5)
    other.load_state_dict(state["projector"])
    other_decoder.load_state_dict(state["decoder"])
    resumed = optimisers_of(other, other_decoder)
    resumed.load_state_dict(state["optimisers"])
    assert resumed.calmed_share == CALM_SHARE
    train(other, other_decoder, resumed, range(10, 15))
    for mine, theirs in zip(projector.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_rates_warm_up_stay_and_fall(projector, decoder):
    optimisers = optimisers_of(projector, decoder)
    scales = [optimisers.scale(step) for step in range(100)]
    assert scales[0] == 1 / 50
    assert scales[50:60] == [1] * 10
    assert all(late < early for early, late in pairwise(scales[60:]))
    assert scales[-1] == pytest.approx(1 / 40)
