"""The layer of a trained drafter over its cache."""

from __future__ import annotations

import pytest
import torch

from mm.engine.spec_decode.cost_model import MAX_WARM_TOKENS
from mm.engine.spec_decode.drafters.eagle.head import DraftConfig, DraftHead
from mm.engine.spec_decode.drafters.eagle.layer import DraftLayer


@pytest.mark.parametrize(("num_bytes", "most"), [(1 << 20, MAX_WARM_TOKENS), (4096, 16)])
def test_each_number_of_rows_is_run_once_before_the_first_answer_and_leaves_nothing(num_bytes, most, monkeypatch):
    config = DraftConfig(
        width=32,
        vocab_size=50,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        feature_layers=(0, 1, 2),
    )
    table = torch.randn(50, 32)
    network = DraftHead(config, table, table).requires_grad_(False)
    layer = DraftLayer(network, torch.float32, torch.device("cpu"), num_bytes, 2)
    counts = []
    finish = network.finish
    monkeypatch.setattr(network, "finish", lambda inputs, seen: counts.append(len(inputs)) or finish(inputs, seen))
    layer.warm()
    assert counts == list(range(1, most + 1))
    assert layer.cache.num_free_seqs == 2
    assert layer.cache.num_free_blocks == layer.cache.num_blocks
