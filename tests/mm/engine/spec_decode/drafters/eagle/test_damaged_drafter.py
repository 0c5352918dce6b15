"""A damaged drafter's folder gives one line, whatever the damage."""

from __future__ import annotations

import random

import pytest
import torch

from mm.engine.spec_decode.drafters.eagle.head import DraftConfig, DraftHead, fingerprint, load_draft_head
from mm.models.folder import BadCheckpoint
from tests.mm.models.test_damaged_folder import mutated

VOCAB, WIDTH = 40, 16
SIZES = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "intermediate_size": 24}


@pytest.fixture
def head() -> torch.Tensor:
    return torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def folder(tmp_path, head):
    config = DraftConfig(width=WIDTH, vocab_size=VOCAB, feature_layers=(1, 2), target=fingerprint(head), **SIZES)
    DraftHead(config, head, head).save(tmp_path)
    return tmp_path


def refusal(folder, head) -> str:
    """What is said about a folder; empty where it is used."""
    try:
        load_draft_head(folder, head, head)
    except BadCheckpoint as error:
        return str(error)
    return ""


def test_mutated_settings_are_used_or_refused_in_one_line(folder, head):
    rng, file = random.Random(7), folder / "config.json"
    before, refusals = file.read_text(), []
    for _ in range(300):
        file.write_bytes(mutated(before, rng))
        refusals.append(refusal(folder, head))
    assert all("\n" not in text and len(text) < 700 for text in refusals)
    assert sum(map(bool, refusals)) > 100
    file.write_text(before)
    assert refusal(folder, head) == ""


@pytest.mark.parametrize("damage", [b"", b"[1]", b"\xff\xfe{}", b'{"width": 1e999}', b'{"width": 4}'])
def test_a_damaged_config_is_named(folder, head, damage):
    (folder / "config.json").write_bytes(damage)
    assert "config.json" in refusal(folder, head)


@pytest.mark.parametrize(("key", "value"), [("intermediate_size", 2**24), ("num_heads", 2**20), ("num_ahead", 2**20)])
def test_a_size_beyond_the_weights_takes_no_memory(folder, head, key, value):
    config = (folder / "config.json").read_text()
    old = {**SIZES, "num_ahead": 1}[key]
    (folder / "config.json").write_text(config.replace(f'"{key}": {old}', f'"{key}": {value}'))
    assert "parameters" in refusal(folder, head)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, bytes(100)])
def test_damaged_weights_are_named(folder, head, damage):
    (folder / "model.safetensors").write_bytes(damage)
    assert "model.safetensors" in refusal(folder, head)
