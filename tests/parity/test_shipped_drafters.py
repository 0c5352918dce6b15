"""Every drafter that ships with `tiny`, by its name: the answers are those without, on a cached prompt too.

The states of a prompt that drafters read are kept beside the prefix cache. Where a prompt went in for somebody who did
not draft there are none: a drafter has to do with the embeddings and with what is computed anew.
"""

from __future__ import annotations

import pytest

import mm
from demos.train.data.scenes import draw_scene, sample_scene
from demos.train.data.things import HELD_OUT
from mm.config import SpeculationLimits
from mm.models.checkpoint import find
from mm.plugins.registry import get, names

SHIPPED = sorted(path.name for path in (find("tiny") / "drafters").iterdir() if path.is_dir())
PICTURES = [draw_scene(sample_scene(HELD_OUT + seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def model() -> mm.Model:
    limits = SpeculationLimits(drafters=tuple(SHIPPED), control=False, max_draft_tokens=7)
    return mm.load("tiny", dtype="float32", speculation=limits)


def asked(model: mm.Model, drafter: str, question: str = "Describe the picture.") -> list[mm.api.Answer]:
    items = [{"prompt": question, "images": [picture]} for picture in PICTURES]
    return model.generate_batch(items, max_new_tokens=40, temperature=0.0, speculation=drafter)


def accepted_length(answers: list[mm.api.Answer]) -> float:
    usages = [answer.usage for answer in answers]
    return 1 + sum(u.num_accepted_tokens for u in usages) / sum(u.num_drafts for u in usages)


@pytest.fixture(scope="module")
def expected(model: mm.Model) -> list[tuple]:
    return [answer.token_ids for answer in asked(model, "none")]


def test_every_shipped_drafter_is_registered_under_its_name():
    assert SHIPPED
    assert set(SHIPPED) <= {getattr(get("drafter", name), "weights", None) for name in names("drafter")}


@pytest.mark.parametrize("drafter", SHIPPED)
def test_a_cached_prompt_is_drafted_for_as_well_as_a_new_one(model, expected, drafter):
    model.engine.prefix_cache.clear()
    new = asked(model, drafter)
    assert not any(answer.usage.num_cached_tokens for answer in new)
    again = asked(model, drafter)
    model.engine.prefix_cache.clear()
    asked(model, "none", "How many objects do you see?")
    other = asked(model, drafter)
    for cached in (again, other):
        assert all(answer.usage.num_cached_tokens >= 256 for answer in cached)
        assert [answer.token_ids for answer in cached] == [answer.token_ids for answer in new] == expected
        assert accepted_length(cached) > 0.85 * accepted_length(new) > 1.5
    assert accepted_length(again) == accepted_length(new)
    assert model.engine.stats.spec_decode.num_faults == 0
