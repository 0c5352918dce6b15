"""With a trained drafter, however bad, the answer is the answer without: every way of seeing, chains and trees."""

import numpy as np
import pytest
import torch

import mm
from mm.config import SpeculationLimits
from mm.engine.spec_decode.drafters.eagle.head import DraftConfig, DraftHead, fingerprint
from mm.engine.spec_decode.drafters.eagle.vision_adapters import VISION_ADAPTERS
from tests.helpers.checkpoints import random_llava
from tests.helpers.speculating import draft_at_random

QUESTIONS = ("Describe the picture.", "red blue red blue", "What is left of it?", "1 2 3 1 2 3")
REDUCERS = ("none", "uniform:keep_ratio=0.5", "fastv:keep_ratio=0.5", "pyramiddrop")
OPTIONS = {"flash": {"num_rows": 3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return random_llava(tmp_path_factory.mktemp("llava"), num_layers=4)


@pytest.fixture(scope="module")
def drafters(folder):
    """Untrained heads in the model's own folder, by every way of seeing; and one that reads three layers."""
    language = mm.load(folder, dtype="float32").engine.family.language
    embedding = language.model.get_input_embeddings().weight.detach()
    sizes = {"width": 48, "vocab_size": language.vocab_size, "num_heads": 4, "num_kv_heads": 2, "head_dim": 12}
    names = []
    for way in (*sorted(VISION_ADAPTERS), "eagle3"):
        torch.manual_seed(len(names))
        config = DraftConfig(
            **sizes,
            intermediate_size=48,
            vision_adapter="msd" if way == "eagle3" else way,
            vision_adapter_options=OPTIONS.get(way, {}),
            feature_layers=(1, 2, 3) if way == "eagle3" else (),
            num_ahead=4 if way == "flash" else 1,
            target=fingerprint(language.head_weight),
        )
        network = DraftHead(config, embedding, language.head_weight.detach())
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        names.append("eagle" if way == "none" else way)
        network.save(folder / "drafters" / names[-1], torch.float32)
    return names


def asked():
    pictures = [np.random.default_rng(i).integers(0, 256, (40, 56, 3), dtype=np.uint8) for i in range(3)]
    found = []
    for i in range(24):
        options = {"temperature": 0.0} if i % 3 else {"temperature": 1.0, "seed": i, "n": 1 + i % 2}
        found.append(
            {
                "prompt": f"{QUESTIONS[i % 4]} {i}",
                "images": pictures[: i % 3] if i % 5 else pictures[:1],
                "reducer": REDUCERS[i % len(REDUCERS)],
                "max_new_tokens": 4 + i % 9,
                "ignore_eos": True,
                **options,
            }
        )
    return found


def answers(model, **more):
    found = [answer.token_ids for answer in model.generate_batch(asked(), **more)]
    model.engine.cache.check(model.engine.prefix_cache.held)
    return found


def load(folder, *specs):
    limits = SpeculationLimits(drafters=specs, control=False, max_draft_tokens=10)
    return mm.load(folder, dtype="float32", speculation=limits, max_num_seqs=5)


@pytest.fixture(scope="module")
def expected(folder):
    return answers(mm.load(folder, dtype="float32"))


@pytest.mark.parametrize("width", [1, 3])
def test_rubbish_changes_nothing_but_speed(folder, drafters, expected, width):
    specs = [f"{name}:width={width},depth=4,stop_below=0" for name in drafters]
    model = load(folder, *specs)
    before = model.engine.stats.spec_decode
    for spec in specs:
        assert answers(model, speculation=spec) == expected, spec
        stats = model.engine.stats.spec_decode
        assert stats.num_faults == 0, spec
        num_drafts = stats.num_drafts - before.num_drafts
        assert stats.num_draft_tokens - before.num_draft_tokens > 2 * num_drafts > 0, spec
        before = stats
    for source in model.engine.spec_decoder._drafters.active:
        if source.spec != "none":
            assert source.loaded.num_sessions == 0, f"{source.spec} keeps sessions of answers that are over"
            assert source.loaded._layer.cache.num_free_blocks == source.loaded._layer.cache.num_blocks


def test_a_full_draft_cache_changes_nothing(folder, drafters, expected):
    spec = "msd:depth=3,stop_below=0,cache_mb=0.02"
    model = load(folder, spec)
    assert answers(model, speculation=spec) == expected
    assert model.engine.stats.spec_decode.num_faults == 0


def test_drafters_are_told_of_the_prompt_however_late_they_are_asked(folder, drafters, expected, monkeypatch):
    draft_at_random(monkeypatch)
    for prefix_caching in (True, False):
        limits = SpeculationLimits(drafters=tuple(drafters), max_draft_tokens=10)
        model = mm.load(folder, dtype="float32", speculation=limits, max_num_seqs=5, prefix_caching=prefix_caching)
        for name in drafters:
            assert answers(model, speculation=name) == expected, name
            assert model.engine.stats.spec_decode.num_faults == 0, name
        assert model.engine.stats.spec_decode.num_drafts > 50
