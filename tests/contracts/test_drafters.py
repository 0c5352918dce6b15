"""What every registered drafter promises. A new one is tested as soon as it has its entry point.

The target is `tiny`, for which the trained drafters are shipped. One whose weights are not shipped has to say so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mm
from mm.config import SpeculationLimits
from mm.data.tokens import Prompt
from mm.engine.spec_decode.drafter_instance import target_of
from mm.errors import MmError
from mm.models.checkpoint import find
from mm.plugins.drafter import DraftBudget, DraftTarget, Observation
from mm.plugins.registry import get, names
from mm.plugins.spec import build_drafter, drafter_spec

SPECS = ["copy + recycle" if name == "hybrid" else name for name in names("drafter")]
NOT_SHIPPED = [
    name
    for name in names("drafter")
    if (weights := getattr(get("drafter", name), "weights", None))
    and not (find("tiny") / "drafters" / weights).is_dir()
]
READY = [spec for spec in SPECS if spec not in NOT_SHIPPED]
LENGTH = 24
REPEATING = [11, 12, 13, 14] * 6


@pytest.fixture(scope="module")
def model():
    limits = SpeculationLimits(drafters=tuple(READY), control=False, max_draft_tokens=5)
    return mm.load("tiny", dtype="float32", num_threads=1, speculation=limits)


@pytest.fixture(scope="module")
def target(model) -> DraftTarget:
    return target_of(model.engine.family)


@pytest.fixture(scope="module", params=READY)
def loaded(request, target) -> Any:
    return Driven(request.param, target)


class Driven:
    """A loaded drafter, and what an engine would observe for it."""

    def __init__(self, spec: str, target: DraftTarget) -> None:
        self.target = target
        self.drafter = build_drafter(spec)
        self.loaded: Any = self.drafter.load(target)
        self.needs: frozenset[str] = getattr(self.loaded, "needs", self.drafter.needs)

    def prompt(self, seed: int) -> Prompt:
        """Text that repeats itself around a picture."""
        is_visual = torch.zeros(LENGTH, dtype=torch.bool)
        is_visual[4:10] = True
        ids = torch.tensor([token + seed for token in REPEATING])
        ids[is_visual] = min(self.target.placeholder_ids)
        return Prompt(
            token_ids=ids,
            embeddings=self.target.embed(ids),
            positions=torch.arange(LENGTH).unsqueeze(0),
            next_position=LENGTH,
            is_visual=is_visual,
        )

    def observation(self, token_ids: tuple[int, ...], first: int, count: int, seed: int) -> Observation:
        drawn = torch.Generator().manual_seed(seed)
        width = self.target.hidden_size
        states = sorted(need for need in self.needs if need.startswith(("last_hidden", "hidden:")))
        num_tops = max((int(need.partition(":")[2]) for need in self.needs if need.startswith("top_ids:")), default=0)
        return Observation(
            token_ids=token_ids,
            token_indices=torch.arange(first, first + count) if states else torch.zeros(0, dtype=torch.int64),
            hidden={name: torch.randn(count, width, generator=drawn) for name in states},
            step_token_ids=token_ids if num_tops else (),
            step_top_ids=(50 + torch.arange(len(token_ids) * num_tops)).view(-1, num_tops) if num_tops else None,
            is_prompt=first == 0,
        )

    def open(self, seed: int = 0, num_steps: int = 3) -> Any:
        session = self.loaded.open(self.prompt(seed), private=False)
        self.loaded.observe([session], [self.observation((11 + seed,), 0, LENGTH, seed)])
        for step in range(num_steps):
            token = 11 + seed + (step + 1) % 4
            self.loaded.observe([session], [self.observation((token,), LENGTH + step, 1, seed + step)])
        return session


def budget(num_tokens: int, depth: int | None = None) -> DraftBudget:
    return DraftBudget(max_tokens=num_tokens, max_depth=num_tokens if depth is None else depth)


def test_what_a_drafter_declares(loaded, target):
    drafter = loaded.drafter
    assert isinstance(drafter.trained, bool)
    for need in loaded.needs:
        name, _, number = need.partition(":")
        assert name in ("last_hidden", "hidden", "top_ids"), f"an engine does not offer {need!r}"
        assert name != "hidden" or 0 <= int(number) < target.num_layers
        assert name != "top_ids" or int(number) > 0


@pytest.mark.parametrize("spec", SPECS)
def test_its_text_parses_to_an_equal_drafter(spec):
    resolved = drafter_spec(spec)
    assert build_drafter(resolved.canonical) == resolved.plugin


@pytest.mark.parametrize("spec", NOT_SHIPPED)
def test_a_drafter_without_weights_for_the_target_says_so(spec, target):
    with pytest.raises(MmError):
        build_drafter(spec).load(target)


@pytest.mark.parametrize(("num_tokens", "depth"), [(0, 0), (1, 1), (4, 2), (5, 5), (40, 12)])
def test_drafts_stay_within_their_budget(loaded, num_tokens, depth):
    session = loaded.open()
    (draft,) = loaded.loaded.propose([session], [budget(num_tokens, depth)])
    draft.check(loaded.target.vocab_size, budget(num_tokens, depth))
    assert draft.num_tokens <= num_tokens
    assert not set(draft.token_ids) & loaded.target.placeholder_ids
    loaded.loaded.close(session)


def test_proposing_again_proposes_the_same(loaded):
    session = loaded.open()
    first = loaded.loaded.propose([session], [budget(5)])[0]
    again = loaded.loaded.propose([session], [budget(5)])[0]
    assert (first.token_ids, first.parents) == (again.token_ids, again.parents)
    loaded.loaded.close(session)


def test_sessions_are_independent(loaded):
    """A session drafts the same beside others as alone, also after others were closed."""
    alone = loaded.open(0)
    expected = loaded.loaded.propose([alone], [budget(5)])[0]
    loaded.loaded.close(alone)
    sessions = [loaded.open(seed) for seed in (7, 0, 30)]
    together = loaded.loaded.propose(sessions, [budget(5)] * 3)
    assert len(together) == 3
    assert together[1].token_ids == expected.token_ids
    loaded.loaded.close(sessions[0])
    (left,) = loaded.loaded.propose(sessions[1:2], [budget(5)])
    assert left.token_ids == expected.token_ids
    for session in sessions[1:]:
        loaded.loaded.close(session)


def test_a_session_can_be_closed_at_any_time(loaded):
    loaded.loaded.close(loaded.loaded.open(loaded.prompt(0), private=True))
    loaded.loaded.close(loaded.open(num_steps=0))
    assert loaded.loaded.propose([], []) == []
    loaded.loaded.observe([], [])


@pytest.mark.parametrize("spec", READY)
def test_greedy_answers_are_those_without_drafts(model, spec):
    options = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    for question in ("red blue red blue red blue", "Count to ten."):
        plain = model.generate(question, speculation="none", **options)
        assert model.generate(question, speculation=spec, **options).token_ids == plain.token_ids
